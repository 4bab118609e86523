"""The replay is bounded in tokens and bytes, keeps new and old requests, and is repeatable."""

import pytest
import torch

from hf_onlinespec import Feedback
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.replay import PROFILE, SAMPLING, Replay, ReplayConstants, ReplaySchedule


def request(i: int, length: int = 10, new: int = 6, vocab: int = 50) -> Feedback:
    return Feedback(torch.full((length,), i), Teacher.from_logits(torch.randn(new, vocab)))


def names(requests: list[Feedback]) -> list[int]:
    return [int(r.tokens[0]) for r in requests]


def filled(n: int, max_tokens: int, sampling: str = "uniform", seed: int = 0) -> Replay:
    replay = Replay(max_tokens, top_k=4, seed=seed, sampling=sampling)
    for i in range(n):
        replay.add(request(i))
    return replay


def test_nothing_is_forgotten_before_the_room_is_full() -> None:
    assert names(filled(10, 100).requests) == list(range(10))


def test_half_of_the_room_is_for_the_newest() -> None:
    replay = filled(40, 100)
    assert replay.tokens == 100 and names([r.feedback for r in replay.recent]) == [35, 36, 37, 38, 39]


def test_every_earlier_request_has_the_same_chance_to_stay() -> None:
    kept = torch.zeros(35)
    for seed in range(400):
        for i in names([r.feedback for r in filled(40, 100, seed=seed).old]):
            kept[i] += 1
    assert kept.sum() == 400 * 5
    expected = 400 * 5 / 35
    # A binomial of 400 draws with chance 1/7 has a standard deviation of 7: four of them.
    assert (kept - expected).abs().max() < 28


def test_bytes_stay_within_the_stated_bound() -> None:
    replay = Replay(max_tokens=200, top_k=8, seed=0)
    for i in range(50):
        replay.add(request(i, length=7 + i % 9, new=6))
        assert replay.tokens <= 200
        assert replay.nbytes <= 200 * (12 + 12 * 8) + 4 * PROFILE * len(replay)
    assert replay.nbytes == sum(f.tokens.nbytes + f.teacher.nbytes + 4 * PROFILE for f in replay.requests)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_request_above_the_bound_is_not_kept(sampling: str) -> None:
    replay = Replay(max_tokens=5, top_k=4, seed=0, sampling=sampling)
    replay.add(request(0))
    assert len(replay) == 0 and replay.sample(3) == [] and replay.refused == 1


@pytest.mark.parametrize("sampling", SAMPLING)
def test_samples_are_distinct_and_repeatable(sampling: str) -> None:
    def draws() -> list[list[int]]:
        torch.manual_seed(0)
        replay = filled(60, 300, sampling, seed=7)
        return [names([r.feedback for r in replay.sample(5)]) for _ in range(3)]

    first = draws()
    assert first == draws()
    assert all(len(set(drawn)) == 5 for drawn in first)
    one = filled(1, 100, sampling)
    assert names([r.feedback for r in one.sample(4)]) == [0]


def drawn(replay: Replay, n: int = 4) -> list[Feedback]:
    return [r.feedback for _ in range(200) for r in replay.sample(n)]


def test_what_is_rehearsed() -> None:
    """Each way of sampling prefers what its name says."""

    def new(sampling: str) -> float:
        found = names(drawn(filled(60, 300, sampling)))
        return sum(i >= 45 for i in found) / len(found)

    assert new("recent") == 1.0 and new("mixed") == 0.5 and new("uniform") == pytest.approx(0.5, abs=0.05)

    by_loss = filled(20, 300, "loss")
    for r in (*by_loss.recent, *by_loss.old):
        r.loss = 9.0 if int(r.feedback.tokens[0]) == 3 else 0.1
    assert names(drawn(by_loss, 1)).count(3) / 200 == pytest.approx(9 / 10.9, abs=0.08)

    near = Replay(1000, top_k=4, seed=0, sampling="near")
    for i in range(20):  # two domains in turn; the newest request is of the odd one
        near.add(request(i % 2))
    found = names(drawn(near))
    assert found.count(1) / len(found) > 0.9


def test_what_was_never_learned_from_comes_first() -> None:
    replay = filled(20, 300, "loss")
    for r in replay.recent[:-2]:
        r.loss = 0.5
    assert set(names([r.feedback for r in replay.sample(2)])) == {18, 19}


def test_keeps_no_more_than_top_k_probabilities() -> None:
    replay = Replay(max_tokens=100, top_k=4, seed=0)
    replay.add(request(0))
    assert replay.requests[0].teacher.log_probs.shape == (6, 4)


def test_passes_shrink_and_grow_with_what_they_bring() -> None:
    passes = ReplaySchedule(3)

    def see(times: int, new: tuple[float, float], old: tuple[float, float]) -> int:
        for _ in range(times * ReplayConstants().window):
            passes.observe(new, old)
        return passes.now

    assert see(2, (1.0, 0.1), (1.0, 0.1)) == 3  # worth as much as new tokens
    assert see(1, (1.0, 0.1), (0.1, 0.1)) == 2
    assert see(9, (1.0, 0.1), (-1.0, 0.1)) == 1  # one is left for old domains
    assert see(1, (1.0, 0.1), (1.0, 0.9)) == 1  # as much, but nine times as slow
    assert see(1, (-1.0, 0.1), (0.5, 0.1)) == 2
    assert see(9, (float("nan"), 0.1), (-5.0, 0.1)) == 2  # says nothing
    none = ReplaySchedule(0)
    for _ in range(3 * ReplayConstants().window):
        none.observe((1.0, 0.1), (0.0, 0.1))
    assert none.now == 0
