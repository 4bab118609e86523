"""Tokens that stand for a part of a picture, a video or a sound in a prompt: no text, and nothing that a draft could learn from."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from transformers import PretrainedConfig

# What configurations of transformers 5.23 call them; marks of a beginning or an end are ordinary tokens.
NAMES = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


def placeholder_tokens(config: PretrainedConfig) -> frozenset[int]:
    """Ids that a model replaces by what it reads of a picture, a video or a sound; none: it reads text alone."""
    found = (vars(config).get(name) for name in NAMES)
    return frozenset(token for token in found if isinstance(token, int))


def mask_of_text(mask: Tensor | None, prompts: Tensor, placeholders: Set[int]) -> Tensor | None:
    """The attention mask (batch, prompt) of prompts without such tokens: what a draft is shown of them; None: all of them.

    A prompt that has no other tokens keeps them.
    """
    found = torch.isin(prompts, torch.tensor(sorted(placeholders), dtype=prompts.dtype, device=prompts.device))
    if not bool(found.any()):
        return mask
    mask = torch.ones_like(prompts) if mask is None else mask
    text = mask.masked_fill(found, 0)
    return torch.where(text.any(dim=1, keepdim=True), text, mask)
