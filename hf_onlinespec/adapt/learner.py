"""Learning from feedback: one batched forward and backward per update, the replay, and the guard over both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .._compat.caches import CACHE, copied_prefix
from .._compat.models import keeps_logits
from ..config import OnlineSpecConfig
from ..errors import ArtifactError
from ..metrics import Counts, UpdateReport
from ..state import State
from .experts import Experts
from .feedback import Feedback, Teacher, acceptance, parts
from .gated_lora import GatedLora
from .guard import Guard
from .learned_texts import LearnedTexts, Request
from .losses import LOSSES
from .replay import Replay, ReplaySchedule
from .segment import PendingRequest, Scores, Segment

JUDGED_TOKENS = 32  # of a request, that tell how experts and adapter do

logger = logging.getLogger(__name__)


class Reader:
    """How a draft model is given tokens."""

    def __init__(self, lora: GatedLora) -> None:
        self._keeps_logits = keeps_logits(lora.tree)

    def inputs(self, tokens: Tensor, cached: int, mask: Tensor | None) -> dict[str, Tensor]:
        """Model inputs for `tokens` (batch, n) behind `cached` tokens, with the padding of `mask` (batch, prompt)."""
        if mask is None:
            return {"input_ids": tokens}
        length = cached + tokens.shape[1]
        if length > mask.shape[1]:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], dim=-1)
        mask = mask[:, :length]
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions[:, cached:]}

    def keep(self, n: int) -> dict[str, int]:
        """Tells the model to compute logits for its last n positions only, where it can be told."""
        return {"logits_to_keep": n} if self._keeps_logits else {}


class Learner:
    """What turns feedback into a better adapter.

    Args:
        lora: the adapter; its parameters are moved here and nowhere else.
        on_update: told of every gradient step.
    """

    def __init__(
        self,
        lora: GatedLora,
        settings: OnlineSpecConfig,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
    ) -> None:
        self.adaptation = Experts(lora, settings)
        self.replay = Replay(settings.replay_tokens, settings.replay_top_k, settings.seed, settings.replay_sampling)
        self.guard = Guard(settings.snapshots)
        self.passes = ReplaySchedule(settings.replay_passes)
        self.texts = LearnedTexts(settings.audit_tokens, prompt_tokens=settings.context_tokens)
        self.reader = Reader(lora)
        self._lora, self._settings, self._on_update = lora, settings, on_update
        self._loss = LOSSES[settings.loss]
        self.loss = math.inf  # on the latest segment, before it was learned
        self._waiting: PendingRequest | None = None
        self._cache_invalid = False  # whether the request's cache may hold what is not finite
        # What the steps since the last request moved, and the seconds they took: on new tokens, on remembered ones.
        self._moved: dict[str, tuple[Tensor, float, int]] = {}
        self._tail = settings.loss != "cross_entropy"  # whether the loss takes all other tokens as one outcome

    @property
    def nbytes(self) -> int:
        """Adapter, gradients, folded weights, the learner's state, earlier states, and the requests that are remembered or wait."""
        state = sum(moved.nbytes for moved, _, _ in self._moved.values())
        waiting = self._waiting
        state += 0 if waiting is None else waiting.segment.nbytes
        return (
            self._lora.nbytes
            + state
            + self.adaptation.nbytes
            + self.guard.nbytes
            + self.replay.nbytes
            + self.texts.nbytes
        )

    def segment(
        self,
        segment: Segment,
        cache: Cache | None,
        prefix: int,
        counts: Counts,
        compare: bool = False,
        request: Request | None = None,
    ) -> Scores:
        """One step on the last `len(teacher)` tokens of every row.

        A single learner reads the first `prefix` tokens from the draft's own KV cache, detached: one forward and backward over
        the rest, with nothing recomputed. Experts of an ensemble have no cache of their own and read everything.

        Args:
            compare: whether the base draft should be looked at too, in a forward of its own; an ensemble always does.
            request: of which the segment is a part; None: it is all that is learned of its request before `remember`.
        """
        n, batch = len(segment.teachers[0]), segment.tokens.shape[0]
        self.texts.grow(segment.rows, n if request is None else segment.tokens.shape[1] - request.prompt, request)
        rows = self.adaptation.rows
        base = None
        if rows is not None or self._cache_invalid:
            prefix = 0
        if rows is None and compare and self.adaptation.steps:
            with torch.no_grad():
                base = self._accepts(self._lora.tree, segment)
        started = time.perf_counter()
        config = self._lora.tree.config
        past = DynamicCache(config=config)
        if cache is not None and prefix > 0:
            past = copied_prefix(cache, prefix, config)
        copies = 1 if rows is None else len(rows)
        tokens = segment.tokens.repeat(copies, 1)
        mask = None if segment.mask is None else segment.mask.repeat(copies, 1)
        gates = None if rows is None else rows.repeat_interleave(batch, dim=0)
        inputs = self.reader.inputs(tokens[:, prefix:-1], prefix, mask)
        with torch.enable_grad(), self._lora.gated(gates) as model:
            logits = model(**{CACHE: past}, use_cache=True, **inputs, **self.reader.keep(n)).logits[:, -n:]
            logits = logits.unflatten(0, (copies, batch))  # (rows, batch, n, vocab)
            accepted = [self._acceptance(segment, row).tolist() for row in logits.detach()]
            losses = torch.stack([self._losses(segment.teachers, row).mean() for row in logits[: self._lora.blocks]])
            self.loss = float(losses.detach()[self.adaptation.best_expert])
            if rows is None:
                shown = Scores(accepted[0], base)
            else:
                shown = Scores(accepted[self.adaptation.served_row], accepted[self._lora.blocks])
        before, skipped = counts.updates, counts.skipped_updates
        self._step(losses, counts, "new", started, lambda base: self._is_learnable(segment, base))
        if counts.updates > before:
            counts.learned_tokens += batch * n
            counts.loss_sum += max(0.0, self.loss) * batch * n  # rounding may leave a divergence just below 0
            self._report("new", self.loss, started)
        if counts.skipped_updates > skipped:
            self._cache_invalid = True  # the request's cache may hold what is not finite
        elif segment.sound:
            self._watch(segment, accepted, shown)
        return shown

    @torch.no_grad()
    def _is_learnable(self, segment: Segment, base: bool) -> bool:
        """Whether the loss of the base or of the learned draft is finite, in a forward of its own. Experts are not asked."""
        if self.adaptation.is_ensemble and not base:
            return False
        with nullcontext(self._lora.tree) if base else self._lora.gated() as model:
            logits = self._logits(model, segment)
        return bool(torch.isfinite(self._losses(segment.teachers, logits)).all())

    def _step(self, losses: Tensor, counts: Counts, kind: str, started: float, sound: Callable[[bool], bool]) -> None:
        """A gradient step, and what the steps before it brought for a request that they did not know."""
        if self._settings.update_every != "auto":
            self.adaptation.step(losses, counts, sound, self._go_back)
            return
        before = self._lora.params.clone()
        taken = self.adaptation.step(losses, counts, sound, self._go_back)
        if not taken:
            self._moved = {}
            return
        if kind == "new" and "new" in self._moved:
            brought = {
                name: (-float(self._lora.grads @ moved.float()) / n, seconds / n)
                for name, (moved, seconds, n) in self._moved.items()
            }
            if "old" in brought:
                self.passes.observe(brought["new"], brought["old"])
        if kind == "new":
            self._moved = {}
        moved, seconds, n = self._moved.get(kind, (torch.zeros_like(before), 0.0, 0))
        moved = (moved.float() + self._lora.params - before).bfloat16()
        self._moved[kind] = (moved, seconds + time.perf_counter() - started, n + 1)

    def _go_back(self) -> Tensor | None:
        state = self.guard.go_back()
        if state is not None:
            self._waiting, self._moved = None, {}
            logger.warning("%s", self.guard.reason)
        return state

    def _watch(self, segment: Segment, accepted: list[list[float]], shown: Scores) -> None:
        """Judges experts and adapter by what they did, a whole request at a time: small segments of one wait for the others."""
        accepted = [[a if math.isfinite(a) else 0.0 for a in row] for row in accepted]
        shown = Scores([a if math.isfinite(a) else 0.0 for a in shown.learned], shown.base)
        waiting = self._waiting
        if waiting is not None and waiting.continues(segment):
            waiting = waiting.joined(segment, accepted, shown)
        else:
            self._judge()
            waiting = PendingRequest(segment, accepted, shown)
        self._waiting = waiting
        if len(waiting.shown.learned) >= JUDGED_TOKENS:
            self._judge()

    def end_request(self) -> None:
        """Nothing of a request waits any longer than the request."""
        self._judge()
        self._cache_invalid = False

    def _judge(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        if self.adaptation.is_ensemble:
            self.adaptation.weigh([sum(row) / len(row) for row in waiting.accepted])
        state = self.guard.observe(
            waiting.shown.learned,
            waiting.shown.base,
            self.adaptation.best_params,
            None if self.adaptation.is_ensemble else self._base_params,
            lambda state: self._would(state, waiting.segment),
        )
        if state is not None:
            self.adaptation.restore(state)
            self._moved = {}

    def _base_params(self) -> Tensor:
        """The adapter, saying nothing. In an ensemble the base draft is a row already."""
        return self._lora.with_zero_b(self.adaptation.best_params())

    @torch.no_grad()
    def _would(self, state: Tensor, segment: Segment) -> list[float]:
        """Acceptance of other parameters of one block."""
        gates = None
        rows = self._lora.split(self._lora.params).clone()
        if self.adaptation.is_ensemble:
            gates = torch.zeros(1, self._lora.blocks, device=rows.device)
            gates[0, 0] = 1.0
        before = self._lora.params.clone()
        rows[0] = state
        try:
            self._lora.put(rows)
            with self._lora.gated(gates) as model:
                found = self._accepts(model, segment)
            return [a if math.isfinite(a) else 0.0 for a in found]
        finally:
            self._lora.params.copy_(before)  # no new memory: there may be none

    def _logits(self, model: Callable[..., Any], segment: Segment) -> Tensor:
        """Logits (batch, n, vocab) at the taught tokens."""
        n = len(segment.teachers[0])
        inputs = self.reader.inputs(segment.tokens[:, :-1], 0, segment.mask)
        logits: Tensor = model(use_cache=False, **inputs, **self.reader.keep(n)).logits[:, -n:]
        return logits

    def _accepts(self, model: Callable[..., Any], segment: Segment) -> list[float]:
        found: list[float] = self._acceptance(segment, self._logits(model, segment)).tolist()
        return found

    def _acceptance(self, segment: Segment, logits: Tensor) -> Tensor:
        return acceptance(segment.teachers, logits, segment.temperature, self._settings.temperature)

    def _losses(self, teachers: Sequence[Teacher], logits: Sequence[Tensor] | Tensor) -> Tensor:
        """The loss at every taught position, of rows of logits (n, vocab)."""
        found = []
        for teacher, row in zip(teachers, logits, strict=True):
            row = row[-len(teacher) :]
            pieces = parts(*row.shape)
            if len(pieces) == 1 or not row.requires_grad:
                found += [self._loss_at(teacher.rows(part), row[part]) for part in pieces]
                continue
            # Log-probabilities of all positions at once would take several times the memory of the logits.
            split = row.split([part.stop - part.start for part in pieces])
            for part, piece in zip(pieces, split, strict=True):
                loss = checkpoint(
                    self._loss_at, teacher.rows(part), piece, use_reentrant=False, preserve_rng_state=False
                )
                found.append(loss)
        return torch.cat(found)

    def _loss_at(self, teacher: Teacher, logits: Tensor) -> Tensor:
        return self._loss(*teacher.compare(logits, self._settings.temperature, self._tail))

    # Saving

    def state(self) -> State:
        """The state beside the served adapter: of an ensemble also B of its experts, before the weights were put into it.

        What is remembered of requests stays behind: it holds users' tokens.
        """
        own = {} if self._lora.weights is None else self._lora.outputs(self._lora.params)
        return State.joined(
            experts=State(own),
            adaptation=self.adaptation.state(),
            guard=self.guard.state(),
            replay=State({"random": self.replay.random_state()}),
            learning=State(values={"loss": self.loss if math.isfinite(self.loss) else None}),
        )

    def resume(self, adapter: Mapping[str, Tensor], saved: State) -> None:
        """The inverse of `saved`, for the served adapter that was written beside it."""
        params = self._params(adapter)
        self._forget()
        if self.adaptation.is_ensemble:
            experts = saved.part("experts")
            for name, part in self._lora.outputs(params).items():
                part.copy_(experts.tensor(name, part))
        self._lora.put(self._lora.split(params))
        self.adaptation.resume(saved.part("adaptation"))
        self.guard.resume(
            saved.part("guard"), self.adaptation.best_params(), tries_base=not self.adaptation.is_ensemble
        )
        self.replay.resume_random(saved.part("replay"))
        loss = saved.part("learning").values.get("loss")
        self.loss = math.inf if loss is None else saved.part("learning").value("loss", float)

    def adopt(self, adapter: Mapping[str, Tensor]) -> None:
        """Goes on from an adapter that was trained elsewhere, with a new state."""
        self.adaptation.adopt(self._params(adapter))
        self._forget()

    def _forget(self) -> None:
        """What was known of the adapter that another one replaces: its earlier states, what waits to be judged, what steps brought."""
        rollbacks = self.guard.rollbacks
        self.guard = Guard(self._settings.snapshots)
        self.guard.rollbacks = rollbacks  # they go on counting
        self.passes = ReplaySchedule(self._settings.replay_passes)
        self._waiting, self._moved, self._cache_invalid, self.loss = None, {}, False, math.inf

    def _params(self, adapter: Mapping[str, Tensor]) -> Tensor:
        """A flat vector like the adapter's parameters from tensors by PEFT's names. Raises ArtifactError."""
        params = torch.empty_like(self._lora.params)
        parts = self._lora.named(params)
        if sorted(adapter) != sorted(parts):
            odd = sorted(set(adapter) ^ set(parts))
            raise ArtifactError(
                f"The adapter and this base with these settings do not fit: {len(odd)} tensors differ, {odd[0]} for one."
            )
        for name, part in parts.items():
            found = {name: adapter[name].to(part.dtype)}  # a fine-tune may have saved it in half of the precision
            part.copy_(State(found).tensor(name, part))
        return params

    # The replay

    def remember(self, feedback: Feedback, request: Request | None = None) -> None:
        """Keeps a finished request, unless its steps would be skipped."""
        self.texts.finish(feedback.tokens, len(feedback.teacher), request)
        if feedback.teacher.teaches and not bool(feedback.teacher.log_probs.isnan().any()):
            self.replay.add(feedback, self.loss)

    def replay_step(self, counts: Counts) -> bool:
        """One step on a few remembered requests in one padded batch; whether there were any."""
        started = time.perf_counter()
        remembered = self.replay.sample(self._settings.replay_batch)
        if not remembered:
            return False
        losses = self.learn_from([r.feedback for r in remembered], counts, "old", started)
        for request, loss in zip(remembered, losses, strict=True):
            request.loss = loss
        return True

    def learn_from(
        self, requests: list[Feedback], counts: Counts, kind: str = "new", started: float | None = None
    ) -> list[float]:
        """One step on whole requests, new or old ones; the loss of each before it."""
        started = time.perf_counter() if started is None else started
        experts = self._lora.blocks
        gates = torch.eye(experts, device=self._lora.params.device).repeat_interleave(len(requests), dim=0)
        with torch.enable_grad(), self._lora.gated(gates if self.adaptation.is_ensemble else None) as model:
            rows = self._request_losses(model, requests, experts)
            losses = torch.stack([torch.cat(row).mean() for row in rows])
        before = counts.updates
        self._step(losses, counts, kind, started, lambda base: self._all_learnable(requests, base))
        found = [float(loss.detach().mean()) for loss in rows[self.adaptation.best_expert]]
        if counts.updates > before:
            self._report("new" if kind == "new" else "replay", sum(found) / len(found), started)
        return found

    def _report(self, kind: str, loss: float, started: float) -> None:
        self._on_update(UpdateReport(self.adaptation.steps, kind, loss, time.perf_counter() - started))

    @torch.no_grad()
    def _all_learnable(self, requests: list[Feedback], base: bool) -> bool:
        if self.adaptation.is_ensemble and not base:
            return False
        with nullcontext(self._lora.tree) if base else self._lora.gated() as model:
            losses = self._request_losses(model, requests, 1)[0]
        return bool(torch.isfinite(torch.cat(losses)).all())

    def _request_losses(self, model: Callable[..., Any], requests: list[Feedback], experts: int) -> list[list[Tensor]]:
        """For every expert and request the losses at its taught positions; rows of the batch end together."""
        lengths = [len(request.tokens) - 1 for request in requests]
        longest = max(lengths)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long, device=self._lora.params.device)
        mask = torch.zeros_like(tokens)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            tokens[row, longest - length :] = request.tokens[:-1]
            mask[row, longest - length :] = 1
        padding = None if min(lengths) == longest else mask.repeat(experts, 1)
        inputs = self.reader.inputs(tokens.repeat(experts, 1), 0, padding)
        n = max(len(request.teacher) for request in requests)
        logits = model(use_cache=False, **inputs, **self.reader.keep(n)).logits
        return [
            [self._losses([request.teacher], [own]) for request, own in zip(requests, part, strict=True)]
            for part in logits.unflatten(0, (experts, len(requests)))
        ]
