"""What all learners share: their form, the directions they step in, and the ball that bounds them.

Tensors are (experts, parameters), or of any shape with the parameters of one expert along the last dimension; a step size
may be a tensor (experts, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RuleState = dict[str, Tensor]
Rate = float | Tensor


class UpdateRule(NamedTuple):
    """A learner: `state = init(params)`; `updates, state = update(grads, state)`; the caller adds `updates` to the parameters."""

    init: Callable[[Tensor], RuleState]
    update: Callable[[Tensor, RuleState], tuple[Tensor, RuleState]]


class Direction(NamedTuple):
    """What takes the gradient's place in a step: `state = init(params)`; `direction, state = of(grads, state)`."""

    init: Callable[[Tensor], RuleState]
    of: Callable[[Tensor, RuleState], tuple[Tensor, RuleState]]
    last: Callable[[RuleState], Tensor] | None  # the last direction, where the state tells it; zero before the first


def plain() -> Direction:
    """The gradient itself."""
    return Direction(lambda params: {}, lambda grads, state: (grads, state), None)


def adam(b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Direction:
    """m̂ / (√v̂ + ε), with bias-corrected moments m̂, v̂ of the gradients (Kingma & Ba 2015).

    b2 = 0.99 instead of the usual 0.999: the stream changes, so the metric must forget within about 100 updates.
    """

    def init(params: Tensor) -> RuleState:
        zeros = torch.zeros_like(params)
        # Every expert counts its own steps, so that one can begin anew.
        return {"step": torch.zeros_like(params[..., :1]), "m": zeros, "v": zeros.clone()}

    def of(grads: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        step = state["step"] + 1
        m = torch.lerp(grads, state["m"], b1)
        v = torch.lerp(grads * grads, state["v"], b2)
        return corrected(step, m, v), {"step": step, "m": m, "v": v}

    def corrected(step: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt_().add_(eps))

    def last(state: RuleState) -> Tensor:
        return torch.where(state["step"] > 0, corrected(state["step"], state["m"], state["v"]), 0.0)

    return Direction(init, of, last)


def begins(direction: Direction, radius: float | None, *zeros: str) -> Callable[[Tensor], RuleState]:
    """The `init` of a learner: its direction's state, what it keeps besides, and where it is in its ball."""
    names = zeros if radius is None else (*zeros, "moved")
    return lambda params: direction.init(params) | {name: torch.zeros_like(params) for name in names}


def moves(updates: Tensor, state: RuleState, radius: float | None) -> tuple[Tensor, RuleState]:
    """The updates as far as the ball allows, and where they lead; None: no ball."""
    if radius is None:
        return updates, {}
    moved = into_ball(state["moved"] + updates, radius)
    return moved - state["moved"], {"moved": moved}


def into_ball(moved: Tensor, radius: float) -> Tensor:
    """The nearest point to `moved` (..., parameters) whose distance from zero is at most `radius`, for every expert."""
    norm = moved.norm(dim=-1, keepdim=True)
    return moved * (radius / norm.clamp_min(radius))
