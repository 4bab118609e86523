"""OnlineDraft: a draft model with its adapter, its learner and its memory, from call to call."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ._compat import max_positions, record_past
from .adapters import GatedLora
from .artifact import Artifact
from .audit import check_privacy
from .card import write
from .checks import plain_draft
from .config import ENSEMBLE, OnlineSpecConfig
from .decoding import GenerateFn
from .export import merge_and_export
from .feedback import Feedback, Teacher, acceptance
from .hub import Checkpoints, Push
from .identity import Identity, public_name
from .idle import IdleWorker
from .learning import Learning, Segment
from .loading import load
from .memory_draft import MemoryDraft
from .metrics import Counts
from .preference import PREFERENCE_TOKENS
from .run import run_record, run_targets
from .state import Saved, copied

logger = logging.getLogger(__name__)

LAST_WAIT_S = 5.0  # for a push that is under way when the draft goes, or the process ends


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
            self.identity = Identity.of(base)
            self._lora = GatedLora(
                base,
                rank=self.settings.rank,
                alpha=self.settings.alpha,
                target_modules=self.settings.target_modules,
                blocks=self.settings.experts if self.settings.learner == ENSEMBLE else 1,
                seed=self.settings.seed,
            )
            self._learning = Learning(self._lora, self.settings)
        self._adaptation, self._replay = self._learning.adaptation, self._learning.replay
        self._positions = max_positions(self._lora.base.config)
        self._learns = threading.RLock()  # held for one gradient step at a time
        # Where it came from, see the model card; the number tells its pushes from those of others.
        self.lineage: dict[str, Any] = {"draft": uuid.uuid4().hex}
        self.targets: list[str] = []  # names of the models that it has drafted for
        self.pushes = threading.RLock()  # held for one push at a time
        self.checkpoints: Checkpoints | None = None  # pushes in the background, if `push_to_hub` was asked for them
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
    def steps(self) -> int:
        """Gradient steps that the adapter has taken."""
        return self._adaptation.steps

    @property
    def learning_bytes(self) -> int:
        """Memory that learning takes: adapter, gradients, moments, folded weights, and the requests that are remembered."""
        return self._learning.nbytes

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
        with self._learns, self.lock:
            self._lora.fold()

    @contextmanager
    def serving(self, frozen: bool = False) -> Iterator[PreTrainedModel]:
        """The model as it drafts now; a draft that has not learned yet runs at the speed of its base.

        Args:
            frozen: the original draft, whatever was learned.
        """
        if self._lora.folds and not self._adaptation.original_serves and not frozen:
            if self._lora.stale:
                self.fold()
            with self.lock, torch.no_grad():
                yield self._lora.served
            return
        with self._learns, torch.no_grad():  # learning switches the adapter on and off in this tree
            if frozen or self._adaptation.original_serves:
                yield self._lora.base
            else:
                weights = self._lora.weights
                with self._lora.speaking(None if weights is None else weights[None]) as model:
                    yield model

    def inputs(self, tokens: Tensor, cached: int, mask: Tensor | None) -> dict[str, Tensor]:
        """Model inputs for `tokens` (batch, n) behind `cached` tokens, with the padding of `mask` (batch, prompt)."""
        return self._learning.reader.inputs(tokens, cached, mask)

    def keep(self, n: int) -> dict[str, int]:
        """Tells the model to compute logits for its last n positions only, where it can be told."""
        return self._learning.reader.keep(n)

    def serves(self, target: PreTrainedModel) -> None:
        """Notes the name of a model that it drafts for, without the folders of this machine; a model may have none."""
        name = public_name(str(target.config._name_or_path))
        with self.lock:
            if name and name not in self.targets:
                self.targets.append(name)

    # Saving and loading

    def artifact(self) -> Artifact:
        """A copy of everything that is saved, as it is now; waits for what drafts or learns in another thread at this moment."""
        with self._learns, self.lock:
            name = str(self._lora.base.config._name_or_path)  # it may be a folder of this machine: PEFT has to find it
            state = self._learning.saved()
            counters = self.metrics.saved()
            return Artifact(
                settings=self.settings,
                base=self.identity,
                adapter_config=self._lora.adapter_config(name).to_dict(),
                adapter=copied(self._lora.named(self._lora.served_params())),
                state=Saved(copied(state.tensors), state.values | {"metrics": counters.values}),
                run=run_record(self.metrics, self.targets),
                lineage=copy.deepcopy(self.lineage),
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the evolved draft: an ordinary PEFT adapter, with what learning needs to go on, and a model card.

        What the replay and the suffix memory remember stays behind: it holds users' tokens. With `replay_tokens=0`,
        `memory_tokens=0` and numbers instead of "auto", a draft that is loaded again learns on as if it had never stopped; one
        that learns when idle, if `catch_up` was called before.

        Raises:
            ArtifactError: the folder cannot be written; what it held is still there.
        """
        write(self.artifact(), folder, draw=False)

    def merge_and_export(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a plain causal language model that serves as `assistant_model` without this package, see `export.py`."""
        merge_and_export(self, folder, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = True,
        data_statement: str | None = None,
        checkpoint_every: int | None = None,
        token: str | None = None,
        message: str | None = None,
        tag: str | None = None,
        force: bool = False,
        skip_audit: bool = False,
    ) -> str:
        """Pushes what `save_pretrained` saves, in one commit, and returns the commit's hash.

        Args:
            repo_id: "user/name"; made where it does not exist.
            private: a public push needs a `data_statement`, and passes the privacy audit first.
            data_statement: what the draft was trained on, for the card.
            checkpoint_every: push again after so many requests, from a thread that no call waits for: `checkpoints`, whose
                `close()` ends them. None: checkpoints that are on go on.
            tag: a name for this state, a milestone.
            force: push over another's commit.
            skip_audit: push publicly without the privacy audit, for text that is public anyway.

        Raises:
            HubError: not pushed; the draft is as it was, and `save_pretrained` needs no network.
            PrivacyError: a public push without a statement, or one that would show what was in users' text.
        """
        options = Push(repo_id, private, data_statement, token, message, tag, force, skip_audit)
        options.check(checkpoint_every)
        artifact = self.artifact()  # taken before the audit: whatever is sent, the audit has seen
        if not private and not skip_audit:
            check_privacy(self)
        commit = options.send(self, artifact)
        if checkpoint_every is not None:
            if self.checkpoints is not None:
                self.checkpoints.close()
            options = replace(options, message=None, tag=None, force=False)
            self.checkpoints = Checkpoints(self, options, checkpoint_every)
            weakref.finalize(self, self.checkpoints.close, LAST_WAIT_S)  # at the end of the process too
        return commit

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        base_model: PreTrainedModel | str | Path | None = None,
        config: OnlineSpecConfig | None = None,
        revision: str | None = None,
        force: bool = False,
        token: str | None = None,
    ) -> OnlineDraft:
        """Loads an evolved draft and resumes it; an ordinary LoRA adapter or a causal language model begins a new one.

        Args:
            source: a folder, or a name on the Hub.
            base_model: the base draft, or its name; None: the one that the adapter was made for.
            config: settings to go on with; None: the saved ones.
            revision: branch, tag or commit on the Hub.
            force: load the adapter onto a base that is not the one it was made for.

        Raises:
            ArtifactError: a file is damaged, or the adapter belongs to another base.
            DraftError: there is neither an adapter nor a causal language model.
            HubError: the Hub cannot be reached, or asks for a token.
        """
        return load(cls, source, base_model, config, revision, force, token)

    def resume(self, artifact: Artifact) -> None:
        """Takes over everything that was saved, for a new draft of the same base and settings. Raises ArtifactError."""
        with self._learns, self.lock, torch.inference_mode(False):
            self._learning.resume(artifact.adapter, artifact.state)
            self.metrics.resume(artifact.state.part("metrics"))
            self._replay.refused = self.metrics.replay_refused
            self.targets = run_targets(artifact.run)
            self.metrics.decisions.rollback = self._learning.guard.reason
            self._note()

    def adopt(self, adapter: Mapping[str, Tensor]) -> None:
        """Goes on from an adapter that was trained elsewhere, by PEFT's names; the learner begins anew."""
        with self._learns, self.lock, torch.inference_mode(False):
            self._learning.adopt(adapter)

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
        segment = Segment(tokens, teachers, mask, temperature)
        with self._learns:
            governed = self.settings.update_every == "auto"
            compare = governed and self.governor.compares(preference)
            shown = self._learning.segment(segment, cache, prefix, counts, compare)
            self._note()
        if governed:
            with self.lock:
                self.governor.shadow(shown.learned, shown.original, recalled, True, preference)

    def _note(self) -> None:
        """What the learners say about themselves."""
        adaptation, guard = self._adaptation, self._learning.guard
        if adaptation.many:
            self.metrics.expert_weights = tuple(adaptation.weights)
        self.metrics.removed_experts = adaptation.removed
        if guard.rollbacks > self.metrics.rollbacks:
            self.metrics.rollbacks = guard.rollbacks
            self.metrics.decisions.rollback = guard.reason
            logger.info("%s", guard.reason)

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
        for frozen in (False, True) if self._adaptation.steps else (True,):
            with self.serving(frozen) as model:
                logits = model(use_cache=False, **inputs, **self.keep(n)).logits[:, -n:]
            seen.append(acceptance(teachers, logits, temperature, self.settings.temperature))
        with self.lock:
            self.governor.shadow(seen[0].tolist(), seen[-1].tolist(), (), False, preference)

    @torch.no_grad()
    def preference(self, tokens: Tensor, mask: Tensor | None) -> tuple[float, dict[bool, DynamicCache]]:
        """Log-likelihood per token of `tokens` (batch, L) under the learned draft minus that under the frozen one.

        Of two drafts, the one that predicts a prompt better is the one that does better on its continuation: measured, see
        benchmarks/LOG.md. At most `PREFERENCE_TOKENS` last tokens are read. Where that is all of them, the KV caches of the
        learned (False) and of the frozen draft (True) come with it: each holds all tokens but the last.
        """
        length = tokens.shape[1]
        tokens = tokens[:, -PREFERENCE_TOKENS:].to(self.device)
        if self._adaptation.original_serves or tokens.shape[1] < 2:
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

    def end_request(self) -> None:
        """Judges what the draft showed in a request that is over, or was broken off."""
        with self._learns:
            self._learning.end_request()
            self._note()

    def remember(self, feedback: Feedback) -> None:
        """Keeps a finished request for the replay."""
        with self._learns:
            self.end_request()
            self._learning.remember(feedback)
            self.metrics.replay_bytes, self.metrics.replay_refused = self._replay.nbytes, self._replay.refused

    def rehearse(self, counts: Counts, passes: int) -> None:
        """The replay's gradient steps: each on a few remembered requests, in one padded batch.

        With `update_every="auto"` no more than were worth their time of late.
        """
        if self.settings.update_every == "auto":
            passes = min(passes, self._learning.passes.now)
            self.metrics.decisions.replay_passes = self._learning.passes.now
        for _ in range(passes):
            with self._learns:
                if not self._learning.rehearse(counts):
                    return

    # Learning while nothing is generated

    @contextmanager
    def generating(self) -> Iterator[None]:
        try:
            if self._idle is None:
                yield
            else:
                self.metrics.idle_failures = self._idle.failures
                with self._idle.call():
                    yield
        finally:
            checkpoints = self.checkpoints
            if checkpoints is not None:
                checkpoints.request_done()

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
            with self._learns:
                if i == 0:
                    segment = Segment(feedback.tokens[None], [feedback.teacher], None, temperature)
                    self._learning.segment(segment, None, 0, counts)
                    self._note()
                    self.remember(feedback)
                else:
                    self._learning.rehearse(counts)
                self.fold()
            with self.lock:
                self.metrics.idle_updates += counts.updates
                self.metrics.learned_tokens += counts.learned_tokens
                self.metrics.skipped_updates += counts.skipped_updates
                self.metrics.idle_time_s += time.perf_counter() - started
            yield


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
