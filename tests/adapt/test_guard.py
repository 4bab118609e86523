"""The guard on scripted streams: an adapter is one number, and a stream says what acceptance each number has."""

import random

import pytest
import torch

from hf_onlinespec.adapt.gradient_cap import CapConstants, GradientCap
from hf_onlinespec.adapt.guard import Guard, GuardConstants

TOKENS = 60


class World:
    """A learner that walks towards the stream's place; acceptance falls with the distance to it."""

    def __init__(self, size: int = 2, step: float = 0.1, seed: int = 0) -> None:
        self.guard = Guard(size)
        self.at, self.step = 0.0, step
        self.rng = random.Random(seed)

    def acceptance(self, where: float, place: float) -> list[float]:
        rate = max(0.05, 0.9 - 0.3 * abs(where - place))
        return [float(self.rng.random() < rate) for _ in range(TOKENS)]

    def request(self, place: float, learns: bool = True) -> float:
        learned = self.acceptance(self.at, place)
        base = self.acceptance(0.0, place)
        state = self.guard.observe(
            learned,
            base,
            lambda: torch.tensor([self.at]),
            lambda: torch.zeros(1),
            lambda state: self.acceptance(float(state), place),
        )
        if state is not None:
            self.at = float(state)
        if learns:
            self.at += max(-self.step, min(self.step, place - self.at))
        return sum(learned) / TOKENS


def test_a_steady_stream_keeps_what_was_learned() -> None:
    for seed in range(20):
        world = World(seed=seed)
        for _ in range(100):
            world.request(1.0)
        assert world.guard.rollbacks == 0


def test_back_in_a_domain_that_it_knew_it_goes_on_where_it_was() -> None:
    returned = 0
    for seed in range(20):
        world = World(seed=seed)
        for place in (2.0, -2.0):
            for _ in range(60):
                world.request(place)
        for _ in range(15):
            world.request(2.0)
        returned += abs(world.at - 2.0) < 0.5
        assert "earlier state" in world.guard.reason
    assert returned >= 18  # fifteen steps alone would reach −0.5


def test_on_a_mixed_stream_it_stays_where_it_is() -> None:
    """Every earlier state is better on some requests, and going back to it would lose the others."""
    lost = 0
    for seed in range(20):
        world = World(seed=seed)
        for _ in range(40):
            world.request(-1.0)
        for _ in range(100):
            world.request(world.rng.choice((1.0, -1.0)))
        lost += world.guard.rollbacks
    assert lost <= 40  # in 2,000 requests: six in a row that speak for one state happen by chance


def test_after_a_burst_that_led_it_astray_it_goes_back() -> None:
    for seed in range(10):
        world = World(seed=seed)
        for _ in range(40):
            world.request(1.5)
        before = sum(world.request(1.5) for _ in range(10)) / 10
        for _ in range(20):
            world.request(-3.0)
        for _ in range(GuardConstants().latest + 2 * GuardConstants().trial):
            world.request(1.5)
        assert sum(world.request(1.5) for _ in range(10)) / 10 > before - 0.1
        assert world.guard.rollbacks >= 1


def test_a_change_that_does_not_show_is_found_by_the_next_trial() -> None:
    """From one stream to another that what is served is as bad at; the base draft is no better."""
    for seed in range(10):
        world = World(seed=seed)
        for place in (2.0, 0.0):
            for _ in range(60):
                world.request(place)
        for _ in range(30):
            world.request(-2.0, learns=False)
        before = world.guard.rollbacks
        for _ in range(GuardConstants().try_every + 2 * GuardConstants().trial):
            world.request(2.0, learns=False)
        assert world.guard.rollbacks > before and world.at > 1.0


def test_no_earlier_state_without_evidence() -> None:
    """Requests that differ wildly, around a level that stays."""
    guard = Guard(2)
    rng = random.Random(0)
    for _ in range(200):
        rate = rng.choice((0.1, 0.9))
        tokens = [float(rng.random() < rate) for _ in range(TOKENS)]
        state = guard.observe(tokens, None, lambda: torch.zeros(1), None, lambda state, t=tokens: t)
        assert state is None
    assert guard.rollbacks == 0


@pytest.mark.parametrize("size", [0, 1, 3])
def test_no_more_states_than_asked_for(size: int) -> None:
    world = World(size=size)
    for place in (2.0, -2.0) * 8:
        for _ in range(15):
            world.request(place)
        assert world.guard.nbytes <= size * 4  # the latest one included
    if not size:
        assert world.guard.rollbacks == 0


def test_of_too_many_states_the_newest_and_the_most_different_stay() -> None:
    """Two changes of the stream keep a state each; then the first of them is surely better, and takes the place of a third."""
    guard = Guard(2)
    found: list[float] = []
    for value, rate, of_first, requests in ((5.0, 0.2, 0.0, 8), (0.0, 0.8, 0.0, 3), (0.1, 0.2, 0.9, 8)):
        for _ in range(requests):
            state = guard.observe(
                [rate] * TOKENS,
                None,
                lambda value=value: torch.tensor([value]),
                None,
                lambda state, lead=of_first: [lead if float(state) == 5.0 else 0.0] * TOKENS,
            )
            found += [] if state is None else [float(state)]
    assert found == [5.0] and [float(state) for state in guard.states] == [5.0, pytest.approx(0.1)]


def test_gradients_longer_than_usual_are_shortened() -> None:
    cap = GradientCap(3.0)
    usual = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    for _ in range(CapConstants().least):
        assert torch.equal(cap(usual), usual)
    torch.testing.assert_close(cap(100 * usual), 3 * usual)
    torch.testing.assert_close(cap(usual), usual)
    for _ in range(60):  # what is shortened counts as short: a flood raises the bound slowly
        long = cap(1e6 * usual)
    assert long.norm() <= 3.0**3 * usual.norm()
    free = GradientCap(None)
    for _ in range(2 * CapConstants().least):
        free(usual)
    assert torch.equal(free(1e6 * usual), 1e6 * usual)


def test_gradients_that_stay_long_are_usual_in_the_end() -> None:
    """However many there were before."""
    cap, usual = GradientCap(3.0), torch.tensor([[3.0, 4.0]])
    for _ in range(1000):
        cap(usual)
    for _ in range(128):
        cap(20 * usual)
    assert torch.equal(cap(20 * usual), 20 * usual)


def test_first_gradients_after_none_are_not_shortened() -> None:
    cap = GradientCap(3.0)
    for _ in range(CapConstants().least):
        cap(torch.zeros(1, 2))
    first = torch.tensor([[1.0, 2.0]])
    assert torch.equal(cap(first), first)


def test_what_a_trial_holds_is_counted() -> None:
    guard = Guard(2)
    rng = random.Random(0)
    held = 0
    for i in range(40):
        place = 0.8 if i < 20 else 0.2
        tokens = [float(rng.random() < place) for _ in range(TOKENS)]
        guard.observe(tokens, None, lambda: torch.zeros(8), lambda: torch.zeros(8), lambda state: [1.0] * TOKENS)
        assert guard.nbytes == sum(state.nbytes for state in guard.state().tensors.values())
        held = max(held, guard.nbytes)
    assert held == 2 * 4 * 8 and guard.rollbacks > 0
