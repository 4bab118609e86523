"""Optimistic online learning: step ahead along a guess of the next gradient (Rakhlin & Sridharan 2013; arXiv:2603.12617)."""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import Direction, Rate, RuleState, UpdateRule, begins, into_ball, plain


def optimistic(
    lr: Rate, direction: Direction | None = None, radius: float | None = None, memory: float = 0.0
) -> UpdateRule:
    """Two sequences: w_t = Π[ŵ_t − η h_t] serves, then ŵ_{t+1} = Π[ŵ_t − η u_t]; the hint h is the past, h_1 = 0.

    Without Π, both make w_{t+1} = w_t − η (u_t + h_{t+1} − h_t), and no second sequence is kept.

    Args:
        direction: u; None: the gradient.
        radius: Π keeps every expert within this distance of its start; None: no bound.
        memory: h_{t+1} = memory · h_t + (1 − memory) · u_t; 0: the last one.

    >>> init, update = optimistic(0.1)
    >>> updates, state = update(torch.tensor([2.0]), init(torch.zeros(1)))
    >>> round(updates.item(), 4)                      # the step, and the same once more ahead
    -0.4
    >>> updates, _ = update(torch.tensor([2.0]), state)
    >>> round(updates.item(), 4)
    -0.2
    """
    direction = direction or plain()

    def update(grads: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        u, new = direction.of(grads, state)
        hint = torch.lerp(u, state["hint"], memory)
        if radius is None:
            return -lr * (u + hint - state["hint"]), new | {"hint": hint}
        served = into_ball(state["moved"] - lr * state["hint"], radius)
        moved = into_ball(state["moved"] - lr * u, radius)
        return into_ball(moved - lr * hint, radius) - served, new | {"hint": hint, "moved": moved}

    return UpdateRule(begins(direction, radius, "hint"), update)
