"""A tree of candidates in one forward: who attends to whom, and at which positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounds import Proposal

# Candidates that a tree may have: so far from the end of a table of positions trees end, as places count in some of them. Chosen:
# the largest budget.
MOST_NODES = 64


def tree_mask(
    proposal: Proposal, cached: int, shown: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to the attention's logits: 0 where a token is attended to, the least number elsewhere.

    A forward is fed with the last kept token and the n candidates. Each attends to what is cached, to the last kept token, to the
    candidates that it follows, and to itself.

    Args:
        cached: tokens in the cache.
        shown: (batch, cached) 0 where a cached token is padding; None: none is.

    Returns:
        (batch, 1, 1 + n, cached + 1 + n)
    """
    batch, n = proposal.tokens.shape
    least = torch.finfo(dtype).min
    among = []  # on the host: a handful of numbers
    for row in range(batch):
        seen = [[0.0] + [least] * n]
        for i, parent in enumerate((*proposal.parents_of(row), *(-1,) * (n - proposal.lengths[row]))):
            seen.append(seen[parent + 1].copy())
            seen[-1][i + 1] = 0.0
        among.append(seen)
    mask = torch.zeros(batch, 1, n + 1, cached + n + 1, dtype=dtype, device=device)
    mask[:, 0, :, cached:] = torch.tensor(among, dtype=dtype).to(device)
    if shown is not None:
        mask[..., :cached].masked_fill_((shown == 0).to(device)[:, None, None], least)
    return mask


def tree_positions(proposal: Proposal, first: Tensor) -> Tensor:
    """(..., batch, 1 + n) positions of the last kept token and the candidates, by depth; first: (..., batch, 1) of the last kept token."""
    n = proposal.tokens.shape[1]
    steps = []
    for row in range(proposal.tokens.shape[0]):
        depths = proposal.depths_of(row)
        steps.append([0, *(depth + 1 for depth in depths), *(1,) * (n - len(depths))])
    return first + torch.tensor(steps, dtype=first.dtype).to(first.device)


def in_place(paths: tuple[tuple[int, ...], ...]) -> int:
    """How many of the kept candidates, the first ones, are at their places in the cache already, in every row."""
    least = min(map(len, paths))
    return next((i for i in range(least) if any(path[i] != i for path in paths)), least)
