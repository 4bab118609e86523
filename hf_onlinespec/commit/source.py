"""What an encoder–decoder target reads beside the tokens that it writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """The text, speech or picture of an encoder–decoder target, per row, and what its encoder made of it.

    Lengths are those of one row: padding is on the side where the caller has put it.
    """

    tokens: (
        Tensor | None
    )  # (rows, source length) the encoder's input ids; None: it read no tokens, or they are not known
    mask: (
        Tensor | None
    )  # (rows, source length) of the tokens, or of the states where there are none; 0 at padding; None: no padding
    states: (
        Tensor  # (rows, states, width) the target's encoder outputs; of speech and pictures fewer than what was read
    )

    def row(self, i: int) -> Source:
        """That of one row, with a batch dimension of 1."""
        return self.of_rows([i])

    def of_rows(self, rows: list[int]) -> Source:
        """Those of some rows, in this order."""
        return Source(
            None if self.tokens is None else self.tokens[rows],
            None if self.mask is None else self.mask[rows],
            self.states[rows],
        )

    def text(self, i: int) -> list[int]:
        """The tokens of one row without padding; []: none are known."""
        if self.tokens is None:
            return []
        tokens = self.tokens[i]
        return (tokens if self.mask is None else tokens[self.mask[i] != 0]).tolist()
