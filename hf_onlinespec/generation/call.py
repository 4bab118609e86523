"""One call of `generate` on a model with a draft attached: whether our loop takes it, and why not.

What is attached is kept beside the model, not in it, so a copy of the model, pickled or saved, has none of it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .._compat.caches import CACHE
from ..commit.base import Draft
from ..commit.memory_draft import online_memory
from ..draft import OnlineDraft, online_draft
from ..errors import OnlineSpecError, UnsupportedError
from ..runtime.warning import warn_or_log
from ..verify.checks import check_attached_synced, check_call
from ..verify.probe import Parts, check_rounds, parts_of


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
class AttachedCall:
    """One call of `generate` on an attached model, from its beginning to its end."""

    attachment: Attachment
    target: PreTrainedModel
    explicit: bool = False  # whether the call itself says who drafts, or that nobody does
    once: bool = False  # whether what the caller gave is used up in it, so that it cannot be made once more
    # For its decoding loop, such as streamer and tokenizer; None: it never came near one.
    arguments: dict[str, Any] | None = None
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
        if self.config is not None and self.config.is_assistant:
            return False  # it drafts itself, for another model's assisted decoding
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
        check_attached_synced(bool(arguments.get("synced_gpus")))
        draft = self.attachment.drafts_for(self.target)
        tokenizers = arguments.get("tokenizer"), arguments.get("assistant_tokenizer")
        check_call(self.target, draft.model, self.config, *tokenizers, exit_layers=draft.exit_layers)

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
        warn_or_log(
            f"This call of generate ran without the attached draft: {text} Later calls like it are not mentioned.", 4
        )


def _elsewhere() -> UnsupportedError:
    return UnsupportedError("custom_generate= or cache_implementation='paged' decodes in its place. Leave it out.")


# What is attached to each model of this process.
ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# The call of `generate` that runs in this thread, if it is one on an attached model.
_current: ContextVar[AttachedCall | None] = ContextVar("hf_onlinespec_call", default=None)


def anything_attached() -> bool:
    """Whether any model of this process has something attached."""
    return bool(ATTACHED)


def call_of(model: object) -> AttachedCall | None:
    """The call of `generate` on this model that runs in this thread, if the model is attached."""
    call = _current.get()
    return call if call is not None and call.target is model else None


def call_with(config: GenerationConfig) -> AttachedCall | None:
    """The same, by the configuration that `generate` has prepared."""
    call = _current.get()
    return call if call is not None and call.config is config else None


@contextmanager
def calling(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[AttachedCall | None]:
    """The time of one call of `generate` with these arguments; None: nothing is attached to this model."""
    attachment = ATTACHED.get(model)
    call = None
    if attachment is not None:
        explicit = any(arguments.get(name) is not None for name in ("assistant_model", "onlinespec"))
        # Newer transformers take either name of the cache.
        once = any(arguments.get(name) is not None for name in ("streamer", CACHE, "past_key_values"))
        call = AttachedCall(attachment, model, explicit, once)
    outer = call_of(model)
    if outer is not None and outer.arguments is None:
        outer.arguments = {}  # it is decoded by this call, which says for itself how
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)
