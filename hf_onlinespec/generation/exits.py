"""The early exits of a target that draft for it: kept with the target, one for each number of layers."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from ..config import OnlineSpecConfig
from ..draft import OnlineDraft

_exits: weakref.WeakKeyDictionary[nn.Module, dict[int, OnlineDraft]] = weakref.WeakKeyDictionary()


def exit_draft(target: PreTrainedModel, layers: int, settings: OnlineSpecConfig | None) -> OnlineDraft:
    """The draft of so many first layers that is kept with a target, made at the first call.

    Raises:
        ConfigError: it exists already with other settings, or the target has no such number of layers before its last one.
        DraftError: the target is not one that can draft.
    """
    kept = _exits.setdefault(target, {})
    if layers not in kept:
        draft = OnlineDraft.early_exit(target, layers, settings)
        kept.setdefault(layers, draft)  # another thread may have been faster
    draft = kept[layers]
    draft.begin_anew_if_changed()
    draft.check_setting(settings)
    return draft
