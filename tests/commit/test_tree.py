"""Guesses grow into a tree: the likeliest path first, as far as it pays, and nothing behind an end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_onlinespec.commit.guessing import Guesser
from hf_onlinespec.commit.proposal import ProposalBuilder
from hf_onlinespec.commit.recycling import KEPT, RecyclingTable
from hf_onlinespec.commit.tree import grow
from hf_onlinespec.govern.acceptance import Acceptances, TokenSource
from hf_onlinespec.govern.guesses import Guess, GuessChances
from hf_onlinespec.rounds import Proposal, Rows
from tests.commit.test_request_memory import filled, recall

ROW, VOCAB = torch.tensor([[1, 2, 3]]), 32


def table() -> RecyclingTable:
    """Behind every token the next ones, best first: of t the tokens t + 1, t + 2 …"""
    recycled = RecyclingTable()
    rows = [[(token + 1 + rank) % VOCAB for rank in range(KEPT)] for token in range(VOCAB)]
    recycled.update(range(VOCAB), rows, VOCAB)
    return recycled


def guesser(recycled: RecyclingTable | None = None, with_memory: bool = False) -> Guesser:
    acceptances, memory = Acceptances(), None
    if with_memory:  # of 1 2 3 4 5 6 7 8
        memory = recall(filled(), acceptances=acceptances)
        memory.read(ROW)
    return Guesser(memory, recycled, GuessChances(acceptances), ROW[0].tolist(), 1.0, VOCAB)


def up_to(most: int, least_chance: float = 0.0) -> Callable[[int, float], bool]:
    return lambda candidates, chance: candidates < most and chance > least_chance


def grown(
    asked: Guesser,
    pays: Callable[[int, float], bool],
    room: int = 8,
    ends: frozenset[int] = frozenset(),
    branches: bool = True,
    builder: ProposalBuilder | None = None,
) -> tuple[Proposal, ProposalBuilder]:
    """What it becomes, verified to be one that can be verified."""
    builder = builder or ProposalBuilder(ROW, asked.context, set(ends))
    grow(builder, asked, pays, room, set(ends), branches)
    proposal = builder.proposal(0)
    proposal.check(Rows.of(ROW), room, VOCAB)
    parents = proposal.parents_of(0)
    assert all(-1 <= parent < i for i, parent in enumerate(parents)), "each stands behind the one that it follows"
    siblings = list(zip(parents, proposal.tokens[0].tolist(), strict=True))
    assert len(set(siblings)) == len(siblings), "no token stands twice behind the same prefix"
    assert tuple(source.position for source in proposal.sources[0]) == proposal.depths_of(0)
    return proposal, builder


def path_chances(asked: Guesser, proposal: Proposal) -> list[float]:
    """Of every candidate the chance that its whole path is kept."""
    found: list[float] = []
    for i, parent in enumerate(proposal.parents_of(0)):
        path, at = [], parent
        while at >= 0:
            path, at = [int(proposal.tokens[0, at]), *path], proposal.parents_of(0)[at]
        place = asked.place([*asked.context, *path], parent < 0)
        own = next(guess.chance for guess in place.guesses if guess.token == int(proposal.tokens[0, i]))
        found.append(own * (1.0 if parent < 0 else found[parent]))
    return found


@pytest.mark.parametrize("with_memory", [False, True])
def test_the_likeliest_path_is_added_first(with_memory: bool) -> None:
    asked, told = guesser(table(), with_memory), []

    def pays(candidates: int, chance: float) -> bool:
        told.append((candidates, chance))
        return candidates < 20

    proposal, _ = grown(asked, pays)
    chances = path_chances(asked, proposal)
    assert len(chances) == 20 and chances == sorted(chances, reverse=True)
    assert {candidates for candidates, _ in told} == set(range(21))
    assert all(any(chance == pytest.approx(one) for _, one in told) for chance in chances)
    assert told[-1][1] <= chances[-1], "what is left out is not likelier"


def test_it_ends_with_the_first_guess_that_does_not_pay() -> None:
    """All that are left are less likely."""
    asked = guesser(table())
    full, _ = grown(asked, up_to(64, 0.0))
    chances = path_chances(asked, full)
    for least in (0.01, 0.05, 0.2):
        proposal, _ = grown(asked, up_to(64, least))
        n = sum(chance > least for chance in chances)
        assert proposal.lengths == (n,) and torch.equal(proposal.tokens, full.tokens[:, :n])
    nothing, builder = grown(asked, lambda candidates, chance: False)
    assert nothing.lengths == (0,) and list(builder.places) == [-1], "what was said there is known nevertheless"


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("branches", [False, True])
def test_no_path_is_longer_than_the_room(room: int, branches: bool) -> None:
    proposal, _ = grown(guesser(table(), True), up_to(40), room=room, branches=branches)
    assert max(proposal.depths_of(0)) == room - 1
    assert grown(guesser(table(), True), up_to(40), room=0, branches=branches)[0].lengths == (0,)


@pytest.mark.parametrize("branches", [False, True])
def test_nothing_follows_an_end(branches: bool) -> None:
    proposal, builder = grown(guesser(table(), True), up_to(24), ends=frozenset({4}), branches=branches)
    tokens, parents = proposal.tokens[0].tolist(), proposal.parents_of(0)
    assert tokens.count(4) == 1 and tokens.index(4) not in parents and tokens.index(4) not in builder.places
    assert len(tokens) == (24 if branches else 1)


def test_without_branches_it_is_the_chain_of_the_likeliest_guesses() -> None:
    proposal, _ = grown(guesser(table()), up_to(5), branches=False)
    assert proposal.parents is None and proposal.tokens.tolist() == [[4, 5, 6, 7, 8]]
    assert {source.source for source in proposal.sources[0]} == {"recycled"}


def test_a_memory_that_is_sure_stays_a_chain_without_parents() -> None:
    """Candidates one behind the other are a chain, whoever might have branched: it is verified as fast as one."""
    proposal, builder = grown(guesser(None, True), up_to(8))
    assert proposal.parents is None and proposal.is_chain(0)
    assert proposal.tokens.tolist() == [[4, 5, 6, 7, 8]] and 4 in builder.places  # 8 was its last word
    beside_a_table, _ = grown(guesser(table(), True), up_to(3))
    assert beside_a_table.parents is None and beside_a_table.tokens.tolist() == [[4, 5, 6]]
    assert {source.source for source in beside_a_table.sources[0]} == {"memory"}


def test_nobody_who_knows_anything_adds_nothing() -> None:
    proposal, _ = grown(guesser(RecyclingTable()), up_to(8))
    assert proposal.lengths == (0,) and proposal.tokens.shape == (1, 0)
    unknown = ProposalBuilder(ROW, None, set())  # the last tokens are not known on the host
    assert grown(guesser(table()), up_to(8), builder=unknown)[0].lengths == (0,)


def test_every_place_says_what_was_guessed_there() -> None:
    """Behind every candidate that may be followed by another that pays, so that what is verified can be learned from."""
    asked = guesser(table())
    proposal, builder = grown(asked, up_to(10), room=3)
    depths = proposal.depths_of(0)
    assert set(builder.places) == {-1, *(i for i, depth in enumerate(depths) if depth < 2 and i < 9)}
    for at, place in builder.places.items():
        last = 3 if at < 0 else int(proposal.tokens[0, at])
        assert [guess.token for guess in place.guesses] == list(range(last + 1, last + 1 + KEPT))


# Beside a draft model.


def with_model_tokens(beside: list[Guess], chance: float, sample: bool = False) -> ProposalBuilder:
    """A chain of two tokens of the draft model's: 20, 21."""
    builder = ProposalBuilder(ROW, ROW[0].tolist(), set())
    for i, token in enumerate((20, 21)):
        probs = torch.full((1, VOCAB), 1 / VOCAB) if sample else None
        source = TokenSource("model", i, (4,))
        builder.add_model_token(torch.tensor([[token]]), token, probs, source, chance, beside if i == 0 else [])
    return builder


def test_siblings_stand_beside_a_model_s_token_and_grow_on() -> None:
    beside = [Guess(9, 0.3, "recycled", ()), Guess(25, 0.2, "model", ())]
    proposal, builder = grown(guesser(table()), up_to(12), builder=with_model_tokens(beside, 0.5))
    tokens, parents, sources = proposal.tokens[0].tolist(), proposal.parents_of(0), proposal.sources[0]
    assert tokens[:2] == [20, 21] and parents[:2] == (-1, 0), "the chain comes first"
    siblings = [i for i, parent in enumerate(parents) if parent == -1]
    assert [tokens[i] for i in siblings] == [20, 9, 25]
    assert [sources[i].source for i in siblings] == ["model", "recycled", "model"]
    assert [sources[i].is_drafted for i in siblings] == [True, False, False]
    assert 22 in [tokens[i] for i, parent in enumerate(parents) if parent == 1], "behind the chain's end"
    assert 10 in [tokens[i] for i, parent in enumerate(parents) if parent == siblings[1]], "behind a sibling"
    assert builder.beside == {-1: beside}


def test_a_model_that_is_sure_leaves_its_siblings_out() -> None:
    """The chain's end is likelier to be reached."""
    beside = [Guess(9, 0.01, "recycled", ())]
    proposal, _ = grown(guesser(table()), up_to(6), builder=with_model_tokens(beside, 0.95))
    assert 9 not in proposal.tokens[0].tolist() and proposal.parents_of(0)[2] == 1


def test_without_branches_guesses_go_on_behind_the_model_s_chain() -> None:
    beside = [Guess(9, 0.9, "recycled", ())]
    proposal, _ = grown(guesser(table()), up_to(5), branches=False, builder=with_model_tokens(beside, 0.1))
    assert proposal.parents is None and proposal.tokens.tolist() == [[20, 21, 22, 23, 24]]


def test_q_is_about_the_drawn_ones_alone() -> None:
    beside = [Guess(9, 0.3, "recycled", ())]
    builder = with_model_tokens(beside, 0.5, sample=True)
    grow(builder, guesser(table()), up_to(8), 8, set(), True)
    proposal = builder.proposal(VOCAB)
    proposal.check(Rows.of(ROW), 8, VOCAB)
    assert proposal.drawn_of(0) == (0, 1) and proposal.q is not None and proposal.q.shape == (1, 2, VOCAB)
    assert proposal.lengths == (8,)


def test_a_guess_in_the_chain_leaves_the_others_beside_it() -> None:
    """Taken in the place of a model's token; what else was said there may stand beside it."""
    asked = guesser(table())
    builder = ProposalBuilder(ROW, asked.context, set())
    builder.places[-1] = asked.place(asked.context, True)
    builder.add_guess(builder.places[-1].guesses[0])
    proposal, _ = grown(asked, up_to(12), builder=builder)
    behind_the_row = [int(proposal.tokens[0, i]) for i, parent in enumerate(proposal.parents_of(0)) if parent < 0]
    assert behind_the_row[:3] == [4, 5, 6] and builder.survival == builder.places[-1].guesses[0].chance
