"""What models are made of, and what their configurations say of them."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapters import base_of
from .alterations import HOOK
from .caches import CACHE
from .modules import modules_of
from .versions import imports_of_others

with imports_of_others():
    from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook  # type: ignore[import-untyped]
    from peft import PeftModel
    from transformers import (
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
        PretrainedConfig,
        PreTrainedModel,
    )


def inner_model(model: Any) -> PreTrainedModel:
    """The model that `generate` runs on: what is inside of a PeftModel, or of what torch.compile returns."""
    while True:
        compiled = vars(model).get("_modules", {}).get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif isinstance(model, PeftModel):
            model = base_of(model)
        else:
            inner: PreTrainedModel = model
            return inner


def uncompiled(model: Any) -> PreTrainedModel | PeftModel:
    """The model inside of what torch.compile returns; any other model is itself."""
    inner: PreTrainedModel | PeftModel = vars(model).get("_modules", {}).get("_orig_mod", model)
    return inner


def takes_cache(model: nn.Module) -> bool:
    """Whether `forward` names an argument for the KV cache; one that names no tokens either tells nothing."""
    names = inspect.signature(model.forward).parameters
    return CACHE in names or "input_ids" not in names


def keeps_logits(model: nn.Module) -> bool:
    """Whether `forward` can be told for how many last positions to compute logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def drops_cache(model: PreTrainedModel) -> bool:
    """Whether the model is in training with gradient checkpointing, under which transformers reads without the cache."""
    return any(module.training and vars(module).get("gradient_checkpointing") for module in modules_of(model))


def weight_of(layer: nn.Module) -> Tensor:
    """The weights of an embedding, a head or a linear layer: torch annotates every attribute as a tensor or a module."""
    return cast(Tensor, layer.weight)


def placed(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The model, moved to a device. Transformers wraps `to` in a way that hides its arguments from a type checker."""
    return model.to(device)  # type: ignore[arg-type]


def auto_class(config: PretrainedConfig) -> Any:
    """Which of transformers' classes loads a language model of this configuration, with its head."""
    if not config.is_encoder_decoder:
        return AutoModelForCausalLM
    return AutoModelForSpeechSeq2Seq if type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING else AutoModelForSeq2SeqLM


# Where accelerate keeps its hook of a module, and what it put in the place of `forward`.
_HOOKED = (HOOK, "_old_forward", "forward")


_COMPILED = "_compiled_call_impl"  # what `module.compile()` made of the module's own forward
_RECORDS = "_output_capturing_hooks_installed"  # whether a module has the hooks that hand out its hidden states (5.24)


def module_state(module: nn.Module) -> dict[str, Any]:
    """What belongs to a module itself: without what compiling made of it, without a hook of somebody else's, and without the note
    that hooks which are left behind are there.

    Accelerate's own hooks go along; a function put in place of `forward` (torch.compile) still runs the user's own module.
    """
    hook = vars(module).get(HOOK)
    foreign = hook is not None and not type(hook).__module__.startswith("accelerate.")
    return {
        name: value
        for name, value in vars(module).items()
        if not (
            name in (_COMPILED, _RECORDS)
            or (foreign and name in _HOOKED)
            or (name == "forward" and inspect.isfunction(value))
        )
    }


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere between two forwards."""
    hooks = [vars(module).get(HOOK) for module in model.modules()]
    hooks += [part for hook in hooks if isinstance(hook, SequentialHook) for part in hook.hooks]
    return any(isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks)


def is_split(model: PreTrainedModel) -> bool:
    """Whether several processes hold parts of each layer, and compute every forward together (tensor parallelism)."""
    return (model.tp_size or 1) > 1


NO_LIMIT = 2**31


# Under which names configurations state the longest sequence; the first one found counts.
_LONGEST = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_decoder_position_embeddings"),
    "max_seq_len",
)
_LONGEST_SOURCE = ("max_source_positions", "max_encoder_position_embeddings", "max_position_embeddings")


def writing_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of what writes: of an encoder–decoder its decoder's, with the widths and layers of that.

    `get_text_config` leaves T5's family the number of layers of the encoder (5.24).
    """
    text = config.get_text_config(decoder=True)
    layers = vars(config).get("num_decoder_layers")
    if text is not config and config.is_encoder_decoder and layers is not None:  # it is a copy
        name = "num_encoder_layers" if text.model_type == "prophetnet" else "num_hidden_layers"  # what stands behind it
        setattr(text, name, layers)
    return text


_GROWING = ("xglm",)  # their table of positions grows with the sequence
_GROWING_SOURCE = ("fsmt", "m2m_100", "nllb-moe")  # that of their encoder does


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence a model is made for; models without a stated bound (ALiBi) take any."""
    text = config.get_text_config(decoder=True)
    if text.model_type in _GROWING:
        return NO_LIMIT
    stated = (vars(text).get(text.attribute_map.get(name, name)) for name in _LONGEST)
    longest = next((int(n) for n in stated if n), NO_LIMIT)
    return longest if longest > 0 else NO_LIMIT


def max_source_positions(config: PretrainedConfig) -> int:
    """The longest text that the encoder of an encoder–decoder is made for; without a stated bound (T5), or where
    its table of positions grows, it reads any."""
    encoder = config.get_text_config(encoder=True)
    if encoder.model_type in _GROWING_SOURCE:
        return NO_LIMIT
    stated = (vars(encoder).get(name) for name in _LONGEST_SOURCE)
    return next((int(n) for n in stated if n), NO_LIMIT)


def unpadded_size(config: PretrainedConfig) -> int | None:
    """How many logits a forward returns that leaves out padded rows of its head (Inkling); None: all of them."""
    return vars(config).get("unpadded_vocab_size")


def model_name(config: PretrainedConfig) -> str:
    """The name or folder that a model was loaded from; "": it was not loaded."""
    return str(config._name_or_path)


def commit_hash(config: PretrainedConfig) -> str | None:
    """The commit on the Hub that a model was loaded from; None: it was not loaded from there."""
    return vars(config).get("_commit_hash")
