"""Means that forget, medians of times, falls that are more than noise."""

from __future__ import annotations

import random

import pytest

from hf_onlinespec.govern.costs import CostConstants, DraftCost, VerifyCost
from hf_onlinespec.govern.estimates import ChangeConstants, ChangeDetector, DecayedMean


def test_times_follow_a_line() -> None:
    times = DraftCost(CostConstants(draft_slope=0.05))
    assert times.at(3) == 0.0 and times.step() == 0.0 and not times.known
    times.add(3, 1.1)
    assert times.at(3) == pytest.approx(1.1) and times.at(4) == pytest.approx(1.15)  # 5 % of one position's time each
    for n, steps in ((1, 1.0), (5, 1.2)):
        for _ in range(3):
            times.add(n, steps)
    assert times.at(4) == pytest.approx(1.15, abs=0.01) and times.step() == pytest.approx(0.05, abs=0.01)
    times.add(9, 12.0)  # a size seen once, in a stall: the line stays
    assert times.at(4) == pytest.approx(1.15, abs=0.01)
    falling = DraftCost(CostConstants(draft_slope=0.05))
    falling.add(2, 2.0)
    falling.add(6, 1.0)
    assert falling.step() == 0.0 and falling.at(9) > 0


def test_shares_forget() -> None:
    share = DecayedMean(0.9)
    for _ in range(100):
        share.add(1.0)
    assert share.mean(0.0, strength=4.0) == pytest.approx(10 / 14, abs=0.01)
    share.fade(1000)
    assert share.mean(0.3, strength=4.0) == pytest.approx(0.3)


def test_a_level_falls_by_more_than_its_noise() -> None:
    rng = random.Random(0)
    level = ChangeDetector()
    assert not any(level.detect_drop(rng.gauss(0.6, 0.1)) for _ in range(300))
    assert any(level.detect_drop(rng.gauss(0.2, 0.1)) for _ in range(5))
    assert not any(level.detect_drop(rng.gauss(0.2, 0.1)) for _ in range(50))
    alternating = ChangeDetector()
    assert not any(alternating.detect_drop((0.05, 0.7)[i % 2]) for i in range(200))


def test_requests_of_several_domains_are_no_fall() -> None:
    """Four in a row of the one that is hard for the draft happen by chance."""
    fallen = 0
    for seed in range(20):
        rng, level = random.Random(seed), ChangeDetector()
        for _ in range(300):
            rate = rng.choice((0.05, 0.9))
            fallen += level.detect_drop(sum(rng.random() < rate for _ in range(20)) / 20, 20)
    assert fallen <= 10


def requests(level: ChangeDetector, rates: tuple[float, ...], n: int, seed: int = 0) -> None:
    """n requests of 20 positions, at these acceptance rates in turn."""
    rng = random.Random(seed)
    for i in range(n):
        rate = rates[i % len(rates)]
        level.detect_drop(sum(rng.random() < rate for _ in range(20)) / 20, 20)


def test_requests_are_alike_where_they_differ_by_chance_only() -> None:
    level = ChangeDetector()
    constants = ChangeConstants()
    assert constants.least_strength < level.prior_strength < constants.most_strength  # nothing is known
    requests(level, (0.6,), 60)
    assert level.prior_strength > 25
    requests(level, (0.05, 0.9), 60)
    assert level.prior_strength < 3


def test_after_a_fall_only_what_came_after_it_counts() -> None:
    level = ChangeDetector()
    requests(level, (0.8,), 30)
    requests(level, (0.1,), 8)
    assert level.prior_strength > 25  # of both together: 2


def test_verification_bends_and_rises() -> None:
    curve = VerifyCost()
    assert curve.at(4) > curve.at(1) > 1
    cost = {k: 1 + 0.3 * (1 - 2 ** (-k / 2)) + 0.02 * k for k in (1, 2, 4, 8, 12)}
    for k, steps in cost.items():
        for i in range(5):
            curve.add(k, steps * (1 + 0.02 * (i - 2)))
    assert all(curve.at(k) == pytest.approx(steps, abs=0.01) for k, steps in cost.items())
    assert curve.at(20) == pytest.approx(1.7, abs=0.02) and curve.step(1) > 2 * curve.step(10)
    before = curve.at(6)
    curve.add(6, 50.0)  # a stall
    assert curve.at(6) == pytest.approx(before, abs=0.01)


@pytest.mark.parametrize("slope", [0.0, 0.06, -0.05])
def test_verification_never_gets_cheaper_with_more_tokens(slope: float) -> None:
    curve = VerifyCost()
    for k in (2, 5, 9):
        for _ in range(5):
            curve.add(k, 1.2 + slope * k)
    assert all(curve.step(k) >= 0 and curve.at(k) >= 1 for k in range(1, 30))
    if slope >= 0:
        assert curve.at(5) == pytest.approx(1.2 + slope * 5, abs=0.05)
