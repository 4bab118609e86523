"""A draft head for a target that has none, grown while it serves: from the target's weights, by what is verified anyway."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..share.heads import grown_head

_grown: weakref.WeakKeyDictionary[nn.Module, OnlineDraft] = weakref.WeakKeyDictionary()


def grown_draft(target: PreTrainedModel, settings: OnlineSpecConfig | None) -> OnlineDraft | None:
    """The draft with a head that is kept with a target, begun at the first call whose settings ask for it; None: none was asked for.

    Args:
        settings: of the call; None: it goes on with what is there.

    Raises:
        ConfigError: it exists already with other settings.
        DraftError: the target is not one that a head could be begun for.
    """
    if settings is None:
        return _grown.get(target)
    if not settings.grow_head:
        return None
    if target not in _grown:
        draft = OnlineDraft(grown_head(target), settings)
        _grown.setdefault(target, draft)  # another thread may have been faster
    draft = _grown[target]
    draft.check_setting(settings)
    return draft
