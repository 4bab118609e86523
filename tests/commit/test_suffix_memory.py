"""The suffix memory answers as a search through all live tokens would, at bounded bytes and a bounded number of steps."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest

import hf_onlinespec.commit.suffix_memory as module
from hf_onlinespec.commit.suffix_memory import CANDIDATES, GRAMS, REACH, SuffixMemory
from hf_onlinespec.errors import ConfigError
from hf_onlinespec.govern.acceptance import Continuation


class Reference:
    """Keeps every token and searches all of them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.slots: list[int | None] = []  # None ends a sequence

    def extend(self, tokens: Sequence[int]) -> None:
        self.slots += tokens

    def close(self) -> None:
        if self.slots and self.slots[-1] is not None:
            self.slots.append(None)

    @property
    def live(self) -> list[int | None]:
        return self.slots[-self.max_tokens :]

    def continuation(self, context: Sequence[int]) -> Continuation | None:
        live = self.live
        recent = list(context)[-REACH:]
        found: list[tuple[int, int]] = []  # (length of the match, next token), newest first
        for i in range(len(live) - 1, 0, -1):
            length = 0
            while length < min(i, len(recent)) and live[i - 1 - length] == recent[-1 - length]:
                length += 1
            token = live[i]
            if token is not None and length >= min(GRAMS):
                found.append((length, token))
        if not found:
            return None
        longest = max(length for length, _ in found)
        votes = [token for length, token in found if length == longest]
        distinct = sorted(dict.fromkeys(votes), key=lambda token: -votes.count(token))
        probs = tuple(votes.count(token) / len(votes) for token in distinct)
        return Continuation(tuple(distinct), probs, longest, len(votes))


def grow(seed: int, vocab: int, memory: SuffixMemory, reference: Reference, rounds: int = 150) -> int:
    """Feeds both the same random sequences, asks both the same questions; returns how many had an answer."""
    rng = random.Random(seed)
    context: list[int] = []
    answered = 0
    for _ in range(rounds):
        piece = [rng.randrange(vocab) for _ in range(rng.randrange(6))]
        if context and rng.random() < 0.4:  # text repeats itself
            start = rng.randrange(len(context))
            piece = context[start : start + rng.randrange(2 * REACH)]
        context = (context + piece)[-4 * REACH :]
        for side in (memory, reference):
            side.extend(piece)
        if rng.random() < 0.2:
            for side in (memory, reference):
                side.close()
        cut = rng.randrange(REACH + 4)
        for question in (context, context[-cut:], context[: len(context) - cut], [rng.randrange(vocab)] * 3):
            answer = memory.continuation(question)
            assert answer == reference.continuation(question)
            answered += answer is not None
        assert len(memory) == sum(token is not None for token in reference.live)
    return answered


@pytest.mark.parametrize("vocab", [2, 5, 30])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, CANDIDATES, 37, 256, 10_000])
def test_equals_a_search_through_everything(vocab: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if max_tokens > CANDIDATES:  # below it, the bound cannot bind
        monkeypatch.setattr(module, "CANDIDATES", max_tokens)
    answered = grow(max_tokens, vocab, SuffixMemory(max_tokens), Reference(max_tokens))
    assert answered > 30 or max_tokens <= CANDIDATES


def test_hash_collisions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash", lambda run: 0, raising=False)
    monkeypatch.setattr(module, "CANDIDATES", 64)
    assert grow(1, 5, SuffixMemory(64), Reference(64)) > 30


@pytest.mark.parametrize("max_tokens", [3, 7, 20, 100])
def test_every_answer_stands_in_the_live_tokens(max_tokens: int) -> None:
    """With the bound on candidates in force: what is said to have followed did follow, at the stated length."""
    rng = random.Random(max_tokens)
    memory, reference = SuffixMemory(max_tokens), Reference(max_tokens)
    answered = 0
    for _ in range(2000):
        piece = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
        ends = rng.random() < 0.2
        for side in (memory, reference):
            side.extend(piece)
            if ends:
                side.close()
        question = [rng.randrange(3) for _ in range(6)]
        answer = memory.continuation(question)
        if answer is None:
            continue
        answered += 1
        live = reference.live
        for token, prob in zip(answer.tokens, answer.probs, strict=True):
            evidence = [*question[-answer.length :], token]
            places = sum(live[i : i + len(evidence)] == evidence for i in range(len(live)))
            assert places >= round(prob * answer.support) >= 1
    assert answered > 100


def test_no_match_runs_across_an_end_of_sequence() -> None:
    memory = SuffixMemory(100)
    memory.extend([1, 2, 3])
    memory.close()
    memory.extend([4, 5, 6])
    assert memory.continuation([1, 2, 3]) is None  # 4 came next, in another sequence
    assert memory.continuation([3, 4]) == Continuation((5,), (1.0,), 1, 1)  # the 3 before the 4 was of another sequence
    assert memory.continuation([2, 3, 4, 5]) == Continuation((6,), (1.0,), 2, 1)
    memory.close()
    memory.close()
    assert len(memory) == 6


def test_the_tail_of_a_request_in_progress_does_not_answer_itself() -> None:
    memory = SuffixMemory(100)
    text = [1, 2, 3, 4, 5]
    memory.extend(text)
    assert memory.continuation(text) is None
    memory.extend([1, 2, 3])
    assert memory.continuation([*text, 1, 2, 3]) == Continuation((4,), (1.0,), 3, 1)


def test_growing_token_by_token_equals_growing_at_once() -> None:
    rng = random.Random(0)
    text = [rng.randrange(4) for _ in range(200)]
    one, many = SuffixMemory(150), SuffixMemory(150)
    one.extend(text)
    for token in text:
        many.extend([token])
    for _ in range(100):
        question = [rng.randrange(4) for _ in range(5)]
        assert one.continuation(question) == many.continuation(question)


def test_the_longest_match_speaks_and_ties_are_newest_first() -> None:
    memory = SuffixMemory(100)
    for sequence in ([9, 1, 2, 3], [8, 1, 2, 4], [8, 1, 2, 5], [8, 1, 2, 6], [8, 1, 2, 6]):
        memory.extend(sequence)
        memory.close()
    assert memory.continuation([8, 1, 2]) == Continuation((6, 5, 4), (0.5, 0.25, 0.25), 3, 4)
    assert memory.continuation([9, 1, 2]) == Continuation((3,), (1.0,), 3, 1)
    assert memory.continuation([7, 1, 2]) == Continuation((6, 5, 4, 3), (0.4, 0.2, 0.2, 0.2), 2, 5)
    assert memory.continuation([7, 7, 2]) == Continuation((6, 5, 4, 3), (0.4, 0.2, 0.2, 0.2), 1, 5)
    assert memory.continuation([8, 1, 7]) is None and memory.continuation([]) is None


def test_laws_sum_to_one_and_are_the_same_again() -> None:
    def answers() -> list[Continuation | None]:
        rng = random.Random(5)
        memory = SuffixMemory(300)
        found = []
        for _ in range(300):
            memory.extend([rng.randrange(4) for _ in range(7)])
            found.append(memory.continuation([rng.randrange(4) for _ in range(8)]))
        return found

    first = answers()
    assert first == answers()
    laws = [answer for answer in first if answer is not None]
    assert len(laws) > 200
    for answer in laws:
        assert sum(answer.probs) == pytest.approx(1, abs=1e-12)
        assert list(answer.probs) == sorted(answer.probs, reverse=True)
        assert len(set(answer.tokens)) == len(answer.tokens) == len(answer.probs)
        assert 1 <= answer.support <= CANDIDATES and 1 <= answer.length <= REACH


def test_the_oldest_is_forgotten() -> None:
    memory = SuffixMemory(8)
    memory.extend([1, 2, 3])
    memory.close()
    memory.extend([4, 5, 6, 7])
    assert memory.continuation([1, 2]) == Continuation((3,), (1.0,), 2, 1)
    memory.extend([8])
    assert memory.continuation([1, 2]) == Continuation((3,), (1.0,), 1, 1)  # the 1 is gone
    memory.extend([9])
    assert memory.continuation([1, 2]) is None
    assert len(memory) == 7


def test_bytes_are_allocated_once() -> None:
    for max_tokens in (2, 1000, 4095, 4096, 5000):
        assert 16 * max_tokens <= SuffixMemory(max_tokens).nbytes <= 20 * max_tokens
    memory = SuffixMemory(5000)
    before = memory.nbytes
    rng = random.Random(0)
    for _ in range(1000):
        memory.extend([rng.randrange(50_000) for _ in range(100)])
        memory.close()
        assert memory.nbytes == before
    assert len(memory) <= 5000


class CountingArray(array):  # type: ignore[type-arg]
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        CountingArray.reads += 1
        return super().__getitem__(index)

    def __mul__(self, times):  # type: ignore[no-untyped-def]
        return CountingArray(self.typecode, super().__mul__(times))


@pytest.mark.parametrize("vocab", [1, 3])
def test_a_question_takes_a_bounded_number_of_steps(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many occurrences there are: text of one token is the worst case."""
    monkeypatch.setattr(module, "array", CountingArray)
    rng = random.Random(0)
    memory = SuffixMemory(20_000)
    memory.extend([rng.randrange(vocab) for _ in range(30_000)])
    for _ in range(20):
        CountingArray.reads = 0
        assert memory.continuation([rng.randrange(vocab) for _ in range(1000)]) is not None
        assert CountingArray.reads <= len(GRAMS) * CANDIDATES * (REACH + 4)
    CountingArray.reads = 0
    memory.extend([0] * 100)
    # Per token: the one that it overwrites, and the newest place of each run before it.
    assert CountingArray.reads == 100 * (1 + len(GRAMS))


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_a_memory_of_nothing_is_refused(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=str(max_tokens)):
        SuffixMemory(max_tokens)
