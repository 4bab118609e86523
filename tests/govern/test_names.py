"""Which adapter serves a request: in simulated worlds whose best answer is known."""

from __future__ import annotations

import math
import random

import pytest

from hf_onlinespec.govern.names import NameConstants, NameRouter

NAMES = ("a", "b", "c")
Table = dict[tuple[str, str], float]  # acceptance by kind of request and adapter


def world(requests: int, acceptance: Table, noise: float = 0.0, seed: int = 0) -> tuple[list[tuple[str, str]], float]:
    """Requests of kinds in turn: (kind, chosen) of each, and what was lost per request against the best adapter of each kind."""
    router, rng, chosen, lost = NameRouter[str](), random.Random(seed), [], 0.0
    for i in range(requests):
        kind = NAMES[i % len(NAMES)]
        name = router.choose(kind, NAMES)
        got = acceptance[kind, name]
        router.observe(kind, {name: got + rng.gauss(0, noise)})
        chosen.append((kind, name))
        lost += max(acceptance[kind, one] for one in NAMES) - got
    return chosen, lost / requests


def own_is_best(gap: float) -> Table:
    return {(kind, name): 0.6 if kind == name else 0.6 - gap for kind in NAMES for name in NAMES}


def test_where_the_own_adapter_is_the_best_one_it_is_hardly_ever_left() -> None:
    chosen, lost = world(300, own_is_best(0.2))
    assert chosen[:3] == [("a", "a"), ("b", "b"), ("c", "c")] and lost < 0.02
    assert sum(kind == name for kind, name in chosen[150:]) > 140


@pytest.mark.parametrize("seed", range(3))
def test_an_adapter_that_does_better_than_the_own_one_is_found(seed: int) -> None:
    only_b: Table = {(kind, name): 0.7 if name == "b" else 0.4 for kind in NAMES for name in NAMES}
    chosen, lost = world(300, only_b, noise=0.1, seed=seed)
    assert sum(name == "b" for _, name in chosen[150:]) > 140 and lost < 0.04


@pytest.mark.parametrize("gap", [0.05, 0.2])
def test_where_all_adapters_are_scored_the_best_one_is_hardly_ever_left(gap: float) -> None:
    """Requests differ by more than the adapters do on one of them."""
    table = own_is_best(gap) | {("c", "a"): 0.7, ("c", "c"): 0.5}
    router, rng, chosen = NameRouter[str](), random.Random(0), []
    for i in range(300):
        kind, request = NAMES[i % len(NAMES)], rng.gauss(0, 0.2)
        chosen.append((kind, router.choose(kind, NAMES)))
        router.observe(kind, {name: table[kind, name] + request + rng.gauss(0, 0.03) for name in NAMES})
    best = {"a": "a", "b": "b", "c": "a"}
    assert sum(name == best[kind] for kind, name in chosen[60:]) > 235


def test_an_adapter_that_becomes_the_better_one_is_found() -> None:
    router, chosen = NameRouter[str](), []
    for i in range(300):
        name = router.choose("a", ("a", "b"))
        router.observe("a", {name: {"a": 0.6, "b": 0.4 if i < 100 else 0.8}[name]})
        chosen.append(name)
    assert chosen[:100].count("a") > 85 and chosen[200:].count("b") > 85


def test_the_choice_is_that_of_the_formula() -> None:
    """After a request of a and one of b with d more: (x + p (level + ahead)) / (1 + p) against (x + d + p level) / (1 + p)."""
    constants = NameConstants(discount=1.0)
    lead = constants.prior_requests * constants.ahead
    for more, chosen in ((-0.01, "a"), (0.01, "b")):
        router = NameRouter[str](constants)
        router.observe("a", {"a": 0.5})
        router.observe("a", {"b": 0.5 + lead + more})
        router.observe("a", {"b": math.nan})
        assert router.choose("a", ("a", "b")) == chosen
    # After n requests of a, all of x, b is looked at once √(ln(1 + n)) (√(1 / p) − √(1 / (n + p))) width makes up for p ahead / (n + p).
    p, n = constants.prior_requests, 0
    router = NameRouter[str](constants)
    while router.choose("a", ("a", "b")) == "a":
        router.observe("a", {"a": 0.5})
        n += 1

    def gain(requests: int) -> float:
        bonus = constants.width * math.sqrt(math.log1p(requests)) * (p**-0.5 - (requests + p) ** -0.5)
        return bonus - p * constants.ahead / (requests + p)

    assert gain(n - 1) < 0 < gain(n) and 1 < n < 10


def test_a_context_knows_nothing_of_another_and_adapters_come_and_go() -> None:
    router = NameRouter[str]()
    for _ in range(20):
        router.observe("a", {"a": 0.1})
        router.observe("a", {"b": 0.9})
    assert router.choose("a", NAMES) == "b" and router.choose("b", NAMES) == "b"
    assert router.choose("c", NAMES) == "c" and router.choose("a", ("a",)) == "a"


# What a prompt looks like


def prompts_of(kind: int, n: int, seed: int) -> list[list[int]]:
    """Ten tokens that all kinds have, then thirty of which two thirds are the kind's own."""
    rng = random.Random(f"{kind} {seed}")
    own = range(100 + 40 * kind, 140 + 40 * kind)
    return [
        [*range(10), *(rng.choice(own) if rng.random() < 0.67 else rng.randrange(100) for _ in range(30))]
        for _ in range(n)
    ]


def test_a_prompt_is_told_by_those_that_came_with_the_names() -> None:
    router, right = NameRouter[str](), 0
    for i, name in enumerate(NAMES):
        for prompt in prompts_of(i, 4, 0):
            router.note_prompt(name, prompt)
    for i, name in enumerate(NAMES):
        right += sum(router.favourite(prompt, NAMES) == name for prompt in prompts_of(i, 50, 1))
    assert right > 145
    new = prompts_of(7, 20, 0)
    assert sum(router.favourite(prompt, ("none", *NAMES)) == "none" for prompt in new) > 16, (
        "it looks like none of them"
    )


def test_of_a_single_name_the_prompts_that_look_like_its_own_are_known() -> None:
    router = NameRouter[str]()
    for prompt in prompts_of(0, 6, 0):
        router.note_prompt("a", prompt)
    among = ("none", "a")
    assert sum(router.favourite(prompt, among) == "a" for prompt in prompts_of(0, 20, 1)) > 16
    assert sum(router.favourite(prompt, among) == "none" for prompt in prompts_of(7, 20, 1)) > 16
    assert router.favourite([], among) == "none"


def test_the_score_is_a_likelihood_ratio() -> None:
    """Of a name with 30 of its 40 tokens a 1, and of all with 40 of 80, three kinds."""
    router = NameRouter[str]()
    router.note_prompt("a", [1] * 30 + [2] * 10)
    router.note_prompt("b", [1] * 10 + [3] * 30)
    usual = 40.5 / (80 + 0.5 * 4)
    assert router.score("a", [1]) == pytest.approx(math.log((30 / usual + 20) / 60))
    assert router.score("a", [3]) == pytest.approx(math.log(20 / 60)), "a token of others speaks against it"
    assert router.score("a", [9, 1]) == pytest.approx(router.score("a", [1]) / 2), "one of nobody does not"
    assert router.score("c", [1]) == NameConstants().unnoted


def test_a_profile_is_bounded_and_follows_what_comes() -> None:
    router = NameRouter[str](NameConstants(profile_tokens=400))
    for _ in range(60):
        router.note_prompt("a", [1] * 20)
        router.note_prompt("b", [2] * 20)
    assert router.favourite([1] * 5, NAMES) == "a"
    for _ in range(200):
        router.note_prompt("b", [1] * 20)
        router.note_prompt("a", [2] * 20)
    assert router.favourite([1] * 5, NAMES) == "b"
