"""The draft adapts: pure functions `init(params) -> state` and `update(grads, state) -> (updates, state)` over plain tensors."""

from .ogd import Learner, adam, ogd

LEARNERS = ("ogd",)

__all__ = ["LEARNERS", "Learner", "adam", "ogd"]
