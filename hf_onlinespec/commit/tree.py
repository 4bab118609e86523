"""Guesses that cost no model grow into a tree, likeliest first, as far as verifying them is expected to pay."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from ..govern.guesses import Guess
from .expansion import Expansion, Leaf
from .guessing import Guesser
from .proposal import ProposalBuilder
from .suffix_memory import REACH

# What follows a guess is asked for as if this were its chance. Chosen: on the embedded pair six of eight prefixes that were asked about
# in a round were not reached, and asking about one takes as long as verifying a fifth of a candidate.
LIKELIEST_NEXT = 0.7


class _Branch(NamedTuple):
    """A guess that may join, in the order of a heap: the likeliest path first, then the one that was found first."""

    less: float  # minus the chance that its whole path is kept
    number: int
    parent: int
    depth: int
    context: list[int]
    guess: Guess


def grow(
    builder: ProposalBuilder,
    guesser: Guesser,
    pays: Callable[[int, float], bool],
    room: int,
    ends: set[int],
    branches: bool,
    expansion: Expansion | None = None,
) -> None:
    """Adds guesses to what is drafted, the likeliest path first, until the next one does not pay.

    Args:
        pays: whether one more candidate pays: (candidates so far, chance that it is kept).
        room: most candidates that follow each other.
        ends: tokens that nothing follows.
        branches: whether several may follow the same prefix; else they go on behind the last candidate, one after the other.
        expansion: asks the draft model what follows candidates beside its chain; None: it is not asked.
    """
    heap: list[_Branch] = []
    leaves: list[Leaf] = []
    offered: set[tuple[int, int]] = set()
    number = 0

    def offer(parent: int, depth: int, context: list[int] | None, survival: float, guesses: list[Guess]) -> None:
        nonlocal number
        if context is None or depth >= room:
            return
        for guess in guesses if branches else guesses[:1]:
            if (parent, guess.token) in offered:
                continue
            offered.add((parent, guess.token))
            number += 1
            heapq.heappush(heap, _Branch(-survival * guess.chance, number, parent, depth, context, guess))

    for at in builder.open_places(branches):
        if at.guesses is None:
            builder.places[at.parent] = place = guesser.place(at.context, at.parent < 0)
            offer(at.parent, at.depth, at.context, at.survival, place.guesses)
        else:
            offer(at.parent, at.depth, at.context, at.survival, at.guesses)
    while heap or leaves:
        if not heap or not pays(len(builder.drafted), -heap[0].less):
            following = [] if expansion is None else expansion.next(leaves)
            if not following:
                return
            for leaf, guesses in following:
                offer(leaf.node, leaf.depth + 1, leaf.context, leaf.survival, guesses)
            continue
        best = heapq.heappop(heap)
        node = builder.add_branch(best.guess, best.parent, best.depth, -best.less)
        # What follows is asked for where one more candidate would pay that is kept less often than its parent: asking takes time too.
        if best.guess.token in ends or best.depth + 1 >= room:
            continue
        context = [*best.context[1 - REACH :], best.guess.token]
        if expansion is not None:
            leaves.append(Leaf(node, best.parent, best.depth, best.guess.token, -best.less, context))
        if pays(len(builder.drafted), -best.less * LIKELIEST_NEXT):
            builder.places[node] = place = guesser.place(context, False)
            offer(node, best.depth + 1, context, -best.less, place.guesses)
