"""The replay is bounded in tokens and bytes, forgets the oldest and is repeatable."""

import torch

from hf_onlinespec import Feedback
from hf_onlinespec.feedback import Teacher
from hf_onlinespec.replay import Replay


def request(i: int, length: int = 10, new: int = 6, vocab: int = 50) -> Feedback:
    return Feedback(torch.full((length,), i), Teacher.from_logits(torch.randn(new, vocab)))


def test_forgets_the_oldest_first() -> None:
    replay = Replay(max_tokens=35, top_k=4, seed=0)
    for i in range(5):
        replay.add(request(i))
    assert [int(f.tokens[0]) for f in replay.requests] == [2, 3, 4]
    assert replay.tokens == 30


def test_bytes_stay_within_the_stated_bound() -> None:
    replay = Replay(max_tokens=200, top_k=8, seed=0)
    for i in range(50):
        replay.add(request(i, length=7 + i % 9, new=6))
        assert replay.nbytes <= 200 * (12 + 12 * 8)
    assert replay.nbytes == sum(f.tokens.nbytes + f.teacher.nbytes for f in replay.requests)


def test_a_request_above_the_bound_is_not_kept() -> None:
    replay = Replay(max_tokens=5, top_k=4, seed=0)
    replay.add(request(0))
    assert len(replay) == 0 and replay.sample(3) == []


def test_samples_are_distinct_and_repeatable() -> None:
    def draws() -> list[list[int]]:
        replay = Replay(max_tokens=1000, top_k=4, seed=7)
        for i in range(20):
            replay.add(request(i))
        return [[int(f.tokens[0]) for f in replay.sample(5)] for _ in range(3)]

    first = draws()
    assert first == draws()
    assert all(len(set(drawn)) == 5 for drawn in first)


def test_keeps_no_more_than_top_k_probabilities() -> None:
    replay = Replay(max_tokens=100, top_k=4, seed=0)
    replay.add(request(0))
    assert replay.requests[0].teacher.log_probs.shape == (6, 4)
