"""`generate(custom_generate=...)`: our loop, entered through transformers' public argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from .._compat.generation import Generated, needs_synced_gpus
from ..commit.base import Draft
from ..config import OnlineSpecConfig
from ..config.adapters import Asked
from ..errors import UnsupportedError
from .batch import check_batch
from .checks import check_call, check_inputs, check_synced_gpus
from .loop import decode


class GenerateFn:
    """What `OnlineDraft.generate_fn` returns: hand it to `generate(custom_generate=...)`."""

    def __init__(self, draft: Draft, streamer: BaseStreamer | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._draft, self._streamer, self._tokenizer = draft, streamer, tokenizer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        # Named here, generate() hands it to us; it would want a tokenizer of its own, and that it never hands over.
        stop_strings: str | list[str] | None = None,
        onlinespec: OnlineSpecConfig | bool | None = None,
        adapter: Asked = None,
        inputs_tensor: Tensor | None = None,  # named here, generate() hands it to us
        **model_kwargs: Any,
    ) -> Generated | Tensor:
        self._draft.begin_anew_if_changed()
        self._draft.check_setting(onlinespec)
        # Whisper's own generate hands its arguments on in the configuration.
        said = vars(generation_config)
        onlinespec = said.get("onlinespec") if onlinespec is None else onlinespec
        adapter = said.get("adapter") if adapter is None else adapter
        # generate() keeps its own synced_gpus from such callables: what it would have been is found out here.
        synced_gpus = bool(model_kwargs.pop("synced_gpus", False)) or needs_synced_gpus(model)
        check_synced_gpus(synced_gpus, model, self._draft.model, generation_config)
        check_call(model, self._draft.model, generation_config, self._tokenizer, exit_layers=self._draft.exit_layers)
        check_inputs(model, input_ids, generation_config, model_kwargs)
        stopping_criteria = _with_stop_strings(stopping_criteria, stop_strings, self._tokenizer)
        check_batch(model, input_ids, logits_processor, stopping_criteria, generation_config, self._streamer)
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())  # as generate does with a streamer of its own
        return decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            draft=self._draft,
            learn=onlinespec is not False,
            streamer=self._streamer,
            tokenizer=self._tokenizer,
            adapter=adapter,
            synced_gpus=synced_gpus,
            inputs_tensor=inputs_tensor,
            **model_kwargs,
        )


@dataclass(frozen=True)
class PreparedCall:
    """A call of `generate` that is prepared as far as its decoding method."""

    target: PreTrainedModel
    input_ids: Tensor  # (batch, prompt), padded on the left
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    inputs_tensor: Tensor | None = None  # what was given to an encoder, a row for each prompt


class Prepare:
    """Handed to `generate(custom_generate=...)`: keeps what is prepared, and decodes nothing.

    Attributes:
        call: what was prepared; None: `generate` did not come so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.call: PreparedCall | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | list[str] | None = None,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        if needs_synced_gpus(model):
            raise UnsupportedError(
                "Rows that begin and end one by one would run other forwards than the other processes."
            )
        criteria = _with_stop_strings(stopping_criteria, stop_strings, self._tokenizer)
        self.call = PreparedCall(
            model, input_ids, logits_processor, criteria, generation_config, model_kwargs, inputs_tensor
        )
        return input_ids


def _with_stop_strings(
    criteria: StoppingCriteriaList, stop_strings: str | list[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> StoppingCriteriaList:
    if stop_strings is None:
        return criteria
    if tokenizer is None:
        raise UnsupportedError(f"stop_strings={stop_strings!r} needs a tokenizer: use generate_fn(tokenizer=...).")
    return StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])
