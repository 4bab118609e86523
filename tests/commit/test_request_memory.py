"""The memory as one request sees it."""

from __future__ import annotations

import threading

import torch

from hf_onlinespec.commit.request_memory import RequestMemory
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.govern.acceptance import Acceptances, RequestStats

EARLIER = [1, 2, 3, 4, 5, 6, 7, 8]


def recall(memory: SuffixMemory, padding: int = 0, acceptances: Acceptances | None = None) -> RequestMemory:
    return RequestMemory(memory, threading.RLock(), 64, padding, RequestStats(), acceptances or Acceptances())


def filled() -> SuffixMemory:
    memory = SuffixMemory(64)
    memory.extend(EARLIER)
    memory.close()
    return memory


def test_the_likelier_match_answers() -> None:
    acceptances = Acceptances()
    ours = recall(filled(), acceptances=acceptances)
    ours.read(torch.tensor([[9, 4, 7, 3, 4]]))
    earlier = ours.lookup([2, 3, 4])
    assert earlier is not None and earlier.tokens == (5,)  # seen as 2 3 4 5 before; here, 4 was followed by 7
    two = ours.lookup([3, 4])
    # Two tokens that match an earlier request say no more than one of this one.
    assert two is not None and two.tokens == (7,)
    for _ in range(40):  # earlier requests are wrong, though their matches are longer
        acceptances.observe_answer(acceptances.memory_key(earlier), 0.0, RequestStats())
    now = ours.lookup([2, 3, 4])
    assert now is not None and now.tokens == (7,)
    here = ours.lookup([9, 4])
    assert here is not None and here.tokens == (7,)
    assert ours.lookup([31]) is None


def test_a_request_that_is_asked_once_more_is_answered_from_the_earlier_one() -> None:
    """Whatever this request's own text says often behind a short match."""
    memory, text = SuffixMemory(64), list(range(10, 20))
    memory.extend([*text, 30])
    memory.close()
    ours = recall(memory)
    ours.read(torch.tensor([[*[18, 19, 31] * 6, *text]]))
    found = ours.lookup(text)
    assert found is not None and found.tokens == (30,)


def test_a_short_match_in_an_earlier_request_is_believed_less() -> None:
    """Until it has shown itself; and what earlier requests have shown says nothing about this one's own text."""
    acceptances = Acceptances()
    ours = recall(filled(), acceptances=acceptances)
    ours.read(torch.tensor([[30, 31, 32]]))
    earlier, here = ours.lookup([4]), ours.lookup([31])
    assert earlier is not None and here is not None and earlier.length == here.length == 1
    usual = acceptances.memory(here)[1]
    assert acceptances.memory(earlier)[1] < 0.7 * usual
    for _ in range(40):
        acceptances.observe_answer(acceptances.memory_key(earlier), 1.0, RequestStats())
    assert acceptances.memory(here)[1] == usual < 0.5 < 0.9 < acceptances.memory(earlier)[1]


def test_padding_is_not_read() -> None:
    memory = filled()
    ours = recall(memory, padding=2)
    ours.read(torch.tensor([[0, 0, 5, 6]]))
    assert ours.context == [5, 6]
    held = len(memory)
    ours.commit(torch.tensor([[0, 0, 5, 6, 7]]))
    assert len(memory) == held + 3


def test_what_the_memory_would_have_said_is_asked_before_it_is_read() -> None:
    """One estimate for every generated token: high where earlier requests knew it, 0 where nothing matches."""
    ours = RequestMemory(filled(), threading.RLock(), 64, 0, RequestStats(), Acceptances(), asks=True)
    assert ours.read(torch.tensor([[2, 3, 4]])) == []
    expected = ours.read(torch.tensor([[2, 3, 4, 5, 20, 21]]))
    assert len(expected) == 3
    assert expected[0] > 0.4  # behind 2 3 4
    assert expected[1] > 0.4  # 6 was expected behind 5, and 20 came: an estimate does not know
    assert expected[2] == 0.0  # 20 was never seen
    assert recall(filled()).read(torch.tensor([[2, 3, 4]])) == []


def test_remembering_gives_the_whole_request_once() -> None:
    memory = filled()
    ours = recall(memory)
    tokens = torch.tensor([[11, 12, 13, 14]])
    ours.read(tokens[:, :2])
    assert ours.commit(tokens) == memory.nbytes
    found = memory.continuation([11, 12, 13])
    assert found is not None and found.tokens == (14,) and found.support == 1
    recall(memory).commit(torch.tensor([[15, 16]]))
    seam = memory.continuation([14, 15])
    assert seam is not None and seam.length == 1  # two requests are two sequences
