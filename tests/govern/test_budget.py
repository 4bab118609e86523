"""A budget that is kept, and an effort that follows what learning brings."""

from __future__ import annotations

import random

import pytest

from hf_onlinespec.govern.budget import FIRST_EFFORT, FIRST_WINDOW, LEAST_EFFORT, LearningBudget
from hf_onlinespec.metrics import Decisions

BUDGET, PASSES = 0.1, 2


def compared(effort: LearningBudget, gain: float, noise: float, n: int, frozen: bool = False, seed: int = 0) -> None:
    """n comparisons; what learning brings grows by `gain` with each."""
    rng = random.Random(seed)
    for i in range(n):
        effort.compared((1 + gain) ** i + rng.gauss(0, noise), frozen)


def test_effort_is_cut_where_nothing_is_gained_and_raised_where_much_is() -> None:
    decisions = Decisions()
    effort = LearningBudget(BUDGET, PASSES, decisions)
    assert decisions.effort == FIRST_EFFORT
    compared(effort, 0.0, 0.005, 40)
    assert decisions.effort == LEAST_EFFORT
    compared(effort, 0.05, 0.02, 80)
    assert decisions.effort == 1.0 and "gain of +" in decisions.learning


def test_a_doubtful_gain_keeps_a_small_effort_and_cuts_a_full_one() -> None:
    decisions = Decisions()
    effort = LearningBudget(BUDGET, PASSES, decisions)
    for value in (1.0, 1.4, 0.8, 1.2) * 2:  # the same mean twice, and much noise
        effort.compared(value)
    assert decisions.effort == FIRST_EFFORT
    effort.reset_full("for a test")
    assert decisions.effort == 1.0
    for value in (1.0, 1.4, 0.8, 1.2) * 2:
        effort.compared(value)
    assert decisions.effort == FIRST_EFFORT


def test_the_frozen_draft_s_requests_have_an_effort_of_their_own() -> None:
    decisions = Decisions()
    effort = LearningBudget(BUDGET, PASSES, decisions)
    compared(effort, 0.0, 0.005, 40, frozen=True)
    effort.earn(1.0, frozen=True)
    assert decisions.effort == LEAST_EFFORT
    effort.earn(1.0, frozen=False)
    assert decisions.effort == FIRST_EFFORT
    effort.reset_full("for a test", frozen=True)
    effort.earn(1.0, frozen=False)
    assert decisions.effort == FIRST_EFFORT


def test_steps_are_paid_from_the_budget() -> None:
    effort = LearningBudget(BUDGET, PASSES, Decisions())
    effort.reset_full("for a test")
    assert effort.affordable_steps() == 1 + PASSES  # their price is not known
    effort.spent(6.0, 3)
    spent, time = 6.0, 0.0
    for _ in range(500):
        effort.earn(5.0)
        time += 5.0
        steps = effort.affordable_steps()
        effort.spent(2.0 * steps, steps)
        spent += 2.0 * steps
    assert 0.08 * time < spent <= BUDGET * time + 6.0


def test_looks_are_rare_where_they_are_dear() -> None:
    effort = LearningBudget(BUDGET, PASSES, Decisions())
    looks = 0
    for _ in range(1000):
        effort.earn(1.0)
        if effort.should_score():
            effort.scored(0.05)
            looks += 1
    assert 80 <= looks <= 110  # half a percent of the time
    effort.scored(float("nan"))
    effort.earn(100.0)
    assert effort.should_score()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_comparisons_that_are_no_numbers_are_left_out(value: float) -> None:
    decisions = Decisions()
    effort = LearningBudget(BUDGET, PASSES, decisions)
    for _ in range(4 * FIRST_WINDOW):
        effort.compared(value)
    assert decisions.effort == FIRST_EFFORT


def test_after_a_raise_it_is_looked_at_soon() -> None:
    decisions = Decisions()
    effort = LearningBudget(BUDGET, PASSES, decisions)
    for value in (0.8, 1.2) * 8:  # windows of 4, 4 and 8: doubtful, so that the next one has 16
        effort.compared(value)
    assert decisions.effort == FIRST_EFFORT
    for _ in range(16):
        effort.compared(3.0)
    assert decisions.effort == 1.0
    for _ in range(FIRST_WINDOW):
        effort.compared(3.0)  # no further gain
    assert decisions.effort == FIRST_EFFORT


def test_time_that_comes_to_no_step_is_paid_for_too() -> None:
    effort = LearningBudget(BUDGET, PASSES, Decisions())
    effort.spent(5.0, 0)  # every step was skipped
    assert effort.affordable_steps() == 0
    effort.earn(1000.0)
    assert effort.affordable_steps() == 1 + PASSES
