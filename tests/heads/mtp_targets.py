"""Tiny targets whose checkpoint has an MTP layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_layers

from tests.architectures import ARCHITECTURES, Architecture
from tests.tiny_models import random_model

MLA = ("deepseek_v3", "sarvam_mla")


def mtp_target(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> PreTrainedModel:
    """A target whose checkpoint has an MTP layer behind the others, as DeepSeek's has."""
    more: dict[str, Any] = {"num_mtp_layers": 1} | ({"num_key_value_heads": 4} if kind in MLA else {})
    if kind == "bailing_hybrid":
        more |= next(row.arguments for row in ARCHITECTURES if row.name == kind) | {
            "mtp_layer_types": ["full_attention"],
            "mtp_mlp_layer_types": ["dense"],
        }
    target = random_model(Architecture(kind, "rope", "full", "", "", more).config(), seed)
    layers = target.config.num_hidden_layers
    # Each class knows the checkpoints that were released by the number of their layers.
    monkeypatch.setattr(type(target), "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{layers}.*"])
    target.save_pretrained(folder)
    torch.manual_seed(seed + 1)
    parts = {  # whose experts transformers leaves without values: they come from files
        name: 0.3 * torch.randn_like(value) if value.dim() > 1 else torch.ones_like(value)
        for name, value in modeling_layers.MtpModel(target, 1).layers[0].state_dict().items()
    }
    file = folder / "model.safetensors"
    names = {name: f"model.layers.{layers}.{name.removeprefix('mtp_block.')}" for name in parts}
    save_file(load_file(file) | {names[name]: value for name, value in parts.items()}, file, {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).eval()
