"""OnlineDraft: a draft that learns while it serves, and that is saved, resumed and shared."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, final

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .._compat.adapters import base_of
from .._compat.assistants import lives_in_target
from .._compat.models import is_split, uncompiled
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora, without_adapter
from ..adapt.idle import IdleLearning
from ..adapt.learner import Learner
from ..adapt.replicas import Replicas
from ..adapt.schedules import Schedule
from ..adapt.service import LearningService
from ..commit.base import Call, Draft, Proposer
from ..commit.causal_lm import CausalLM
from ..commit.combined import Combined
from ..commit.draft_model import DraftModel
from ..commit.head import HeadModel
from ..commit.row_model import RowModel
from ..commit.seq2seq import Seq2Seq
from ..config import OnlineSpecConfig, as_config
from ..errors import ConfigError, CopyError, DraftError, NotAModelError
from ..govern.acceptance import RequestStats
from ..govern.routing import AdapterRouter
from ..heads.assistants import assistant_head
from ..heads.base import Head
from ..metrics import DraftMetrics, UpdateReport
from ..metrics.summary import counted, size
from ..models.early_exit import EarlyExit
from ..models.encoders import SourceInputs
from ..models.identity import BaseFingerprint
from ..models.layers import describe
from ..models.plain import check_cache, plain_draft
from ..models.vocabulary import Vocabulary
from ..models.watch import Source
from ..runtime.forks import Lock
from ..share.artifact import Artifact
from ..share.checkpoints import Checkpoints
from ..share.export import merge_and_export
from ..share.hub import Push
from ..share.lineage import Lineage
from ..share.loading import Loaded, load
from ..share.memorization import SAVE_S
from ..share.named import place_of, remove_others
from ..share.pushing import push
from ..share.resuming import go_on
from ..share.saving import artifact_of, save
from ..share.targets import Targets
from ..state import State, copied
from ..verify.custom_generate import GenerateFn
from .adapters import NamedAdapters
from .routing import Routing
from .rows import models_of_rows, schedule_of, schedule_of_names


@final
class OnlineDraft(Draft):
    """A draft that learns while it serves; pass it as `assistant_model`.

    The model itself is not touched: its weights are shared, its modules are not, and the adapter lives here.

    Args:
        model: a causal language model, an encoder–decoder for a target that is one, a `PeftModel` around either (its adapter is merged into
            a copy), a draft head, or the first layers of the target (`OnlineDraft.early_exit`).
        config: how to draft and to learn, an OnlineSpecConfig or a dict of its settings; None: the defaults.
        settings: single settings of an OnlineSpecConfig, such as `lookahead=4`; they go before those of `config`.

    Attributes:
        trainable: the model with its adapter: it serves, and learning moves it.
        learning: what moves the adapter.
        adapters: those that have names, see `generate(adapter=...)`: steps, acceptance and bytes by name.

    Raises:
        DraftError: the model keeps a state that cannot be rolled back, or has no layer for LoRA.

    Example:
        >>> draft = OnlineDraft(model, lookahead=4)                            # doctest: +SKIP
        >>> out = target.generate(**inputs, assistant_model=draft)             # doctest: +SKIP
        >>> draft.metrics.acceptance_length                                    # doctest: +SKIP
    """

    trainable: DraftModel
    idle: IdleLearning
    adapters: NamedAdapters[OnlineDraft]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | EarlyExit,
        config: OnlineSpecConfig | dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config, **settings)
        self._prepare(None)
        self._begin(model)

    @classmethod
    def early_exit(
        cls,
        target: PreTrainedModel,
        layers: int,
        config: OnlineSpecConfig | dict[str, Any] | None = None,
        **settings: Any,
    ) -> OnlineDraft:
        """A draft of the target's own first layers, its final norm and its head, over the target's weights, with an adapter that learns.

        The target is not touched. Where its weights are trained, the draft follows them.

        Raises:
            ConfigError: the target has no such number of layers before its last one.
            DraftError: it is not one that can draft.
        """
        return cls(EarlyExit(target, layers), config, **settings)

    def _prepare(self, beside: OnlineDraft | None) -> None:
        """What does not depend on the model; `beside`: the draft of whose adapters this is one."""
        self.target_identity: BaseFingerprint | None = None  # the first one that a head has served; None: it is no head
        self._begun = 0  # how often it began, on the model's weights as they were then
        self.learning = LearningService(self.settings, self.metrics, self.lock, Lock())
        self._report_update: Callable[[UpdateReport], None]
        self._report_update = self._traces.update if beside is None else beside._report_update
        self.idle = IdleLearning(self.learning, self._traces, None if beside is None else beside.idle)
        self.replicas = Replicas(self.learning)
        self.lineage = Lineage.new()
        self.targets = Targets()
        self._main: Callable[[], OnlineDraft | None] = lambda: None  # the draft of whose adapters this is one
        self.pushes = Lock(waits=False)  # held for one push at a time
        self.checkpoints: Checkpoints | None = None  # pushes in the background, if `push_to_hub` was asked for them

    def _begin(self, model: PreTrainedModel | PeftModel | EarlyExit) -> None:
        """A new adapter on the model's weights as they are now; those with names are forgotten."""
        with torch.inference_mode(False):
            base = _base(model, self.targets.at_hand)
            self._adapt(base, BaseFingerprint.of(base), folds=not isinstance(model, EarlyExit))
        self._source = Source(model)
        self.exit_layers = self._source.exit_layers
        self.adapters = NamedAdapters[OnlineDraft](self._beside, self.settings.resident_adapters)

    def _adapt(
        self, base: PreTrainedModel, identity: BaseFingerprint, router: AdapterRouter | None = None, folds: bool = True
    ) -> None:
        """A new adapter on the base's weights; `router`: of one with a name; `folds`: as of `GatedLora`."""
        settings = self.settings
        with torch.inference_mode(False):
            rank, alpha, layers = settings.rank, settings.alpha, settings.target_modules
            blocks, seed = settings.blocks, settings.seed
            adapter = GatedLora(
                base, rank=rank, alpha=alpha, target_modules=layers, blocks=blocks, seed=seed, folds=folds
            )
            experts, locks = Experts(adapter, settings), (self.lock, self.learning.steps_lock)
            trainable: HeadModel | CausalLM | Seq2Seq
            if isinstance(base, Head):
                trainable = HeadModel(base, adapter, experts, *locks)
            else:
                check_cache(adapter.tree)
                kind = CausalLM if SourceInputs.of(base) is None else Seq2Seq
                trainable = kind(adapter, experts, Vocabulary.of(base), *locks)
            learner = Learner(trainable, experts, settings, self._report_update)
        self.identity, self.vocabulary, self.trainable = identity, trainable.vocabulary, trainable
        self.reads = trainable.reads
        self.learning.begin(learner, self.governor, trainable.positions, router)
        self._begun += 1

    # Adapters with names: each is a draft of its own, which `NamedAdapters` makes and puts away

    def _beside(self) -> OnlineDraft:
        """A draft with another adapter on the same base; lock, governor and what fails are those of this one."""
        if self.replicas.leaves_names_out:
            self.warn_once(
                "adapter=: several processes learn, and average the adapter without a name alone. Those with names are each process' own; "
                "save_pretrained writes those of rank 0."
            )
        own = OnlineDraft.__new__(OnlineDraft)
        Draft.__init__(own, replace(self.settings.of_draft(), memory_tokens=0, recycle=False))
        own.settings = self.settings.of_draft()
        own.governor, own.failures, own.lock = self.governor, self.failures, self.lock
        own.metrics = DraftMetrics(decisions=self.governor.decisions)
        own._prepare(self)
        own._main, own._source, own.exit_layers = weakref.ref(self), self._source, self.exit_layers
        own.adapters = NamedAdapters[OnlineDraft](own._beside, self.settings.resident_adapters)
        own.begin_adapter()
        return own

    def begin_adapter(self) -> None:
        """A new adapter in the place of this one, which has a name."""
        main, router = self._main(), AdapterRouter(self.governor.constants.router)
        assert main is not None  # it holds this one
        base = main.trainable.adapter
        self._adapt(without_adapter(base), main.identity, router, base.folds)

    def put_away(self) -> None:
        """Lets go of an adapter that has a name, whose state is kept elsewhere; what it remembers of requests stays."""
        with self.learning.steps_lock, self.lock:
            self.learning.put_away()
            del self.trainable

    def take_back(self, state: State) -> None:
        """The inverse of `put_away`. Raises ArtifactError."""
        main = self._main()
        assert main is not None
        with self.learning.steps_lock, self.lock:
            base = main.trainable.adapter
            self._adapt(without_adapter(base), main.identity, self.learning.router, base.folds)
            self.learning.take_back(state.part("adapter").tensors, state.part("learning"))

    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        """Begins anew, with a warning, where the model that it was made from has other weights or layers by now.

        The suffix memory and the counters stay. Called at every `generate`.

        Args:
            model: where the one that it was made from is gone, such as a PeftModel around it.

        Raises:
            DraftError: the model can no longer be a draft; what was learned is still there.
        """
        source: PreTrainedModel | PeftModel | EarlyExit | None = self._source.model
        source = model if source is None else source
        # Without the model nobody can have meant to change the draft.
        if source is None or self._source.change() is None:
            return
        with self.learning.steps_lock, self.lock:
            change = self._source.change()  # another thread may have been faster
            if change is None:
                return
            governor, self.governor = self.governor, self._new_governor()
            try:
                self._begin(source)
            except BaseException:  # what was learned is still there
                self.governor = governor
                raise
            self.metrics.decisions = self.governor.decisions
            self.lineage = Lineage.new()
        warnings.warn(
            f"The draft {type(self.trainable.adapter.tree).__name__} was changed after it was wrapped ({change}): "
            "what was learned does not belong to these weights, and learning begins anew.",
            stacklevel=2,
        )

    # What it is

    @property
    def model(self) -> PeftModel:
        """The PEFT model: the base draft's weights and the adapter. Its gate is shut outside our own calls."""
        return self.trainable.adapter.model

    @property
    def config(self) -> PretrainedConfig:
        """The base draft's model configuration, as `generate` expects of an assistant."""
        return self.trainable.config

    @property
    def generation_config(self) -> GenerationConfig:
        """That of the user's model, as it is now."""
        if isinstance(self.trainable, HeadModel):
            return GenerationConfig()
        model = self._source.model
        model = model.target if isinstance(model, EarlyExit) else model
        model = self.trainable.adapter.tree if model is None else model
        return model.generation_config

    @property
    def device(self) -> torch.device:
        return self.trainable.device

    def _title(self) -> str:
        adapter = self.trainable.adapter
        without = f", left out: {describe(adapter.left_out)}" if adapter.left_out else ""
        layers = f"{len(adapter.layers)} adapted layers{without}"
        first = "" if self.exit_layers is None else f"the first {counted(self.exit_layers, 'layer')} of "
        return f"{type(self).__name__}({first}{type(adapter.tree).__name__}, {layers})"

    def _rows(self) -> list[tuple[str, str]]:
        steps, share = counted(self.steps, "gradient step"), self.metrics.update_share
        learned = f"{steps} by this adapter of {size(self.trainable.adapter.params.nbytes)}, {share:.1%} of the time"
        return [self._memory_row(), ("learned", learned)]

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CopyError(
            f"An {type(self).__name__} is not copied or pickled: it shares its weights and learns on in this process. "
            "Use draft.save_pretrained(folder), and OnlineDraft.from_pretrained(folder) for another one."
        )

    if not TYPE_CHECKING:  # a type checker goes on finding names that are not there

        def __getattr__(self, name: str) -> NoReturn:
            raise NotAModelError(
                f"OnlineDraft has no {name!r}: it is not a model of transformers. If generate() asked for it as "
                "assistant_model, call hf_onlinespec.enable() first, or pass custom_generate=draft.generate_fn()."
            )

    # Generating

    def generate_fn(
        self, streamer: BaseStreamer | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> GenerateFn:
        """A callable for `generate(custom_generate=...)`: our loop without any patched method.

        `generate` does not hand its `streamer` to such callables, so give it here; a `tokenizer` given here serves
        `stop_strings=`.
        """
        return GenerateFn(self, streamer, tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The evolved draft's forward, without gradients: arguments and output of the base model."""
        with self.trainable.serving() as model:
            return model(*args, **kwargs)

    def proposer(self, call: Call) -> Proposer:
        """See `Draft`: the memory alone, where preparing the model for the call fails."""
        stats = [RequestStats() for _ in range(call.rows)]
        sources = self.guess_sources(call)
        models: list[RowModel] = []
        schedule: Schedule | None = None
        if self.failures.preparing.begin():
            with self.failures.preparing.attempt(call.count_failed_draft):
                routing = Routing(self, call, self.adapters.present)
                wanted = [name for name in routing.names if name is not None]
                lease = self.adapters.lease(wanted, present=routing.routes)
                routing.choose(lease.drafts)
                lease.keep(routing.names)
                target = self.targets.at_hand
                for own in lease.drafts.values():
                    if target is not None:
                        own.serves(target)
                drafts = [self if name is None else lease.drafts[name] for name in routing.names]
                rows = models_of_rows(drafts, call, stats)
                if call.adapters:

                    def closed() -> None:
                        lease.end()
                        routing.close(stats)

                    schedule = schedule_of_names(self, routing, drafts, rows, call, sources, closed)
                else:
                    schedule = schedule_of(self, rows, call, sources, call.counts)
                models = rows
                needs = isinstance(self.trainable, Seq2Seq) and self.trainable.needs_source
                if needs and any(row.source is None for row in rows):
                    schedule.leave_out(
                        "encoder outputs were given without what they were made of, which the draft reads"
                    )
        return Combined(self, call, models, sources, stats, schedule)

    def serves(self, target: PreTrainedModel, own_tokens: bool = True) -> None:
        with self.lock:
            self.targets.add(target, own_tokens)
            if is_split(target):
                self.replicas.leave(
                    "off: the processes split the target's layers, and serve the same requests together"
                )
            if isinstance(self.trainable, HeadModel | Seq2Seq):
                self.trainable.belongs_to(target)
            if isinstance(self.trainable, HeadModel) and self.target_identity is None:
                self.target_identity = BaseFingerprint.of(target)

    @contextmanager
    def generating(self) -> Iterator[None]:
        base = {"the base's configuration": self.identity.config, "the base's weights": self.identity.weights}
        self.replicas.begin_call(base, self._begun)
        try:
            with self.idle.call():
                yield
        finally:
            self.replicas.end_call()
            checkpoints = self.checkpoints
            if checkpoints is not None:
                with self.failures.records.attempt():
                    checkpoints.request_done()

    # Learning

    @property
    def steps(self) -> int:
        """Gradient steps that the adapter has taken."""
        return self.trainable.steps

    @property
    def version(self) -> tuple[int, int]:
        """Another one whenever what is served has changed: by a step, an adapter that was adopted, an earlier state, a new base."""
        return self._begun, self.trainable.adapter.changes + sum(named.steps for named in self.adapters.values())

    @property
    def learning_bytes(self) -> int:
        """Memory that learning holds now.

        The adapter, its gradients, moments, folded weights and earlier states; what the replay remembers; what was recorded in
        requests that are in progress: up to `context_tokens` target distributions over the whole vocabulary each, 4 bytes per
        token of the vocabulary, or `top_k` of them, and of a draft head the hidden states of the latest tokens; requests that wait to
        be evaluated, or to be learned when idle. A gradient
        step takes more for its own time: what a forward and a backward of the draft over the new tokens take.
        """
        return self.learning.nbytes + self.idle.nbytes + self.adapters.nbytes + self.replicas.nbytes

    def catch_up(self, timeout_s: float | None = None) -> bool:
        """Waits until everything that was handed to the worker is learned, and whether it was.

        What waits after a failure is tried at once. False: the time was too short, or some of what was handed over since the last
        call is lost, because there was no room (`metrics.idle_dropped`) or learning from it raised (`metrics.idle_failures`).

        Of several processes that learn one adapter, what this one has learned is published, and what the others have published by
        now is taken in; False, where that failed (`metrics.decisions.averaging`). It does not wait for what they have not: all have
        the same adapter after each has called it, they have met (`accelerator.wait_for_everyone()`), and each has called it again.
        """
        learned = self.idle.wait(timeout_s)
        return self.replicas.catch_up(timeout_s) and learned

    def clone_for_audit(self, learning: OnlineSpecConfig | None = None) -> OnlineDraft:
        """A copy that learns on by itself, over the same base weights: always, after every request, whatever time it takes.

        It remembers no requests, as a draft that was saved and loaded again.

        Args:
            learning: settings to learn on with, of the same adapter; None: the draft's own. Under others the learner begins anew.
        """
        with self.learning.steps_lock, torch.inference_mode(False):
            state = self.state()
            adapter, learned = state.part("adapter").tensors, state.part("learning")
            settings = (learning or self.settings).of_draft()
            settings = replace(settings, update_when="request", update_every=1, memory_tokens=0)
            clone = OnlineDraft(without_adapter(self.trainable.adapter), settings)
            target = self.targets.at_hand
            if target is not None and isinstance(clone.trainable, HeadModel):
                clone.trainable.belongs_to(target)  # canaries come without features
            if learning is None:
                clone.learning.learner.resume(adapter, learned)
            else:
                clone.learning.learner.adopt(adapter)
        return clone

    # Saving and sharing

    def state(self) -> State:
        with self.learning.steps_lock, self.lock:
            adapter, learned = self.trainable.adapter, self.learning.learner.state()
            return State.joined(
                adapter=State(copied(adapter.named(adapter.served_params()))),
                learning=State(copied(learned.tensors), learned.values),
                metrics=self.metrics.state(),
            )

    def artifact(self) -> Artifact:
        """A copy of everything that is saved, as it is now; waits for what drafts or learns in another thread at this moment."""
        return artifact_of(self)

    def save_pretrained(self, folder: str | Path, is_main_process: bool | None = None) -> None:
        """Saves the evolved draft: an ordinary PEFT adapter, with what learning needs to go on, and a model card.

        What the replay and the suffix memory remember stays behind: it holds users' tokens. With `replay_tokens=0`,
        `memory_tokens=0` and numbers instead of "auto", a draft that is loaded again learns on as if it had never stopped; one
        that learns when idle, if `catch_up` was called before.

        What it learned from since it was loaded is examined first, for a later public push, for at most twenty seconds:
        whether any of it comes out. Numbers of that are saved, no text; with `audit_tokens=0` nothing is examined.

        Adapters with names are saved in `adapters/NAME`, each as a draft that `from_pretrained` and PEFT load by itself too.

        Args:
            is_main_process: whether this process writes, as in transformers and PEFT. None: of several processes that learn one adapter
                the one of rank 0 does, and in the others nothing happens; any other process writes.

        Raises:
            ArtifactError: the folder cannot be written; what it held is still there.
        """
        if self.replicas.saves(is_main_process):
            self._save(Path(folder), SAVE_S)

    def save_unexamined(self, folder: str | Path) -> None:
        """Saves in no more time than writing takes: what was learned since it was loaded is not examined, and no curve drawn.

        Raises:
            ArtifactError: the folder cannot be written; what it held is still there.
        """
        if self.replicas.saves(None):
            self._save(Path(folder), 0.0)

    def _save(self, folder: Path, seconds: float) -> None:
        names = list(self.adapters)
        seconds /= 1 + len(names)
        save(self, folder, seconds)
        for name in names:
            with self.adapters.using(name) as own:
                save(own, place_of(folder, name), seconds)
        remove_others(folder, names)

    def merge_and_export(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        form: str | None = None,
        is_main_process: bool | None = None,
    ) -> None:
        """Writes a plain causal language model that serves as `assistant_model` without this package, see `export.py`.

        Args:
            dtype: of the written weights; None: as the base has them.
            form: of a draft head: "eagle3" (vLLM, SGLang) or "speculators" (vLLM); None: as it was read.
            is_main_process: see `save_pretrained`.
        """
        if self.replicas.saves(is_main_process):
            merge_and_export(self, folder, dtype, form=form)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = True,
        data_statement: str | None = None,
        checkpoint_every: int | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        tag: str | None = None,
        force: bool = False,
        skip_audit: bool = False,
        with_state: bool | None = None,
        license: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        message: str | None = None,
        is_main_process: bool | None = None,
        selected_adapters: Sequence[str] | None = None,
    ) -> str:
        """Pushes what `save_pretrained` saves, adapters with names too, in one commit, and returns the commit's hash.

        Args:
            repo_id: "user/name", or "name" for a repository of your own; made where it does not exist.
            private: False: the push needs a `data_statement`, and every adapter passes the privacy audit first. None is True.
            data_statement: what the draft was trained on, for the card.
            checkpoint_every: push again after so many requests, in the background, until `checkpoints.close()`. None: as before.
            token: of the Hub; None or True: the one that `hf auth login` keeps; False: none.
            commit_message, message: one of the two; None: says how many tokens the draft has served.
            tag: a name for this state, a milestone.
            force: push over another's commit.
            skip_audit: push publicly without the privacy audit, for text that is public anyway.
            with_state: also send what learning needs to go on, and what was noted of this machine. None: in a private push.
            license: of the adapter, as the Hub names it ("apache-2.0"), for the card. None: what was stated before, if anything.
            revision: the branch to push to, made where it does not exist; None: main.
            create_pr: open a pull request, in place of a commit.
            is_main_process: see `save_pretrained`; a process that leaves it to rank 0 returns "".
            selected_adapters: names of those that are sent beside the one without a name; others that lie there stay as they are. None:
                all, and names that lie there and that the draft does not have are removed.

        Raises:
            ConfigError: an argument is not well-formed.
            HubError: not pushed; the draft is as it was, and `save_pretrained` needs no network.
            PrivacyError: a public push without a statement, or one that would show what was in users' text.
        """
        if message is not None and commit_message is not None:
            raise ConfigError(f"commit_message={commit_message!r} and message={message!r}: give one of the two.")
        if not self.replicas.saves(is_main_process):
            return ""
        said = commit_message if message is None else message
        options = Push(repo_id, private is not False, data_statement, token, said, tag, force, skip_audit)
        options = replace(options, with_state=with_state, license=license, revision=revision, create_pr=create_pr)
        if selected_adapters is not None:
            options = replace(options, selected_adapters=tuple(selected_adapters))
        return push(self, options, checkpoint_every)

    # Loading

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        base_model: PreTrainedModel | str | Path | None = None,
        config: OnlineSpecConfig | dict[str, Any] | None = None,
        revision: str | None = None,
        force: bool = False,
        token: str | None = None,
        target: PreTrainedModel | None = None,
    ) -> OnlineDraft:
        """Loads an evolved draft and resumes it; an ordinary LoRA adapter, a causal language model or a draft head begins a new one.

        Args:
            source: a folder, or a name on the Hub.
            base_model: the base draft, or its name; None: the one that the adapter was made for.
            config: settings to go on with; None: the saved ones.
            revision: branch, tag or commit on the Hub.
            force: load the adapter onto a base that is not the one it was made for.
            target: that a draft head is for: it reads with the target's embedding, in its precision and on its device; or whose first
                layers draft.

        Raises:
            ArtifactError: a file is damaged, or the adapter belongs to another base or target.
            DraftError: there is neither an adapter, nor a causal language model, nor a head for this target.
            HubError: the Hub cannot be reached, or asks for a token.
        """
        return cls.of(load(source, base_model, as_config(config), revision, force, token, target))

    @classmethod
    def of(cls, loaded: Loaded) -> OnlineDraft:
        """A draft of what was read and checked."""
        draft = cls(loaded.base, loaded.settings)
        if loaded.target is not None:
            draft.serves(loaded.target)
        go_on(draft, loaded)
        for name, own in loaded.named.items():
            with draft.adapters.using(name) as adapter:
                go_on(adapter, own)
        return draft

    def resume(self, state: State) -> None:
        self.learning.resume(state.part("adapter").tensors, state.part("learning"), state.part("metrics"))


def _base(model: PreTrainedModel | PeftModel | EarlyExit, target: PreTrainedModel | None) -> PreTrainedModel:
    """The model or head to adapt; `target`: the latest one, if any is at hand. Raises DraftError."""
    if isinstance(model, EarlyExit):
        return model.cut()
    inner = uncompiled(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, PeftModel) and isinstance(base_of(inner), Head):
        raise DraftError(
            f"The draft is a PeftModel around the head {type(base_of(inner)).__name__}: an adapter on a head is loaded with it. "
            "Pass the head itself, or load its folder with OnlineDraft.from_pretrained."
        )
    if target is not None and isinstance(inner, PreTrainedModel) and lives_in_target(inner):
        return assistant_head(inner, target)
    return inner if isinstance(inner, Head) else plain_draft(model)
