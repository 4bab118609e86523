"""What a model's attention can be asked for: whether it takes a mask of a tree of tokens."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .caches import keeps_all
from .versions import imports_of_others

with imports_of_others():
    from transformers import PretrainedConfig

MASKED = ("sdpa", "eager")  # implementations that take a 4-D mask as it is
ALIBI = ("bloom", "mpt")  # they state it nowhere, or inside of a part of their configuration


def attention_kind(config: PretrainedConfig) -> str:
    """The implementation of attention that a model uses now; of a model with several parts, the text decoder."""
    return str(config.get_text_config(decoder=True)._attn_implementation)


def take_boolean_masks(config: PretrainedConfig) -> None:
    """From now on, a model that holds this configuration takes masks of (batch, 1, rows, keys) that are boolean."""
    config._attn_implementation = "sdpa"


def tree_obstacle(config: PretrainedConfig, places: int | None = None) -> str:
    """What in a configuration keeps from verifying a tree, said of the model; "": nothing.

    In a tree the places of the keys are not the positions of the tokens: nothing may be counted in places.

    Args:
        places: that a request takes at most; None: not known.
    """
    text = config.get_text_config(decoder=True)
    stated, kind = vars(text), attention_kind(config)
    if kind not in MASKED:
        return f"runs with {kind!r} attention, which takes no mask of a tree"
    if not keeps_all(config, places) or "local" in (stated.get("attention_layers") or ()):
        return "has layers that attend to a window of tokens, or keep more than keys and values"
    if stated.get("alibi") or text.model_type in ALIBI:
        return "knows its positions by ALiBi, which counts places"
    if stated.get("attn_temperature_tuning"):
        return "scales its attention by the place of a token"
    return ""


def has_sinks(model: nn.Module) -> bool:
    """Whether its attention has sinks: logits of its own beside those of the tokens."""
    return any("sink" in name.rpartition(".")[2] for name, _ in model.named_parameters())


def takes_positions(model: nn.Module, name: str = "position_ids") -> bool:
    """Whether `forward` takes the positions of the tokens, under this name."""
    parameters: dict[str, Any] = dict(inspect.signature(model.forward).parameters)
    return name in parameters
