"""LearningDraft: a draft model that serves and learns, from call to call; the part of `OnlineDraft` that stays in the process."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.caches import CACHE, record_past
from .._compat.models import max_positions, uncompiled
from ..adapt.background import IdleWorker
from ..adapt.feedback import Feedback, Teacher, acceptance
from ..adapt.gated_lora import GatedLora
from ..adapt.learned_texts import Learned, Request
from ..adapt.learner import Learner
from ..adapt.request_feedback import RequestFeedback
from ..adapt.segment import Segment
from ..config import ENSEMBLE, OnlineSpecConfig
from ..errors import CopyError
from ..metrics import Counts
from ..metrics.summary import counted, size
from ..models.borrow import copy_modules
from ..models.identity import BaseFingerprint
from ..models.layers import describe
from ..models.plain import check_cache, plain_draft
from ..models.vocabulary import Vocabulary
from ..models.watch import ModelWatch
from ..runtime.forks import Lock
from ..state import State, copied
from .base import Draft

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

logger = logging.getLogger(__name__)


class LearningDraft(Draft):
    """The adapter, its learner and its memory: how the draft serves, and how it learns.

    Args:
        model, config: see `OnlineDraft`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: OnlineSpecConfig | dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config, **settings)
        self._begun = 0  # how often it began, on the model's weights as they were then
        # Held for one gradient step at a time. `lock` may be taken while it is held, not the other way round.
        self._learns = Lock()
        self.requests = weakref.WeakSet[RequestFeedback]()  # feedback of those in progress
        self._begin(model)
        self._idle: IdleWorker[tuple[Feedback, float]] | None = None
        if self.settings.update_when == "idle":
            self._idle = IdleWorker(self._learn_when_idle, self.metrics, lambda item: item[0].nbytes)
            weakref.finalize(self, self._idle.close)  # at the end of the process too

    def _begin(self, model: PreTrainedModel | PeftModel) -> None:
        """A new adapter on the model's weights as they are now."""
        with torch.inference_mode(False):
            base = plain_draft(model)
            identity, vocabulary = BaseFingerprint.of(base), Vocabulary.of(base)
            lora = GatedLora(
                base,
                rank=self.settings.rank,
                alpha=self.settings.alpha,
                target_modules=self.settings.target_modules,
                blocks=self.settings.experts if self.settings.learner == ENSEMBLE else 1,
                seed=self.settings.seed,
            )
            check_cache(lora.tree)
            learning = Learner(lora, self.settings, self._traces.update)
            # The counters go on where a draft begins anew.
            learning.guard.rollbacks, learning.adaptation.removed = self.metrics.rollbacks, self.metrics.removed_experts
        self.identity, self.vocabulary, self._lora, self._learning = identity, vocabulary, lora, learning
        self._begun += 1
        self._adaptation, self._replay = learning.adaptation, learning.replay
        self._positions = max_positions(lora.tree.config)
        self._watch, self._source = ModelWatch(uncompiled(model)), weakref.ref(model)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CopyError(
            f"An {type(self).__name__} is not copied or pickled: it shares its weights and learns on in this process. "
            "Use draft.save_pretrained(folder), and OnlineDraft.from_pretrained(folder) for another one."
        )

    def _title(self) -> str:
        left_out = self._lora.left_out
        without = f", left out: {describe(left_out)}" if left_out else ""
        layers = f"{len(self._lora.layers)} adapted layers{without}"
        return f"{type(self).__name__}({type(self._lora.tree).__name__}, {layers})"

    def _rows(self) -> list[tuple[str, str]]:
        steps, share = counted(self.steps, "gradient step"), self.metrics.update_share
        learned = f"{steps} by this adapter of {size(self._lora.params.nbytes)}, {share:.1%} of the time"
        return [self._memory_row(), ("learned", learned)]

    @property
    def model(self) -> PeftModel:
        """The PEFT model: the base draft's weights and the adapter. Its gate is shut outside our own calls."""
        return self._lora.model

    @property
    def config(self) -> PretrainedConfig:
        """The base draft's model configuration, as `generate` expects of an assistant."""
        return self._lora.tree.config

    @property
    def generation_config(self) -> GenerationConfig:
        """That of the user's model, as it is now."""
        model = self._source()
        return (self._lora.tree if model is None else model).generation_config

    @property
    def device(self) -> torch.device:
        return self._lora.params.device

    @property
    def positions(self) -> int:
        """The longest context that the draft may see; beyond it the target goes on alone."""
        return self._positions

    @property
    def steps(self) -> int:
        """Gradient steps that the adapter has taken."""
        return self._adaptation.steps

    @property
    def changed(self) -> bool:
        """Whether anything was learned: else it says what its base says."""
        return self.steps > 0

    @property
    def version(self) -> tuple[int, int]:
        """Another one whenever what is served has changed: by a step, an adapter that was adopted, an earlier state, a new base."""
        return self._begun, self._lora.changes

    @property
    def learning_bytes(self) -> int:
        """Memory that learning holds now.

        The adapter, its gradients, moments, folded weights and earlier states; what the replay remembers; what was recorded in
        requests that are in progress: up to `context_tokens` target distributions over the whole vocabulary each, 4 bytes per
        token of the vocabulary, or `top_k` of them; requests that wait to be judged, or to be learned when idle. A gradient step
        takes more for its own time: what a forward and a backward of the draft over the new tokens take.
        """
        with self.lock:
            recorded = sum(request.nbytes for request in list(self.requests))
        return self._learning.nbytes + recorded + (0 if self._idle is None else self._idle.nbytes)

    @contextmanager
    def at_rest(self) -> Iterator[Learned]:
        """What it has learned from in this process; no gradient step is taken inside of the context."""
        with self._learns:
            texts, guard = self._learning.texts, self._learning.guard
            yield Learned(self.steps, guard.rollbacks, texts.seen, texts.repeats, tuple(texts.texts))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The evolved draft's forward, without gradients: arguments and output of the base model."""
        with self.serving() as model:
            return model(*args, **kwargs)

    def fold(self) -> None:
        """Brings the weights that draft up to date with what was learned."""
        with self._learns, self.lock:
            self._lora.fold()

    @contextmanager
    def serving(self, base: bool = False) -> Iterator[PreTrainedModel]:
        """The model as it drafts now; a draft that has not learned yet runs at the speed of its base.

        Args:
            base: the base draft, whatever was learned.
        """
        if self._lora.folds and not self._adaptation.serves_base and not base:
            if self._lora.stale:
                self.fold()
            if not self._lora.stale:
                with self.lock, torch.no_grad():
                    yield self._lora.folded_tree
                return
        with self._learns, torch.no_grad():  # learning switches the adapter on and off in this tree
            if base or self._adaptation.serves_base:
                yield self._lora.tree
            else:
                weights = self._lora.weights
                with self._lora.gated(None if weights is None else weights[None]) as model:
                    yield model

    @torch.no_grad()
    def logits(self, tokens: Tensor, n: int, base: bool = False, mask: Tensor | None = None) -> Tensor:
        """What the draft says after each of the last n of `tokens` (rows, L): logits (rows, n, vocab).

        Args:
            base: the base draft, whatever was learned.
            mask: (rows, L) with zeros where a row is padded on the left; None: no padding.
        """
        inputs = self.inputs(tokens.to(self.device), 0, mask)
        with self.serving(base) as model:
            logits: Tensor = model(use_cache=False, **inputs, **self.keep(n)).logits[:, -n:]
        return logits

    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> Tensor:
        """What the draft says with these tensors in the place of its adapter's, by PEFT's names; gradients flow to them.

        Args:
            inputs: of the model: tokens (rows, L) and their mask.
        """
        own = self._lora.placed(adapter)
        with self._learns, self._lora.gated() as model:
            logits: Tensor = functional_call(model, own, kwargs=inputs | {"use_cache": False}).logits
        return logits

    def adapter_params(self) -> dict[str, Tensor]:
        """A copy of the adapter by PEFT's names: of all experts, with no weight of theirs in it."""
        with self._learns:
            return copied(self._lora.named(self._lora.params))

    def merged_weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The base's weights with what serves now in them, see `GatedLora.merged_weights`."""
        with self._learns, self.lock:  # between two gradient steps
            return self._lora.merged_weights(dtype)

    def inputs(self, tokens: Tensor, cached: int, mask: Tensor | None) -> dict[str, Tensor]:
        """Model inputs for `tokens` (batch, n) behind `cached` tokens, with the padding of `mask` (batch, prompt)."""
        return self._learning.reader.inputs(tokens, cached, mask)

    def keep(self, n: int) -> dict[str, int]:
        """Tells the model to compute logits for its last n positions only, where it can be told."""
        return self._learning.reader.keep(n)

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
        prompt_log_ratio: float = 0.0,
        request: Request | None = None,
    ) -> None:
        """One step on the last `len(teacher)` tokens of every row of `tokens` (batch, L).

        The first `prefix` tokens are read from the draft's own KV cache, detached: one forward and backward over the
        rest, with nothing recomputed.

        Args:
            temperature: of the call that generated the tokens, 0 for greedy: the governor is told the acceptance there.
            recalled: estimated acceptance of the memory's answers at the n tokens of one row; (): no memory; None: not asked.
            prompt_log_ratio: of the prompt for the learned draft.
            request: of which the tokens are; None: they are all that is learned of their request before `remember`.
        """
        segment = Segment(tokens, teachers, mask, temperature)
        with self._learns:
            governed = self.settings.update_every == "auto"
            compare = governed and self.governor.decide_comparison(prompt_log_ratio)
            shown = self._learning.segment(segment, cache, prefix, counts, compare, request)
            self._note()
        if governed:
            with self.lock:
                self.governor.observe_comparison(shown.learned, shown.base, recalled, True, prompt_log_ratio)

    def learn(self, examples: Sequence[Feedback], counts: Counts) -> None:
        """One gradient step on whole texts, together; the privacy audit will look at them."""
        with self._learns:
            for example in examples:
                self._learning.texts.grow([example.tokens], len(example.teacher))
                self._learning.texts.finish(example.tokens, len(example.teacher))
            self._learning.learn_from(list(examples), counts)

    def learn_request(self, request: Feedback) -> Counts:
        """Learns a request as after a call of `generate`, replay included, however little time there is."""
        counts = Counts()
        self.learn_segment(request.tokens[None], [request.teacher], None, 0, None, counts)
        self.remember(request)
        self.replay_step(counts, self.settings.replay_passes)
        return counts

    def gradient(self) -> Tensor:
        """A copy of the adapter's gradient (parameters,) in the latest step."""
        with self._learns:
            return self._lora.grads.clone()

    def replayed(self) -> list[Feedback]:
        """What the replay remembers."""
        with self._learns:
            return self._replay.requests

    def _note(self) -> None:
        """What the learners say about themselves."""
        adaptation, guard = self._adaptation, self._learning.guard
        if adaptation.is_ensemble:
            self.metrics.expert_weights = tuple(adaptation.weights)
        self.metrics.removed_experts = adaptation.removed
        if guard.rollbacks > self.metrics.rollbacks:
            self.metrics.rollbacks = guard.rollbacks
            self.metrics.decisions.rollback = guard.reason
            logger.info("%s", guard.reason)

    @torch.no_grad()
    def score_offline(
        self,
        tokens: Tensor,
        teachers: list[Teacher],
        mask: Tensor | None,
        temperature: float,
        prompt_log_ratio: float | None = None,
    ) -> None:
        """Tells the governor the acceptance of the learned and of the base draft, as `learn_segment` does."""
        n = len(teachers[0])
        if prompt_log_ratio is None:
            prompt_log_ratio, _ = self.prompt_log_ratio(tokens[:, :-n], mask)
        seen = []
        for base in (False, True) if self.changed else (True,):
            logits = self.logits(tokens[:, :-1], n, base, mask)
            seen.append(acceptance(teachers, logits, temperature, self.settings.temperature))
        with self.lock:
            self.governor.observe_comparison(seen[0].tolist(), seen[-1].tolist(), (), False, prompt_log_ratio)

    @torch.no_grad()
    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None) -> tuple[float, dict[bool, DynamicCache]]:
        """Log-likelihood per token of `tokens` (batch, L) under the learned draft minus that under the base draft.

        Of two drafts, the one that predicts a prompt better is the one that does better on its continuation: measured, see
        benchmarks/LOG.md. At most the router's `prompt_tokens` last tokens are read, by both without the token that opens the text. Where that is all of them, the KV caches of the
        learned (False) and of the base draft (True) come with it: each holds all tokens but the last.
        """
        length = tokens.shape[1]
        tokens = tokens[:, -self.governor.router.constants.prompt_tokens :].to(self.device)
        if self._adaptation.serves_base or tokens.shape[1] < 2:
            return 0.0, {}
        mask = None if mask is None else mask[:, length - tokens.shape[1] :]
        weight = torch.ones_like(tokens) if mask is None else mask[:, : tokens.shape[1]].to(tokens)
        weight = (weight[:, 1:] * weight[:, :-1]).float()
        found, caches = [], {base: DynamicCache(config=self.config) for base in (False, True)}
        for base, cache in caches.items():
            record_past(cache)
            with self.serving(base) as model:
                logits = model(**{CACHE: cache}, **self.inputs(tokens[:, :-1], 0, mask)).logits.float()
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            found.append(float((chosen * weight).sum() / weight.sum().clamp_min(1)))
        difference = found[0] - found[1] if all(map(math.isfinite, found)) else 0.0
        return difference, caches if length == tokens.shape[1] else {}

    def clone_for_audit(self, learning: OnlineSpecConfig | None = None) -> Self:
        """A copy that learns on by itself, over the same base weights: always, after every request, whatever time it takes.

        It remembers no requests, as a draft that was saved and loaded again.

        Args:
            learning: settings to learn on with, of the same adapter; None: the draft's own. Under others the learner begins anew.
        """
        with self._learns, torch.inference_mode(False):
            base, state = self._lora.tree, self._learning.state()
            adapter = copied(self._lora.named(self._lora.served_params()))
            # The base as it was before it got an adapter: weights are shared, and in place of every LoRA layer stands what it wraps.
            instead: dict[int, Tensor | nn.Module] = {id(parameter): parameter for parameter in base.parameters()}
            instead |= {id(layer): layer.get_base_layer() for layer in self._lora.layers}
            plain = copy_modules(base, instead)
            vars(plain).pop("peft_config", None)
            settings = (learning or self.settings).of_draft()
            clone = type(self)(plain, replace(settings, update_when="request", update_every=1, memory_tokens=0))
            if learning is None:
                clone._learning.resume(adapter, State(copied(state.tensors), state.values))
            else:
                clone._learning.adopt(adapter)
        return clone

    def end_request(self) -> None:
        """Judges what the draft showed in a request that is over, or was broken off."""
        with self._learns:
            self._learning.end_request()
            self._note()

    def remember(self, feedback: Feedback, request: Request | None = None) -> None:
        """Keeps a finished request for the replay."""
        with self._learns:
            self.end_request()
            self._learning.remember(feedback, request)
            self.metrics.replay_bytes, self.metrics.replay_refused = self._replay.nbytes, self._replay.refused

    def replay_step(self, counts: Counts, passes: int) -> None:
        """The replay's gradient steps: each on a few remembered requests, in one padded batch.

        With `update_every="auto"` no more than were worth their time of late.
        """
        if self.settings.update_every == "auto":
            passes = min(passes, self._learning.passes.now)
            self.metrics.decisions.replay_passes = self._learning.passes.now
        for _ in range(passes):
            with self._learns:
                if not self._learning.replay_step(counts):
                    return

    # Learning while nothing is generated

    def learn_later(self, feedback: Feedback, temperature: float) -> None:
        """Hands a finished request, generated at a temperature, to the worker that learns while nothing is generated."""
        assert self._idle is not None
        self._idle.add((feedback, temperature))

    @property
    def idle_outcome(self) -> str:
        """What becomes of requests that are learned when nothing is generated, in words."""
        assert self._idle is not None
        waiting = f"learned when nothing is generated: {counted(self._idle.waiting, 'request')} waiting"
        return self._idle.failure or f"{waiting}, {counted(self.metrics.idle_updates, 'gradient step')} taken so far"

    def catch_up(self, timeout_s: float | None = None) -> bool:
        """Waits until everything that was handed to the worker is learned, and whether it was.

        What waits after a failure is tried at once. False: the time was too short, or some of what was handed over since the last
        call is lost, because there was no room (`metrics.idle_dropped`) or learning from it raised (`metrics.idle_failures`).
        """
        return self._idle is None or self._idle.wait(timeout_s)

    def _learn_when_idle(self, item: tuple[Feedback, float]) -> Iterator[None]:
        """The gradient steps of one request, one at a time: a call may come in after any of them."""
        feedback, temperature = item
        if self.settings.update_every == "auto":
            started = time.perf_counter()
            self.score_offline(feedback.tokens[None], [feedback.teacher], None, temperature)
            self.metrics.idle_time_s += time.perf_counter() - started
            yield
        for i in range(1 + self.settings.replay_passes):
            started, counts = time.perf_counter(), Counts()
            with self._learns:
                if i == 0:
                    segment = Segment(feedback.tokens[None], [feedback.teacher], None, temperature)
                    self._learning.segment(segment, None, 0, counts)
                    self._note()
                    self.remember(feedback)
                else:
                    self._learning.replay_step(counts)
                self.fold()
            with self.lock:
                self.metrics.idle_updates += counts.updates
                self.metrics.learned_tokens += counts.learned_tokens
                self.metrics.skipped_updates += counts.skipped_updates
                self.metrics.loss_sum += counts.loss_sum
                self.metrics.idle_time_s += time.perf_counter() - started
            self._count_reports(self._traces.flush())
            yield
