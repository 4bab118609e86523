"""Streamers that are told which tokens the draft had proposed."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class OriginStreamer(BaseStreamer, ABC):
    """A streamer for `generate(streamer=...)` that our decoding loop hands whole rounds, with where their tokens come from.

    `put` gets what it gets from transformers: the prompt, and in plain decoding each new token.
    """

    @abstractmethod
    def put_round(self, tokens: Tensor, accepted: int) -> None:
        """Takes the new tokens of one round, at least one.

        Args:
            tokens: (n,) on the CPU.
            accepted: how many of the first ones were drafted; the others are the target's own.
        """
