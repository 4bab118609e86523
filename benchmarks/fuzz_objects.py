"""What the fuzzer's callers hand over beside numbers: each notes how it was called, which has to be as in plain `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_models import VOCAB
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Nudge(LogitsProcessor):
    """Prefers another token at every call: wrong from there on where it was called once too often."""

    def __init__(self, fails_at: int | None) -> None:
        self.calls: list[int] = []
        self._fails_at = fails_at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.shape[1])
        if len(self.calls) == self._fails_at:
            raise ZeroDivisionError("a processor of the caller's")
        scores = scores.clone()
        scores[:, (7 * len(self.calls)) % VOCAB] += 1.5
        return scores


class Follow(LogitsProcessor):
    """Leaves plain `generate` one choice: the tokens of other texts (rows, L), padded on the right with `pad`."""

    def __init__(self, tokens: Tensor, start: int, pad: int) -> None:
        self._tokens, self._start, self._pad = tokens, start, pad
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = self._start + self.calls
        self.calls += 1
        if place >= self._tokens.shape[1]:
            return scores
        only = torch.full_like(scores, -torch.inf)
        token = self._tokens[:, place : place + 1]
        own = scores.gather(1, token)
        padding = (self._tokens[:, place:] == self._pad).all(-1, keepdim=True) & (len(scores) > 1)
        return only.scatter(1, token, own.masked_fill(padding & own.isinf(), 0.0))


class Stop:
    """A criterion that no configuration knows: at a length, or at a token.

    Args:
        by_row: whether it says something of each row; otherwise one thing of all of them.
    """

    def __init__(self, length: int, token: int | None, by_row: bool) -> None:
        self.calls: list[tuple[int, bool]] = []
        self._length, self._token, self._by_row = length, token, by_row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append((input_ids.shape[1], scores is None))
        said = torch.tensor(
            [input_ids.shape[1] >= self._length or token == self._token for token in input_ids[:, -1].tolist()]
        )
        return said if self._by_row else said.all()[None]


class Listener(BaseStreamer):
    """A streamer that hangs up at the n-th word."""

    def __init__(self, hangs_up_at: int | None) -> None:
        self.heard: list[int] = []
        self.ended = 0
        self._hangs_up_at = hangs_up_at

    def put(self, value: Tensor) -> None:
        self.heard.extend(value.flatten().tolist())
        if self._hangs_up_at is not None and len(self.heard) >= self._hangs_up_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


@dataclass(frozen=True)
class Fresh:
    """An argument that is made anew for every call."""

    make: Callable[[], Any]
