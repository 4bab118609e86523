"""Some prompts as one call of `generate`, and what it says to each of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.generation import generative
from ..runtime.warning import warn_or_log
from ..verify.custom_generate import Prepare, PreparedCall
from .answers import Answer
from .prompts import Encoded
from .setting import unset

DRAFTING = (
    "assistant_model",
    "onlinespec",
    "adapter",
    "assistant_tokenizer",
    "assistant_early_exit",
    "use_mtp",
)  # arguments that say what drafts


class PromptCalls:
    """Calls of `generate` with the same arguments, for prompts of any lengths.

    Args:
        arguments: of `generate`.
    """

    def __init__(
        self,
        target: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None,
        arguments: Mapping[str, Any],
    ) -> None:
        # Of a PeftModel its own `generate` is called: a prompt that was tuned is put in there.
        self._target, self._tokenizer, self._arguments = target, tokenizer, dict(arguments)
        self._encodes = bool(target.config.is_encoder_decoder)
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

    def answer(self, prompts: Sequence[Encoded]) -> list[Answer]:
        """What is said to every prompt, in one call; where that fails, in one for each of them."""
        try:
            return self._answered(prompts)
        except Exception as error:  # a prompt, a processor or the model may raise anything
            if len(prompts) == 1:
                return [self._failed(prompts[0], error)]
            self.warn(error, len(prompts))
        return self.answer_alone(prompts)

    def answer_alone(self, prompts: Sequence[Encoded]) -> list[Answer]:
        """What is said to every prompt by itself, or why it fails."""
        found = []
        for prompt in prompts:
            try:
                found += self._answered([prompt])
            except Exception as error:
                found.append(self._failed(prompt, error))
        return found

    def warn(self, error: Exception, prompts: int) -> None:
        """Says that prompts are answered one by one, which takes longer."""
        warn_or_log(f"A batch of {prompts} prompts failed ({error!r}): they are answered one by one.", 3)

    def _failed(self, prompt: Encoded, error: Exception) -> Answer:
        """This prompt's failure; raises it where it is not the prompt's: `generate` fails at any."""
        if not self._works:
            self._generate([torch.tensor([self._pad])])
            self._works = True
        return Answer(prompt.index, prompt.prompt, error=error)

    def _answered(self, prompts: Sequence[Encoded]) -> list[Answer]:
        tokens = [prompt.tokens for prompt in prompts]
        # An encoder–decoder's answer begins with the token that it starts with, and has no prompt.
        begins = 1 if self._encodes else max(map(len, tokens))
        new = [self._own(row[begins:]) for row in self._generate(tokens).cpu()]
        return [self.answer_with(prompt, own) for prompt, own in zip(prompts, new, strict=True)]

    def answer_with(self, prompt: Encoded, new: Tensor) -> Answer:
        """An answer of these new tokens (n,)."""
        self._works, text = True, None
        if self._tokenizer is not None:
            text = str(self._tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return Answer(prompt.index, prompt.prompt, new, text)

    def _own(self, new: Tensor) -> Tensor:
        """New tokens (n,) of a row without what pads it."""
        values = new.tolist()
        end = next((i + 1 for i, token in enumerate(values) if token in self._ends), len(values))
        while self._stops and end > 1 and values[end - 1] == self._pad and self._pad not in self._ends:
            end -= 1
        return new[:end].clone()

    def prepare(self, prompts: Sequence[Encoded]) -> PreparedCall:
        """What `generate` makes of a call without decoding it; what drafts is not in it."""
        prepared = Prepare(self._tokenizer)
        arguments = {name: value for name, value in self._arguments.items() if name not in DRAFTING}
        if arguments.get("generation_config") is not None:
            arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
            unset(arguments["generation_config"])
            arguments["generation_config"].adapter = None
        self._call([prompt.tokens for prompt in prompts], arguments | {"custom_generate": prepared})
        assert prepared.call is not None
        return prepared.call

    def _generate(self, prompts: Sequence[Tensor]) -> Tensor:
        """(batch, L) of prompts (n,)."""
        output: Tensor = self._call(prompts, self._arguments | {"tokenizer": self._tokenizer})
        return output

    def _call(self, prompts: Sequence[Tensor], arguments: Mapping[str, Any]) -> Any:
        device, longest = self._target.device, max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            # Encoders that count their positions begin at the first place, padding or not.
            own = slice(0, len(prompt)) if self._encodes else slice(longest - len(prompt), longest)
            tokens[i, own], mask[i, own] = prompt, 1
        columns = {"attention_mask": mask.to(device), "return_dict_in_generate": False}
        return generative(cast(PreTrainedModel, self._target)).generate(tokens.to(device), **columns, **arguments)
