"""PEFT's adapters: what of them we switch, and which of them change what `generate` does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any, cast

from torch import Tensor

from .versions import imports_of_others

with imports_of_others():
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Embedding as LoraEmbedding
    from peft.tuners.lora import LoraLayer
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )
    from transformers import PreTrainedModel

__all__ = [
    "LoraEmbedding",
    "LoraLayer",
    "activates_lora",
    "adapts_by_row",
    "adds_virtual_tokens",
    "base_of",
    "delta_weight",
    "disable_lora",
    "embedding_scale",
    "expert_names",
    "lora_factors",
]


def base_of(model: PeftModel) -> PreTrainedModel:
    """The model that the adapter is on: annotated as any module."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def adds_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether a PeftModel with prompt learning is generating through this model: it puts its own method in place."""
    prepare = model.prepare_inputs_for_generation
    owner = prepare.__self__ if inspect.ismethod(prepare) else None
    return isinstance(owner, PeftModel) and bool(owner.active_peft_config.is_prompt_learning)


def activates_lora(model: PreTrainedModel) -> bool:
    """Whether PEFT adapts the last tokens of each forward, counted from its end: an activated LoRA whose invocation was found."""
    configs = vars(model).get("peft_config", {})
    if not any(vars(config).get("alora_invocation_tokens") for config in configs.values()):
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    offsets = (hook.keywords.get("alora_offsets") or [] for hook in hooks if isinstance(hook, functools.partial))
    return any(offset is not None for row in offsets for offset in row)


def adapts_by_row(model: PreTrainedModel) -> bool:
    """Whether PEFT reads each row of a batch with an adapter of its own: the call was given `adapter_names`."""
    if "peft_config" not in vars(model):
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, functools.partial) and "adapter_names" in hook.keywords for hook in hooks)


def delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """What a LoRA layer adds to its weights, laid out as they are."""
    change: Tensor = cast(Any, layer).get_delta_weight(adapter)  # the base class of LoRA layers is annotated without it
    return change


def lora_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, bool]:
    """A (rank, in), B (out, rank), and whether the layer's weights are laid out as (in, out)."""
    if isinstance(layer, LoraEmbedding):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], True
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return cast(Tensor, a), cast(Tensor, b), bool(cast(Any, layer).fan_in_fan_out)


def disable_lora(layer: LoraLayer, disabled: bool) -> None:
    """Switches one LoRA layer off or on, without PEFT's walk over all modules."""
    layer._disable_adapters = disabled


def embedding_scale(layer: LoraEmbedding) -> Any:
    """The factor some models (Gemma) apply inside their embedding; None for the others."""
    return layer._get_embed_scale()


def expert_names(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """The module names that PEFT would turn into the fused expert weights of this class, which were modules in transformers 4."""
    found, mapping = set(), get_model_conversion_mapping(model)
    for name in names:
        settings = LoraConfig(target_modules=[name], task_type="CAUSAL_LM")
        try:
            convert_peft_config_for_transformers(settings, model, mapping)
        except ValueError:  # it wants all the names of one fused weight
            found.add(name)
        else:
            if name not in (settings.target_modules or ()):
                found.add(name)
    return found
