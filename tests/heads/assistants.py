"""Tiny Gemma-4 assistants and DFlash drafts of transformers, and targets of theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedModel

from tests.architectures import ARCHITECTURES, Architecture, text
from tests.tiny_models import tiny_llama

GEMMAS = ("gemma4", "gemma4_unified")
DFLASH = "muse_glimmer_assistant"
ASSISTANT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_experts": None,
    "moe_intermediate_size": None,
}


class Drafted(NamedTuple):
    """A target, and what drafts for it."""

    target: PreTrainedModel
    draft: PreTrainedModel


def gemma(kind: str = "gemma4", seed: int = 0, ordered: bool = False, **more: Any) -> Drafted:
    """A Gemma 4 target with sliding windows and shared layers, and an assistant; `ordered`: it says some clusters of tokens alone."""
    known = next(one for one in ARCHITECTURES if one.name == "_".join((kind, "text")))
    target = Architecture(known.name, known.positions, known.cache, "", "", known.arguments | more).build(seed)
    return Drafted(target, assistant_of(target, f"{kind}_assistant", seed, ordered))


def assistant_of(
    target: PreTrainedModel, kind: str = "gemma4_assistant", seed: int = 0, ordered: bool = False
) -> PreTrainedModel:
    """A Gemma-4 assistant as wide as a target."""
    torch.manual_seed(seed + 1)
    clusters = {"use_ordered_embeddings": True, "num_centroids": 8, "centroid_intermediate_top_k": 2} if ordered else {}
    config = CONFIG_MAPPING[kind](
        text_config=text(kind.replace("assistant", "text"), **ASSISTANT),
        backbone_hidden_size=target.config.get_text_config(decoder=True).hidden_size,
        initializer_range=0.3,
        **clusters,
    )
    try:
        draft: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    except ValueError as error:
        if "layer types producing a cache" not in str(error):
            raise
        pytest.skip(
            f"transformers {transformers.__version__} builds no Gemma-4 assistant, whose layers all share: {error}"
        )
    if ordered:
        draft.masked_embedding.token_ordering.copy_(torch.randperm(len(draft.masked_embedding.token_ordering)))
    draft.generation_config.num_assistant_tokens = 3
    return draft


def dflash(seed: int = 0, target: PreTrainedModel | None = None, block: int = 4) -> Drafted:
    """A Llama of three layers, or another target, and a DFlash draft with one sliding window."""
    target = tiny_llama(seed, vocab=96, layers=3, hidden=32) if target is None else target
    return Drafted(target, dflash_of(target, seed, block))


def dflash_of(target: PreTrainedModel, seed: int = 0, block: int = 4) -> PreTrainedModel:
    """A DFlash draft as wide as a target, which reads its first and its last layer."""
    text_config = target.config.get_text_config(decoder=True)
    width, layers = text_config.hidden_size, text_config.num_hidden_layers
    torch.manual_seed(seed + 1)
    config = CONFIG_MAPPING[DFLASH](
        hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"], block_size=block,
        mask_token_id=2, target_layer_ids=[0, layers - 1], initializer_range=0.3,
    )  # fmt: skip
    draft: PreTrainedModel = AutoModel.from_config(config).eval()
    return draft
