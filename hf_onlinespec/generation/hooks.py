"""`enable()` teaches transformers' `generate` the argument `onlinespec=` and looks up what is attached; `disable()` restores it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .._compat.generation import (
    WRAPPED,
    GenerationMode,
    asks_mtp,
    early_exit_of,
    frames_of_generate,
    note_given,
    originals,
    plain_mode,
    sample,
)
from .._compat.models import uncompiled
from .._compat.recurrent import is_recurrent
from ..commit.base import Draft
from ..commit.memory_draft import online_memory
from ..config import OnlineSpecConfig
from ..draft import OnlineDraft, online_draft
from ..errors import OnlineSpecError, UnsupportedError
from ..models.plain import no_model
from ..share.loading import is_evolved, load_beside
from ..verify.batch import check_batch
from ..verify.checks import check_call, check_inputs, check_mode, check_prompt, check_synced_gpus
from ..verify.custom_generate import GenerateFn, Prepare
from ..verify.loop import decode
from .call import AttachedCall, anything_attached, call_of, call_with, calling
from .growing import grown_draft
from .own_layers import own_layers_draft
from .setting import add_settings, is_ours, remove_settings, says, unset, wanted, wanted_adapter
from .whisper import give_back, wrap_whisper

Function = Callable[..., Any]

_originals: list[Function] = []  # what the wrapped methods were, in the order of WRAPPED; empty: not enabled


def enable() -> None:
    """Teaches `generate` the `onlinespec` argument. Done by importing hf_onlinespec; a second call changes nothing."""
    if _originals:
        return
    _originals.extend(originals())
    extract, get_mode, validate, assisted, prepare, generate, load_assistant, of_whisper = _originals
    wrappers = (
        _wrap_extract(extract),
        _wrap_get_mode(get_mode),
        _wrap_validate(validate, get_mode),
        _wrap_assisted(assisted),
        _wrap_prepare(prepare),
        _wrap_generate(generate),
        _wrap_load_assistant(load_assistant),
        wrap_whisper(of_whisper),
    )
    for (owner, name), wrapper in zip(WRAPPED, wrappers, strict=True):
        setattr(owner, name, wrapper)
    add_settings()


def disable() -> None:
    """Restores transformers exactly as it was. Drafts keep what they learned; what is attached rests until `enable()`."""
    if not _originals:
        return
    for (owner, name), original in zip(WRAPPED, _originals, strict=True):
        setattr(owner, name, original)
    remove_settings()
    _originals.clear()


class _OurArguments(dict[str, Any]):
    """What `generate` hands to `OnlineDraft.generate_fn`, which reads the adapter in the configuration too."""


class _CustomArguments(dict[str, Any]):
    """What `generate` hands to a `custom_generate=` that is not ours."""


def _wrap_extract(extract: Function) -> Function:
    @functools.wraps(extract)
    def _extract_generation_mode_kwargs(
        self: PreTrainedModel, custom_generate: object, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        found = extract(self, custom_generate, *args, **kwargs)
        call = call_of(self)
        ours = type(custom_generate) in (GenerateFn, Prepare)
        others = callable(custom_generate) and not ours
        if call is not None:
            call.begin(found, chosen="assistant_model" in found or ours, elsewhere=others)
        if others:
            return _CustomArguments(found)
        return _OurArguments(found) if type(custom_generate) is GenerateFn else found

    return _extract_generation_mode_kwargs


def _wrap_get_mode(get_mode: Function) -> Function:
    @functools.wraps(get_mode)
    def get_generation_mode(self: GenerationConfig, assistant_model: object = None) -> GenerationMode:
        call = call_with(self)
        if is_ours(self, assistant_model):
            check_mode(self, get_mode(self))
        elif call is None or not call.accepts():
            return get_mode(self, assistant_model)
        return GenerationMode.ASSISTED_GENERATION

    return get_generation_mode


def _wrap_validate(validate: Function, get_mode: Function) -> Function:
    @functools.wraps(validate)
    def _validate_generation_mode(
        self: PreTrainedModel, mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict[str, Any]
    ) -> None:
        assistant = mode_kwargs.get("assistant_model")
        if isinstance(mode_kwargs, _CustomArguments) and wanted(config):
            warnings.warn(
                f"onlinespec={wanted(config)!r} is ignored: custom_generate= decodes in its place. Leave one of the two out.",
                stacklevel=3 + frames_of_generate(),
            )
        if isinstance(assistant, Draft):
            assistant.begin_anew_if_changed()
        call = call_of(self)
        ours = is_ours(config, assistant) or isinstance(mode_kwargs, _OurArguments)
        if wanted_adapter(config) is not None and call is None and not ours:
            raise UnsupportedError(
                f"adapter={wanted_adapter(config)!r} in a call in which no draft of ours takes part. Pass a draft with onlinespec=True."
            )
        if call is not None and assistant is None and wanted(config):
            assistant = call.attachment.draft
        if mode == GenerationMode.ASSISTED_GENERATION and is_ours(config, assistant):
            _check_ours(self, assistant, config, mode_kwargs)
            # Vocabularies were compared; transformers asks for two tokenizers wherever sizes differ, and refuses them otherwise.
            told = ("assistant_model", "assistant_tokenizer")
            mode_kwargs = {name: value for name, value in mode_kwargs.items() if name not in told}
            if (config.num_return_sequences or 1) > 1 or is_recurrent(self):
                mode = plain_mode(
                    config
                )  # transformers' own assisted decoding takes one sequence, and no recurrent state
        if call is not None and call.served:
            mode = get_mode(config)  # a class that names the modes it supports means plain decoding's
        validate(self, mode, config, mode_kwargs)

    return _validate_generation_mode


def _check_ours(
    target: PreTrainedModel, assistant: object, config: GenerationConfig, mode_kwargs: dict[str, Any]
) -> None:
    """Raises what our loop would refuse the call with."""
    if isinstance(assistant, nn.Module):
        assistant = uncompiled(assistant)
    if assistant is not None and not isinstance(assistant, Draft | PreTrainedModel | PeftModel):
        raise no_model(assistant)
    model = assistant.model if isinstance(assistant, Draft) else assistant
    check_synced_gpus(bool(mode_kwargs.get("synced_gpus")), target, model, config)
    exit_layers, mtp = assistant.exit_layers if isinstance(assistant, Draft) else None, False
    if assistant is None:
        exit_layers = early_exit_of(config)
        mtp = exit_layers is None
    tokenizer, others = mode_kwargs.get("tokenizer"), mode_kwargs.get("assistant_tokenizer")
    check_call(target, model, config, tokenizer, others, exit_layers, mtp)


# The arguments of a decoding method that go before the named ones.
Positional = tuple[PreTrainedModel, Tensor, LogitsProcessorList, StoppingCriteriaList, GenerationConfig]


def _wrap_assisted(assisted: Function) -> Function:
    @functools.wraps(assisted)
    def _assisted_decoding(
        self: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        inputs_tensor: Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **model_kwargs: Any,
    ) -> Any:
        arguments = (self, input_ids, logits_processor, stopping_criteria, generation_config)
        named: dict[str, Any] = {
            "streamer": streamer,
            "tokenizer": tokenizer,
            "assistant_tokenizer": assistant_tokenizer,
        }
        call = call_of(self)
        if call is not None and call.served:
            return _decode_attached(call, arguments, synced_gpus, named, model_kwargs, inputs_tensor)
        if not is_ours(generation_config, assistant_model):
            return assisted(
                *arguments,
                synced_gpus=synced_gpus,
                inputs_tensor=inputs_tensor,
                assistant_model=assistant_model,
                **named,
                **model_kwargs,
            )
        check_inputs(self, input_ids, generation_config, model_kwargs)  # before a draft is set up for nothing
        check_batch(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        setting = wanted(generation_config)
        if assistant_model is None and call is not None:
            assistant_model = call.attachment.draft
        settings = setting if isinstance(setting, OnlineSpecConfig) else None
        exit_layers, mtp = early_exit_of(generation_config), asks_mtp(generation_config)
        draft = draft_for(self, assistant_model, settings, exit_layers, mtp)
        named["adapter"] = wanted_adapter(generation_config)
        learn = setting is not False
        named |= {"synced_gpus": synced_gpus, "inputs_tensor": inputs_tensor}
        return decode(*arguments, draft=draft, learn=learn, **(named | model_kwargs))

    return _assisted_decoding


def _decode_attached(
    call: AttachedCall,
    arguments: Positional,
    synced_gpus: bool,
    named: dict[str, Any],
    model_kwargs: dict[str, Any],
    inputs_tensor: Tensor | None,
) -> Any:
    """A call that what is attached serves, as far as its configuration tells; what its inputs rule out decodes plainly."""
    target, input_ids, processors, criteria, config = arguments
    try:
        check_inputs(target, input_ids, config, model_kwargs)
        check_batch(target, input_ids, processors, criteria, config, named["streamer"])
        draft = call.attachment.drafts_for(target)
        call.prove(input_ids, model_kwargs)
    except OnlineSpecError as reason:
        call.reason = reason
    if call.reason is not None:
        given = {name: value for name, value in named.items() if value is not None}
        return sample(*arguments, synced_gpus=synced_gpus, **(given | model_kwargs))
    named["adapter"] = wanted_adapter(config)
    try:
        return decode(*arguments, draft=draft, inputs_tensor=inputs_tensor, **(named | model_kwargs))
    except UnsupportedError as reason:  # the target's first forwards have shown it
        call.refuse(reason)
        raise


def draft_for(
    target: PreTrainedModel, assistant: Any, settings: OnlineSpecConfig | None, exit_layers: int | None, mtp: bool
) -> Draft:
    """What drafts in a call with onlinespec=: the given draft, the target's first layers, its MTP layers, or its suffix memory."""
    if isinstance(assistant, Draft):
        assistant.begin_anew_if_changed()
        assistant.check_setting(settings)
        return assistant
    if assistant is not None:
        return online_draft(assistant, settings, target)
    if exit_layers is not None or mtp:
        return own_layers_draft(target, exit_layers, settings)
    grown = grown_draft(target, settings)
    if grown is not None:
        return grown
    if settings is not None and not settings.guesses:
        raise UnsupportedError(
            "memory_tokens=0 and recycle=False without assistant_model: nothing could draft. Pass a draft, or leave onlinespec out."
        )
    return online_memory(target, settings)


def _wrap_prepare(prepare: Function) -> Function:
    @functools.wraps(prepare)
    def _prepare_generation_config(
        self: PreTrainedModel, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> Any:
        config, model_kwargs = prepare(self, generation_config, *args, **kwargs)
        config = note_given(config, kwargs, generation_config, self.generation_config)
        call = call_of(self)
        if call is not None and not call.explicit:
            call.explicit = says(kwargs.get("onlinespec"), generation_config, self.generation_config)
            if not call.explicit:
                unset(config)  # what was saved with the model does not go before what was attached
                call.config = config
        return config, model_kwargs

    return _prepare_generation_config


def _wrap_generate(generate: Function) -> Function:
    @functools.wraps(generate)
    def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        give_back(self, kwargs)
        if kwargs.get("onlinespec") or isinstance(kwargs.get("assistant_model"), Draft):
            check_prompt(self, args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")))
        if not anything_attached():
            return generate(self, *args, **kwargs)
        with calling(self, kwargs) as call:
            try:
                output = generate(self, *args, **kwargs)
            except UnsupportedError as error:
                if call is None or call.reason is not error or call.once:
                    raise
                with calling(self, kwargs):
                    output = generate(self, *args, **kwargs)
        if call is not None:
            call.finish()
        return output

    return _generate


def _wrap_load_assistant(load_assistant: Function) -> Function:
    @functools.wraps(load_assistant)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        if isinstance(assistant_model, str) and is_evolved(assistant_model):
            assistant_model = OnlineDraft.of(load_beside(assistant_model, model))
        return load_assistant(model, assistant_model, assistant_tokenizer)

    return load_assistant_model
