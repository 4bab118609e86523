"""The training of a head: accelerate's loop over cached hidden states, with checkpoints from which it goes on to equal bits."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import ConfigError, require_whole
from ..heads.eagle3 import Eagle3Head
from ..runtime.progress import progress
from .head_features import FeatureCache
from .head_loss import unrolled_loss

BETAS = (0.9, 0.95)  # EAGLE's
# SmolLM2-135M, one pass over 33,000 answer tokens: acceptance length 1.23 at 2e-3, 1.22 at 1e-3.
LEARNING_RATE = 2e-3
# The embedded pair's target, eight passes over 5,730 answer tokens: acceptance length 1.44 with 1 step, 1.66 with 3, 1.66 with 5.
UNROLLED_STEPS = 3
SORTED_BATCHES = 8  # batches whose answers are sorted by length together, so that little is padded; chosen


@dataclass(frozen=True)
class LoopSettings:
    """How a head is trained.

    Attributes:
        epochs: passes over the answers.
        batch_size: answers of a gradient step.
        learning_rate: of AdamW; it rises over the first `warmup` of all steps and falls to 0 over the last `cooldown` of them.
        unrolled_steps, decay: of training-time test, see `unrolled_loss`.
        max_grad_norm: gradients are clipped to it.
        checkpoint_s: seconds between two checkpoints.
    """

    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = LEARNING_RATE
    warmup: float = 0.05
    cooldown: float = 0.4
    weight_decay: float = 0.0
    unrolled_steps: int = UNROLLED_STEPS
    decay: float = 0.8
    max_grad_norm: float = 1.0
    checkpoint_s: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "unrolled_steps"):
            require_whole(name, vars(self)[name])
        for name in ("learning_rate", "decay", "max_grad_norm"):
            if not 0 < vars(self)[name] < float("inf"):
                raise ConfigError(f"{name}={vars(self)[name]}: expected a value above 0.")
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown <= 1):
            raise ConfigError(
                f"warmup={self.warmup}, cooldown={self.cooldown}: expected parts of the training, 1 together at most."
            )

    def rate(self, step: int, total: int) -> float:
        """The learning rate of one step of `total`."""
        rising = (step + 1) / max(1.0, self.warmup * total)
        falling = (total - step) / max(1.0, self.cooldown * total)
        return self.learning_rate * min(1.0, rising, falling)


@dataclass
class Point:
    """What was measured at the end of an epoch."""

    tokens: int  # answer tokens learned since the start, each pass counted
    losses: list[float]  # of each unrolled step, the mean over the epoch
    acceptance_length: dict[str, float]  # on answers that are held out: by kind, and of all


@dataclass
class Progress:
    """How far a training has come, and what it measured on the way."""

    step: int = 0
    tokens: int = 0  # answer tokens learned, each pass counted
    time_s: float = 0.0  # of gradient steps
    losses: list[list[float]] = field(default_factory=list)  # of each step of this epoch, by unrolled step
    curve: list[Point] = field(default_factory=list)


def epoch_batches(lengths: Sequence[int], settings: LoopSettings, epoch: int) -> list[list[int]]:
    """The answers of each step of an epoch: shuffled, those of similar length together; the same for the same seed."""
    shuffled = random.Random(f"{settings.seed} {epoch}")
    order = list(range(len(lengths)))
    shuffled.shuffle(order)
    size = settings.batch_size
    batches = []
    for at in range(0, len(order), size * SORTED_BATCHES):
        block = sorted(order[at : at + size * SORTED_BATCHES], key=lambda i: lengths[i])
        batches += [block[i : i + size] for i in range(0, len(block), size)]
    shuffled.shuffle(batches)
    return batches


class HeadLoop:
    """Trains a head on what the target said along its answers.

    Args:
        head: on any device; it is moved to accelerate's.
        file: of the checkpoint; one that is there goes on.
        fingerprint: of what a checkpoint belongs to.
        measure: called with the head at the end of every epoch; what it returns stands in the curve.

    Raises:
        ConfigError: the checkpoint belongs to another training; there are several processes.
    """

    def __init__(
        self,
        head: Eagle3Head,
        cache: FeatureCache,
        settings: LoopSettings,
        file: Path,
        fingerprint: str,
        measure: Callable[[Eagle3Head], dict[str, float]],
    ) -> None:
        self._accelerator = Accelerator()
        if self._accelerator.num_processes > 1:
            raise ConfigError(
                f"{self._accelerator.num_processes} processes: a head is small, and is trained in one. Start it without accelerate launch."
            )
        self._cache, self._settings, self._file, self._fingerprint = cache, settings, file, fingerprint
        self._measure = measure
        optimizer = torch.optim.AdamW(
            [p for p in head.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=settings.weight_decay,
        )
        self._head, self._optimizer = self._accelerator.prepare(head, optimizer)
        config = head.config
        self._known: Tensor | None = None
        if head.draft_ids is not None:
            self._known = torch.zeros(config.vocab_size, dtype=torch.bool, device=self._accelerator.device)
            self._known[head.draft_ids.to(self._accelerator.device)] = True
        self.progress = Progress()
        self._lengths = [len(a.prompt) + len(a.tokens) for a in cache.answers]
        if file.exists():
            self._resume()

    def run(self) -> Progress:
        """Trains to the end. An interruption costs what came after the last checkpoint."""
        settings, progressed = self._settings, self.progress
        per_epoch = len(epoch_batches(self._lengths, settings, 0))
        total, saved_s = per_epoch * settings.epochs, time.monotonic()
        self._head.train()
        with progress(total, "The head learns", "step") as bar:
            bar.update(progressed.step)
            while progressed.step < total:
                epoch, done = divmod(progressed.step, per_epoch)
                for indices in epoch_batches(self._lengths, settings, epoch)[done:]:
                    self._step(indices, total)
                    bar.update()
                    if progressed.step % per_epoch == 0:
                        self._note_epoch()
                    if progressed.step == total or time.monotonic() - saved_s >= settings.checkpoint_s:
                        self._save()
                        saved_s = time.monotonic()
        self._head.eval()
        return progressed

    def _step(self, indices: list[int], total: int) -> None:
        started, settings, accelerator = time.perf_counter(), self._settings, self._accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(self.progress.step, total)
        batch = self._cache.batch(indices).to(accelerator.device)
        logits = self._cache.reader.logits(batch.said)
        with accelerator.autocast():
            found = unrolled_loss(self._head, batch, logits, settings.unrolled_steps, settings.decay, self._known)
        self._optimizer.zero_grad()
        accelerator.backward(found.loss)
        accelerator.clip_grad_norm_(self._head.parameters(), settings.max_grad_norm)
        self._optimizer.step()
        self.progress.step += 1
        self.progress.tokens += sum(self._cache.answers[i].learned for i in indices)
        self.progress.losses.append(found.steps)
        self.progress.time_s += time.perf_counter() - started

    def _note_epoch(self) -> None:
        """Measures the head at the end of an epoch."""
        self._head.eval()
        done, measured = self.progress, self._measure(self._accelerator.unwrap_model(self._head))
        self._head.train()
        means = [sum(step) / len(done.losses) for step in zip(*done.losses, strict=True)]
        done.curve.append(Point(done.tokens, means, measured))
        done.losses = []

    def _save(self) -> None:
        head = self._accelerator.unwrap_model(self._head)
        unfinished = self._file.with_suffix(".part")
        state = {
            "head": head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state | {"fingerprint": self._fingerprint}, unfinished)
        os.replace(unfinished, self._file)

    def _resume(self) -> None:
        state = torch.load(self._file, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self._fingerprint:
            raise ConfigError(
                f"{self._file} is the checkpoint of a training with other answers or settings. Remove it, or name a new folder for this work."
            )
        self._accelerator.unwrap_model(self._head).load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.progress.curve = [Point(**point) for point in state["progress"]["curve"]]
