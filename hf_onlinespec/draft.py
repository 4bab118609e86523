"""OnlineDraft: a draft that learns while it serves, and that is saved, resumed and shared."""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ._compat.models import inner_model, model_name
from .adapt.learned_texts import Examined
from .commit.learning_draft import LearningDraft
from .config import OnlineSpecConfig, as_config
from .errors import ConfigError, NotAModelError
from .govern.routing import AdapterRouter
from .models.identity import public_name
from .models.plain import no_model
from .runtime.forks import Lock
from .share.artifact import Artifact
from .share.card import write
from .share.checkpoints import Checkpoints
from .share.export import merge_and_export
from .share.history import ServingHistory
from .share.hub import Push
from .share.learned_from import loaded_record, privacy_record
from .share.lineage import Lineage
from .share.loading import Loaded, load
from .share.lora_options import LoraOptions
from .share.memorization import SAVE_S, examine
from .share.privacy import check_privacy
from .share.privacy_record import TRAINED_ELSEWHERE
from .state import State, copied
from .verify.custom_generate import GenerateFn

logger = logging.getLogger(__name__)

LAST_WAIT_S = 5.0  # for a push that is under way when the draft goes, or the process ends


@final
class OnlineDraft(LearningDraft):
    """A draft that learns while it serves; pass it as `assistant_model`.

    The model itself is not touched: its weights are shared, its modules are not, and the adapter lives here.

    Args:
        model: a causal language model, or a `PeftModel` around one (its adapter is merged into a copy).
        config: how to draft and to learn, an OnlineSpecConfig or a dict of its settings; None: the defaults.
        settings: single settings of an OnlineSpecConfig, such as `lookahead=4`; they go before those of `config`.

    Raises:
        DraftError: the model is an encoder–decoder, keeps a state that cannot be rolled back, or has no layer for LoRA.

    Example:
        >>> draft = OnlineDraft(model, lookahead=4)                            # doctest: +SKIP
        >>> out = target.generate(**inputs, assistant_model=draft)             # doctest: +SKIP
        >>> draft.metrics.acceptance_length                                    # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: OnlineSpecConfig | dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, config, **settings)
        self.lineage = Lineage.new()
        self.targets: list[str] = []  # names of the models that it has drafted for
        self.loaded_rollbacks = 0  # of the guard, before it was loaded
        self.examined: Examined | None = None  # what came out of what it learned from, when that was last looked at
        self._target: weakref.ref[PreTrainedModel] | None = None
        self.pushes = Lock(waits=False)  # held for one push at a time
        self.checkpoints: Checkpoints | None = None  # pushes in the background, if `push_to_hub` was asked for them

    if not TYPE_CHECKING:  # a type checker goes on finding names that are not there

        def __getattr__(self, name: str) -> NoReturn:
            raise NotAModelError(
                f"OnlineDraft has no {name!r}: it is not a model of transformers. If generate() asked for it as "
                "assistant_model, call hf_onlinespec.enable() first, or pass custom_generate=draft.generate_fn()."
            )

    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        """Begins anew, with a warning, where the model that it was made from has other weights or layers by now.

        The suffix memory and the counters stay. Called at every `generate`.

        Args:
            model: where the one that it was made from is gone, such as a PeftModel around it.

        Raises:
            DraftError: the model can no longer be a draft; what was learned is still there.
        """
        change = self._watch.change()
        source = self._source()
        source = model if source is None else source
        if change is None or source is None:  # without the model nobody can have meant to change the draft
            return
        with self._learns, self.lock:
            change = self._watch.change()  # another thread may have been faster
            if change is None:
                return
            self._begin(source)
            self.governor = self._new_governor()
            self.metrics.decisions = self.governor.decisions
            self.lineage, self.examined = Lineage.new(), None
        warnings.warn(
            f"The draft {type(self._lora.tree).__name__} was changed after it was wrapped ({change}): "
            "what was learned does not belong to these weights, and learning begins anew.",
            stacklevel=2,
        )

    def generate_fn(
        self, streamer: BaseStreamer | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> GenerateFn:
        """A callable for `generate(custom_generate=...)`: our loop without any patched method.

        `generate` does not hand its `streamer` to such callables, so give it here; a `tokenizer` given here serves
        `stop_strings=`.
        """
        return GenerateFn(self, streamer, tokenizer)

    def serves(self, target: PreTrainedModel) -> None:
        """Notes the name of a model that it drafts for, without the folders of this machine; a model may have none."""
        self.keep_at_hand(target)
        name = public_name(model_name(target.config))
        with self.lock:
            if name and name not in self.targets:
                self.targets.append(name)

    def keep_at_hand(self, target: PreTrainedModel) -> None:
        """Notes a target, weakly: the privacy audit asks what it says by itself."""
        self._target = weakref.ref(target)

    @property
    def target_at_hand(self) -> PreTrainedModel | None:
        """The target that it last learned from, if that is still there."""
        return None if self._target is None else self._target()

    @contextmanager
    def generating(self) -> Iterator[None]:
        try:
            with nullcontext() if self._idle is None else self._idle.call():
                yield
        finally:
            checkpoints = self.checkpoints
            if checkpoints is not None:
                with self.failures.records.attempt():
                    checkpoints.request_done()

    # Saving and loading

    def artifact(self) -> Artifact:
        """A copy of everything that is saved, as it is now; waits for what drafts or learns in another thread at this moment."""
        with self._learns, self.lock:
            name = model_name(self._lora.tree.config)  # it may be a folder of this machine: PEFT has to find it
            state = self._learning.state()
            counters = self.metrics.state()
            return Artifact(
                settings=self.settings.of_draft(),
                base=self.identity,
                options=LoraOptions.of(self._lora.adapter_config(name).to_dict()),
                adapter=copied(self._lora.named(self._lora.served_params())),
                state=State(copied(state.tensors), state.values | {"metrics": counters.values}),
                serving=ServingHistory.of(self.metrics, self.targets),
                lineage=replace(copy.deepcopy(self.lineage), privacy=privacy_record(self)),
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the evolved draft: an ordinary PEFT adapter, with what learning needs to go on, and a model card.

        What the replay and the suffix memory remember stays behind: it holds users' tokens. With `replay_tokens=0`,
        `memory_tokens=0` and numbers instead of "auto", a draft that is loaded again learns on as if it had never stopped; one
        that learns when idle, if `catch_up` was called before.

        What it learned from since it was loaded is examined first, for a later public push, for at most twenty seconds:
        whether any of it comes out. Numbers of that are saved, no text; with `audit_tokens=0` nothing is examined.

        Raises:
            ArtifactError: the folder cannot be written; what it held is still there.
        """
        # No step comes in between: what is saved is what was examined.
        with nullcontext() if self._idle is None else self._idle.call():
            if self.changed:
                try:
                    examine(self, SAVE_S)
                except Exception:  # a save that is lost would be worse
                    logger.exception(
                        "What the draft learned from was not examined: a public push of what is saved will be refused."
                    )
            artifact = self.artifact()
        write(artifact, folder, draw=False)

    def merge_and_export(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a plain causal language model that serves as `assistant_model` without this package, see `export.py`."""
        merge_and_export(self, folder, dtype)

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
    ) -> str:
        """Pushes what `save_pretrained` saves, in one commit, and returns the commit's hash.

        Args:
            repo_id: "user/name", or "name" for a repository of your own; made where it does not exist.
            private: a public push needs a `data_statement`, and passes the privacy audit first. None, transformers' default, is
                private here: a draft that was trained on prompts is user data.
            data_statement: what the draft was trained on, for the card.
            checkpoint_every: push again after so many requests, from a thread that no call waits for: `checkpoints`, whose
                `close()` ends them. None: checkpoints that are on go on.
            token: of the Hub; None or True: the one that `hf auth login` keeps; False: none.
            commit_message: None: says how many tokens the draft has served.
            tag: a name for this state, a milestone.
            force: push over another's commit.
            skip_audit: push publicly without the privacy audit, for text that is public anyway.
            with_state: also send what learning needs to go on (moments, earlier states of the adapter) and what was noted on the
                way (machine, names of folders). None: in a private push. Without it `from_pretrained` begins learning anew, from
                the adapter that was sent.
            license: of the adapter, as the Hub names it ("apache-2.0"), for the card. None: what was stated before, if anything.
            revision: the branch to push to, made where it does not exist; None: main.
            create_pr: open a pull request, in place of a commit.
            message: the same as `commit_message`.

        Raises:
            ConfigError: an argument is not well-formed.
            HubError: not pushed; the draft is as it was, and `save_pretrained` needs no network.
            PrivacyError: a public push without a statement, or one that would show what was in users' text.
        """
        if message is not None and commit_message is not None:
            raise ConfigError(f"commit_message={commit_message!r} and message={message!r}: give one of the two.")
        private = private is not False
        said = commit_message if message is None else message
        options = Push(
            repo_id,
            private,
            data_statement,
            token,
            said,
            tag,
            force,
            skip_audit,
            with_state,
            license,
            revision,
            create_pr,
        )
        options.check(checkpoint_every)
        options = options.with_user()
        with self._learns:  # whatever is sent, the audit has seen
            if not private and not skip_audit:
                check_privacy(self)
            artifact = self.artifact()
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
        config: OnlineSpecConfig | dict[str, Any] | None = None,
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
        return cls.of(load(source, base_model, as_config(config), revision, force, token))

    @classmethod
    def of(cls, loaded: Loaded) -> OnlineDraft:
        """A draft of what was read and checked."""
        draft = cls(loaded.base, loaded.settings)
        if loaded.artifact is not None:
            draft.resume(loaded.artifact)
        elif loaded.adapter is not None:
            draft.adopt(loaded.adapter)
        draft.lineage = draft.lineage.going_on_from(loaded.lineage)
        return draft

    def resume(self, artifact: Artifact) -> None:
        """Takes over everything that was saved, for a new draft of the same base and settings. Raises ArtifactError."""
        with self._learns, self.lock, torch.inference_mode(False):
            self._learning.resume(artifact.adapter, artifact.state)
            self.metrics.resume(artifact.state.part("metrics"))
            self._replay.refused = self.metrics.replay_refused
            self.targets = list(artifact.serving.targets)
            self.loaded_rollbacks = self._learning.guard.rollbacks
            self.metrics.decisions.rollback = self._learning.guard.reason
            self.lineage.privacy = loaded_record(artifact.lineage, _scale(artifact.settings), _scale(self.settings))
            self._note()

    def adopt(
        self, adapter: Mapping[str, Tensor], texts: Sequence[Tensor] | None = None, n_texts: int | None = None
    ) -> None:
        """Goes on from an adapter that was trained elsewhere, by PEFT's names; the learner begins anew.

        Args:
            texts: (L,) tokens each, what it was trained on, for the privacy audit; None: not known, and it cannot be public.
            n_texts: how many there were, where `texts` is a part of them: the others cannot be judged; None: no more.
        """
        with self._learns, self.lock, torch.inference_mode(False):
            self._learning.adopt(adapter)
            self.examined = None  # that was of the adapter before
            self.governor.router = AdapterRouter()  # which of the two serves was found out with the one before
            self._note()
            if texts is None:
                self.lineage.privacy = privacy_record(self).plus(TRAINED_ELSEWHERE)
                return
            for text in texts:
                self._learning.texts.finish(text, 0)  # it counts how often each stands, whole
            self._learning.texts.dropped += max(0, (n_texts or 0) - len(texts))


def _scale(settings: OnlineSpecConfig) -> float:
    return settings.alpha / settings.rank


_drafts: weakref.WeakKeyDictionary[nn.Module, OnlineDraft] = weakref.WeakKeyDictionary()


def kept_draft(model: nn.Module) -> OnlineDraft | None:
    """The OnlineDraft that is kept with a model, if one was made."""
    return _drafts.get(model)


def online_draft(
    model: PreTrainedModel | PeftModel | OnlineDraft,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    **settings: Any,
) -> OnlineDraft:
    """The OnlineDraft that is kept with a model, made at the first call.

    Args:
        model: also inside of a `PeftModel`, or as torch.compile returns it: the draft is the same.

    Raises:
        ConfigError: the model's draft already learns with other settings.
    """
    if not isinstance(model, OnlineDraft | nn.Module):
        raise no_model(model)
    config = as_config(config, **settings)
    if isinstance(model, OnlineDraft):
        draft = model
        draft.begin_anew_if_changed()
    else:
        inner = inner_model(model)
        if inner not in _drafts:
            _drafts.setdefault(inner, OnlineDraft(model, config))  # another thread may have been faster
        draft = _drafts[inner]
        draft.begin_anew_if_changed(model)
    draft.check_setting(config)
    return draft
