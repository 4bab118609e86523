"""Hedge: weights over experts that follow their losses (Freund & Schapire 1997; fixed share: Herbster & Warmuth 1998)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import RuleState


class Hedge(NamedTuple):
    """`state = init(n)` for n experts; `weights, state = update(losses, state)`, both (n,) in float64 on the CPU, weights sum to one."""

    init: Callable[[int], RuleState]
    update: Callable[[Tensor, RuleState], tuple[Tensor, RuleState]]


def _zeros(*shape: int) -> Tensor:
    """On the CPU, whatever the default is: not every device has float64 (MPS)."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def hedge(rate: float | None = None, discount: float = 1.0, share: float = 0.0, bound: float = 1.0) -> Hedge:
    """π_{t+1}^i ∝ π_t^i exp(−ε ℓ_t^i), losses clipped to [0, bound]; what is not finite counts as `bound`.

    Args:
        rate: ε; None: √(8 ln n / T) / bound, T being the next power of two above the number of losses so far (doubling),
            or the memory of the weights where that is shorter.
        discount: factor on all past losses at every step; 1: cumulative.
        share: of every weight that is handed out evenly at every step, so that who was bad can come back soon (fixed share).
        bound: largest loss.

    >>> init, update = hedge(rate=1.0)
    >>> weights, _ = update(torch.tensor([0.0, 1.0]), init(2))
    >>> [round(w, 3) for w in weights.tolist()]       # 1 : 1/e
    [0.731, 0.269]
    """
    memory = min(1 / (1 - discount) if discount < 1 else math.inf, 1 / share if share else math.inf)

    def init(n: int) -> RuleState:
        # The scores are −Σ ℓ, and a bonus for what was shared; ε enters when the weights are made, so it may change.
        return {"scores": _zeros(n), "round": _zeros()}

    def update(losses: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        n = len(losses)
        t = state["round"] + 1
        horizon = min(2.0 ** math.ceil(math.log2(t.item() + 1)), memory)
        epsilon = rate if rate is not None else math.sqrt(8 * math.log(max(n, 2)) / horizon) / bound
        clipped = losses.cpu().double().nan_to_num(bound, bound, bound).clamp(0, bound)
        scores = discount * state["scores"] - clipped
        weights = (epsilon * scores).softmax(-1)
        if share:
            weights = (1 - share) * weights + share / n
            scores = weights.log() / epsilon
        return weights, {"scores": scores, "round": t}

    return Hedge(init, update)


def last_chunk(rate: float = 10.0) -> Hedge:
    """A softmax of the last losses alone: what the released code of arXiv:2603.12617 runs. A baseline."""

    def update(losses: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        scores = -losses.cpu().double().nan_to_num(1.0, 1.0, 1.0)
        return (rate * scores).softmax(-1), {"scores": scores}

    return Hedge(lambda n: {"scores": _zeros(n)}, update)


# By name, with a step size or the one of theory (None).
HEDGES: dict[str, Callable[[float | None], Hedge]] = {
    "cumulative": lambda rate: hedge(rate),
    "discounted": lambda rate: hedge(rate, discount=0.95),
    "fixed_share": lambda rate: hedge(rate, share=0.02),
    "last_chunk": lambda rate: last_chunk(10.0 if rate is None else rate),
}
