"""The OnlineDraft that is kept with a model: whoever passes the model as a draft again goes on with it."""

from __future__ import annotations

import weakref
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._compat.assistants import lives_in_target
from .._compat.models import inner_model, uncompiled
from ..config import OnlineSpecConfig, as_config
from ..heads.assistants import assistant_head
from ..models.plain import no_model
from .online import OnlineDraft

_drafts: weakref.WeakKeyDictionary[nn.Module, OnlineDraft] = weakref.WeakKeyDictionary()


def kept_draft(model: nn.Module) -> OnlineDraft | None:
    """The OnlineDraft that is kept with a model, if one was made."""
    return _drafts.get(model)


def online_draft(
    model: PreTrainedModel | PeftModel | OnlineDraft,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    target: PreTrainedModel | None = None,
    **settings: Any,
) -> OnlineDraft:
    """The OnlineDraft that is kept with a model, made at the first call.

    Args:
        model: also inside of a `PeftModel`, or as torch.compile returns it: the draft is the same.
        target: that it is to draft for: transformers' Gemma-4 assistants and DFlash drafts are made for one.

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
            _drafts.setdefault(inner, _begun(model, config, target))  # another thread may have been faster
        draft = _drafts[inner]
        draft.begin_anew_if_changed(model)
    draft.check_setting(config)
    return draft


def _begun(
    model: PreTrainedModel | PeftModel, config: OnlineSpecConfig | None, target: PreTrainedModel | None
) -> OnlineDraft:
    """A new draft of a model."""
    inner = uncompiled(model)
    if target is None or not isinstance(inner, PreTrainedModel) or not lives_in_target(inner):
        return OnlineDraft(model, config)
    draft = OnlineDraft(assistant_head(inner, target), config)
    draft.serves(target)  # from here on it knows whom it is for, whatever becomes of the model
    return draft
