"""Attaching a draft to a model: from then on every `generate` on it speculates and learns, whoever calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .._compat.generation import own_generate
from .._compat.models import inner_model, uncompiled
from ..commit.base import Draft, latest_draft
from ..commit.memory_draft import MemoryDraft, keep_memory, kept_memory, online_memory
from ..config import OnlineSpecConfig, as_config
from ..draft import OnlineDraft, kept_draft, online_draft
from ..errors import DraftError, UnsupportedError
from ..metrics import DraftMetrics
from ..runtime.warning import warn_or_log
from ..share.loading import load_beside
from ..verify.checks import check_draft, check_target
from .call import ATTACHED, Attachment
from .growing import grown_draft
from .setting import wanted


def attach(
    target: PreTrainedModel | PeftModel,
    draft: PreTrainedModel | PeftModel | Draft | str | Path | None = None,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    **settings: Any,
) -> Draft:
    """From now on every `generate` on this model speculates and learns, whoever calls it; returns what drafts.

    Batches too, and models in training mode: the rollouts of a trainer, whose weights may be others in each call. A call that the
    decoding loop does not take (beam search, a static cache, …) runs as if nothing were attached, and a warning says why, once per
    reason. `onlinespec=` or `assistant_model=` in a call goes before: `onlinespec=True` uses the attached draft
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
    _check_enabled()
    check_target(inner)
    config = as_config(config, **settings)
    saved = wanted(inner.generation_config)
    if config is None and isinstance(saved, OnlineSpecConfig) and not isinstance(draft, Draft):
        config = saved
    if isinstance(draft, str | Path):
        draft = OnlineDraft.of(load_beside(draft, inner, config))
    if draft is None:
        draft = grown_draft(inner, config)
    if draft is None or isinstance(draft, MemoryDraft):
        _keep(inner, draft, config)
        model_draft = None
    else:
        model_draft = _model_draft(inner, draft, config)
    before = ATTACHED.get(inner)
    if before is None or before.draft is not model_draft:
        ATTACHED[inner] = Attachment(model_draft)
    _warn_of_own_generate(inner)
    return ATTACHED[inner].drafts_for(inner)


def _check_enabled() -> None:
    if "onlinespec" not in vars(GenerationConfig):
        raise UnsupportedError(
            "attach: hf_onlinespec is disabled, so that generate cannot see a draft. Call enable() first."
        )


def _warn_of_own_generate(target: PreTrainedModel) -> None:
    own = own_generate(target)
    if own:
        warn_or_log(
            f"{type(target).__name__} has a generate of its own ({own}): what is attached drafts only where that comes to transformers' "
            "generate on this model. online_metrics(model).rounds says whether it did.",
            4,
        )


def _model_draft(target: PreTrainedModel, draft: object, config: OnlineSpecConfig | None) -> OnlineDraft:
    """What was given as `draft=`, as an OnlineDraft that fits the target."""
    if not isinstance(draft, OnlineDraft | nn.Module):
        hint = " Settings are given as config=." if isinstance(draft, OnlineSpecConfig | dict) else ""
        raise DraftError(
            f"draft is a {type(draft).__name__}: expected a transformers model, a PeftModel, an OnlineDraft, or the folder or name of "
            f"one.{hint}"
        )
    model = draft if isinstance(draft, OnlineDraft) else uncompiled(draft)
    if isinstance(model, PreTrainedModel | PeftModel):
        check_draft(target, model)  # before an adapter is made for nothing
    found = online_draft(cast(PreTrainedModel, draft), config, target)  # which refuses other modules itself
    check_draft(target, found.model)
    return found


def _keep(target: PreTrainedModel, memory: MemoryDraft | None, settings: OnlineSpecConfig | None) -> None:
    """Keeps a suffix memory with the target that is to draft for it: the given one, or its own."""
    if memory is None:
        if settings is None or settings.guesses:
            memory = online_memory(target, settings)
    else:
        memory.check_setting(settings)
        keep_memory(target, memory)
    if memory is None or not memory.settings.guesses:
        raise UnsupportedError(
            "memory_tokens=0 and recycle=False without a draft: nothing could draft. Pass a draft, or another config."
        )


def detach(target: PreTrainedModel | PeftModel) -> Draft | None:
    """Makes `generate` on this model plain again; returns what was attached, None where nothing was.

    The draft keeps what it learned. Calls that are running in other threads end as they began.
    """
    inner = _generating(target)
    attachment = ATTACHED.pop(inner, None)
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
    before = ATTACHED.get(inner)
    try:
        yield attach(target, draft, config, **settings)
    finally:
        if before is None:
            ATTACHED.pop(inner, None)
        else:
            ATTACHED[inner] = before


def _generating(target: object) -> PreTrainedModel:
    """The model that `generate` runs on."""
    inner = inner_model(target) if isinstance(target, nn.Module) else target
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise UnsupportedError(
            f"target is a {type(target).__name__}: expected a model that writes token by token in transformers' own `generate`, such as "
            "AutoModelForCausalLM loads."
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
    attachment = ATTACHED.get(inner)
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
