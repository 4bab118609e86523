"""A draft head for a target that has none, grown while it serves: from the target's weights, by what is verified anyway."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from .._compat.models import placed
from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..heads.eagle3 import Eagle3Head
from ..runtime.seeding import seeded
from ..training.head_start import frequent_tokens, new_config, special_tokens, start_from_target

# Tokens that a grown head can propose: nothing is known of the target's own frequent ones yet, and tokenizers give the lowest ids to
# frequent tokens. 89 % of SmolLM2's answer tokens are among its first 8,192 ids: LOG 2026-11-26 "Draft heads".
DRAFT_VOCABULARY = 8192

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
        draft = OnlineDraft(new_head_of(target, settings.seed), settings)
        _grown.setdefault(target, draft)  # another thread may have been faster
    draft = _grown[target]
    draft.check_setting(settings)
    return draft


def new_head_of(target: PreTrainedModel, seed: int) -> Eagle3Head:
    """An untrained EAGLE-3 head of a target, in its precision and on its device. Raises DraftError."""
    config = new_config(target, DRAFT_VOCABULARY)
    ids = frequent_tokens((), config.draft_vocab_size or config.vocab_size, special_tokens(target), config.vocab_size)
    with seeded(target, seed):
        head = Eagle3Head(config, ids)
    start_from_target(head, target)
    head.share(target)
    return placed(head, target.device).to(target.dtype).eval()  # type: ignore[arg-type]  # annotated for a device alone
