"""Chances of guesses: learned online, by source, rank and what the other source says, whether a guess was taken or not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from hf_onlinespec.govern.acceptance import Acceptances, Continuation, RequestStats
from hf_onlinespec.govern.guesses import NOWHERE, Guess, GuessChances, Place

TABLE = list(range(10, 18))  # recycled tokens, best first


def memory(*tokens: int, share: float = 1.0, length: int = 4, support: int = 3) -> list[Continuation]:
    """One answer: the first token has this share, the others what is left of it."""
    rest = [(1 - share) / max(1, len(tokens) - 1)] * (len(tokens) - 1)
    return [Continuation(tokens, (share, *rest), length, support)]


def chance(place: Place, token: int) -> float:
    return {guess.token: guess.chance for guess in place.guesses}[token]


def chances() -> GuessChances:
    return GuessChances(Acceptances())


def simulate(
    known: GuessChances, answers: Sequence[Continuation], table: Sequence[int], law: dict[int, float], n: int = 3000
) -> Place:
    """What is believed after n verified places at which the target's token follows this law; 99: one that nobody guesses."""
    rng, seen = random.Random(0), RequestStats()
    for _ in range(n):
        token = rng.choices([*law, 99], [*law.values(), 1 - sum(law.values())])[0]
        known.observe(known.place(answers, table, False), token, seen)
    return known.place(answers, table, False)


@pytest.mark.parametrize(
    ("answers", "table", "law"),
    [
        ([], TABLE, {10: 0.6, 11: 0.2, 12: 0.05}),
        ([], TABLE, {10: 0.1, 11: 0.5, 14: 0.3}),
        (memory(5), [], {5: 0.35}),
        (memory(5, 6, 7, share=0.6), [], {5: 0.5, 6: 0.25, 7: 0.05}),
        (memory(5), TABLE, {5: 0.5, 10: 0.3}),
        (memory(10), TABLE, {10: 0.8, 11: 0.1}),
    ],
    ids=["the table", "the table, other ranks", "the memory", "its later answers", "both, apart", "both, agreed"],
)
def test_they_become_the_frequencies_of_what_was_verified(
    answers: list[Continuation], table: list[int], law: dict[int, float]
) -> None:
    """Within what 200 places tell, as many as are remembered: three standard deviations are 0.1."""
    place = simulate(chances(), answers, table, law)
    for guess in place.guesses:
        assert guess.chance == pytest.approx(law.get(guess.token, 0.0), abs=0.1), guess
    assert [guess.chance for guess in place.guesses] == sorted((g.chance for g in place.guesses), reverse=True)


def test_each_of_several_guesses_is_there_once_with_its_source() -> None:
    place = chances().place(memory(5, 11, share=0.7), TABLE, first=True)
    assert sorted(guess.token for guess in place.guesses) == sorted({5, *TABLE})
    assert {guess.token for guess in place.guesses if guess.source == "memory"} == {5, 11}
    assert all(guess.source == "recycled" for guess in place.guesses if guess.token not in (5, 11))
    assert all(0 < guess.chance < 1 for guess in place.guesses)
    assert not NOWHERE.guesses and not NOWHERE.answers


def test_at_most_four_answers_of_the_memory_are_guessed() -> None:
    place = chances().place(memory(*range(20, 30), share=0.3), [], first=False)
    assert [guess.token for guess in sorted(place.guesses)] == [20, 21, 22, 23]


def test_what_two_sources_agree_on_is_likelier_than_either_says() -> None:
    """Before anything was seen, and by rank; a memory that the table does not support is less."""
    known = chances()
    alone = chance(known.place(memory(10, share=0.8), [], False), 10)
    by_rank = [chance(known.place(memory(token, share=0.8), TABLE, False), token) for token in TABLE]
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[-1] > alone > by_rank[0] - 0.4
    assert by_rank[0] > chance(known.place([], TABLE, False), 10)
    assert chance(known.place(memory(5, share=0.8), TABLE, False), 5) < alone


def test_a_sure_memory_leaves_little_for_the_table() -> None:
    known = chances()
    free = known.place([], TABLE, False)
    sure, unsure = known.place(memory(5, support=9), TABLE, False), known.place(memory(5, share=0.3), TABLE, False)
    for token in TABLE:
        assert chance(sure, token) < 0.4 * chance(free, token)
        assert chance(sure, token) < chance(unsure, token) < chance(free, token)


def test_an_answer_that_two_matches_give_is_learned_apart_from_one_that_one_gives() -> None:
    known, seen = chances(), RequestStats()
    here, before = memory(5)[0], Continuation((5,), (1.0,), 4, 3, earlier=True)
    other = Continuation((6,), (1.0,), 4, 3, earlier=True)
    for _ in range(60):
        known.observe(known.place([here, before], [], False), 5, seen)
        known.observe(known.place([here, other], [], False), 6, seen)
    assert chance(known.place([here, before], [], False), 5) > 0.85
    assert chance(known.place([here, other], [], False), 5) < 0.3
    assert chance(known.place([here, other], [], False), 6) > 0.7


def test_guesses_that_were_not_taken_are_learned_too() -> None:
    """A place that was verified tells the fate of every guess: of the eight of the table, whichever was in the tree."""
    known, seen = chances(), RequestStats()
    before = [guess.chance for guess in known.place([], TABLE, False).guesses]
    for _ in range(40):
        known.observe(known.place([], TABLE, False), TABLE[7], seen)
    after = known.place([], TABLE, False)
    assert after.guesses[0].token == TABLE[7] and after.guesses[0].chance > 0.8 > 0.1 > before[-1]
    assert all(chance(after, token) < 0.1 for token in TABLE[:7])
    assert seen.expected == seen.right == 0  # the memory has said nothing


def test_the_memory_s_answers_are_told_to_the_acceptances_and_to_the_request() -> None:
    """Of a place that was verified, by their own key: right is right, whatever else was guessed."""
    acceptances = Acceptances()
    known, seen = GuessChances(acceptances), RequestStats()
    answer = memory(5, 6, share=0.8)[0]
    usual = acceptances.memory(answer)[1]
    for _ in range(30):
        known.observe(known.place([answer], TABLE, False), 6, seen)
    assert acceptances.memory(answer)[1] < 0.2 * usual and seen.right == 0
    assert seen.expected > 1 and acceptances.memory_calibration(seen) < 1
    fresh = chances()
    assert chance(fresh.place([answer], [], False, 0.5), 5) < 0.7 * chance(fresh.place([answer], [], False), 5)


def test_a_first_token_of_a_round_is_kept_apart() -> None:
    known, seen = chances(), RequestStats()
    for _ in range(40):
        known.observe(known.place(memory(5), [], first=True), 99, seen)
        known.observe(known.place(memory(5), [], first=False), 5, seen)
    place = known.place(memory(5), [], first=True)
    assert place.answers != known.place(memory(5), [], first=False).answers
    assert Acceptances().memory(memory(5)[0], first=True)[0] == place.answers[0][1]


# Beside a token of the draft model's.


def beside(known: GuessChances, drafted: float, best: Sequence[tuple[int, float]] = ()) -> dict[int, Guess]:
    place = known.place(memory(5, share=0.8), TABLE, False)
    return {guess.token: guess for guess in known.beside(place, 10, drafted, best)}


def test_beside_a_drafted_token_the_others_are_guessed_as_far_as_it_may_be_wrong() -> None:
    known = chances()
    unsure, sure = beside(known, 0.3), beside(known, 0.95)
    assert 10 not in unsure and unsure.keys() == sure.keys() == {5, *TABLE[1:]}
    assert all(sure[token].chance < 0.2 * unsure[token].chance for token in sure)
    assert unsure[5].source == "memory" and unsure[11].source == "recycled"


def test_the_draft_s_own_next_best_join_with_its_probability() -> None:
    known = chances()
    found = beside(known, 0.5, [(10, 0.5), (30, 0.2), (11, 0.25), (5, 0.01)])
    assert 10 not in found and found[30].source == "model" and found[30].chance == pytest.approx(0.1)
    assert found[11].source == "recycled" and found[11].chance == pytest.approx(0.125)  # what is likelier of the two
    assert found[5].chance == beside(known, 0.5)[5].chance
    assert beside(known, 0.5).keys() == found.keys() - {30}


def test_what_stands_beside_a_drafted_token_is_learned() -> None:
    known = chances()
    for _ in range(200):
        known.observe_guesses(list(beside(known, 0.5, [(30, 0.2)]).values()), 30)
    found = beside(known, 0.5, [(30, 0.2)])
    assert found[30].chance > 0.9 and max(guess.chance for token, guess in found.items() if token != 30) < 0.1


def test_a_place_of_the_model_s_tells_nothing_about_the_same_guesses_elsewhere() -> None:
    """Beside a draft that is mostly right they are mostly wrong."""
    known = chances()
    before = known.place(memory(5, share=0.8), TABLE, False)
    for _ in range(50):
        known.observe_guesses(list(beside(known, 0.9).values()), 10)
    assert known.place(memory(5, share=0.8), TABLE, False) == before
