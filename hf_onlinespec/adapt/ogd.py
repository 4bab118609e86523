"""Online gradient descent, w ← Π[w − η u] (Zinkevich 2003), and with momentum, as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import Direction, Rate, RuleState, UpdateRule, begins, moves, plain


def ogd(lr: Rate, direction: Direction | None = None, radius: float | None = None) -> UpdateRule:
    """Steps −η u.

    Args:
        direction: u; None: the gradient.
        radius: Π keeps every expert within this distance of its start; None: no bound.

    >>> init, update = ogd(0.1)
    >>> updates, _ = update(torch.tensor([2.0]), init(torch.zeros(1)))
    >>> round(updates.item(), 4)
    -0.2
    """
    direction = direction or plain()

    def update(grads: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        u, new = direction.of(grads, state)
        updates, moved = moves(-lr * u, state, radius)
        return updates, new | moved

    return UpdateRule(begins(direction, radius), update)


def heavy_ball(
    lr: Rate, direction: Direction | None = None, radius: float | None = None, momentum: float = 0.9
) -> UpdateRule:
    """Steps −η (1 − μ) Σ μ^i u_{t−i} (Polyak 1964): the rate is matched, so that a constant gradient moves as far as in `ogd`.

    >>> init, update = heavy_ball(0.1)
    >>> updates, _ = update(torch.tensor([2.0]), init(torch.zeros(1)))
    >>> round(updates.item(), 4)
    -0.02
    """
    direction = direction or plain()

    def update(grads: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        u, new = direction.of(grads, state)
        mean = torch.lerp(u, state["mean"], momentum)
        updates, moved = moves(-lr * mean, state, radius)
        return updates, new | moved | {"mean": mean}

    return UpdateRule(begins(direction, radius, "mean"), update)
