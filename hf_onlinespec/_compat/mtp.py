"""The layers that some checkpoints bring beside their model to say the token after the next one (multi-token prediction, MTP)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel

from .attention import take_boolean_masks

FULL, LAYERS = "full_attention", "num_mtp_layers"


@dataclass(frozen=True)
class MtpParts:
    """The first MTP layer of a target, as it was read from the target's checkpoint."""

    layer: nn.Module
    rotary: nn.Module  # a copy of the target's


def mtp_layers(config: PretrainedConfig) -> int:
    """How many MTP layers the checkpoint of a model has, as its configuration says."""
    text = config.get_text_config(decoder=True)
    return int(vars(text).get(text.attribute_map.get(LAYERS, LAYERS)) or 0)


def mtp_obstacle(target: PreTrainedModel) -> str:
    """Why the MTP layers of a target cannot draft here; "": they can."""
    if not mtp_layers(target.config):
        return "its configuration names none (num_mtp_layers)"
    types = vars(target.config.get_text_config(decoder=True)).get("mtp_layer_types")
    if types and types[0] != FULL:
        return f"its first one has {types[0]}, and a head sees all of its text"
    if not isinstance(vars(target.get_decoder())["_modules"].get("rotary_emb"), nn.Module):
        return "it has no rotary embedding, by which its first one would know the places of its tokens"
    return ""


def read_mtp(target: PreTrainedModel) -> MtpParts:
    """Reads the first one from the checkpoint that the target was loaded from. Raises whatever that does."""
    model = MtpModel.from_pretrained(target, device_map={"": str(target.device)})
    layer = model.layers[0]
    take_boolean_masks(model.config)
    return MtpParts(layer.requires_grad_(False), copy.deepcopy(cast(nn.Module, model.rotary_emb)))
