"""The KV cache of a draft in several rows, each with holes of its own.

A hole is a place where a row has nothing: rejected tokens, padding, and whatever other rows read while it read nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from .._compat.caches import join_rows, select_rows
from .._compat.rollback import crop
from ..models.holes import close_holes, last_seen

MOST_READ = 16  # tokens that are read behind a row in a round, with room to spare; chosen


@final
class RowCache:
    """Keys and values, and what is seen of them.

    Args:
        rows: by their number in the call.
        positions: places that it should have at most.

    Attributes:
        past: the keys and values.
        seen: (batch, places) on the host, 0 at holes.
        order: which row each one of the cache is.
    """

    def __init__(self, config: PretrainedConfig, rows: Sequence[int], positions: int) -> None:
        self.past = DynamicCache(config=config)
        self.seen = torch.zeros(len(rows), 0, dtype=torch.long)
        self.order = list(rows)
        self._positions = positions
        self._rejected: list[tuple[int, int]] = []  # row and place of what is a hole from the next forward on
        self._left: set[int] = set()  # rows that leave before it

    @property
    def places(self) -> int:
        return self.seen.shape[1]

    def reject(self, row: int, places: Sequence[int]) -> None:
        """What a row has at these places is taken back."""
        at = self.order.index(row)
        self._rejected += [(at, place) for place in places]

    def leave(self, row: int) -> None:
        """A row that has ended is read no further."""
        self._left.add(row)

    def kept(self, row: int) -> list[int]:
        """The places of a row that are no holes."""
        at = self.order.index(row)
        rejected = {place for other, place in self._rejected if other == at}
        return [place for place in torch.nonzero(self.seen[at])[:, 0].tolist() if place not in rejected]

    def settle(self) -> None:
        """Takes out rows that have left and places where no row has a token, and moves the others together where that is worth it."""
        if not self._rejected and not self._left:
            return
        if self._rejected:
            rows, rejected = zip(*self._rejected, strict=True)
            self.seen[list(rows), list(rejected)] = 0
        going_on = [at for at, row in enumerate(self.order) if row not in self._left]
        if len(going_on) < len(self.order):
            select_rows(self.past, torch.tensor(going_on))
            self.seen, self.order = self.seen[going_on], [self.order[at] for at in going_on]
        places = last_seen(self.seen)
        crop(self.past, self.places - places)
        most = int(self.seen[:, :places].sum(dim=1).max())
        full = places + MOST_READ > self._positions
        self.seen = close_holes(self.past, self.seen[:, :places], most, full)
        self._rejected, self._left = [], set()

    def join(self, others: RowCache) -> None:
        """Takes over the rows of another cache, which is used up; what is to be taken back of either leaves it first."""
        for one in (self, others):
            one.settle()
        places = max(self.places, others.places)
        join_rows(self.past, others.past, places)
        self.seen = torch.cat([F.pad(one.seen, (places - one.places, 0)) for one in (self, others)])
        self.order += others.order

    def of_row(self, row: int, tensor: Tensor) -> Tensor:
        """(1, …) of one row, of a tensor (batch, …) of a forward."""
        at = self.order.index(row)
        return tensor[at : at + 1]
