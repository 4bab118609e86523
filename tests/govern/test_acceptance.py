"""Estimates of acceptance: what each draft does is its own, whoever served last."""

from __future__ import annotations

import pytest

from hf_onlinespec.commit.suffix_memory import Continuation
from hf_onlinespec.govern.acceptance import Acceptances, RequestStats, TokenSource


def served(acceptances: Acceptances, base: bool, overlap: float, n: int = 30) -> None:
    seen = RequestStats(serves_base=base)
    for i in range(n):
        acceptances.observe_round([(TokenSource("model", i % 3, (4,)), overlap)], seen)


def test_the_two_drafts_are_kept_apart() -> None:
    acceptances = Acceptances()
    for _ in range(5):
        served(acceptances, False, 0.8)
        served(acceptances, True, 0.2)
    assert acceptances.mean_rate(False) == pytest.approx(0.8, abs=0.05)
    assert acceptances.mean_rate(True) == pytest.approx(0.2, abs=0.05)
    assert acceptances.rate == acceptances.mean_rate(True)  # it served last
    assert acceptances.rate_at(0, 0.8, base=False) == pytest.approx(0.8, abs=0.05)
    assert acceptances.rate_at(0, 0.2, base=True) == pytest.approx(0.2, abs=0.05)


def test_a_draft_that_was_never_seen_is_taken_for_the_other_one() -> None:
    acceptances = Acceptances()
    served(acceptances, False, 0.8)
    assert acceptances.mean_rate(True) == pytest.approx(acceptances.mean_rate(False), abs=0.02)


def test_a_request_shows_itself() -> None:
    acceptances = Acceptances()
    for rate in (0.05, 0.9) * 10:  # requests differ much
        served(acceptances, False, rate)
        acceptances.observe_request(rate, 30, False)
    seen = RequestStats()
    before, doubt = acceptances.request_rate(seen)
    assert doubt > 0.2
    for _ in range(4):
        acceptances.observe_round([(TokenSource("model", 0, (4,)), 0.0)], seen)
    after, less = acceptances.request_rate(seen)
    assert after < 0.5 * before and less < doubt


def test_a_law_that_is_none_counts_as_a_rejection() -> None:
    acceptances, seen = Acceptances(), RequestStats()
    served(acceptances, False, 0.8)
    for _ in range(100):
        acceptances.non_finite(seen)
    assert acceptances.mean_rate(False) < 0.3 and seen.positions == 100


def test_a_copied_passage_does_not_speak_for_the_weaker_answers_behind_it() -> None:
    """In a request in which the memory was right throughout, its other answers are worth what they are worth elsewhere."""
    acceptances, copying = Acceptances(), RequestStats()
    copied, weak = Continuation((5,), (1.0,), 12, 1), Continuation((6, 7), (0.5, 0.5), 1, 2)
    key = acceptances.memory_key(copied)
    for _ in range(30):
        acceptances.observe_answer(key, 1.0, copying)
    assert acceptances.memory(weak, calibration=acceptances.memory_calibration(copying)) == acceptances.memory(
        weak, calibration=acceptances.memory_calibration(RequestStats())
    )
    for _ in range(30):
        acceptances.observe_answer(key, 0.0, copying)
    assert (
        acceptances.memory(weak, calibration=acceptances.memory_calibration(copying))[1]
        < 0.8 * acceptances.memory(weak)[1]
    )
