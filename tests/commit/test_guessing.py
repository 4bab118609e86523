"""Where guesses come from in a call: the memory and the table, of which each may be missing, padded or failing."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_onlinespec.commit.guessing import GuessSources
from hf_onlinespec.commit.proposal import ProposalBuilder
from hf_onlinespec.commit.recycling import KEPT, RecyclingTable
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.commit.tree import grow
from hf_onlinespec.govern.acceptance import Acceptances, RequestStats, TokenSource
from hf_onlinespec.govern.guesses import GuessChances
from hf_onlinespec.metrics import Counts
from hf_onlinespec.rounds import Proposal, Rows
from hf_onlinespec.runtime.failures import Backoff
from tests.commit.test_request_memory import filled

VOCAB = 32
ROWS = Rows.of(torch.tensor([[1, 2, 3]]))


def sources(
    memory: SuffixMemory | None = None,
    table: RecyclingTable | None = None,
    padding: tuple[int, ...] = (0,),
    vocabulary: int | None = VOCAB,
    backoff: Backoff | None = None,
) -> tuple[GuessSources, Counts]:
    acceptances, counts = Acceptances(), Counts()
    backoff = backoff or Backoff("Guessing", "it goes on")
    chances = GuessChances(acceptances)
    lock = threading.RLock()
    return GuessSources(memory, table, backoff, counts, lock, acceptances, chances, 64, padding, vocabulary), counts


def full(behind: dict[int, list[int]], vocab: int = VOCAB) -> RecyclingTable:
    table = RecyclingTable()
    table.update(list(behind), [(row + list(range(KEPT)))[:KEPT] for row in behind.values()], vocab)
    return table


def guessed(own: GuessSources, row: torch.Tensor, i: int = 0) -> dict[str, set[int]]:
    """By source, the tokens that are guessed behind a row."""
    asked = own.row(i, row, RequestStats())
    found: dict[str, set[int]] = {"memory": set(), "recycled": set()}
    if asked is not None:
        for guess in asked.place(asked.context, True).guesses:
            found[guess.source].add(guess.token)
    return found


def test_each_source_guesses_alone_and_both_together() -> None:
    row, table = ROWS.row(0), full({3: list(range(10, 18))})
    assert guessed(sources(filled())[0], row) == {"memory": {4}, "recycled": set()}
    assert guessed(sources(None, table)[0], row) == {"memory": set(), "recycled": set(range(10, 18))}
    assert guessed(sources(filled(), table)[0], row) == {"memory": {4}, "recycled": set(range(10, 18))}
    nobody = sources()[0]
    assert nobody.row(0, row, RequestStats()) is None and not nobody.worked and not nobody.in_use


def test_the_request_and_earlier_ones_answer_side_by_side() -> None:
    """Earlier 4 followed 2 3; in this request it was 7."""
    own = sources(filled())[0]
    assert guessed(own, torch.tensor([[2, 3, 7, 2, 3]])) == {"memory": {4, 7}, "recycled": set()}


def test_ids_that_the_target_cannot_read_are_not_guessed() -> None:
    """A head may have more rows than an embedding, and a memory may know another target."""
    row, table = ROWS.row(0), full({3: [30, 10, 31, 11, 29]}, vocab=40)
    assert guessed(sources(None, table, vocabulary=30)[0], row)["recycled"] == {10, 11, 29, 0, 1, 2}
    assert guessed(sources(None, full({3: [31] * 8}), vocabulary=31)[0], row)["recycled"] == set()
    assert guessed(sources(filled(), vocabulary=4)[0], row)["memory"] == set()


def test_padding_is_neither_read_nor_asked_about() -> None:
    table = full({0: list(range(10, 18)), 3: list(range(20, 28))})
    for memory in (filled(), None):
        own = sources(memory, table, padding=(2,))[0]
        asked = own.row(0, torch.tensor([[0, 0, 3]]), RequestStats())
        assert asked is not None and asked.context == [3]
        assert guessed(own, torch.tensor([[0, 0, 3]]))["recycled"] == set(range(20, 28))


def forked() -> SuffixMemory:
    """Behind 2 3 came 4 three times, and 5 once."""
    memory = SuffixMemory(64)
    for last in (4, 5, 4, 4):
        memory.extend([2, 3, last])
        memory.close()
    return memory


def test_one_candidate_under_sampling_is_drawn_from_what_the_memory_says() -> None:
    """With its law; how likely it is believed to be, and so whether it is submitted, says nothing about which token was drawn."""
    own, drawn = sources(forked())[0], list[int]()
    torch.manual_seed(1)
    asked = own.row(0, torch.tensor([[2, 3]]), RequestStats(), draws=True)
    assert asked is not None
    chances = set()
    for _ in range(400):
        guess = asked.place(asked.context, True).guesses[0]
        assert guess.law is not None and dict(zip(guess.law.tokens, guess.law.probs, strict=True)).keys() == {4, 5}
        drawn.append(guess.token)
        chances.add(guess.chance)
    share = dict(zip(guess.law.tokens, guess.law.probs, strict=True))[4]
    assert drawn.count(4) / 400 == pytest.approx(share, abs=0.1) and set(drawn) == {4, 5}
    assert len(chances) == 1


def test_a_token_that_was_drawn_stands_in_the_proposal_with_its_law() -> None:
    own = sources(forked())[0]
    asked = own.row(0, torch.tensor([[2, 3]]), RequestStats(), draws=True)
    assert asked is not None
    builder = ProposalBuilder(torch.tensor([[2, 3]]), asked.context, set())
    grow(builder, asked, lambda candidates, chance: candidates < 1, 4, set(), False)
    proposal = builder.proposal(VOCAB)
    proposal.check(Rows.of(torch.tensor([[2, 3]])), 4, VOCAB)
    assert proposal.q is not None and proposal.drawn_of(0) == (0,) and proposal.is_chain(0)
    assert proposal.q.dtype == torch.float32 and float(proposal.q.sum()) == pytest.approx(1)
    assert proposal.q[0, 0].nonzero().flatten().tolist() == [4, 5]


def test_what_several_guesses_say_is_never_drawn() -> None:
    own = sources(forked(), full({3: list(range(10, 18))}))[0]
    asked = own.row(0, torch.tensor([[2, 3]]), RequestStats())
    assert asked is not None
    assert all(guess.law is None for guess in asked.place(asked.context, True).guesses)


def chain(tokens: list[list[int]]) -> Proposal:
    longest = max(map(len, tokens))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
    found = tuple(tuple(TokenSource("recycled", i) for i in range(len(row))) for row in tokens)
    return Proposal(rows, None, found)


def peaked(best: list[list[int]], vocab: int = VOCAB) -> torch.Tensor:
    """Logits (rows, places, vocab) whose largest are at these tokens, and then the smaller ones first."""
    logits = -torch.arange(vocab, dtype=torch.float32).repeat(len(best), len(best[0]), 1)
    for row, tokens in enumerate(best):
        for at, token in enumerate(tokens):
            logits[row, at, token] = 1.0
    return logits


def test_what_was_verified_is_taken_in_once_it_is_observed() -> None:
    table = RecyclingTable()
    own = sources(None, table)[0]
    own.read(ROWS, chain([[7, 9]]), peaked([[11, 12, 13]]))
    assert table.nbytes == 0, "what a round reads serves no other request before it is over"
    own.take_in()
    assert [table.successors(token)[0] for token in (3, 7, 9)] == [11, 12, 13]
    assert not table.successors(11) and not table.successors(13), "these were not fed to the target"
    table.update([3], [[1] * KEPT], VOCAB)
    own.take_in()
    assert list(table.successors(3)) == [1] * KEPT, "nothing is taken in twice"


def test_a_tree_is_read_by_the_token_of_each_place() -> None:
    table = RecyclingTable()
    own = sources(None, table)[0]
    drafted = tuple(TokenSource("recycled", depth) for depth in (0, 0, 1))
    tree = Proposal(torch.tensor([[7, 8, 9]]), None, (drafted,), parents=((-1, -1, 1),))
    own.read(ROWS, tree, peaked([[11, 12, 13, 14]]))
    own.take_in()
    assert [table.successors(token)[0] for token in (3, 7, 8, 9)] == [11, 12, 13, 14]


def test_what_pads_a_shorter_row_is_not_read() -> None:
    table = RecyclingTable()
    own = sources(None, table, padding=(0, 0))[0]
    rows = Rows(torch.tensor([[1, 2, 3], [4, 5, 0]]), (3, 2))
    own.read(rows, chain([[7, 9], [6]]), peaked([[11, 12, 13], [14, 15, 16]]))
    own.take_in()
    assert [table.successors(token)[0] for token in (3, 7, 9, 5, 6)] == [11, 12, 13, 14, 15]
    assert not table.successors(0)


def test_a_plain_round_tells_what_follows_the_last_token() -> None:
    table = RecyclingTable()
    own = sources(None, table)[0]
    own.read(ROWS, Proposal.nothing(ROWS), peaked([[11]]))
    own.take_in()
    assert table.successors(3)[0] == 11 and not table.successors(11)


def test_without_a_table_nothing_is_read() -> None:
    own = sources(filled())[0]
    own.read(ROWS, Proposal.nothing(ROWS), peaked([[11]]))
    own.take_in()
    assert guessed(own, ROWS.row(0))["recycled"] == set()


@pytest.mark.failures
@pytest.mark.parametrize("with_memory", [False, True])
def test_what_fails_is_out_for_the_call_and_works_again_in_a_later_one(with_memory: bool) -> None:
    backoff, table = Backoff("Guessing", "it goes on"), full({3: [9]})
    memory = filled() if with_memory else None
    own, counts = sources(memory, table, backoff=backoff)
    assert guessed(own, ROWS.row(0))["recycled"] and own.worked
    own.read(ROWS, chain([[7]]), torch.zeros(1, 0, VOCAB))  # fewer places than were fed
    with own.attempt():
        own.take_in()
    assert counts.failed_drafts == 1 and not own.worked and backoff.failing
    assert own.row(0, ROWS.row(0), RequestStats()) is None
    for tried in (False, True):  # left out of one request
        own, counts = sources(memory, table, backoff=backoff)
        assert (own.row(0, ROWS.row(0), RequestStats()) is not None) is tried is own.worked
    assert backoff.worked() and not backoff.failing


def test_the_row_is_given_to_the_memory_at_the_end() -> None:
    memory = filled()
    own = sources(memory)[0]
    assert not own.in_use
    own.row(0, ROWS.row(0), RequestStats())
    assert own.in_use and own.commit(Rows.of(torch.tensor([[1, 2, 3, 20, 21]]))) == memory.nbytes
    found = memory.continuation([3, 20])
    assert found is not None and found.tokens == (21,)
