"""What we use of `generate`: the methods that `enable()` wraps, its modes and processors, and parts that models have of their own."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from .caches import CACHE, held_tokens
from .versions import imports_of_others, moved

with imports_of_others():
    from transformers import EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.generation import (
        EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        GenerateDecoderOnlyOutput,
        GenerateEncoderDecoderOutput,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        LogitsProcessorList,
        MaxLengthCriteria,
        MaxTimeCriteria,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        PrefixConstrainedLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        StoppingCriteriaList,
        StopStringCriteria,
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )
    from transformers.generation.stopping_criteria import EosTokenCriteria
    from transformers.generation.utils import GenerationMode, is_deepspeed_zero3_enabled, is_fsdp_managed_module
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin
    from transformers.pipelines import base as pipelines_base
    from transformers.utils import ModelOutput

try:
    from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL as _DROPPED
except ImportError:  # earlier releases name them in each class
    _DROPPED = ()  # type: ignore[assignment]

# What `generate` returns of greedy decoding and sampling with return_dict_in_generate.
Generated: TypeAlias = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput

# The methods that `enable()` wraps.
WRAPPED = (
    (GenerationMixin, "_extract_generation_mode_kwargs"),
    (GenerationConfig, "get_generation_mode"),
    (GenerationMixin, "_validate_generation_mode"),
    (GenerationMixin, "_assisted_decoding"),
    (GenerationMixin, "_prepare_generation_config"),
    (GenerationMixin, "generate"),
    (pipelines_base, "load_assistant_model"),
    (WhisperGenerationMixin, "generate"),
)


# What `generate` fills in where the user has said nothing, see GenerationConfig._get_default_generation_params.
ASSISTANT_DEFAULTS = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


_GIVEN = "_onlinespec_given"  # in a configuration that `generate` has prepared: those of them that the user has set
_CACHE_GIVEN = "_onlinespec_cache_given"  # the same: whether the user has passed a cache


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
    # From transformers 5.24 on `generate` takes either name.
    vars(prepared)[_CACHE_GIVEN] = any(arguments.get(name) is not None for name in (CACHE, "past_key_values"))
    return prepared


def hands_back_cache(config: GenerationConfig) -> bool:
    """Whether the caller of `generate` has the cache afterwards: as a part of the result, or as they have passed it.

    Without our hooks nobody has noted whether they have: then they may have.
    """
    return bool(config.return_dict_in_generate or vars(config).get(_CACHE_GIVEN, True))


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
            raise moved(AttributeError(f"transformers has no {owner.__name__}.{name}"))
    return [vars(owner)[name] for owner, name in WRAPPED]


def frames_of_generate() -> int:
    """How many frames of decorators lie between a caller of `generate` and its body."""
    return sum(1 for _ in _unwrapped(GenerationMixin.generate)) - 1


def _unwrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = vars(function).get("__wrapped__")


def early_exit_of(config: GenerationConfig) -> int | None:
    """The layers of the target that are asked to draft; None: none are."""
    layers: int | None = vars(config).get("assistant_early_exit")
    return layers


def asks_mtp(config: GenerationConfig) -> bool:
    """Whether the MTP layers of the target's checkpoint are asked to draft."""
    return bool(vars(config).get("use_mtp"))


def plain_mode(config: GenerationConfig) -> GenerationMode:
    """Of a call that was found to decode greedily or to sample, how it would without a draft."""
    return GenerationMode.SAMPLE if config.do_sample else GenerationMode.GREEDY_SEARCH


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


# What transformers itself has that says of a row what it says of it alone, and that keeps nothing from call to call: types must
# match exactly, as above.
OF_EACH_ROW = (
    *STATELESS,
    EosTokenCriteria,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MaxTimeCriteria,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
)


def known_of_row(one: Any, row: int, rows: int = 0) -> Any:
    """What says of a row alone what a processor or criterion of transformers' own says of it in a batch: itself, for most of them.

    None: it is none that is known to say of a row what it says of it alone.

    Args:
        rows: of the batch, which may have several for each source; 0: as many as sources.
    """
    if type(one) is EncoderNoRepeatNGramLogitsProcessor:
        of_row = copy.copy(one)
        place = row * one.batch_size // rows if rows else row
        of_row.batch_size, of_row.generated_ngrams = 1, one.generated_ngrams[place : place + 1]
        return of_row
    if type(one) is EncoderRepetitionPenaltyLogitsProcessor:
        penalizing = copy.copy(one)
        # Transformers penalizes the first rows alone where there are more rows than sources.
        penalizing.encoder_input_ids = cast(torch.LongTensor, one.encoder_input_ids[row : row + 1])
        return penalizing
    if type(one) is PrefixConstrainedLogitsProcessor:  # it asks the caller by the number of the row
        allowed = one._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, tokens: allowed(row, tokens), 1)
    if type(one) is RepetitionPenaltyLogitsProcessor and isinstance(one.prompt_ignore_length, Tensor):  # the padding
        own = copy.copy(one)
        own.prompt_ignore_length = one.prompt_ignore_length[row : row + 1]
        return own
    return one if type(one) in OF_EACH_ROW else None


def goes_on_finished(criteria: StoppingCriteriaList) -> str:
    """Why `generate` lets rows that have ended write on until all of them have, instead of padding them; "": it does not.

    It asks whether any criterion has an attribute `eos_token_id`; one of somebody else's that has counts here as none.
    """
    if any(isinstance(criterion, EosTokenCriteria) for criterion in criteria):
        return ""
    others = [type(criterion).__name__ for criterion in criteria if type(criterion) is not MaxLengthCriteria]
    return f"{others[0]} without a token that ends a text: rows write on until all of them have ended" if others else ""


def pad_token(config: GenerationConfig) -> int:
    """What rows that have ended are padded with; 0 where none is needed, as all of them end together."""
    found = vars(config).get("_pad_token_tensor")
    return 0 if found is None else int(found)


def stateless(processors: LogitsProcessorList, row: int = 0) -> LogitsProcessorList:
    """Copies of the list's members that are known to be pure functions: what they keep for the size of the first scores is theirs.

    Args:
        row: that they are called with, alone.
    """
    return LogitsProcessorList([copy.copy(known_of_row(p, row)) for p in processors if type(p) in STATELESS])


class GenerativeModel(Protocol):
    """What we call of a model that generates: transformers loads one as a PreTrainedModel, which is annotated without it."""

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Any: ...

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]: ...

    def _supports_default_dynamic_cache(self) -> bool: ...

    def _has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool: ...

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput | None, model_kwargs: dict[str, Any], is_encoder_decoder: bool
    ) -> dict[str, Any]: ...


def generative(model: PreTrainedModel) -> GenerativeModel:
    """The same model, for the type checker: as one that generates."""
    return cast(GenerativeModel, model)


def sampled_at(temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that sample from the whole vocabulary at a temperature; 0: greedy.

    A model's own generation_config may say otherwise, and transformers' default keeps the 50 most probable tokens alone.
    """
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def processed_scores(processors: LogitsProcessorList, prefix: Tensor, scores: Tensor) -> Tensor:
    """Scores as the processors leave them, both (batch, vocab). They are annotated for LongTensor, which no tensor is."""
    return processors(cast(torch.LongTensor, prefix), scores)


def generated_output(
    sequences: Tensor, scores: tuple[Tensor, ...] | None, logits: tuple[Tensor, ...] | None, cache: Any
) -> Generated:
    """What `generate` returns with return_dict_in_generate: sequences (batch, L), scores and logits (batch, vocab) a token."""
    fields: dict[str, Any] = {"sequences": sequences, "scores": scores, "logits": logits, CACHE: cache}
    if isinstance(cache, EncoderDecoderCache):
        return GenerateEncoderDecoderOutput(**fields)
    return GenerateDecoderOnlyOutput(**fields)


def own_loop(model: PreTrainedModel) -> str:
    """The part of greedy decoding and sampling that a model has a method of its own for, as some for speech have; "": none."""
    methods = {
        "_sample": _of_class(model, "_sample"),  # which `generate` calls on the class
        "_prefill": model._prefill,
        "_has_unfinished_sequences": model._has_unfinished_sequences,
    }
    own = (name for name, method in methods.items() if _plain(method) is not vars(GenerationMixin)[name])
    return next(own, "")


def _of_class(model: PreTrainedModel, name: str) -> Any:
    """A method that the class of a model that generates has."""
    return getattr(type(model), name)


def _plain(method: Any) -> Any:
    return method.__func__ if inspect.ismethod(method) else method


def own_generate(model: PreTrainedModel) -> str:
    """The name of a `generate` that stands in the place of transformers', in the class or in the model itself; "": there is none."""
    found = vars(model).get("generate", _of_class(model, "generate"))
    if found is GenerationMixin.generate:
        return ""
    named = found if inspect.isfunction(found) or inspect.ismethod(found) else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def sample(model: PreTrainedModel, *arguments: Any, **model_kwargs: Any) -> Any:
    """Greedy decoding or sampling without a draft, as `generate` calls it; arguments and result are its own."""
    return _of_class(model, "_sample")(model, *arguments, **model_kwargs)


def hidden_tokens(input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> int:
    """Tokens of each row that are in its cache alone, of an earlier turn: `input_ids` are all tokens, or the new ones only.

    The attention mask covers all of them. One that is all ones was dropped by `generate`, which has noted its length.
    """
    cache = model_kwargs[CACHE]
    mask = model_kwargs.get("decoder_attention_mask" if isinstance(cache, EncoderDecoderCache) else "attention_mask")
    covered = vars(generation_config).get("_mask_length") if mask is None else mask.shape[1]
    return 0 if covered == input_ids.shape[1] else held_tokens(cache)


# Families of transformers whose own `_update_model_kwargs_for_generation` is compared with plain decoding in the tests. The
# others (talkers, streamed audio) take states out of their outputs that belong to the last token of a forward alone.
CONTINUES = ("transformers.models.idefics.", "transformers.models.mllama.", "transformers.models.paligemma.")


# What is said of pictures and sounds beside them: plain decoding hands it to every forward, and it is read with them alone.
_SAID_OF_PICTURES = {
    "image_grid_thw",
    "video_grid_thw",
    "image_merge_sizes",
    "video_merge_sizes",
    "second_per_grid_ts",
    "spatial_shapes",
    "feature_attention_mask",
    "audio_feature_lengths",
    "use_audio_in_video",
    "image_num_crops",
}
VECTORS = "inputs_embeds"  # of a prompt, beside its tokens: `generate` has them read in their place, once


def read_once(name: str) -> bool:
    """Whether an input of a model of transformers' is read with the prompt alone, as a part of a picture or a sound is."""
    return name in _DROPPED or name in _SAID_OF_PICTURES or name == VECTORS


def is_transformers(model: PreTrainedModel) -> bool:
    """Whether a model is of one of transformers' own classes."""
    return type(model).__module__.startswith("transformers.")


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
    encoder_decoder = bool(model.config.is_encoder_decoder)
    inputs = generative(model)._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=encoder_decoder)
    return {name: value for name, value in inputs.items() if name != CACHE}


def needs_synced_gpus(model: PreTrainedModel) -> bool:
    """Whether several processes hold one model, so that each has to run as many forwards as the longest of them."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return bool(sharded) and several and torch.distributed.get_world_size() > 1


def unfinished_anywhere(model: PreTrainedModel, done: bool, device: torch.device) -> bool:
    """Whether any of the processes that hold one model goes on; all of them ask at once, and say whether they are done."""
    return bool(generative(model)._has_unfinished_sequences(done, True, device=device))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether several processes hold parts of a model's weights (ZeRO-3, FSDP)."""
    from torch.distributed.tensor import DTensor  # not every torch has it, but who shards has

    parameters = list(model.parameters())
    zero = any("ds_id" in vars(parameter) for parameter in parameters)
    return zero or is_fsdp_managed_module(model) or any(isinstance(p, DTensor) for p in parameters)
