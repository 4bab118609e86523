"""Drafts that are made of a target's own layers, its first ones or those of its checkpoint for MTP: kept with the target."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..heads.mtp import mtp_head

# By the number of first layers; None: the MTP layers.
_drafts: weakref.WeakKeyDictionary[nn.Module, dict[int | None, OnlineDraft]] = weakref.WeakKeyDictionary()


def own_layers_draft(
    target: PreTrainedModel, exit_layers: int | None, settings: OnlineSpecConfig | None
) -> OnlineDraft:
    """The draft of so many first layers (None: of its MTP layers) that is kept with a target, made at the first call.

    Raises:
        ConfigError: it exists already with other settings, or the target has no such number of layers before its last one.
        DraftError: the target is not one that can draft, or its checkpoint has no MTP layers.
    """
    kept = _drafts.setdefault(target, {})
    if exit_layers not in kept:
        if exit_layers is None:
            draft = OnlineDraft(mtp_head(target), settings)
        else:
            draft = OnlineDraft.early_exit(target, exit_layers, settings)
        kept.setdefault(exit_layers, draft)  # another thread may have been faster
    draft = kept[exit_layers]
    draft.begin_anew_if_changed()
    draft.check_setting(settings)
    return draft
