"""What a prompt of `generate_stream` may be, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.models import max_positions, max_source_positions
from .._compat.tokenizers import chat_inputs
from ..errors import ConfigError, brief
from ..models.encoders import known_source_ids
from ..models.vocabulary import Vocabulary

FORMS = ("prompt", "messages", "input_ids")  # keys of a dict, of which one says what is to be answered


@dataclass(frozen=True)
class Encoded:
    """A prompt as the target reads it."""

    index: int  # its place among all prompts, from 0
    prompt: Any  # as it was given
    tokens: Tensor  # (L,) on the CPU


class PromptReader:
    """Makes tokens of prompts.

    Args:
        tokenizer: None: prompts are token ids.
    """

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._encodes = bool(target.config.is_encoder_decoder)  # a prompt is what the encoder reads
        self._ids = known_source_ids(target) if self._encodes else Vocabulary.of(target).read
        self._positions = (
            max_source_positions(target.config) + 1 if self._encodes else max_positions(target.config)
        )  # a prompt has fewer tokens

    def read(self, index: int, prompt: Any) -> Encoded:
        """Raises whatever keeps a prompt from being read; a ConfigError where it is of no form, empty, or too long."""
        tokens = self._tokens(prompt)
        if not len(tokens):
            raise ConfigError(f"Prompt {index} has no tokens: there is nothing to answer. Leave it out.")
        if len(tokens) >= self._positions:
            reads = (
                f"encoder reads {self._positions - 1}"
                if self._encodes
                else f"target reads {self._positions}, new ones included"
            )
            raise ConfigError(f"Prompt {index} has {len(tokens)} tokens: the {reads}.")
        least, most = map(int, tokens.aminmax())
        if least < 0 or most >= self._ids:
            raise ConfigError(
                f"Prompt {index} has the token {least if least < 0 else most}: expected 0 to {self._ids - 1}."
            )
        return Encoded(index, prompt, tokens)

    def _tokens(self, prompt: Any) -> Tensor:
        if isinstance(prompt, Mapping):
            given = [name for name in FORMS if name in prompt]
            if len(given) != 1:
                raise ConfigError(
                    f"A prompt has the keys {brief(sorted(map(str, prompt)))}: expected one of {', '.join(FORMS)}."
                )
            if given == ["input_ids"]:
                return _ids(prompt["input_ids"], prompt.get("attention_mask"))
            if not isinstance(prompt[given[0]], str if given == ["prompt"] else Sequence):
                raise ConfigError(
                    f"{given[0]}={brief(prompt[given[0]])}: expected a text in a prompt, and a list in messages."
                )
            return self._written(prompt[given[0]], given == ["messages"])
        if isinstance(prompt, str) or _is_conversation(prompt):
            return self._written(prompt, not isinstance(prompt, str))
        return _ids(prompt, None)

    def _written(self, prompt: Any, is_conversation: bool) -> Tensor:
        if self._tokenizer is None:
            raise ConfigError(f"The prompt {brief(prompt)} is no list of token ids. Pass tokenizer= to have it read.")
        inputs = chat_inputs(self._tokenizer, prompt) if is_conversation else self._tokenizer(prompt)
        return _ids(inputs["input_ids"], None)


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)


def _ids(given: Any, mask: Any) -> Tensor:
    """Token ids (L,) of what stands for one sequence, without what a mask hides."""
    try:
        tokens = torch.as_tensor(given).cpu()
        shown = None if mask is None else torch.as_tensor(mask).cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, other objects
        raise ConfigError(
            f"A prompt is {brief(given)}: expected a text, messages, or the token ids of one sequence."
        ) from error
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or (
        len(tokens) and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    ):
        raise ConfigError(
            f"A prompt is {tuple(tokens.shape)} values of {tokens.dtype}: expected the token ids of one sequence."
        )
    if shown is not None:
        if shown.numel() != len(tokens):
            raise ConfigError(f"A prompt of {len(tokens)} tokens has an attention_mask of {shown.numel()}.")
        tokens = tokens[shown.reshape(-1).bool()]
    return tokens.long()
