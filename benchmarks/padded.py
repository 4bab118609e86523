"""A target that computes the same function at a larger cost: layers that add exactly zero.

The embedded target is tiny, and beside it even a tiny draft is dear. Real pairs have a draft that costs a much smaller part
of the target. The cost-padded target stands in for such a pair where none is at hand; every table that uses it says so.
"""

from __future__ import annotations

import copy
import re

import torch
from transformers import PreTrainedModel

SILENT = ("self_attn.o_proj.", "mlp.down_proj.")  # what a layer adds to the residual stream goes through these


def padded(target: PreTrainedModel, extra_layers: int) -> PreTrainedModel:
    """A new model: the target's layers, then `extra_layers` more whose attention and MLP end in zero weights.

    Their other weights are copies of the target's own layers, so that they compute with ordinary numbers. x + 0 = x in
    floating point: hidden states pass unchanged, and the logits are equal to the last bit.

    Args:
        target: a decoder whose layers are named as Llama's.
        extra_layers: 0 gives a plain copy.
    """
    own = target.config.num_hidden_layers
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = own + extra_layers
    weights = dict(target.state_dict())
    for name, weight in target.state_dict().items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            continue
        layer, inner = int(found[1]), found[2]
        for extra in range(own + layer, own + extra_layers, own):
            silent = inner.startswith(SILENT)
            weights[f"model.layers.{extra}.{inner}"] = torch.zeros_like(weight) if silent else weight
    with torch.random.fork_rng(devices=[]):  # the first values are thrown away
        model = type(target)(config).to(device=target.device, dtype=target.dtype).eval()
    model.load_state_dict(weights)
    model.generation_config = copy.deepcopy(target.generation_config)
    return model
