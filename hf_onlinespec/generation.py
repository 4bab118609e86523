"""The entry point: `generate(onlinespec=...)` is recognised and handed to our loop. `enable()` opens it, `disable()` shuts it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ._compat import (
    WRAPPED,
    GenerationMode,
    frames_of_generate,
    keeps_extras,
    note_given,
    originals,
    sample,
    uncompiled,
)
from .attachment import anything_attached, call_of, call_with, calling
from .commit.memory_draft import online_memory
from .config import OnlineSpecConfig
from .draft import OnlineDraft, online_draft
from .errors import ConfigError, OnlineSpecError, UnsupportedError
from .models.plain import no_model
from .share.loading import is_evolved, load_beside
from .verify.checks import check_call, check_inputs, check_mode, check_synced_gpus
from .verify.custom_generate import GenerateFn
from .verify.loop import decode

_originals: list[Any] = []  # what the wrapped methods were, in the order of WRAPPED; empty: not enabled


class _CustomArguments(dict[str, Any]):
    """What `generate` hands to a `custom_generate=` that is not ours."""


class _Settings(dict[str, Any]):
    """A config as plain JSON values, because transformers copies and prints its configurations; and as it was given.

    Where it reports is in the latter alone: it is not saved, and an object is not copied.
    """

    def __init__(self, config: OnlineSpecConfig) -> None:
        super().__init__(config.to_saved())
        self.config = config

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        return _Settings(self.config)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:  # pickled as the values alone
        return dict, (dict(self),)


class _OnlineSpecField:
    """`GenerationConfig.onlinespec`: its being an attribute lets `generate` accept the argument."""

    def __get__(self, config: GenerationConfig | None, owner: type) -> OnlineSpecConfig | bool | None:
        value = None if config is None else config.__dict__.get("onlinespec")
        if isinstance(value, _Settings):
            return value.config
        return OnlineSpecConfig.from_saved(value) if isinstance(value, dict) else value

    def __set__(self, config: GenerationConfig, value: OnlineSpecConfig | dict[str, Any] | bool | None) -> None:
        if isinstance(value, _Settings):
            value = value.config
        if isinstance(value, dict):
            value = OnlineSpecConfig.from_saved(value)
        if value is not None:
            keeps_extras(config)
        if isinstance(value, OnlineSpecConfig):
            config.__dict__["onlinespec"] = _Settings(value)
        elif value is None or isinstance(value, bool):
            config.__dict__["onlinespec"] = value
        else:
            raise ConfigError(f"onlinespec={value!r}: expected True, False or an OnlineSpecConfig.")


def enable() -> None:
    """Teaches `generate` the `onlinespec` argument. Done by importing hf_onlinespec; a second call changes nothing."""
    if _originals:
        return
    _originals.extend(originals())
    extract, get_mode, validate, assisted, prepare, generate, load_assistant = _originals

    @functools.wraps(extract)
    def _extract_generation_mode_kwargs(self: Any, custom_generate: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = extract(self, custom_generate, *args, **kwargs)
        call = call_of(self)
        others = callable(custom_generate) and type(custom_generate) is not GenerateFn
        if call is not None:
            call.begin(
                found, chosen="assistant_model" in found or type(custom_generate) is GenerateFn, elsewhere=others
            )
        return _CustomArguments(found) if others else found

    @functools.wraps(get_mode)
    def get_generation_mode(self: GenerationConfig, assistant_model: Any = None) -> GenerationMode:
        call = call_with(self)
        if _is_ours(self, assistant_model):
            check_mode(self, get_mode(self))
        elif call is None or not call.accepts():
            return get_mode(self, assistant_model)
        return GenerationMode.ASSISTED_GENERATION

    @functools.wraps(validate)
    def _validate_generation_mode(self: Any, mode: Any, config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
        assistant = mode_kwargs.get("assistant_model")
        if isinstance(mode_kwargs, _CustomArguments) and _wanted(config):
            warnings.warn(
                f"onlinespec={_wanted(config)!r} is ignored: custom_generate= decodes in its place. Leave one of the two out.",
                stacklevel=3 + frames_of_generate(),
            )
        if isinstance(assistant, OnlineDraft):
            assistant.begin_anew_if_changed()
        call = call_of(self)
        if call is not None and assistant is None and _wanted(config):
            assistant = call.attachment.draft
        if mode == GenerationMode.ASSISTED_GENERATION and _is_ours(config, assistant):
            if isinstance(assistant, nn.Module):
                assistant = uncompiled(assistant)
            if assistant is not None and not isinstance(assistant, OnlineDraft | PreTrainedModel | PeftModel):
                raise no_model(assistant)
            check_synced_gpus(bool(mode_kwargs.get("synced_gpus")))
            tokenizers = [mode_kwargs.get(name) for name in ("tokenizer", "assistant_tokenizer")]
            check_call(self, assistant.model if isinstance(assistant, OnlineDraft) else assistant, config, *tokenizers)
            # Vocabularies are compared here; transformers asks for two tokenizers wherever sizes differ, and refuses them otherwise.
            ours = ("assistant_model", "assistant_tokenizer")
            mode_kwargs = {name: value for name, value in mode_kwargs.items() if name not in ours}
        if call is not None and call.served:
            mode = get_mode(config)  # a class that names the modes it supports means plain decoding's
        validate(self, mode, config, mode_kwargs)

    @functools.wraps(assisted)
    def _assisted_decoding(
        self: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        arguments = (self, input_ids, logits_processor, stopping_criteria, generation_config)
        call = call_of(self)
        common = {
            "streamer": streamer,
            "tokenizer": tokenizer,
            "assistant_tokenizer": assistant_tokenizer,
            **model_kwargs,
        }
        if call is not None and call.served:
            try:
                check_inputs(self, input_ids, generation_config, model_kwargs)
                draft = call.attachment.drafts_for(self)
                call.prove(input_ids, model_kwargs)
            except OnlineSpecError as reason:
                call.reason = reason
            if call.reason is not None:
                given = {name: value for name, value in common.items() if value is not None or name in model_kwargs}
                return sample(*arguments, synced_gpus=synced_gpus, **given)
            try:
                return decode(*arguments, draft=draft, **common)
            except UnsupportedError as reason:  # the target's first forwards have shown it
                call.refuse(reason)
                raise
        if not _is_ours(generation_config, assistant_model):
            return assisted(
                *arguments,
                synced_gpus=synced_gpus,
                inputs_tensor=inputs_tensor,
                assistant_model=assistant_model,
                **common,
            )
        check_inputs(self, input_ids, generation_config, model_kwargs)  # before a draft is set up for nothing
        wanted = _wanted(generation_config)
        settings = wanted if isinstance(wanted, OnlineSpecConfig) else None
        if assistant_model is None and call is not None:
            assistant_model = call.attachment.draft
        if assistant_model is None and settings is not None and settings.memory_tokens == 0:
            raise UnsupportedError(
                "memory_tokens=0 without assistant_model: nothing could draft. Pass a draft, or leave onlinespec out."
            )
        draft = online_memory(self, settings) if assistant_model is None else online_draft(assistant_model, settings)
        return decode(
            *arguments,
            draft=draft,
            learn=wanted is not False,
            **common,
        )

    @functools.wraps(prepare)
    def _prepare_generation_config(
        self: Any, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> Any:
        config, model_kwargs = prepare(self, generation_config, *args, **kwargs)
        config = note_given(config, kwargs, generation_config, self.generation_config)
        call = call_of(self)
        if call is not None and not call.explicit:
            call.explicit = _says(kwargs.get("onlinespec"), generation_config, self.generation_config)
            if not call.explicit:
                config.onlinespec = None  # what was saved with the model does not go before what was attached
                call.config = config
        return config, model_kwargs

    @functools.wraps(generate)
    def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
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

    @functools.wraps(load_assistant)
    def load_assistant_model(model: Any, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        if isinstance(assistant_model, str) and is_evolved(assistant_model):
            assistant_model = OnlineDraft.of(load_beside(assistant_model, model))
        return load_assistant(model, assistant_model, assistant_tokenizer)

    wrappers = (
        _extract_generation_mode_kwargs,
        get_generation_mode,
        _validate_generation_mode,
        _assisted_decoding,
        _prepare_generation_config,
        _generate,
        load_assistant_model,
    )
    for (owner, name), wrapper in zip(WRAPPED, wrappers, strict=True):
        setattr(owner, name, wrapper)
    GenerationConfig.onlinespec = _OnlineSpecField()


def disable() -> None:
    """Restores transformers exactly as it was. Drafts keep what they learned; what is attached rests until `enable()`."""
    if not _originals:
        return
    for (owner, name), original in zip(WRAPPED, _originals, strict=True):
        setattr(owner, name, original)
    del GenerationConfig.onlinespec
    _originals.clear()


def _says(argument: Any, config: GenerationConfig | None, saved: GenerationConfig) -> bool:
    """Whether a call itself says something about drafting: in an argument, or in a configuration that is no copy of the model's."""
    if argument is not None:
        return True
    return config is not None and _wanted(config) not in (None, _wanted(saved))


def _wanted(config: GenerationConfig) -> OnlineSpecConfig | bool | None:
    return config.onlinespec


def _is_ours(config: GenerationConfig, assistant: Any) -> bool:
    """An OnlineDraft always decodes in our loop (with onlinespec=False it only drafts); any other draft when asked to."""
    return isinstance(assistant, OnlineDraft) or bool(_wanted(config))
