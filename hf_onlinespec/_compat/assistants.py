"""transformers' drafts that read the inside of their target: Gemma-4 assistants and DFlash drafts."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

GEMMA = ("gemma4_assistant", "gemma4_unified_assistant")
SHARING = (
    "gemma4_text",
    "gemma4_unified_text",
)  # targets whose forward returns keys and values (`return_shared_kv_states`)
DFLASH = ("block_size", "mask_token_id", "target_layer_ids")  # what configurations of DFlash drafts state


class Shared(NamedTuple):
    """Keys, and values, of one token in one layer."""

    heads: int
    width: int  # of each


def is_gemma_assistant(config: PretrainedConfig) -> bool:
    """Whether a model reads keys and values of a Gemma 4 target."""
    return config.model_type in GEMMA


def is_dflash(config: PretrainedConfig) -> bool:
    """Whether a model drafts a block of tokens at once from hidden states of its target."""
    return set(DFLASH) <= set(vars(config))


def lives_in_target(model: PreTrainedModel) -> str:
    """What a draft of transformers reads inside of its target, beside tokens; "": it drafts from tokens alone, as far as is known."""
    if is_gemma_assistant(model.config):
        return "keys and values of its target's cache"
    if is_dflash(model.config) or "context_hidden_states" in inspect.signature(model.forward).parameters:
        return "hidden states of its target"
    return ""


def read_layers(assistant: Any) -> dict[str, Shared]:
    """By the type of its layers, what a Gemma-4 assistant reads of a token."""
    attentions = [layer.self_attn for layer in assistant.model.layers]
    heads = assistant.config.get_text_config().num_attention_heads
    return {one.layer_type: Shared(heads // one.num_key_value_groups, one.head_dim) for one in attentions}


def shared_layers(target: PretrainedConfig) -> dict[str, Shared]:
    """The same of what a target shares; {}: it shares nothing."""
    text: Any = target.get_text_config(decoder=True)
    if text.model_type not in SHARING:
        return {}
    layers = zip(text.layer_types, text.per_layer_config, strict=True)
    return {kind: Shared(layer.num_key_value_heads, layer.head_dim) for kind, layer in layers}


def embedding_norm(embedding: nn.Module) -> nn.Module | None:
    """The norm that an embedding applies to what it looks up (Muse), which DFlash drafts do without; None: it has none."""
    return vars(embedding)["_modules"].get("embed_norm")
