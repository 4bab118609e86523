"""Rounds of a batch: who is asked in them, and how wide they are."""

from __future__ import annotations

import pytest

from hf_onlinespec.govern.acceptance import RequestStats, RowRound, TokenSource
from hf_onlinespec.govern.batch_pace import BatchPace, progress, share_of_rows
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.govern.planner import NextInRow, Plan


def shares(pace: BatchPace, asking_s: float, tokens: int, rounds: int) -> float:
    """Share of the rounds in which somebody is asked, where a bare round of 4 rows takes a second; tokens: of a round of asking."""
    asked = 0
    for _ in range(rounds):
        asks = pace.asks()
        asked += asks
        pace.observe(asks, asking_s if asks else 1.0, tokens / 4 if asks else 1.0)
    return asked / rounds


def test_nobody_is_asked_for_long_where_that_takes_longer() -> None:
    pace = BatchPace()
    shares(pace, asking_s=1.6, tokens=5, rounds=400)
    assert shares(pace, asking_s=1.6, tokens=5, rounds=2000) < 0.05
    assert not pace.pays and "takes 1280.00 ms with drafting, and 1000.00 ms without" in pace.reason


@pytest.mark.parametrize("asking_s", [1.3, 1.6, 3.0, 8.0])
def test_trials_that_do_not_pay_lose_little_whatever_they_take(asking_s: float) -> None:
    """Of 4 rows, of which asking brings one of them a token more. In the first rounds nothing is known."""
    pace = BatchPace()
    lost, rounds = -6 * (asking_s - 1.25), 12_000
    for _ in range(rounds):
        asks = pace.asks()
        lost += asking_s - 1.25 if asks else 0.0
        pace.observe(asks, asking_s if asks else 1.0, 1.25 if asks else 1.0)
    assert 0 < lost <= 0.011 * rounds


def test_the_progress_of_all_rounds_of_a_call_is_its_plain_decoding() -> None:
    """Rows of 24 tokens each that come at different speeds and leave as they end; a plain round of n rows takes 3 + n."""
    plain, left, took = {n: 3.0 + n for n in range(1, 5)}, {row: 24 for row in range(4)}, 0.0
    while left:
        n, new = len(left), {row: min(row + 1, tokens) for row, tokens in left.items()}
        most = max(left.values())
        left = {row: tokens - new[row] for row, tokens in left.items()}
        share = share_of_rows(plain, n, plain[n])
        slowest = most - max(left.values())
        took += plain[n] * progress(slowest, sum(new.values()) / n, share)
        left = {row: tokens for row, tokens in left.items() if tokens}
    assert took == pytest.approx(24 * plain[4])


def test_how_much_rows_cost_is_told_by_the_times_of_two_sizes() -> None:
    assert share_of_rows({1: 1.0, 8: 2.0}, 8, 2.4) == pytest.approx(8 * 0.2 / 2.4)
    # Not known: rows that end earlier gain nothing.
    assert share_of_rows({8: 2.4}, 8, 2.4) == share_of_rows({1: 1.0}, 8, 0.0) == 0.0
    assert share_of_rows({1: 3.0, 8: 2.4}, 8, 2.4) == 0.0 and share_of_rows({1: 0.1, 8: 2.4}, 8, 2.4) == 1.0


def test_rows_that_are_left_count_by_what_asking_makes_of_them() -> None:
    pace = BatchPace()
    assert pace.fastest_s(1.0) == 1.0
    shares(pace, asking_s=1.6, tokens=10, rounds=400)
    assert pace.fastest_s(1.0) == pytest.approx(0.64)
    shares(pace, asking_s=1.6, tokens=5, rounds=400)
    assert pace.fastest_s(1.0) == 1.0


@pytest.mark.parametrize(("one_row_s", "pays"), [(None, False), (0.95, False), (0.3, True)])
def test_rows_that_are_ahead_count_as_far_as_rows_cost(one_row_s: float | None, pays: bool) -> None:
    """Asking takes 1.3 times as long, and brings the rows 3 tokens in the mean, one of them always 1."""
    governor = Governor(0.1, 1)
    four = governor.for_rows(4)
    assert four.pace is not None
    if one_row_s is not None:
        governor.observe((), (), 0.0, one_row_s)
    four.observe((), (), 0.0, 1.0)
    for _ in range(400):
        asks = four.pace.asks()
        governor.observe_progress(4, asks, 1.3 if asks else 1.0, 1.0, 3.0 if asks else 1.0)
    assert four.pace.pays is pays


def test_where_asking_pays_a_bare_round_is_timed_now_and_then() -> None:
    pace = BatchPace()
    assert not pace.asks()  # first it is found out what a bare round takes
    assert 0.9 < shares(pace, asking_s=1.6, tokens=10, rounds=1000) < 1.0


@pytest.mark.parametrize(("before", "after"), [(5, 10), (10, 5)])
def test_what_changes_is_found_out(before: int, after: int) -> None:
    pace = BatchPace()
    shares(pace, asking_s=1.6, tokens=before, rounds=500)
    shares(pace, asking_s=1.6, tokens=after, rounds=600)
    assert pace.pays is (after == 10)


def test_one_row_is_always_asked() -> None:
    governor = Governor(0.1, 1)
    assert governor.pace is None and governor.for_rows(1) is governor


def test_batches_have_times_of_their_own_by_size_and_share_what_is_known_of_acceptance() -> None:
    governor = Governor(0.1, 1)
    four, eight = governor.for_rows(4), governor.for_rows(5)
    assert four is governor.for_rows(3) and eight is governor.for_rows(8) and four is not eight
    four.observe((), (), 0.0, 2.0)
    assert four.costs.pace_s == 2.0 and not governor.costs.pace_s and not eight.costs.pace_s
    assert four.acceptances is governor.acceptances and four.budget is governor.budget
    assert four.decisions is governor.decisions and governor.decisions.rounds["plain"] == 1


@pytest.mark.parametrize(("rows", "asking_s", "limited"), [(8, 0.8, False), (8, 1.6, True), (4, 1.6, False)])
def test_learning_is_limited_in_large_batches_in_which_asking_does_not_pay(rows, asking_s, limited) -> None:
    """Whatever one row alone has shown."""
    governor = Governor(0.1, 1)
    own = governor.for_rows(rows)
    assert own.pace is not None and own.pace.learning_limit == 1.0  # nothing is known yet
    shares(own.pace, asking_s, tokens=4, rounds=400)
    governor.budget.reset_full("for a test")
    governor.budget.spent(1.0, 1)  # a step takes one second
    own.observe((), (), 0.0, 10.0)
    said = governor.budget.account()
    assert ("the 0.5% of" in said) == limited and ("the 10.0% of" in said) != limited
    governor.observe((), (), 0.0, 10.0)
    assert "the 10.0% of" in governor.budget.account()


def test_all_rows_are_as_wide_as_pays_for_them_together() -> None:
    governor = Governor(0.1, 1).for_rows(4)
    assert governor.width([[0.5], []]) == 1  # nothing is known: nothing is cut
    governor.observe((), (), 0.0, 1.0)
    likely, doubtful = [0.4] * 4, [0.05] * 4
    assert governor.width([likely] * 4) == 4
    assert governor.width([likely, [], [], []]) == 0  # the others would wait for one row
    assert governor.width([doubtful] * 4) == 0


def drafted(n: int, together: bool) -> RowRound:
    tokens = [TokenSource("model", at, (3,)) for at in range(n)]
    return RowRound(tokens, [(token, 0.8) for token in tokens], RequestStats(), read_together=together)


@pytest.mark.parametrize(("together", "step"), [(True, 0.1), (False, 0.4)])
def test_steps_that_rows_share_cost_what_one_forward_takes(together: bool, step: float) -> None:
    """One row of four drafts, 0.1 of a plain step for each token: where rows are read one by one, all of them would take four times."""
    governor = Governor(0.1, 1).for_rows(4)
    governor.observe((), (), 0.0, 1.0)
    nothing = RowRound((), (), RequestStats(), read_together=together)
    for _ in range(4):
        for n in (4, 8):
            governor.observe_rows([drafted(n, together), nothing, nothing, nothing], 0.1 * n, 1.4)
    assert governor.costs.draft.step() == pytest.approx(step, rel=0.1)


def test_one_more_forward_is_held_against_what_it_brings_in_all_rows() -> None:
    governor = Governor(0.1, 1).for_rows(4)
    governor.observe((), (), 0.0, 1.0)
    plan = Plan(3, 1.0, 0.0, acceptance=0.8)
    first = [NextInRow(plan, 0, 1.0, False)]
    assert governor.models_pay(first, 4)  # nothing was timed yet
    for _ in range(10):
        for n in (2, 4):
            governor.observe_rows([drafted(n, True)] * 4, 0.1 * n, 1.0 + 0.05 * n)

    def likely(rows: int, survival: float) -> list[NextInRow]:
        return [NextInRow(plan, 2, survival, True)] * rows

    assert governor.models_pay(likely(4, 0.5), 4) and not governor.models_pay(likely(1, 0.5), 4)
    assert governor.models_pay(likely(2, 0.9), 4) and not governor.models_pay(likely(4, 0.1), 4)
    assert governor.models_pay(first, 4)  # whether the round is begun at all the plan decides
    assert governor.may_draft(plan, 2) and not governor.may_draft(Plan(0, 1.0, 0.0), 2)


def test_a_batch_grows_no_wider_at_once_than_twice_what_was_timed() -> None:
    """What a prompt's width takes in several rows does not follow from a few candidates."""
    governor, sure = Governor(0.1, 1).for_rows(4), [1.0] * 64
    governor.observe((), (), 0.0, 1.0)
    plan = Plan(0, 1.0, 0.0)
    wide = []
    for _ in range(4):
        wide.append(governor.width([sure] * 4))
        assert governor.guess_pays(plan, wide[-1] - 1, 1.0) and not governor.guess_pays(plan, wide[-1], 1.0)
        guesses = [TokenSource("memory", at) for at in range(wide[-1])]
        governor.observe(guesses, [(guess, 1.0) for guess in guesses], 0.0, 1.1)
    assert wide == [6, 12, 24, 48]
    for candidates in (2, 3, 4) * 4:
        guesses = [TokenSource("memory", at) for at in range(candidates)]
        governor.observe(guesses, [(guess, 0.2) for guess in guesses], 0.0, 1.6)
    assert governor.costs.verify.at(64) < 4
    guesses = [TokenSource("memory", at) for at in range(60)]
    governor.observe(guesses, [(guess, 0.2) for guess in guesses], 0.0, 9.0)
    assert governor.costs.verify.at(64) > 5  # once is enough to know that a wide one is dear
    alone = Governor(0.1, 1)
    alone.observe((), (), 0.0, 1.0)
    assert alone.guess_pays(plan, 60, 1.0)
