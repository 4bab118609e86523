"""What a chat keeps from turn to turn: the conversation, and the target's KV cache of it."""

from __future__ import annotations

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.caches import held_tokens, rolls_back
from .._compat.rollback import crop, forgets, rollback_obstacle
from .._compat.tokenizers import chat_inputs
from ..errors import ConfigError

Messages = list[dict[str, str]]


class Conversation:
    """Messages as tokens: by the chat template where there is one, else one text that goes on.

    Args:
        system: the system message; a model without a chat template begins with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self._tokenizer, self._system = tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forgets it."""
        self.messages: Messages = []  # stays empty without a chat template
        self.sequence = torch.empty(1, 0, dtype=torch.long)  # all tokens of the latest turn, prompt and answer
        if self._system is not None and self._tokenizer.chat_template is not None:
            self.messages.append({"role": "system", "content": self._system})

    def render(self, more: Messages) -> Tensor:
        """The tokens (1, L) of the conversation with more messages, as the target is to read them."""
        if self._tokenizer.chat_template is None:
            begins = self.sequence.shape[1] == 0
            text = "".join(message["content"] for message in more)
            if begins and self._system is not None:
                text = self._system + text
            new = self._tokenizer(text, add_special_tokens=begins, return_tensors="pt").input_ids
            return torch.cat([self.sequence, new.view(1, -1).long()], dim=1)
        try:
            rendered = chat_inputs(self._tokenizer, [*self.messages, *more])
        except TemplateError as error:
            raise ConfigError(f"The chat template of this model does not take this conversation ({error}).") from error
        prompt: Tensor = rendered["input_ids"]
        return prompt

    def keep(self, messages: Messages, sequence: Tensor) -> None:
        """Notes a turn, with all tokens (1, L) of the conversation."""
        if self._tokenizer.chat_template is not None:
            self.messages += messages
        self.sequence = sequence


class KeptCache:
    """The target's KV cache from turn to turn: of a new prompt only what differs from the tokens in it is read."""

    def __init__(self, target: PreTrainedModel) -> None:
        self._target = target
        self.drop()

    def drop(self) -> None:
        """Forgets it; what is in the caller's hands is in no known state until `keep`."""
        self.cache: Cache | None = None
        self.tokens = torch.empty(0, dtype=torch.long)  # (n,) whose keys and values are in it

    def keep(self, sequence: Tensor, cache: Cache | None) -> None:
        """Keeps the cache that a call of `generate` returned for a sequence (1, L), if it can be rolled back."""
        asked_for = self._target.generation_config.cache_implementation  # generate makes that one itself, each time
        self.cache = None if asked_for is not None or rollback_obstacle(cache) else cache
        self.tokens = sequence[0, : 0 if self.cache is None else held_tokens(self.cache)]

    def take(self, prompt: Tensor) -> tuple[Cache | None, int]:
        """The cache, rolled back to what it shares with a prompt (L,), and how many tokens these are.

        A template may write earlier turns in another way than they were generated.
        """
        cache, tokens = self.cache, self.tokens
        self.drop()  # whatever interrupts the call leaves it in no known state
        if cache is None:
            return None, 0
        longest = min(len(tokens), len(prompt) - 1)  # one token has to be read
        differs = (tokens[:longest] != prompt[:longest]).nonzero()
        shared = int(differs[0]) if len(differs) else longest
        return (cache, shared) if shared and self._roll_back(cache, len(tokens) - shared) else (None, 0)

    def give_back(self, cache: Cache, tokens: Tensor) -> None:
        """Keeps a cache again, without what was read behind these tokens (n,)."""
        if self._roll_back(cache, held_tokens(cache) - len(tokens)):
            self.cache, self.tokens = cache, tokens

    def _roll_back(self, cache: Cache, n: int) -> bool:
        """Takes the last n tokens out of the cache; False: it cannot be done."""
        if n and (not rolls_back(self._target.config) or forgets(cache, n)):
            return False
        if n:
            crop(cache, n)
        return True
