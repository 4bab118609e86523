"""Whether a target's quantised layers compute each token by itself, tried once for each state of its weights.

Dynamic quantisation rounds activations to multiples of a scale that it takes from what a forward reads. Where that is one scale for
all tokens of a forward, or where one token decides how the others are rounded (the outliers of LLM.int8), several tokens at once get
other logits than one after the other, beyond rounding. A scale for each token, or a fixed one, does not depend on the others.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.generation import is_sharded
from .._compat.modules import modules_of

# How often larger the other tokens are made: beyond every threshold for outliers, and no overflow in half precision. Measured on layers
# of torchao, bitsandbytes, HQQ and torch.ao: what depends on other tokens moves by 9e-3 (LLM.int8) to 1 of the largest number, and what
# does not by exactly 0, as both forwards have one shape.
LARGER = 1000.0
TOKENS = 4  # of a trial; chosen: more than one
NOISE = 8.0  # times what the same forward differs by when it is repeated: kernels that add up in any order. Chosen

# For each target why it is decoded plainly, by the classes of its layers and of their weights.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def why_one_by_one(target: PreTrainedModel, device: torch.device) -> str:
    """Why the tokens of this target cannot be verified together, on account of its quantisation; "": they can.

    Args:
        device: of the request's tokens, where layers without tensors of their own are tried.
    """
    layers = [module for module in modules_of(target) if _is_linear(module)]
    quantized = vars(target.config).get("quantization_config") is not None
    if not quantized and not any(_is_quantized(layer) for layer in layers):
        return ""
    state = tuple((weakref.ref(type(layer)), weakref.ref(type(_weight(layer)))) for layer in layers)
    tried = _tried.setdefault(target, {})
    if state not in tried:
        tried[state] = _try(target, device)
    return tried[state]


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, of whatever library. PEFT's hold another one inside."""
    return "in_features" in vars(module) and not type(module).__module__.startswith("peft.")


def _weight(layer: nn.Module) -> Tensor | None:
    return vars(layer)["_parameters"].get("weight")


def _is_quantized(layer: nn.Module) -> bool:
    """Whether it is not a linear layer of torch, or a part of a model of transformers' (a router; a projector of pictures, which has no weight
    of its own), with an ordinary weight.
    """
    weight, own = _weight(layer), type(layer).__module__.startswith("transformers.models.")
    if own and weight is None:
        return False
    ordinary = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    return not (ordinary and (own or type(layer) is nn.Linear))


def _try(target: PreTrainedModel, device: torch.device) -> str:
    name = type(target).__name__
    if is_sharded(target):
        return (
            f"the target {name} is quantised, and each process holds a part of its layers: they cannot be tried alone"
        )
    generator = torch.Generator().manual_seed(0)
    for path, layer in target.named_modules():
        if not _is_linear(layer) or not (_is_quantized(layer) or "forward" in vars(layer)):
            continue
        tokens = torch.randn(1, TOKENS, vars(layer)["in_features"], generator=generator).to(_device(layer, device))
        try:
            mixes = _mixes(layer, tokens.to(target.dtype))
        except Exception as error:  # kernels may want what a trial does not know
            return f"the target {name} has a quantised layer that could not be tried ({path}): {type(error).__name__}"
        if mixes:
            return (
                f"the target {name} quantises the tokens of a forward together ({type(layer).__name__} {path}): "
                "several at once would get other logits than one by one"
            )
    return ""


def _device(layer: nn.Module, device: torch.device) -> torch.device:
    """Where it computes. What accelerate has put elsewhere for now moves its inputs itself."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return device if not tensors or tensors[0].device.type == "meta" else tensors[0].device


def _mixes(layer: nn.Module, tokens: Tensor) -> bool:
    """Whether what a layer makes of the first token (1, n, width) depends on the others."""
    larger = tokens.clone()
    larger[:, 1:] *= LARGER
    with torch.inference_mode(False), torch.no_grad():
        alone, beside = (layer.forward(inputs)[0, 0].float() for inputs in (tokens, larger))  # without anybody's hooks
        moved = float((alone - beside).abs().max())
        if moved == 0:
            return False
        noise = max(float((alone - layer.forward(tokens)[0, 0].float()).abs().max()) for _ in range(2))
    return not moved <= NOISE * noise
