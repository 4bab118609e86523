"""Attaching a draft to a model: from then on every `generate` on it speculates and learns, whoever calls it.

Nothing is written into the model: what is attached is kept beside it, so a copy of the model, pickled or saved, has none of it.
`enable()` wraps `generate`, which looks up here what is attached; a `Call` is that one call of `generate`.
"""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ._compat import CACHE, inner_model, own_generate, uncompiled
from .commit.base import Draft, latest_draft
from .commit.memory_draft import MemoryDraft, keep_memory, kept_memory, online_memory
from .config import OnlineSpecConfig, as_config
from .draft import OnlineDraft, kept_draft, online_draft
from .errors import DraftError, OnlineSpecError, UnsupportedError
from .metrics import DraftMetrics
from .models.vocabulary import check_vocabularies
from .share.loading import load_beside
from .verify.checks import check_call, check_synced_gpus, check_target
from .verify.probe import Parts, check_rounds, parts_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unserved:
    """Why a target cannot be served, as long as it is made of the same parts."""

    reason: OnlineSpecError
    parts: Parts


@dataclass
class Attachment:
    """What drafts for an attached model."""

    draft: OnlineDraft | None  # None: the suffix memory that is kept with the model
    never: Unserved | None = None  # why no call can be served, where that was found out in a call
    proven: Parts | None = None  # what the target was made of when it was last tried, and can be served
    warned: set[str] = field(default_factory=set)  # reasons for plain decoding that the user has heard

    def drafts_for(self, target: PreTrainedModel) -> Draft:
        """What drafts. Raises DraftError where the draft's model was changed into one that cannot."""
        return online_memory(target) if self.draft is None else online_draft(self.draft)


@dataclass(eq=False)
class Call:
    """One call of `generate` on an attached model, from its beginning to its end."""

    attachment: Attachment
    target: PreTrainedModel
    explicit: bool = False  # whether the call itself says who drafts, or that nobody does
    once: bool = False  # whether what the caller gave is used up in it, so that it cannot be made once more
    arguments: dict[str, Any] | None = (
        None  # for its decoding loop, such as streamer and tokenizer; None: it never came near one
    )
    config: GenerationConfig | None = None  # as `generate` has prepared it; None: what is attached is not asked for
    served: bool | None = None  # None: not decided yet
    reason: OnlineSpecError | None = None  # why it is not served

    def begin(self, arguments: dict[str, Any], chosen: bool, elsewhere: bool) -> None:
        """Notes what `generate` was given.

        Args:
            chosen: whether the call has a draft of its own.
            elsewhere: whether a `custom_generate=` of somebody else's decodes.
        """
        self.arguments, self.explicit = dict(arguments), chosen
        self.once = self.once or arguments.get("streamer") is not None
        if elsewhere:
            self.reason = _elsewhere()

    def accepts(self) -> bool:
        """Whether our loop takes the call, as far as that can be told from its configuration; the answer stays the same."""
        if (
            self.config is not None and self.config.is_assistant
        ):  # it drafts itself, for another model's assisted decoding
            return False
        if self.served is None:
            self.served = False  # the checks ask the configuration for its mode: that is the plain one
            try:
                self._check()
                self.served = True
            except OnlineSpecError as reason:
                self.reason = reason
        return self.served

    def _check(self) -> None:
        assert self.config is not None
        if self.reason is not None:
            raise self.reason
        never = self.attachment.never
        if never is not None and never.parts == parts_of(self.target):
            raise never.reason
        arguments = self.arguments or {}
        check_synced_gpus(bool(arguments.get("synced_gpus")))
        draft = self.attachment.drafts_for(self.target)
        check_call(self.target, draft.model, self.config, arguments.get("tokenizer"))

    def prove(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Tries the target before what was given for one call alone is used, unless it was served as it is now.

        Raises:
            UnsupportedError: it can never be served.
        """
        if not self.once:
            return
        parts = parts_of(self.target)
        if self.attachment.proven == parts:
            return
        try:
            check_rounds(self.target, input_ids, model_kwargs)
        except UnsupportedError as reason:
            self.refuse(reason)
            raise
        self.attachment.proven = parts

    def refuse(self, reason: UnsupportedError) -> None:
        """Notes why neither this call nor a later one can be served, as long as the target stays as it is."""
        self.attachment.never, self.reason = Unserved(reason, parts_of(self.target)), reason

    def finish(self) -> None:
        """Warns the user, once per reason, that a call ran as if nothing were attached."""
        if self.arguments is None:
            self.reason = _elsewhere()
        if self.reason is None or self.explicit:
            return
        text = str(self.reason)
        kind = re.sub(r"\d+", "#", text)  # a batch of 2 and one of 3 are one reason
        if kind in self.attachment.warned:
            return
        self.attachment.warned.add(kind)
        _warn(f"This call of generate ran without the attached draft: {text} Later calls like it are not mentioned.", 4)


def _warn(message: str, stacklevel: int) -> None:
    """Warns; where warnings are errors, what was asked for is done nevertheless, and the message is logged."""
    try:
        warnings.warn(message, stacklevel=stacklevel)
    except UserWarning:
        logger.warning("%s", message)


def _elsewhere() -> UnsupportedError:
    return UnsupportedError("custom_generate= or cache_implementation='paged' decodes in its place. Leave it out.")


_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# The call of `generate` that runs in this thread, if it is one on an attached model.
_current: ContextVar[Call | None] = ContextVar("hf_onlinespec_call", default=None)


def attach(
    target: PreTrainedModel | PeftModel,
    draft: PreTrainedModel | PeftModel | Draft | str | Path | None = None,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    **settings: Any,
) -> Draft:
    """From now on every `generate` on this model speculates and learns, whoever calls it; returns what drafts.

    A call that the decoding loop does not take (beam search, a batch, …) runs as if nothing were attached, and a warning says
    why, once per reason. `onlinespec=` or `assistant_model=` in a call goes before: `onlinespec=True` uses the attached draft
    and raises where it cannot serve, `onlinespec=False` decodes plainly. What stands in the model's own `generation_config` does not.
    Attaching again replaces what was attached; `disable()` suspends it until `enable()`.

    Args:
        target: a model, also inside of a `PeftModel` or as torch.compile returns it. A copy of it is not attached.
        draft: a causal language model, an `OnlineDraft`, the folder or name on the Hub of one, or what `attach` returned before;
            None: no draft model, the target's suffix memory drafts.
        config: how to draft and to learn; None: the defaults, or those of a draft that exists already.
        settings: single settings of an OnlineSpecConfig, such as `lookahead=4`; they go before those of `config`.

    Raises:
        UnsupportedError: the target can never be served, or `disable()` was called.
        DraftError: the draft does not fit the target.
        ConfigError: the draft, or the target's memory, exists already with other settings.

    Example:
        >>> draft = hf_onlinespec.attach(target)                               # doctest: +SKIP
        >>> pipe = pipeline("text-generation", target, tokenizer=tokenizer)    # doctest: +SKIP
        >>> pipe("Once upon a time"); draft.metrics.acceptance_length          # doctest: +SKIP
    """
    inner = _generating(target)
    if "onlinespec" not in vars(GenerationConfig):
        raise UnsupportedError(
            "attach: hf_onlinespec is disabled, so that generate cannot see a draft. Call enable() first."
        )
    check_target(inner)
    config = as_config(config, **settings)
    saved = inner.generation_config.onlinespec
    if config is None and isinstance(saved, OnlineSpecConfig) and not isinstance(draft, Draft):
        config = saved
    if isinstance(draft, str | Path):
        draft = OnlineDraft.of(load_beside(draft, inner, config))
    neural: OnlineDraft | None = None
    if draft is None or isinstance(draft, MemoryDraft):
        _keep(inner, draft, config)
    elif isinstance(draft, OnlineDraft | nn.Module):
        model = draft if isinstance(draft, OnlineDraft) else uncompiled(draft)
        if isinstance(model, PreTrainedModel | PeftModel):
            check_vocabularies(inner, model)  # before an adapter is made for nothing
        neural = online_draft(draft, config)
        check_vocabularies(inner, neural.model)
    else:
        hint = " Settings are given as config=." if isinstance(draft, OnlineSpecConfig | dict) else ""
        raise DraftError(
            f"draft is a {type(draft).__name__}: expected a transformers model, a PeftModel, an OnlineDraft, or the folder or name of "
            f"one.{hint}"
        )
    before = _attached.get(inner)
    if before is None or before.draft is not neural:
        _attached[inner] = Attachment(neural)
    own = own_generate(inner)
    if own:
        _warn(
            f"{type(inner).__name__} has a generate of its own ({own}): what is attached drafts only where that comes to transformers' "
            "generate on this model. online_metrics(model).rounds says whether it did.",
            3,
        )
    return _attached[inner].drafts_for(inner)


def _keep(target: PreTrainedModel, memory: MemoryDraft | None, settings: OnlineSpecConfig | None) -> None:
    """Keeps a suffix memory with the target that is to draft for it: the given one, or its own."""
    if memory is None:
        if settings is None or settings.memory_tokens:
            memory = online_memory(target, settings)
    else:
        memory.check_setting(settings)
        keep_memory(target, memory)
    if memory is None or memory.memory is None:
        raise UnsupportedError("memory_tokens=0 without a draft: nothing could draft. Pass a draft, or another config.")


def detach(target: PreTrainedModel | PeftModel) -> Draft | None:
    """Makes `generate` on this model plain again; returns what was attached, None where nothing was.

    The draft keeps what it learned. Calls that are running in other threads end as they began.
    """
    inner = _generating(target)
    attachment = _attached.pop(inner, None)
    if attachment is None:
        return None
    return online_memory(inner) if attachment.draft is None else attachment.draft


@contextmanager
def attached(
    target: PreTrainedModel | PeftModel,
    draft: PreTrainedModel | PeftModel | Draft | str | Path | None = None,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Draft]:
    """Attaches for the time of a `with` block; afterwards what was attached before is attached again. Arguments as of `attach`."""
    inner = _generating(target)
    before = _attached.get(inner)
    try:
        yield attach(target, draft, config, **settings)
    finally:
        if before is None:
            _attached.pop(inner, None)
        else:
            _attached[inner] = before


def _generating(target: Any) -> PreTrainedModel:
    """The model that `generate` runs on."""
    inner = inner_model(target) if isinstance(target, nn.Module) else target
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise UnsupportedError(
            f"target is a {type(target).__name__}: expected a transformers model with `generate`, such as AutoModelForCausalLM loads."
        )
    return inner


def online_metrics(model: PreTrainedModel | PeftModel | Draft) -> DraftMetrics:
    """The metrics of what drafts for a target, or of the draft that is kept with a draft model. Nothing is made for asking.

    Args:
        model: a target (what is attached to it counts, otherwise what drafted for it the last time), a draft model that was
            passed as `assistant_model` with `onlinespec=`, or what drafts itself.

    Raises:
        UnsupportedError: nothing has drafted for this model, and it has not drafted; or it has done both.
    """
    if isinstance(model, Draft):
        return model.metrics
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"model is a {type(model).__name__}: expected a target, a draft model, or what attach() returned."
        )
    inner = inner_model(model)
    attachment = _attached.get(inner)
    if attachment is not None:
        found: Draft | None = kept_memory(inner) if attachment.draft is None else attachment.draft
    else:
        found = latest_draft(inner) or kept_memory(inner)
    own = kept_draft(inner)
    if found is not None and own is not None and found is not own:
        raise UnsupportedError(
            f"This {type(inner).__name__} is a target and a draft: ask for online_draft(model).metrics, or for those of what drafts "
            "for it, which attach() returns."
        )
    found = found or own
    if found is None:
        raise UnsupportedError(
            f"Nothing has drafted for this {type(inner).__name__}, and it has not drafted itself: attach() it, or call generate with "
            "onlinespec=True, and ask again. Of a copy of a model nothing is known."
        )
    return found.metrics


def anything_attached() -> bool:
    """Whether any model of this process has something attached."""
    return bool(_attached)


def call_of(model: Any) -> Call | None:
    """The call of `generate` on this model that runs in this thread, if the model is attached."""
    call = _current.get()
    return call if call is not None and call.target is model else None


def call_with(config: GenerationConfig) -> Call | None:
    """The same, by the configuration that `generate` has prepared."""
    call = _current.get()
    return call if call is not None and call.config is config else None


@contextmanager
def calling(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[Call | None]:
    """The time of one call of `generate` with these arguments; None: nothing is attached to this model."""
    attachment = _attached.get(model)
    call = None
    if attachment is not None:
        explicit = any(arguments.get(name) is not None for name in ("assistant_model", "onlinespec"))
        # Newer transformers take either name of the cache.
        once = any(arguments.get(name) is not None for name in ("streamer", CACHE, "past_key_values"))
        call = Call(attachment, model, explicit, once)
    outer = call_of(model)
    if outer is not None and outer.arguments is None:
        outer.arguments = {}  # it is decoded by this call, which says for itself how
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)
