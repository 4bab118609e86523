"""What replicas contribute: two of them and more in one process, through a store in its memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from hf_onlinespec._compat.processes import Process
from hf_onlinespec.adapt.contributions import CHUNK, SILENCE, Board, Contributions
from hf_onlinespec.errors import ConfigError

START = torch.linspace(-1.0, 1.0, 64)


def replicas(n: int, start: Tensor = START) -> list[Contributions]:
    store = HashStore()
    return [Contributions(Process(rank, n, store, itertools.count()), "0", start, {"lr": "0.1"}) for rank in range(n)]


def step(replica: Contributions, params: Tensor) -> None:
    """An exchange whose result is taken in at once."""
    replica.go_on(replica.exchange(params))


def test_the_common_adapter_is_the_mean_of_all() -> None:
    found = replicas(3)
    torch.manual_seed(0)
    common = START
    for _ in range(3):
        led = [common + torch.randn(64) for _ in found]
        for replica, params in zip(found, led, strict=True):
            step(replica, params)
        for replica in found:  # and what was published since
            step(replica, replica.common)
        torch.testing.assert_close(found[0].common, torch.stack(led).mean(0))
        assert all(torch.equal(found[0].common, replica.common) for replica in found)
        common = found[0].common


def test_whoever_comes_late_or_reads_less_often_has_the_same_adapter_to_the_bit() -> None:
    """Three steps of one before another one begins: nobody has waited, and nothing is missing."""
    fast, slow = replicas(2)
    torch.manual_seed(0)
    steps = [torch.randn(64) for _ in range(3)]
    for change in steps:
        step(fast, fast.common + change)
    own = torch.randn(64)
    step(slow, START + own)
    step(fast, fast.common)
    assert torch.equal(fast.common, slow.common)
    torch.testing.assert_close(fast.common, START + sum(steps) / 2 + own / 2)  # type: ignore[operator]


def test_what_was_contributed_before_a_replica_died_stays_and_the_other_learns_in_full_again() -> None:
    one, other = replicas(2)
    step(other, START + 2.0)
    step(one, START)
    for _ in range(SILENCE):
        step(one, one.common + 1.0)
    half = START + 1.0 + SILENCE / 2
    torch.testing.assert_close(one.common, half)
    step(one, one.common + 1.0)
    torch.testing.assert_close(one.common, half + 1.0)
    step(other, other.common + 4.0)  # it was only slow
    step(one, one.common)
    step(one, one.common + 1.0)
    torch.testing.assert_close(one.common, half + 1.0 + 2.0 + 0.5)


def test_the_next_exchange_takes_the_place_of_one_that_was_not_taken_in() -> None:
    one, other = replicas(2)
    one.exchange(START + 1.0)
    step(one, START + 3.0)
    step(other, START)
    torch.testing.assert_close(one.common, START + 1.5)
    assert torch.equal(one.common, other.common)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_published_nor_taken(value: float, caplog: pytest.LogCaptureFixture) -> None:
    store = HashStore()
    one, other = (Contributions(Process(rank, 2, store, itertools.count()), "0", START, {}) for rank in range(2))
    board = Board(store, "0")
    step(other, START + 2.0)
    step(one, START)
    spoiled = START.clone()
    spoiled[3] = value
    other.exchange(spoiled)
    assert board.version(1) == 1 and "not finite" in caplog.text
    board.publish(1, 2, spoiled)  # as only another program would
    step(one, one.common)
    torch.testing.assert_close(one.common, START + 1.0)


def test_a_vector_of_many_values_is_read_whole_and_old_versions_go() -> None:
    store = HashStore()
    board = Board(store, "0")
    vector = torch.arange(CHUNK // 4 + 3, dtype=torch.float32)
    for version in (1, 2, 3):
        board.publish(0, version, vector + version)
    assert board.version(0) == 3
    for version in (2, 3):
        found = board.vector(0, version, vector)
        assert found is not None and torch.equal(found, vector + version)
    assert board.vector(0, 1, vector) is None
    assert board.vector(0, 3, vector[1:]) is None  # of another size


def test_another_draft_is_refused_by_whoever_comes_later_and_left_out_by_who_was_there() -> None:
    store = HashStore()
    first = Contributions(Process(0, 2, store, itertools.count()), "0", START, {"lr": "0.1", "seed": "0"})
    with pytest.raises(ConfigError, match=r"lr is '0.1' there and '0.2' here"):
        Contributions(Process(1, 2, store, itertools.count()), "0", START, {"lr": "0.2", "seed": "0"})
    Board(store, "0").publish(1, 1, START)
    step(first, START + 1.0)
    assert "lr is '0.2' there and '0.1' here" in first.refused[1]
    step(first, first.common + 1.0)
    torch.testing.assert_close(first.common, START + 0.5 + 1.0)  # alone from then on
