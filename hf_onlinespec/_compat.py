"""Every private name of transformers and PEFT that we touch, in one place.

Checked on what docs/versions.md lists. A release that moves one of these names breaks here and nowhere else.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .errors import VersionError

SUPPORTED = "transformers >= 5.18, < 5.25 with peft >= 0.20, < 0.22"
# With 5.17.0, drafted answers of GIT (with a picture) and of PaliGemma (without one) differ from plain ones, without an error.
OLDEST = (5, 18)


def _moved(error: Exception) -> VersionError:
    return VersionError(f"{error}. hf_onlinespec was run on {SUPPORTED}: install one of these.")


def refuse_older(installed: str) -> None:
    """Raises VersionError where a version of transformers is one that would answer otherwise than plain."""
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise _moved(ImportError(f"transformers {installed} is too old"))


refuse_older(transformers.__version__)

try:
    # The client of the Hub lets errors of its HTTP library through, whose name has changed before.
    from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook  # type: ignore[import-untyped]
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Embedding as LoraEmbedding
    from peft.tuners.lora import LoraLayer
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.generation import (
        CandidateGenerator,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        LogitsProcessorList,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )
    from transformers.generation.utils import GenerationMode, is_deepspeed_zero3_enabled, is_fsdp_managed_module
    from transformers.pipelines import base as pipelines_base
    from transformers.utils import ModelOutput

    from ._alterations import HOOK, Alterations, alterations
    from ._caches import (
        CACHE,
        cache_tensors,
        copied_prefix,
        crop,
        forgets,
        fresh_cache,
        held_tokens,
        own_way,
        record_past,
        returned_cache,
        rollback_obstacle,
        rolls_back,
    )
except ImportError as error:
    raise _moved(error) from error

__all__ = ["CACHE", "CandidateGenerator", "GenerationMode", "LoraEmbedding", "LoraLayer"]
__all__ += [
    "Alterations",
    "alterations",
    "cache_tensors",
    "copied_prefix",
    "crop",
    "forgets",
    "fresh_cache",
    "held_tokens",
]
__all__ += ["own_way", "record_past", "returned_cache", "rollback_obstacle", "rolls_back"]

# What a call of the Hub's client may raise: no network, no rights, nothing there, a name that is none; RuntimeError comes out
# of the upload of large files, ValueError of an answer that is no JSON.
HUB_FAILURES = (HFValidationError, HTTPError, RevisionResolutionError, OSError, RuntimeError, ValueError)

# The methods that `enable()` wraps.
WRAPPED = (
    (GenerationMixin, "_extract_generation_mode_kwargs"),
    (GenerationConfig, "get_generation_mode"),
    (GenerationMixin, "_validate_generation_mode"),
    (GenerationMixin, "_assisted_decoding"),
    (GenerationMixin, "_prepare_generation_config"),
    (GenerationMixin, "generate"),
    (pipelines_base, "load_assistant_model"),
)

# What `generate` fills in where the user has said nothing, see GenerationConfig._get_default_generation_params.
ASSISTANT_DEFAULTS = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}
_GIVEN = "_onlinespec_given"  # in a configuration that `generate` has prepared: those of them that the user has set


def keeps_extras(config: GenerationConfig) -> None:
    """Lets a configuration be loaded with what it was given beside transformers' own settings.

    Of one that was derived from a model's configuration, as it is where a model has no generation_config.json, transformers reads
    its own settings alone.
    """
    if vars(config).get("_from_model_config"):
        vars(config)["_from_model_config"] = False


def note_given(
    prepared: GenerationConfig, arguments: dict[str, Any], *configs: GenerationConfig | None
) -> GenerationConfig:
    """Notes in a prepared configuration what the user has set: a value that is the default cannot be told from it later.

    Args:
        arguments: of the call.
        configs: of the call and of the model, before they were merged.
    """
    found = {}
    for name in ASSISTANT_DEFAULTS:
        values = [arguments.get(name)]
        values += [given(config, name, prepared=False) for config in configs if config is not None]
        set_ones = [value for value in values if value is not None]
        if set_ones:
            found[name] = set_ones[0]
    vars(prepared)[_GIVEN] = found
    return prepared


@functools.cache
def _fresh() -> dict[str, Any]:
    """What a configuration holds that nobody has touched."""
    return vars(GenerationConfig())


def given(config: GenerationConfig, name: str, prepared: bool) -> Any:
    """The value of one of ASSISTANT_DEFAULTS that the user has set; None: they have not.

    Args:
        prepared: whether `generate` has filled in its defaults. Without our hooks it has noted nothing: then a value that is the
            default counts as not set.
    """
    noted = vars(config).get(_GIVEN)  # pipelines of transformers 5.18 pass a configuration that was prepared before
    if noted is not None and name in noted:
        return noted[name]
    filled = prepared or noted is not None
    value, unset = vars(config).get(name), ASSISTANT_DEFAULTS[name] if filled else _fresh().get(name)
    return None if type(value) is type(unset) and value == unset else value


def originals() -> list[Any]:
    """The methods that `enable()` wraps, as they are now. Raises VersionError where one has moved."""
    for owner, name in WRAPPED:
        if name not in vars(owner):
            raise _moved(AttributeError(f"transformers has no {owner.__name__}.{name}"))
    return [vars(owner)[name] for owner, name in WRAPPED]


SAMPLING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)

# Pure functions of (prefix, scores): applied to the draft too. A subclass may hold state, so types must match exactly.
STATELESS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def stateless(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Copies of the list's members that are known to be pure functions: what they keep for the size of the first scores is theirs."""
    return LogitsProcessorList([copy.copy(p) for p in processors if type(p) in STATELESS])


def own_loop(model: PreTrainedModel) -> str:
    """The part of greedy decoding and sampling that a model has a method of its own for, as some for speech have; "": none."""
    methods = {
        "_sample": type(model)._sample,  # which `generate` calls on the class
        "_prefill": model._prefill,
        "_has_unfinished_sequences": model._has_unfinished_sequences,
    }
    own = (name for name, method in methods.items() if _plain(method) is not vars(GenerationMixin)[name])
    return next(own, "")


def _plain(method: Any) -> Any:
    return method.__func__ if inspect.ismethod(method) else method


def own_generate(model: PreTrainedModel) -> str:
    """The name of a `generate` that stands in the place of transformers', in the class or in the model itself; "": there is none."""
    found = vars(model).get("generate", type(model).generate)
    if found is GenerationMixin.generate:
        return ""
    named = found if inspect.isfunction(found) or inspect.ismethod(found) else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def sample(model: PreTrainedModel, *arguments: Any, **model_kwargs: Any) -> Any:
    """Greedy decoding or sampling without a draft, as `generate` calls it; arguments and result are its own."""
    return type(model)._sample(model, *arguments, **model_kwargs)


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


def inner_model(model: Any) -> PreTrainedModel:
    """The model that `generate` runs on: what is inside of a PeftModel, or of what torch.compile returns."""
    while True:
        compiled = vars(model).get("_modules", {}).get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            inner: PreTrainedModel = model
            return inner


def uncompiled(model: Any) -> PreTrainedModel | PeftModel:
    """The model inside of what torch.compile returns; any other model is itself."""
    inner: PreTrainedModel | PeftModel = vars(model).get("_modules", {}).get("_orig_mod", model)
    return inner


def frames_of_generate() -> int:
    """How many frames of decorators lie between a caller of `generate` and its body."""
    return sum(1 for _ in _unwrapped(GenerationMixin.generate)) - 1


def _unwrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = vars(function).get("__wrapped__")


def takes_cache(model: nn.Module) -> bool:
    """Whether `forward` names an argument for the KV cache; one that names no tokens either tells nothing."""
    names = inspect.signature(model.forward).parameters
    return CACHE in names or "input_ids" not in names


# Where accelerate keeps its hook of a module, and what it put in the place of `forward`.
_HOOKED = (HOOK, "_old_forward", "forward")
_COMPILED = "_compiled_call_impl"  # what `module.compile()` made of the module's own forward


def module_state(module: nn.Module) -> dict[str, Any]:
    """What belongs to a module itself: without what compiling made of it, and without a hook of somebody else's.

    Accelerate's own hooks go along; a function put in place of `forward` (torch.compile) still runs the user's own module.
    """
    hook = vars(module).get(HOOK)
    foreign = hook is not None and not type(hook).__module__.startswith("accelerate.")
    return {
        name: value
        for name, value in vars(module).items()
        if not (name == _COMPILED or (foreign and name in _HOOKED) or (name == "forward" and inspect.isfunction(value)))
    }


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere between two forwards."""
    hooks = [vars(module).get(HOOK) for module in model.modules()]
    hooks += [part for hook in hooks if isinstance(hook, SequentialHook) for part in hook.hooks]
    return any(isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks)


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether the model carries a recurrent state that cannot be rolled back."""
    return bool(model._is_stateful)


def mask_length(generation_config: GenerationConfig) -> int | None:
    """Length of an all-ones attention mask that `generate` dropped, prefix in the cache included; None if none was."""
    return generation_config.__dict__.get("_mask_length")


# Families of transformers whose own `_update_model_kwargs_for_generation` is compared with plain decoding in the tests. The
# others (talkers, streamed audio) take states out of their outputs that belong to the last token of a forward alone.
CONTINUES = ("transformers.models.idefics.", "transformers.models.mllama.", "transformers.models.paligemma.")


def continues_inputs(model: PreTrainedModel) -> bool:
    """Whether a model has its own way to carry inputs from one forward to the next one."""
    return _continuation(model) is not GenerationMixin._update_model_kwargs_for_generation


def known_continuation(model: PreTrainedModel) -> bool:
    """Whether that way, if it is one of transformers' classes, is known to allow for several tokens in a forward."""
    module = f"{_continuation(model).__module__}."
    ours = not continues_inputs(model) or not module.startswith("transformers.")
    return ours or module.startswith(CONTINUES)


def _continuation(model: PreTrainedModel) -> Any:
    return _plain(model._update_model_kwargs_for_generation)


def continue_inputs(model: PreTrainedModel, outputs: ModelOutput | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs for the forward after the next token, without the cache."""
    inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=False)
    return {name: value for name, value in inputs.items() if name != CACHE}


def drops_cache(model: PreTrainedModel) -> bool:
    """Whether the model is in training with gradient checkpointing, under which transformers reads without the cache."""
    return any(module.training and vars(module).get("gradient_checkpointing") for module in model.modules())


def needs_synced_gpus(model: PreTrainedModel) -> bool:
    """Whether several processes hold one model, so that each has to run as many forwards as the longest of them."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return bool(sharded) and several and torch.distributed.get_world_size() > 1


def matmul_dtypes(device: str) -> set[torch.dtype | str]:
    """In what a device multiplies matrices of float32 now: "tf32", and what autocast makes of them, among others.

    A setting for another device counts too, where it does not say for which it is.
    """
    if torch.is_autocast_enabled(device):
        return {torch.get_autocast_dtype(device)}
    backends: Any = torch.backends
    try:
        settings = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
        settings = {backends.fp32_precision if setting == "none" else setting for setting in settings}
        if device == "cuda":  # convolutions are TF32 by default
            settings.add(backends.cudnn.conv.fp32_precision)
    except AttributeError:  # torch before 2.9 has one setting for all devices
        # "medium" is TF32 on CUDA, bfloat16 on a CPU.
        of_all = {"highest": "ieee", "high": "tf32", "medium": "tf32 bf16"}
        settings = {"ieee", *of_all[torch.get_float32_matmul_precision()].split()}
        if device == "cuda" and backends.cudnn.allow_tf32:
            settings.add("tf32")
    names: dict[str, torch.dtype | str] = {"tf32": "tf32", "bf16": torch.bfloat16}
    return {names.get(setting, torch.float32) for setting in settings}


def doubles(values: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it (MPS)."""
    return values.detach().cpu().double()


NO_LIMIT = 2**31
# Under which names configurations state the longest sequence; the first one found counts.
_LONGEST = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_GROWING = ("xglm",)  # their table of positions grows with the sequence


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence a model is made for; models without a stated bound (ALiBi) take any."""
    text = config.get_text_config(decoder=True)
    if text.model_type in _GROWING:
        return NO_LIMIT
    stated = (vars(text).get(text.attribute_map.get(name, name)) for name in _LONGEST)
    longest = next((int(n) for n in stated if n), NO_LIMIT)
    return longest if longest > 0 else NO_LIMIT


def keeps_logits(model: nn.Module) -> bool:
    """Whether `forward` can be told for how many last positions to compute logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def disable_lora(layer: LoraLayer, disabled: bool) -> None:
    """Switches one LoRA layer off or on, without PEFT's walk over all modules."""
    layer._disable_adapters = disabled


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
            if name not in settings.target_modules:
                found.add(name)
    return found


def embedding_scale(layer: LoraEmbedding) -> Any:
    """The factor some models (Gemma) apply inside their embedding; None for the others."""
    return layer._get_embed_scale()


def unpadded_size(config: PretrainedConfig) -> int | None:
    """How many logits a forward returns that leaves out padded rows of its head (Inkling); None: all of them."""
    return vars(config).get("unpadded_vocab_size")


def model_name(config: PretrainedConfig) -> str:
    """The name or folder that a model was loaded from; "": it was not loaded."""
    return str(config._name_or_path)


def commit_hash(config: PretrainedConfig) -> str | None:
    """The commit on the Hub that a model was loaded from; None: it was not loaded from there."""
    return vars(config).get("_commit_hash")
