"""What is handed on in a round: trees of candidates, and what a verdict says about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict


def sources(*lengths: int) -> tuple[tuple[TokenSource, ...], ...]:
    return tuple(tuple(TokenSource("model", i, (0,)) for i in range(length)) for length in lengths)


def proposal(**changes: Any) -> Proposal:
    """Two rows: a tree of four candidates, two of them drawn, and a chain of two."""
    fields: dict[str, Any] = {
        "tokens": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "q": torch.full((2, 2, 9), 1 / 9),
        "sources": sources(4, 2),
        "parents": ((-1, -1, 0, 2), (-1, 0)),
        "drawn": ((0, 2), (1,)),
    }
    return Proposal(**(fields | changes))


ROWS = Rows(torch.ones(2, 5, dtype=torch.long), (5, 3))


def test_a_tree_is_told_by_its_parents() -> None:
    tree, chain = proposal(), proposal(parents=None, drawn=None, q=None)
    tree.check(ROWS, 3, 9)
    assert tree.lengths == (4, 2) and tree.depths_of(0) == (0, 0, 1, 2) and tree.depths_of(1) == (0, 1)
    assert not tree.is_chain(0) and tree.is_chain(1)
    assert chain.parents_of(0) == (-1, 0, 1, 2) and chain.is_chain(0) and chain.drawn_of(0) == ()
    chain.check(ROWS, 4, 9)
    assert proposal(parents=None, drawn=None, q=torch.ones(2, 4, 9)).drawn_of(1) == (0, 1)


def test_nothing_fits_where_there_is_no_room() -> None:
    Proposal.nothing(ROWS).check(ROWS, 0, 9)
    Proposal(torch.tensor([[7]] * 2), None, sources(1, 0)).check(ROWS, 1, 9)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a later parent": ({"parents": ((-1, 2, 0, 2), (-1, 0))}, r"of 4 tokens has the parents \(-1, 2, 0, 2\)"),
    "its own parent": ({"parents": ((0, -1, 0, 2), (-1, 0))}, r"the parents \(0, -1, 0, 2\)"),
    "a parent below the row": ({"parents": ((-1, -1, 0, 2), (-2, 0))}, r"the parents \(-2, 0\)"),
    "a parent missing": ({"parents": ((-1, -1, 0), (-1, 0))}, r"the parents \(-1, -1, 0\): expected"),
    "parents of one row": ({"parents": ((-1, -1, 0, 2),)}, "for 2 rows has parents for 1"),
    "too deep": ({"parents": ((-1, 0, 1, 2), (-1, 0))}, "reaches 4 tokens far: there is room for 3"),
    "a chain that is too long": ({"parents": None}, "reaches 4 tokens far"),
    "q for too few": ({"drawn": ((0, 1, 2), (1,))}, r"q for 2 drawn ones, and drawn are \(0, 1, 2\)"),
    "q for all, by what is left out": ({"drawn": None}, r"drawn are \(0, 1, 2, 3\)"),
    "drawn beyond the row": ({"drawn": ((0, 2), (2,))}, r"of 2 tokens has q for 2 drawn ones, and drawn are \(2,\)"),
    "drawn twice": ({"drawn": ((2, 2), (1,))}, r"drawn are \(2, 2\)"),
    "drawn without q": ({"q": None}, r"has q for 0 drawn ones, and drawn are \(0, 2\)"),
    "drawn of one row": ({"drawn": ((0, 2),)}, "has drawn for 1"),
    "q of one row": ({"q": torch.full((1, 2, 9), 1 / 9)}, "has q for 1"),
    "sources of one row": ({"sources": sources(4)}, r"sources of \(4,\), for 2 rows"),
    "a source too many": ({"sources": sources(5, 2)}, r"\(2, 4\) tokens with sources of \(5, 2\)"),
    "an id too large": ({"tokens": torch.tensor([[1, 2, 3, 9], [5, 6, 0, 0]])}, "has the token 9: expected 0 to 8"),
    "an id below 0": ({"tokens": torch.tensor([[1, -2, 3, 4], [5, 6, 0, 0]])}, "has the token -2: expected 0 to 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_proposal_that_cannot_be_verified_says_why(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        proposal(**changes).check(ROWS, 3, 9)


def test_some_of_the_rows_keep_their_trees() -> None:
    one = proposal().of([1])
    assert one.tokens.tolist() == [[5, 6, 0, 0]] and one.parents == ((-1, 0),) and one.drawn == ((1,),)
    assert one.q is not None and one.q.shape == (1, 2, 9) and one.lengths == (2,)


def test_rows_are_joined_with_what_each_was_drawn_from() -> None:
    """A tree with a drawn candidate, a chain that was drawn, a chain of guesses and none."""
    first = Proposal(torch.tensor([[1, 2, 3]]), torch.rand(1, 1, 7), sources(3), 0.25, ((-1, -1, 1),), ((1,),))
    second = Proposal(torch.tensor([[4, 5]]), torch.rand(1, 2, 9), sources(2), 0.5)
    third = Proposal(torch.tensor([[6]]), None, sources(1))
    joined = Proposal.joined([first, second, third, Proposal.nothing(Rows.of(torch.ones(1, 3, dtype=torch.long)))])
    joined.check(Rows.of(torch.ones(4, 3, dtype=torch.long)), 2, 9)
    assert joined.tokens.tolist() == [[1, 2, 3], [4, 5, 0], [6, 0, 0], [0, 0, 0]] and joined.lengths == (3, 2, 1, 0)
    assert joined.parents == ((-1, -1, 1), (-1, 0), (-1,), ()) and joined.drawn == ((1,), (0, 1), (), ())
    assert joined.q is not None and joined.q.shape == (4, 2, 9) and joined.model_s == 0.75
    assert first.q is not None and torch.equal(joined.q[0, 0, :7], first.q[0, 0]) and not joined.q[2:].any()
    assert Proposal.joined([first]) is first
    guesses = Proposal.joined([third, third])
    assert guesses.q is None and guesses.drawn is None and guesses.parents is None


def verdict(paths: tuple[tuple[int, ...], ...], new_tokens: tuple[int, ...]) -> Verdict:
    none = ((),) * len(paths)
    return Verdict(proposal(), ROWS, new_tokens, paths, none, none, (False,) * len(paths), None)


def test_values_of_new_tokens_are_those_behind_the_path() -> None:
    values = torch.arange(10).view(2, 5)
    tree = verdict(((0, 2, 3), (0,)), (4, 2))
    assert tree.accepted == (3, 1)
    assert tree.of_new_tokens(values).tolist() == [[0, 1, 3, 4], [5, 6, 5, 5]]
    ended = verdict(((1,), ()), (1, 1))  # the kept candidate ended its row: nothing was chosen behind it
    assert ended.of_new_tokens(values).tolist() == [[0], [5]]
    deep = torch.rand(2, 5, 3)
    assert torch.equal(tree.of_new_tokens(deep)[0], deep[0, [0, 1, 3, 4]])
    chain = verdict(((0, 1), (0, 1)), (3, 3))
    assert torch.equal(chain.of_new_tokens(deep), deep[:, :3])
