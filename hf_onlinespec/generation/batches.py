"""Many prompts, batch after batch: each is one call of `generate` on prompts of similar lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.generation import generative
from ..runtime.warning import warn_or_log
from .answers import Answer
from .prompts import Encoded

SORTED_BATCHES = 4  # batches of prompts that wait, of which those of similar lengths go together; chosen


class Batches:
    """Answers prompts in batches. What waits longest is always in the next one.

    Args:
        arguments: of `generate`.
    """

    def __init__(
        self,
        target: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_size: int,
        arguments: Mapping[str, Any],
    ) -> None:
        # Of a PeftModel its own `generate` is called: a prompt that was tuned is put in there.
        self._target, self._tokenizer, self._size, self._arguments = target, tokenizer, batch_size, dict(arguments)
        self._waiting: list[Encoded] = []
        self._works = False  # whether a prompt was answered
        config = arguments.get("generation_config") or target.generation_config
        assert isinstance(config, GenerationConfig)
        ends = arguments.get("eos_token_id", config.eos_token_id)
        self._ends = {int(end) for end in torch.tensor([] if ends is None else ends).view(-1)}
        pad = arguments.get("pad_token_id", config.pad_token_id)
        # Rows may also end without a token that says so. Without that, padding with such a token leaves no doubt where a row ended.
        self._stops = bool(arguments.get("stop_strings") or config.stop_strings or arguments.get("stopping_criteria"))
        if pad is None or (self._ends and not self._stops):
            pad = min(self._ends, default=0)
        self._pad = self._arguments["pad_token_id"] = int(pad)

    @property
    def room(self) -> int:
        """How many more prompts may wait."""
        return self._size * SORTED_BATCHES - len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def add(self, prompt: Encoded) -> None:
        self._waiting.append(prompt)

    def step(self) -> list[Answer]:
        """Answers a batch of what waits."""
        batch = self._next()
        try:
            return self._answered(batch)
        except Exception as error:  # a prompt, a processor or the model may raise anything
            if len(batch) == 1:
                return [self._failed(batch[0], error)]
            warn_or_log(f"A batch of {len(batch)} prompts failed ({error!r}): they are answered one by one.", 2)
        return [self._alone(prompt) for prompt in batch]

    def _next(self) -> list[Encoded]:
        """Takes the longest waiting prompt, and those of the most similar lengths."""
        oldest = min(self._waiting, key=lambda prompt: prompt.index)
        waiting = sorted(self._waiting, key=lambda prompt: len(prompt.tokens))
        at = next(i for i, prompt in enumerate(waiting) if prompt is oldest)
        first = max(0, min(at, len(waiting) - self._size))
        batch = waiting[first : first + self._size]
        self._waiting = waiting[:first] + waiting[first + self._size :]
        return batch

    def _alone(self, prompt: Encoded) -> Answer:
        try:
            return self._answered([prompt])[0]
        except Exception as error:
            return self._failed(prompt, error)

    def _failed(self, prompt: Encoded, error: Exception) -> Answer:
        """This prompt's failure; raises it where it is not the prompt's: `generate` fails at any."""
        if not self._works:
            self._generate([torch.tensor([self._pad])])
            self._works = True
        return Answer(prompt.index, prompt.prompt, error=error)

    def _answered(self, batch: Sequence[Encoded]) -> list[Answer]:
        rows = self._generate([prompt.tokens for prompt in batch])
        self._works = True
        return [self._answer(prompt, row) for prompt, row in zip(batch, rows, strict=True)]

    def _answer(self, prompt: Encoded, tokens: Tensor) -> Answer:
        text = None
        if self._tokenizer is not None:
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return Answer(prompt.index, prompt.prompt, tokens, text)

    def _generate(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """What is generated behind every prompt (L,), to the token that ends it."""
        device, longest = self._target.device, max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
        output = generative(cast(PreTrainedModel, self._target)).generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            return_dict_in_generate=False,
            tokenizer=self._tokenizer,
            **self._arguments,
        )
        return [self._own(row) for row in output[:, longest:].cpu()]

    def _own(self, new: Tensor) -> Tensor:
        """New tokens (n,) of a row without what pads it."""
        values = new.tolist()
        end = next((i + 1 for i, token in enumerate(values) if token in self._ends), len(values))
        while self._stops and end > 1 and values[end - 1] == self._pad and self._pad not in self._ends:
            end -= 1
        return new[:end].clone()
