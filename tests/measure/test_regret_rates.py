"""Measured regret against theory on convex streams: a linear-softmax draft, a teacher that drifts, many seeds.

Theory gives upper bounds with the step size tuned to the path length P: O(√(T (1 + P))) for OGD, O(√((1 + P)(1 + V))) for the
optimistic rule with gradient variation V. Slopes of log regret over log T are compared with these.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from hf_onlinespec.adapt.learners import UpdateRule, hedge, ogd, optimistic

HORIZONS = (250, 500, 1000, 2000, 4000)
VOCAB, FEATURES, SEEDS = 4, 3, 40
ABOVE, BELOW = 0.05, 0.2  # the slope may exceed the bound's by this, and stay behind it by that


def slope(points: list[tuple[int, float]]) -> float:
    """Least squares of log y over log x."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(1)
    return float((x * y).sum() / (x * x).sum())


def dynamic_regret(make: Callable[[float], UpdateRule], rate: float, horizon: int, path: float) -> float:
    """Expected loss of the draft minus the teacher's own, summed, mean over seeds.

    The teacher's weights walk `path` radii along a circle; the draft sees one context and one sampled token at a time.
    """
    generator = torch.Generator().manual_seed(0)
    size = VOCAB * FEATURES
    a, b = (2 * F.normalize(torch.randn(SEEDS, size, generator=generator, dtype=torch.float64)) for _ in range(2))
    learner = make(rate)
    w, state = a.clone(), learner.init(a)
    regret = torch.zeros(SEEDS, dtype=torch.float64)
    for t in range(horizon):
        angle = path * t / horizon
        teacher = (math.cos(angle) * a + math.sin(angle) * b).view(SEEDS, VOCAB, FEATURES)
        x = torch.randn(SEEDS, FEATURES, generator=generator, dtype=torch.float64)
        p = torch.einsum("svf,sf->sv", teacher, x).softmax(-1)
        token = F.one_hot(torch.multinomial(p, 1, generator=generator)[:, 0], VOCAB).double()
        log_q = torch.einsum("svf,sf->sv", w.view(SEEDS, VOCAB, FEATURES), x).log_softmax(-1)
        regret += (p * (p.log() - log_q)).sum(-1)
        updates, state = learner.update(torch.einsum("sv,sf->svf", log_q.exp() - token, x).flatten(1), state)
        w = w + updates
    return float(regret.mean())


@pytest.mark.parametrize("make", [ogd, optimistic])
@pytest.mark.parametrize("growth", [0.0, 0.25, 0.5])
def test_dynamic_regret_grows_as_the_root_of_horizon_and_path(
    make: Callable[[float], UpdateRule], growth: float
) -> None:
    """P = T^growth: the bound grows with T to the power of (1 + growth) / 2."""
    points = []
    for horizon in HORIZONS:
        path = horizon**growth
        points.append((horizon, dynamic_regret(make, math.sqrt((1 + path) / horizon), horizon, path)))
    bound = (1 + growth) / 2
    assert bound - BELOW < slope(points) < bound + ABOVE


def test_a_step_size_that_ignores_the_path_pays_for_it() -> None:
    """The check above can fail: tuned to a teacher that stands still, OGD cannot follow one that walks √T."""
    points = [(t, dynamic_regret(ogd, 1 / math.sqrt(t), t, t**0.5)) for t in HORIZONS]
    assert slope(points) > 0.75 + ABOVE


def linear_regret(make: Callable[[float], UpdateRule], rate: float, horizon: int) -> float:
    """Static regret on linear losses over the unit disc, whose gradient never changes."""
    learner = make(rate)
    w = torch.zeros(2, dtype=torch.float64)
    state = learner.init(w)
    g = torch.tensor([0.6, 0.8], dtype=torch.float64)
    lost = 0.0
    for _ in range(horizon):
        lost += float(w @ g)
        updates, state = learner.update(g, state)
        w = w + updates
    return lost + horizon  # the best fixed point is −g


def test_optimism_pays_for_variation_alone() -> None:
    """V is that of the first gradient, which no hint foretold. OGD tuned to its worst case pays √T, the optimistic rule a constant."""
    worst_case = [(t, linear_regret(lambda lr: ogd(lr, radius=1.0), 1 / math.sqrt(t), t)) for t in HORIZONS]
    foretold = [linear_regret(lambda lr: optimistic(lr, radius=1.0), 1 / math.sqrt(2), t) for t in HORIZONS]
    assert slope(worst_case) == pytest.approx(0.5, abs=0.03)
    assert max(foretold) <= 2.0 and max(foretold) - min(foretold) < 1e-9


def test_hedge_over_a_grid_comes_close_to_its_best_rate() -> None:
    """Ensemble regret against the best step size in hindsight: at most √(T ln N / 2) of losses up to one, twice over."""
    rates = [0.01 * 4.0**i for i in range(5)]
    for horizon, path in itertools.product((500, 2000), (0.0, 8.0)):
        generator = torch.Generator().manual_seed(1)
        learner = ogd(torch.tensor(rates, dtype=torch.float64)[:, None])
        w = torch.zeros(len(rates), 2, dtype=torch.float64)
        state, (init, update) = learner.init(w), hedge()
        meta = init(len(rates))
        weights = torch.full((len(rates),), 1 / len(rates), dtype=torch.float64)
        served, each = 0.0, torch.zeros(len(rates), dtype=torch.float64)
        for t in range(horizon):
            angle = path * t / horizon
            goal = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            goal = goal + 0.3 * torch.randn(2, generator=generator, dtype=torch.float64)
            losses = (0.25 * (w - goal).square().sum(-1)).clamp_max(1.0)
            served += float(weights @ losses)
            each += losses
            weights, meta = update(losses, meta)
            updates, state = learner.update(0.5 * (w - goal), state)
            w = w + updates
        assert served - float(each.min()) <= 2 * math.sqrt(horizon * math.log(len(rates)) / 2)
