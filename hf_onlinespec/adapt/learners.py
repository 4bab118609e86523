"""The draft adapts: pure functions `init(params) -> state` and `update(grads, state) -> (updates, state)` over plain tensors."""

from .directions import Direction, RuleState, UpdateRule, adam, into_ball, plain
from .hedge import HEDGES, Hedge, hedge, last_chunk
from .ogd import heavy_ball, ogd
from .optimistic import optimistic

LEARNERS = {"ogd": ogd, "optimistic": optimistic, "heavy_ball": heavy_ball}

__all__ = [
    "HEDGES",
    "LEARNERS",
    "Direction",
    "Hedge",
    "UpdateRule",
    "RuleState",
    "adam",
    "heavy_ball",
    "hedge",
    "into_ball",
    "last_chunk",
    "ogd",
    "optimistic",
    "plain",
]
