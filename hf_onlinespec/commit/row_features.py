"""The target's hidden states at the tokens of one row, as far as a draft head still needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..heads.places import with_places

# Newest tokens of a row whose features are held, for a head to read and to learn from: public heads are trained on sequences of 2,048.
MOST_HELD = 2048


class RowFeatures:
    """Features of the tokens `start` to `end` of a row, padding counted: what the target computed while it verified.

    Args:
        first: tokens on the left that are none, or that the target has read in an earlier turn.
        most: the newest so many tokens are held, and those of the latest round.
        padding: tokens on the left that are none, where `rows` are to say the place of each token too; None: they need not.
    """

    def __init__(self, first: int = 0, most: int = MOST_HELD, padding: int | None = None) -> None:
        self._padding = padding
        self.start = self.end = first
        self._parts: list[Tensor] = []  # each (1, n, width), one behind the other
        self._round: Tensor | None = None  # of everything that was fed in the latest round
        self._most = most

    def take(self, features: Tensor) -> None:
        """Features (1, fed, width) of what the target was fed in this round: the end of the row, then every candidate."""
        self._round = features

    def keep(self, length: int, proposed: int, path: Sequence[int]) -> None:
        """What stays of the round.

        Args:
            length: tokens of the row before it.
            proposed: candidates.
            path: those that were kept.
        """
        fed, self._round = self._round, None
        if fed is None:
            return
        own = fed.shape[1] - proposed
        start = length - own
        if start > self.end:  # a prefix that lives in the target's cache alone, or a round that was not seen
            self._parts, self.start = [], start
        elif start < self.end:  # read again
            own -= self.end - start
        begin = fed.shape[1] - proposed - own
        if path == tuple(range(len(path))):
            kept = fed[:, begin : begin + own + len(path)]
        else:
            places = [*range(begin, begin + own), *(begin + own + candidate for candidate in path)]
            kept = fed[:, torch.tensor(places, device=fed.device)]
        if proposed > len(path):
            kept = kept.clone()  # what was rejected is not held with it
        self._parts.append(kept)
        self.end = length + len(path)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._parts) > 1 and self.end - self.start - self._parts[0].shape[1] >= self._most:
            self.start += self._parts.pop(0).shape[1]
        surplus = self.end - self.start - self._most
        if len(self._parts) == 1 and surplus > 0:
            self._parts = [self._parts[0][:, surplus:].clone()]
            self.start += surplus

    def rows(self, start: int, end: int) -> Tensor:
        """(1, end − start, width) of tokens that are held, behind them their places; none where `end` lies before `start`.

        Raises:
            IndexError: some of them are not held.
        """
        if start < self.start or max(start, end) > self.end or not self._parts:
            raise IndexError(f"Features of the tokens {start} to {end}: those of {self.start} to {self.end} are held.")
        found, stop = [self._parts[-1][:, :0]], self.end
        for part in reversed(self._parts):  # mostly the newest are asked for
            at = stop - part.shape[1]
            if at < end and stop > start:
                found.append(part[:, max(0, start - at) : end - at])
            if at <= start:
                break
            stop = at
        rows = found[-1] if len(found) == 2 else torch.cat(found[::-1], dim=1)
        return rows if self._padding is None else with_places(rows, start - self._padding)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)
