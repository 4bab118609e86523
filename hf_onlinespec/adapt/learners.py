"""The draft adapts: pure functions `init(params) -> state` and `update(grads, state) -> (updates, state)` over plain tensors."""

from __future__ import annotations

import torch

from ..config import ENSEMBLE, OnlineSpecConfig
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
    "learner_name",
    "make_direction",
    "make_learner",
    "ogd",
    "optimistic",
    "plain",
    "step_sizes",
]


def step_sizes(settings: OnlineSpecConfig) -> list[float]:
    """One for every expert: a geometric grid with `lr` in the middle."""
    if settings.learner != ENSEMBLE:
        return [settings.lr]
    middle = (settings.experts - 1) / 2
    return [settings.lr * settings.expert_ratio ** (i - middle) for i in range(settings.experts)]


def learner_name(settings: OnlineSpecConfig) -> str:
    """What every expert runs."""
    return settings.expert_learner if settings.learner == ENSEMBLE else settings.learner


def make_direction(settings: OnlineSpecConfig) -> Direction:
    """What every expert steps along."""
    return adam() if settings.preconditioner == "adam" else plain()


def make_learner(settings: OnlineSpecConfig, device: torch.device) -> UpdateRule:
    """The settings' learner, for all experts at once."""
    direction, name = make_direction(settings), learner_name(settings)
    lr = torch.tensor(step_sizes(settings), device=device)[:, None]  # (experts, 1)
    if name == "optimistic":
        return optimistic(lr, direction, settings.radius, settings.hint_memory)
    return LEARNERS[name](lr, direction, settings.radius)
