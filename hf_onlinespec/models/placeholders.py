"""Tokens that stand for a part of a picture, a video or a sound in a prompt: no text, and nothing that a draft could learn from."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .._compat.generation import VECTORS

# What configurations of transformers 5.23 call them; marks of a beginning or an end are ordinary tokens.
NAMES = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


def placeholder_tokens(config: PretrainedConfig) -> frozenset[int]:
    """Ids that a model replaces by what it reads of a picture, a video or a sound; none: it reads text alone, or they are not told.

    A configuration may have a name of its own for one (Molmo2), or keep it with what reads the picture (Phi-4).
    """
    parts = (config, *(part for part in map(vars(config).get, config.sub_configs) if part is not None))
    found = (vars(part).get(part.attribute_map.get(name, name)) for part in parts for name in NAMES)
    return frozenset(token for token in found if isinstance(token, int))


def replaced_tokens(model: PreTrainedModel, tokens: Tensor, inputs: Mapping[str, Any]) -> frozenset[int]:
    """Ids of tokens (rows, n) in whose place a decoder reads something else, as the inputs of a call say beside them: vectors that are not
    its own embedding's (BLIP-2), or a picture where a mask is set (Kosmos-2). None of them is told by its configuration.
    """
    vectors, places = inputs.get(VECTORS), inputs.get("image_embeds_position_mask")
    if vectors is not None and vectors.shape[:2] == tokens.shape and not model.config.is_encoder_decoder:
        embedding: nn.Module = model.get_input_embeddings()
        places = (embedding(tokens).to(vectors) != vectors).any(dim=-1)
    if places is None or places.shape != tokens.shape:
        return frozenset()
    return frozenset(tokens[places.to(device=tokens.device, dtype=torch.bool)].tolist())


def has_unnamed_pictures(config: PretrainedConfig) -> bool:
    """Whether a picture takes places in a model's cache that no token of the prompt stands for, as in GIT alone (transformers 5.24)."""
    return config.model_type == "git"


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
