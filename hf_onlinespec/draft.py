"""OnlineDraft: a draft model with its adapter, its learner and its memory, from call to call."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ._compat import cache_tensors, keeps_logits, max_positions, record_past
from .adapters import GatedLora
from .checks import plain_draft
from .config import OnlineSpecConfig
from .decoding import GenerateFn
from .feedback import Feedback, Teacher, acceptance
from .idle import IdleWorker
from .learners import adam, ogd
from .losses import LOSSES
from .memory_draft import MemoryDraft
from .metrics import Counts
from .replay import Replay

# Tokens of a prompt by which the learned and the frozen draft are told apart: their cost stays small beside a long prompt.
PREFERENCE_TOKENS = 128


class OnlineDraft(MemoryDraft):
    """A draft that learns while it serves; pass it as `assistant_model`.

    The model itself is not touched: its weights are shared, its modules are not, and the adapter lives here.

    Args:
        model: a causal language model, or a `PeftModel` around one (its adapter is merged into a copy).
        config: how to draft and to learn; None: the defaults.

    Raises:
        DraftError: the model is an encoder–decoder, keeps a state that cannot be rolled back, or has no layer for LoRA.

    Example:
        >>> draft = OnlineDraft(model, OnlineSpecConfig(lookahead=4))          # doctest: +SKIP
        >>> out = target.generate(**inputs, assistant_model=draft)             # doctest: +SKIP
        >>> draft.metrics.acceptance_length                                    # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel | PeftModel, config: OnlineSpecConfig | None = None) -> None:
        super().__init__(config)
        with torch.inference_mode(False):
            base = plain_draft(model)
            self._lora = GatedLora(
                base,
                rank=self.settings.rank,
                alpha=self.settings.alpha,
                target_modules=self.settings.target_modules,
                seed=self.settings.seed,
            )
            step = adam if self.settings.preconditioner == "adam" else ogd
            self._learner = step(self.settings.lr)
            self._learner_state = self._learner.init(self._lora.params)
        self._loss = LOSSES[self.settings.loss]
        self._tail = self.settings.loss != "cross_entropy"  # whether the loss takes all other tokens as one outcome
        self._positions = max_positions(self._lora.base.config)
        self._keeps_logits = keeps_logits(self._lora.base)
        self._replay = Replay(self.settings.replay_tokens, self.settings.replay_top_k, self.settings.seed)
        self._steps = 0  # gradient steps taken
        self._learning = threading.RLock()  # held for one gradient step at a time
        self._idle: IdleWorker[tuple[Feedback, float]] | None = None
        if self.settings.update_when == "idle":
            self._idle = IdleWorker(self._learn_when_idle)
            weakref.finalize(self, self._idle.close)  # at the end of the process too

    @property
    def neural(self) -> OnlineDraft:
        return self

    @property
    def model(self) -> PeftModel:
        """The PEFT model: the base draft's weights and the adapter. Its gate is shut outside our own calls."""
        return self._lora.model

    @property
    def config(self) -> PretrainedConfig:
        """The base draft's model configuration, as `generate` expects of an assistant."""
        return self._lora.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        return self._lora.base.generation_config

    @property
    def device(self) -> torch.device:
        return self._lora.params.device

    @property
    def positions(self) -> int:
        """The longest context that the draft may see; beyond it the target goes on alone."""
        return self._positions

    @property
    def learning_bytes(self) -> int:
        """Memory that learning takes: adapter, gradients, moments, folded weights, and the requests that are remembered."""
        state = sum(tensor.nbytes for tensor in self._learner_state.values())
        return self._lora.nbytes + state + self._replay.nbytes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The evolved draft's forward, without gradients: arguments and output of the base model."""
        with self.serving() as model:
            return model(*args, **kwargs)

    def generate_fn(
        self, streamer: BaseStreamer | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> GenerateFn:
        """A callable for `generate(custom_generate=...)`: our loop without any patched method.

        `generate` does not hand its `streamer` to such callables, so give it here; a `tokenizer` given here serves
        `stop_strings=`.
        """
        return GenerateFn(self, streamer, tokenizer)

    def fold(self) -> None:
        """Brings the weights that draft up to date with what was learned."""
        with self._learning, self.lock:
            self._lora.fold()

    @contextmanager
    def serving(self, frozen: bool = False) -> Iterator[PreTrainedModel]:
        """The model as it drafts now; a draft that has not learned yet runs at the speed of its base.

        Args:
            frozen: the original draft, whatever was learned.
        """
        if self._lora.folds and self._steps and not frozen:
            if self._lora.stale:
                self.fold()
            with self.lock, torch.no_grad():
                yield self._lora.served
            return
        with self._learning, torch.no_grad():  # learning switches the adapter on and off in this tree
            if frozen or self._steps == 0:
                yield self._lora.base
            else:
                with self._lora.speaking() as model:
                    yield model

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

    # Learning

    def learn_segment(
        self,
        tokens: Tensor,
        teachers: list[Teacher],
        cache: Cache | None,
        prefix: int,
        mask: Tensor | None,
        counts: Counts,
        temperature: float = 1.0,
        recalled: Sequence[float] | None = (),
        preference: float = 0.0,
    ) -> None:
        """One step on the last `len(teacher)` tokens of every row of `tokens` (batch, L).

        The first `prefix` tokens are read from the draft's own KV cache, detached: one forward and backward over the
        rest, with nothing recomputed.

        Args:
            temperature: of the call that generated the tokens, 0 for greedy: the governor is told the acceptance there.
            recalled: estimated acceptance of the memory's answers at the n tokens of one row; (): no memory; None: not asked.
            preference: of the prompt for the learned draft.
        """
        n = len(teachers[0])
        past = DynamicCache(config=self.config)
        if cache is not None and prefix > 0:
            for index, (keys, values) in enumerate(cache_tensors(cache)):
                past.update(keys[..., :prefix, :].detach(), values[..., :prefix, :].detach(), index)
        with self._learning:
            frozen = None
            governed = self.settings.update_every == "auto"
            if governed and self._steps and self.governor.compares(preference):
                with torch.no_grad():
                    inputs = self.inputs(tokens[:, :-1], 0, mask)
                    frozen = self._lora.base(use_cache=False, **inputs, **self.keep(n)).logits[:, -n:]
            inputs = self.inputs(tokens[:, prefix:-1], prefix, mask)
            with torch.enable_grad(), self._lora.speaking() as model:
                logits = model(past_key_values=past, use_cache=True, **inputs, **self.keep(n)).logits[:, -n:]
                losses = [
                    self._loss(*t.compare(row, self.settings.temperature, self._tail))
                    for t, row in zip(teachers, logits, strict=True)
                ]
                if governed:  # how the draft does on tokens that it has not learned from yet
                    own = self.settings.temperature
                    learned = acceptance(teachers, logits, temperature, own)
                    still = None if frozen is None else acceptance(teachers, frozen, temperature, own)
                    self._tell(learned, still, preference, recalled)
                self._step(torch.cat(losses).mean(), counts)

    def _tell(
        self,
        learned: Tensor,
        frozen: Tensor | None,
        preference: float,
        recalled: Sequence[float] | None = (),
        updates: bool = True,
    ) -> None:
        still = None if frozen is None else frozen.tolist()
        with self.lock:
            self.governor.shadow(learned.tolist(), still, recalled, updates, preference)

    @torch.no_grad()
    def look(
        self,
        tokens: Tensor,
        teachers: list[Teacher],
        mask: Tensor | None,
        temperature: float,
        preference: float | None = None,
    ) -> None:
        """Tells the governor the acceptance of the learned and of the frozen draft, as `learn_segment` does."""
        n = len(teachers[0])
        if preference is None:
            preference, _ = self.preference(tokens[:, :-n], mask)
        inputs = self.inputs(tokens[:, :-1], 0, mask)
        seen = []
        for frozen in (False, True) if self._steps else (True,):
            with self.serving(frozen) as model:
                logits = model(use_cache=False, **inputs, **self.keep(n)).logits[:, -n:]
            seen.append(acceptance(teachers, logits, temperature, self.settings.temperature))
        self._tell(seen[0], seen[-1], preference, updates=False)

    @torch.no_grad()
    def preference(self, tokens: Tensor, mask: Tensor | None) -> tuple[float, dict[bool, DynamicCache]]:
        """Log-likelihood per token of `tokens` (batch, L) under the learned draft minus that under the frozen one.

        Of two drafts, the one that predicts a prompt better is the one that does better on its continuation: measured, see
        benchmarks/LOG.md. At most `PREFERENCE_TOKENS` last tokens are read. Where that is all of them, the KV caches of the
        learned (False) and of the frozen draft (True) come with it: each holds all tokens but the last.
        """
        length = tokens.shape[1]
        tokens = tokens[:, -PREFERENCE_TOKENS:].to(self.device)
        if not self._steps or tokens.shape[1] < 2:
            return 0.0, {}
        mask = None if mask is None else mask[:, length - tokens.shape[1] :]
        weight = torch.ones_like(tokens) if mask is None else mask[:, : tokens.shape[1]].to(tokens)
        weight = (weight[:, 1:] * weight[:, :-1]).float()
        found, caches = [], {frozen: DynamicCache(config=self.config) for frozen in (False, True)}
        for frozen, cache in caches.items():
            record_past(cache)
            with self.serving(frozen) as model:
                logits = model(past_key_values=cache, **self.inputs(tokens[:, :-1], 0, mask)).logits.float()
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            found.append(float((chosen * weight).sum() / weight.sum().clamp_min(1)))
        difference = found[0] - found[1] if all(map(math.isfinite, found)) else 0.0
        return difference, caches if length == tokens.shape[1] else {}

    def remember(self, feedback: Feedback) -> None:
        """Keeps a finished request for the replay."""
        if bool(feedback.teacher.log_probs.isnan().any()):
            return  # its steps were skipped, and would be again at every rehearsal
        with self._learning:
            self._replay.add(feedback)
            self.metrics.replay_bytes = self._replay.nbytes

    def rehearse(self, counts: Counts, passes: int) -> None:
        """The replay's gradient steps: each on a few remembered requests, in one padded batch."""
        for _ in range(passes):
            with self._learning:
                requests = self._replay.sample(self.settings.replay_batch)
                if not requests:
                    return
                self._learn_from(requests, counts)

    def _learn_from(self, requests: list[Feedback], counts: Counts) -> None:
        with torch.enable_grad(), self._lora.speaking() as model:
            self._step(self._replay_loss(model, requests), counts)

    # Learning while nothing is generated

    @contextmanager
    def generating(self) -> Iterator[None]:
        if self._idle is None:
            yield
        else:
            self.metrics.idle_failures = self._idle.failures
            with self._idle.call():
                yield

    def learn_later(self, feedback: Feedback, temperature: float) -> None:
        """Hands a finished request, generated at a temperature, to the worker that learns while nothing is generated."""
        assert self._idle is not None
        self._idle.add((feedback, temperature))

    def catch_up(self, timeout_s: float | None = None) -> bool:
        """Waits until everything that was handed to the worker is learned; False: the time was too short."""
        if self._idle is None:
            return True
        done = self._idle.wait(timeout_s)
        self.metrics.idle_failures = self._idle.failures
        return done

    def _learn_when_idle(self, item: tuple[Feedback, float]) -> Iterator[None]:
        """The gradient steps of one request, one at a time: a call may come in after any of them."""
        feedback, temperature = item
        if self.settings.update_every == "auto":
            started = time.perf_counter()
            self.look(feedback.tokens[None], [feedback.teacher], None, temperature)
            self.metrics.idle_time_s += time.perf_counter() - started
            yield
        for i in range(1 + self.settings.replay_passes):
            started, counts = time.perf_counter(), Counts()
            with self._learning:
                if i == 0:
                    self._learn_from([feedback], counts)
                    self.remember(feedback)
                else:
                    self.rehearse(counts, 1)
                self.fold()
            with self.lock:
                self.metrics.idle_updates += counts.updates
                self.metrics.skipped_updates += counts.skipped_updates
                self.metrics.idle_time_s += time.perf_counter() - started
            yield

    def _replay_loss(self, model: PreTrainedModel, requests: list[Feedback]) -> Tensor:
        """Mean loss over all taught positions; rows end together, so that these are the last ones of each row."""
        lengths = [len(request.tokens) - 1 for request in requests]
        longest = max(lengths)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(tokens)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            tokens[row, longest - length :] = request.tokens[:-1]
            mask[row, longest - length :] = 1
        inputs = self.inputs(tokens, 0, None if min(lengths) == longest else mask)
        n = max(len(request.teacher) for request in requests)
        logits = model(use_cache=False, **inputs, **self.keep(n)).logits
        losses = [
            self._loss(*request.teacher.compare(row[-len(request.teacher) :], self.settings.temperature, self._tail))
            for request, row in zip(requests, logits, strict=True)
        ]
        return torch.cat(losses).mean()

    def _step(self, loss: Tensor, counts: Counts) -> None:
        """Backward, clip, step. A loss or gradient that is not finite skips the step and is counted."""
        lora = self._lora
        lora.grads.zero_()
        loss.backward()
        with torch.no_grad():
            norm = lora.grads.norm()
            if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
                counts.skipped_updates += 1
                return
            lora.grads.mul_((self.settings.max_grad_norm / (norm + 1e-6)).clamp_max(1.0))
            updates, self._learner_state = self._learner.update(lora.grads, self._learner_state)
            lora.move(updates)
        self._steps += 1
        counts.updates += 1


_drafts: weakref.WeakKeyDictionary[nn.Module, OnlineDraft] = weakref.WeakKeyDictionary()


def online_draft(
    model: PreTrainedModel | PeftModel | OnlineDraft, config: OnlineSpecConfig | None = None
) -> OnlineDraft:
    """The OnlineDraft that is kept with a model, made at the first call.

    Raises:
        ConfigError: the model's draft already learns with other settings.
    """
    if isinstance(model, OnlineDraft):
        draft = model
    elif model in _drafts:
        draft = _drafts[model]
    else:
        draft = _drafts.setdefault(model, OnlineDraft(model, config))  # another thread may have been faster
    draft.check_setting(config)
    return draft
