"""Online gradient descent, w ← w − η g, plain and in Adam's metric (Zinkevich 2003; Kingma & Ba 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Learner(NamedTuple):
    """A learner: `state = init(params)`; `updates, state = update(grads, state)`; the caller adds `updates` to the parameters."""

    init: Callable[[Tensor], State]
    update: Callable[[Tensor, State], tuple[Tensor, State]]


def ogd(lr: float) -> Learner:
    """Plain steps −η g.

    >>> init, update = ogd(0.1)
    >>> updates, _ = update(torch.tensor([2.0]), init(torch.zeros(1)))
    >>> round(updates.item(), 4)
    -0.2
    """

    def init(params: Tensor) -> State:
        return {}

    def update(grads: Tensor, state: State) -> tuple[Tensor, State]:
        return -lr * grads, state

    return Learner(init, update)


def adam(lr: float, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Learner:
    """Preconditioned steps −η m̂ / (√v̂ + ε), with bias-corrected moments m̂, v̂ of the gradients.

    b2 = 0.99 instead of the usual 0.999: the stream changes, so the metric must forget within about 100 updates.

    >>> init, update = adam(0.1)
    >>> updates, _ = update(torch.tensor([3.0]), init(torch.zeros(1)))
    >>> round(updates.item(), 4)
    -0.1
    """

    def init(params: Tensor) -> State:
        zeros = torch.zeros_like(params)
        return {"step": torch.zeros((), dtype=torch.float64), "m": zeros, "v": zeros.clone()}

    def update(grads: Tensor, state: State) -> tuple[Tensor, State]:
        step = state["step"] + 1
        m = torch.lerp(grads, state["m"], b1)
        v = torch.lerp(grads * grads, state["v"], b2)
        t = step.item()
        updates = -lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt_().add_(eps))
        return updates, {"step": step, "m": m, "v": v}

    return Learner(init, update)
