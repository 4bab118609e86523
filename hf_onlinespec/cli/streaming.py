"""An answer as it comes: text token by token, and the wish to stop it between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..verify.streaming import OriginStreamer

UNFINISHED = "\ufffd"  # what a tokenizer writes for a character whose bytes are not all there

Show = Callable[[str, bool], None]  # a piece of text, and whether it was drafted


class Detokenizer:
    """Text as it grows token by token: every token gives the text that it completes, "" inside of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start, self._said = 0, 0  # text is decoded from _start on; up to _said it was given away

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        if text.endswith(UNFINISHED):
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left of an unfinished character."""
        return self._give(self._decode(self._tokens[self._start :]))

    def _give(self, text: str) -> str:
        before = self._decode(self._tokens[self._start : self._said])
        self._start, self._said = self._said, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class Teller(OriginStreamer):
    """Shows text as it comes, and notes when the first of it came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        self._text, self._show = Detokenizer(tokenizer), show
        self._is_prompt = True
        self.first_at, self.first_tokens = 0.0, 0

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.put_round(value.view(-1), 0)

    def put_round(self, tokens: Tensor, accepted: int) -> None:
        if not self.first_at:
            self.first_at, self.first_tokens = time.perf_counter(), len(tokens)
        for at, token in enumerate(tokens.tolist()):
            self._tell(self._text.add(token), at < accepted)

    def end(self) -> None:
        self._tell(self._text.end(), False)

    def _tell(self, text: str, drafted: bool) -> None:
        if text:
            self._show(text, drafted)


class StopWhen(StoppingCriteria):
    """Ends an answer between two tokens, so that everything that was kept stays in order."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self.happened = False  # whether it ended the answer

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.happened = self.happened or self._stopped()
        return torch.full((input_ids.shape[0],), self.happened, device=input_ids.device)
