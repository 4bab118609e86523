"""A budget that is kept, and a fraction of it that follows what learning brings."""

from __future__ import annotations

import random

import pytest

from hf_onlinespec.govern.budget import BudgetConstants, LearningBudget
from hf_onlinespec.metrics import Decisions

BUDGET, PASSES = 0.1, 2
CONSTANTS = BudgetConstants()


def compared(budget: LearningBudget, gain: float, noise: float, n: int, base: bool = False, seed: int = 0) -> None:
    """n comparisons; what learning brings grows by `gain` with each."""
    rng = random.Random(seed)
    for i in range(n):
        budget.observe_gain((1 + gain) ** i + rng.gauss(0, noise), base)


def test_effort_is_cut_where_nothing_is_gained_and_raised_where_much_is() -> None:
    decisions = Decisions()
    budget = LearningBudget(BUDGET, PASSES, decisions)
    assert decisions.budget_fraction == CONSTANTS.first_fraction
    compared(budget, 0.0, 0.005, 40)
    assert decisions.budget_fraction == CONSTANTS.least_fraction
    compared(budget, 0.05, 0.02, 80)
    assert decisions.budget_fraction == 1.0 and "gain of +" in decisions.learning


def test_a_doubtful_gain_keeps_a_small_effort_and_cuts_a_full_one() -> None:
    decisions = Decisions()
    budget = LearningBudget(BUDGET, PASSES, decisions)
    for value in (1.0, 1.4, 0.8, 1.2) * 2:  # the same mean twice, and much noise
        budget.observe_gain(value)
    assert decisions.budget_fraction == CONSTANTS.first_fraction
    budget.reset_full("for a test")
    assert decisions.budget_fraction == 1.0
    for value in (1.0, 1.4, 0.8, 1.2) * 2:
        budget.observe_gain(value)
    assert decisions.budget_fraction == CONSTANTS.first_fraction


def test_the_frozen_draft_s_requests_have_an_effort_of_their_own() -> None:
    decisions = Decisions()
    budget = LearningBudget(BUDGET, PASSES, decisions)
    compared(budget, 0.0, 0.005, 40, base=True)
    budget.earn(1.0, base=True)
    assert decisions.budget_fraction == CONSTANTS.least_fraction
    budget.earn(1.0, base=False)
    assert decisions.budget_fraction == CONSTANTS.first_fraction
    budget.reset_full("for a test", base=True)
    budget.earn(1.0, base=False)
    assert decisions.budget_fraction == CONSTANTS.first_fraction


def test_steps_are_paid_from_the_budget() -> None:
    budget = LearningBudget(BUDGET, PASSES, Decisions())
    budget.reset_full("for a test")
    assert budget.affordable_steps() == 1 + PASSES  # their price is not known
    budget.spent(6.0, 3)
    spent, time = 6.0, 0.0
    for _ in range(500):
        budget.earn(5.0)
        time += 5.0
        steps = budget.affordable_steps()
        budget.spent(2.0 * steps, steps)
        spent += 2.0 * steps
    assert 0.08 * time < spent <= BUDGET * time + 6.0


def test_looks_are_rare_where_they_are_dear() -> None:
    budget = LearningBudget(BUDGET, PASSES, Decisions())
    looks = 0
    for _ in range(1000):
        budget.earn(1.0)
        if budget.scoring.affordable():
            budget.scoring.spent(0.05)
            looks += 1
    assert 80 <= looks <= 110  # half a percent of the time
    budget.scoring.spent(float("nan"))
    budget.earn(100.0)
    assert budget.scoring.affordable() and budget.comparing.affordable()
    for wait in (
        90.0,
        190.0,
    ):  # 2 % of 100 s are 2 s; twice as much is saved up at most, and two in a row have to be made up for
        budget.comparing.spent(2.0)
        budget.earn(wait)
        assert not budget.comparing.affordable()
        budget.earn(1000.0)
        assert budget.comparing.affordable()
        for _ in range(2):
            budget.comparing.spent(2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_comparisons_that_are_no_numbers_are_left_out(value: float) -> None:
    decisions = Decisions()
    budget = LearningBudget(BUDGET, PASSES, decisions)
    for _ in range(4 * CONSTANTS.first_window):
        budget.observe_gain(value)
    assert decisions.budget_fraction == CONSTANTS.first_fraction


def test_after_a_raise_it_is_looked_at_soon() -> None:
    decisions = Decisions()
    budget = LearningBudget(BUDGET, PASSES, decisions)
    for value in (0.8, 1.2) * 8:  # windows of 4, 4 and 8: doubtful, so that the next one has 16
        budget.observe_gain(value)
    assert decisions.budget_fraction == CONSTANTS.first_fraction
    for _ in range(16):
        budget.observe_gain(3.0)
    assert decisions.budget_fraction == 1.0
    for _ in range(CONSTANTS.first_window):
        budget.observe_gain(3.0)  # no further gain
    assert decisions.budget_fraction == CONSTANTS.first_fraction


def test_what_begins_to_pay_late_is_noticed_as_soon() -> None:
    """After thousands of comparisons that left it in doubt."""
    took = []
    for seed in range(20):
        rng, decisions = random.Random(seed), Decisions()
        budget = LearningBudget(BUDGET, PASSES, decisions)
        for _ in range(3000):
            budget.observe_gain(rng.choice((0.8, 1.2)))
        took.append(0)
        while decisions.budget_fraction < 1.0:
            budget.observe_gain(rng.choice((0.8, 1.2)) * (1 + 0.01 * took[-1]))
            took[-1] += 1
    assert sum(took) / len(took) < 200


def test_time_that_comes_to_no_step_is_paid_for_too() -> None:
    budget = LearningBudget(BUDGET, PASSES, Decisions())
    budget.spent(5.0, 0)  # every step was skipped
    assert budget.affordable_steps() == 0
    budget.earn(1000.0)
    assert budget.affordable_steps() == 1 + PASSES
