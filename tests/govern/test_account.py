"""A draft model that takes more time than it saves is left alone, and found again once it pays."""

from __future__ import annotations

import pytest

from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.govern.account import AccountConstants, DraftAccount
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.govern.planner import Plan
from tests.govern.world import BUDGET, PASSES, outcomes

CONSTANTS = AccountConstants()
ENOUGH = 100  # rounds that tell


def account(saved: float, taken: float, rounds: int = ENOUGH) -> DraftAccount:
    found = DraftAccount()
    for _ in range(rounds):
        found.observe(saved, taken)
    return found


def test_a_model_that_saves_more_than_it_takes_is_in_every_request() -> None:
    found = account(0.2, 0.1)
    assert found.known and found.pays
    assert all(found.takes_part() for _ in range(100))


def test_a_few_rounds_do_not_tell() -> None:
    found = account(0.0, 0.5, rounds=20)
    assert not found.known and found.pays
    assert all(found.takes_part() for _ in range(100))


def test_a_model_that_does_not_pay_is_tried_ever_more_rarely() -> None:
    found = account(0.1, 0.2)
    tried = [request for request in range(1, 400) if found.takes_part()]
    waits = [b - a for a, b in zip([0, *tried], tried, strict=False)]
    assert waits[:5] == [2, 4, 8, 16, 32] and set(waits[5:]) == {CONSTANTS.last_pause}


def test_a_model_that_begins_to_pay_is_found_by_its_trials() -> None:
    found = account(0.1, 0.2)
    served = 0
    for request in range(400):
        if found.takes_part():
            for _ in range(20):
                found.observe(0.5, 0.2)
            served += request >= 200
    assert found.pays and served == 200


def test_what_has_never_clearly_paid_learns_from_little_of_the_time() -> None:
    assert DraftAccount().learning_limit == 1.0  # it is not weighed at all
    for saved in (0.0, 0.1, 0.2, 0.25):
        assert account(saved, 0.2).learning_limit == CONSTANTS.unpaid_learning
    assert account(0.9, 0.2, rounds=5).learning_limit == CONSTANTS.unpaid_learning  # that does not tell yet
    fallen = account(0.4, 0.2)
    assert fallen.learning_limit == 1.0
    for _ in range(ENOUGH):
        fallen.observe(0.0, 0.2)
    assert not fallen.pays and fallen.learning_limit == 1.0  # it has paid before: catching up is worth the whole budget


def test_a_draft_that_is_never_asked_is_left_alone_only_where_something_is_read_for_it() -> None:
    asleep, reading = DraftAccount(), DraftAccount()
    for _ in range(ENOUGH):
        asleep.observe(0.0, 0.0)
        reading.observe(0.0, 0.0, reads=True)
    assert asleep.pays and not reading.pays


def timed(pace_s: float = 1.0) -> Governor:
    """A governor that knows what rounds take: 0.1 of a plain step for each further candidate."""
    governor = Governor(BUDGET, PASSES)
    for _ in range(60):
        governor.observe((), (), 0.0, pace_s)
        drafted = [TokenSource("memory", at) for at in range(4)]
        governor.observe(drafted, outcomes(drafted, [0.0]), 0.0, 1.4 * pace_s)
    return governor


@pytest.mark.parametrize("pace_s", [1.0, 0.05])
def test_time_is_weighed_in_plain_steps_of_the_machine_s_pace(pace_s: float) -> None:
    governor = timed(pace_s)
    for _ in range(ENOUGH):
        governor.observe_draft(gained=1, own=2, candidates=4, draft_s=0.1 * pace_s)
    found = governor.account
    assert found.saved == pytest.approx(1.0, abs=0.03)  # a token is a plain step where nothing else is gained
    assert found.taken == pytest.approx(0.1 + 2 * 0.1, abs=0.06)


def test_tokens_are_worth_less_where_guesses_bring_several_a_round() -> None:
    governor = timed()
    drafted = [TokenSource("memory", at) for at in range(4)]
    for _ in range(300):
        governor.observe(drafted, outcomes(drafted, [1.0] * 4), 0.0, 1.4)
    governor.observe_draft(gained=1, own=1, candidates=4, draft_s=0.1)
    assert governor.account.saved * 2 == pytest.approx(
        1.4 / 5, abs=0.05
    )  # `saved` is held against one round without anything


def test_learning_is_limited_while_the_draft_does_not_pay() -> None:
    paid, unpaid = timed(), timed()
    for governor, gained in ((paid, 1), (unpaid, 0)):
        governor.budget.reset_full("for a test")
        for _ in range(ENOUGH):
            governor.observe_draft(gained=gained, own=1, candidates=4, draft_s=0.1)
        governor.budget.spent(1.0, 1)  # a step takes one second
        for _ in range(3):
            governor.budget.spent(10.0, 0)  # whatever was saved is gone
        assert not governor.budget.affordable_steps()
    steps = {}
    for name, governor in (("paid", paid), ("unpaid", unpaid)):
        rounds = 0
        while not governor.budget.affordable_steps():
            governor.observe((), (), 0.0, 1.0)
            rounds += 1
        steps[name] = rounds
        assert "2.0%" in governor.budget.account() or name == "paid"
    assert steps["unpaid"] == pytest.approx(steps["paid"] * BUDGET / CONSTANTS.unpaid_learning, rel=0.05)


def test_a_stall_of_the_draft_counts_as_a_few_of_its_steps() -> None:
    governor = timed()
    drafted = [TokenSource("model", 0, (0,))]
    for _ in range(ENOUGH):
        governor.observe(drafted, outcomes(drafted, [1.0]), 0.1, 1.1)
        governor.observe_draft(gained=1, own=1, candidates=1, draft_s=0.1)
    before = governor.account.taken
    governor.observe_draft(gained=1, own=1, candidates=1, draft_s=60.0)
    assert before < governor.account.taken < before + 0.02


def test_a_prompt_that_is_read_counts_as_long_as_it_takes() -> None:
    governor = timed()
    drafted = [TokenSource("model", 0, (0,))]
    for _ in range(ENOUGH):
        governor.observe(drafted, outcomes(drafted, [1.0]), 0.1, 1.1)
    governor.observe_prefill(400, 20.0)
    for _ in range(ENOUGH):
        governor.observe_draft(gained=0, own=0, candidates=0, draft_s=20.0, read=400)
    assert governor.account.taken == pytest.approx(20.0, rel=0.1)


def test_the_first_round_of_a_draft_may_take_long_and_does_not_end_its_part() -> None:
    governor = Governor(BUDGET, PASSES)
    governor.observe((), (), 0.0, 1.0)
    governor.observe_draft(gained=1, own=1, candidates=1, draft_s=1000.0)
    for _ in range(ENOUGH):
        governor.observe_draft(gained=1, own=1, candidates=1, draft_s=0.1)
    assert governor.takes_part()


def test_the_reason_is_told() -> None:
    governor = timed()
    assert governor.takes_part()
    for _ in range(ENOUGH):
        governor.observe_draft(gained=0, own=1, candidates=4, draft_s=0.1)
    assert not governor.takes_part()
    governor.plan(drafts=False)
    governor.request_ended(20, left_alone=True)
    assert governor.decisions.drafting.startswith("guesses alone: the draft model saves 0.000 and takes 0.1")
    assert governor.takes_part()  # a trial
    governor.plan()
    governor.request_ended(20)
    assert not governor.decisions.drafting.startswith("guesses alone")


def test_a_trial_of_what_was_left_alone_drafts() -> None:
    """Else it would show nothing: on its own, the plan would be to draft nothing for many rounds."""
    governor = timed()
    drafted = [TokenSource("model", 0, (0,))]
    for _ in range(ENOUGH):
        governor.observe(drafted, outcomes(drafted, [0.0]), 0.5, 1.2)
        governor.observe_draft(gained=0, own=1, candidates=1, draft_s=0.5)
    assert not any(governor.plan(room=40).lookahead for _ in range(20))
    while not governor.takes_part():
        pass
    plan = governor.plan(room=40)
    assert plan.lookahead and not governor.guess_beats_model(plan, 0, 1.0, 0.9)  # nor does a guess take its place


def test_a_guess_gains_where_it_is_kept_more_often_than_it_costs() -> None:
    plan = Plan(0, 1.0, 0.0)
    assert not Governor(BUDGET, PASSES).guess_gains(plan, 0, 0.99)  # no times: nothing would have been guessed
    governor = timed()
    assert governor.guess_gains(plan, 4, 0.3) and not governor.guess_gains(plan, 4, 0.03)
