"""A KV cache of several rows in which places are holes: a row has nothing there, and nothing attends to it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .._compat.caches import rearrange

# Share of the places that may be holes. Measured: LOG 2026-11-26 "Batches": moving all rows in every round takes 8 to 25 % of a round,
# never moving them 1 to 30 % more places.
MOST_HOLES = 0.25


def close_holes(cache: Cache, seen: Tensor, most: int, full: bool = False, align: bool = False) -> Tensor:
    """Moves all rows together, to the right, where too many places are holes.

    Args:
        seen: (batch, places) 1 where a row has a token, 0 at holes.
        most: tokens of the row that has the most.
        full: whether it is worth it for any hole: places are short.
        align: whether every row has to end at the last place, without a hole between its tokens.

    Returns:
        `seen` as it is then.
    """
    places = seen.shape[1]
    if align:
        moves = places > most or bool((seen[:, 1:] < seen[:, :-1]).any())
    else:
        moves = places > most and (full or places - most > MOST_HOLES * places)
    if not moves:
        return seen
    order = seen.argsort(dim=1, stable=True)[:, places - most :]  # holes first
    rearrange(cache, order)
    return seen.gather(1, order)


def last_seen(seen: Tensor) -> int:
    """Places up to the last one where any row has a token, of (batch, places) on the host."""
    kept = torch.nonzero(seen.any(dim=0))
    return int(kept[-1]) + 1 if len(kept) else 0
