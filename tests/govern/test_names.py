"""Which adapter serves a request: in simulated worlds whose best answer is known."""

from __future__ import annotations

import random

import pytest

from hf_onlinespec.govern.names import NameConstants, NameRouter

NAMES = ("a", "b", "c")


def world(
    requests: int,
    acceptance: dict[tuple[str, str], float],
    misleads: dict[str, str] | None = None,
    nats: float = 0.5,
    noise: float = 0.0,
    seed: int = 0,
) -> tuple[list[tuple[str, str]], float]:
    """Requests of kinds in turn: (kind, chosen) of each, and what was lost per request against the best adapter of each kind.

    Args:
        acceptance: by kind and adapter.
        misleads: the adapter that prompts of a kind speak for, where it is not its own.
        nats: by which they do.
    """
    router, rng, chosen, lost = NameRouter[str](), random.Random(seed), [], 0.0
    for i in range(requests):
        kind = NAMES[i % len(NAMES)]
        said = (misleads or {}).get(kind, kind)
        scores = {name: -2.0 - (0.0 if name == said else nats) for name in NAMES}
        name = router.choose(scores)
        got = acceptance[kind, name]
        router.observe(router.favourite(scores), name, got + rng.gauss(0, noise))
        chosen.append((kind, name))
        lost += max(acceptance[kind, one] for one in NAMES) - got
    return chosen, lost / requests


def own_is_best(gap: float) -> dict[tuple[str, str], float]:
    return {(kind, name): 0.6 if kind == name else 0.6 - gap for kind in NAMES for name in NAMES}


def test_prompts_that_tell_rightly_are_followed_from_the_first_request_on() -> None:
    chosen, lost = world(300, own_is_best(0.2))
    assert all(kind == name for kind, name in chosen) and lost == 0.0
    assert world(300, own_is_best(0.2), noise=0.15)[1] < 0.01


def test_prompts_that_mislead_are_found_out() -> None:
    """Prompts of all kinds speak for a by 0.1 nats: 0.2 of acceptance are lost until some requests have told."""
    only = {(kind, name): 0.6 if name == "b" else 0.4 for kind in NAMES for name in NAMES}
    chosen, lost = world(300, only, misleads=dict.fromkeys(NAMES, "a"), nats=0.1)
    wrong = [i for i, (_, name) in enumerate(chosen) if name != "b"]
    assert len(wrong) < 30 and lost < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_with_prompts_that_say_nothing_it_is_a_bandit_of_low_regret(seed: int) -> None:
    """As of a head, which cannot read a prompt before its target has."""
    best = {(kind, name): {"a": 0.4, "b": 0.6, "c": 0.5}[name] for kind in NAMES for name in NAMES}
    chosen, lost = world(400, best, nats=0.0, noise=0.1, seed=seed)
    assert lost < 0.04 and sum(name == "b" for _, name in chosen[200:]) > 140


def test_an_adapter_that_becomes_the_better_one_is_found() -> None:
    router, scores, late = NameRouter[str](), {"a": -2.0, "b": -2.05}, []
    for i in range(300):
        name = router.choose(scores)
        router.observe("a", name, {"a": 0.6, "b": 0.4 if i < 100 else 0.8}[name])
        late.append(name)
    assert late[:100].count("a") > 85 and late[200:].count("b") > 85


def test_by_the_formula() -> None:
    """Two adapters after one request of the first: 0.6 and a prior of four requests each, plus the bound."""
    constants = NameConstants()
    router = NameRouter[str](constants)
    assert router.choose({"a": -1.0, "b": -1.0}) == "a", "of equals the favourite"
    router.observe("a", "a", 0.6)
    # a: 0.6 + 0.1 √(ln 2 / 5); b: 0.6 − 0.3 d + 0.1 √(ln 2 / 4): equal at d = 0.0146 nats.
    assert router.choose({"a": -1.0, "b": -1.0140}) == "b"
    assert router.choose({"a": -1.0, "b": -1.0150}) == "a"
    router.observe("a", "b", float("nan"))
    assert router.choose({"a": -1.0, "b": -1.0150}) == "a"
    router.forget()
    assert router.choose({"a": -1.0, "b": -1.0140}) == "a"


def test_a_context_knows_nothing_of_another_and_adapters_come_and_go() -> None:
    router = NameRouter[str]()
    for _ in range(20):
        router.observe("a", "a", 0.1)
        router.observe("b", "b", 0.9)
    assert router.choose({"a": -2.5, "b": -2.0}) == "b"
    assert router.choose({"a": -1.95, "b": -2.0}) == "b", "a does badly where its prompts speak for it"
    assert router.choose({"a": -2.0}) == "a"
    assert router.choose({"c": -1.0, "b": -2.0}) == "c"
