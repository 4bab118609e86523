"""What an encoder–decoder model reads beside the tokens that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """The text, speech or picture of an encoder–decoder model, per row, and what an encoder made of it.

    Lengths are those of one row: padding is on the side where the caller has put it.
    """

    tokens: (
        Tensor | None
    )  # (rows, source length) the encoder's input ids; None: it read no tokens, or they are not known
    mask: (
        Tensor | None
    )  # (rows, source length) of the tokens, or of the states where there are none; 0 at padding; None: no padding
    states: (
        Tensor | None
    )  # (rows, states, width) encoder outputs; of speech and pictures fewer than what was read. None: not known
    signal: Tensor | None = (
        None  # (rows, …) what an encoder read in place of tokens, as a spectrogram; None: it is not known
    )

    def row(self, i: int) -> Source:
        """That of one row, with a batch dimension of 1."""
        return self.of_rows([i])

    def of_rows(self, rows: list[int]) -> Source:
        """Those of some rows, in this order."""
        return self._map(lambda tensor: tensor[rows])

    def text(self, i: int) -> list[int]:
        """The tokens of one row without padding; []: none are known."""
        if self.tokens is None:
            return []
        tokens = self.tokens[i]
        return (tokens if self.mask is None else tokens[self.mask[i] != 0]).tolist()

    def to(self, device: torch.device) -> Source:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def without_padding(self) -> Source:
        """The same of one row, where it is padded; what was read without tokens may have a mask of another length than its outputs."""
        if self.mask is None:
            return self
        kept, n = self.mask[0] != 0, self.mask.shape[1]

        def cut(tensor: Tensor | None) -> Tensor | None:
            return tensor[:, kept] if tensor is not None and tensor.shape[1] == n else tensor

        return replace(self, tokens=cut(self.tokens), states=cut(self.states), mask=None)

    def to_keep(self) -> Source:
        """What of it is worth keeping: what is to be encoded takes less than its encoder outputs do, which can be computed anew."""
        return self if self.tokens is None and self.signal is None else replace(self, states=None)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.tokens, self.mask, self.states, self.signal) if t is not None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Source:
        parts = (None if t is None else change(t) for t in (self.tokens, self.mask, self.states, self.signal))
        tokens, mask, states, signal = parts
        return Source(tokens, mask, states, signal)
