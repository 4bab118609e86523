"""The draft model goes on behind several leaves of the tree at once: one forward over all of them (arXiv:2406.16858, EAGLE-2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from ..govern.governor import Governor
from ..govern.guesses import NOWHERE, Guess
from ..govern.planner import Plan
from ..runtime.forks import Lock
from .draft_model import Branch, TreeReader
from .proposal import ProposalBuilder
from .row_model import RowModel

NEXT = 3  # tokens that the draft says behind each leaf; chosen
MOST = 4  # forwards of a round; chosen


class Leaf(NamedTuple):
    """A candidate behind which the draft has said nothing yet."""

    node: int
    parent: int
    depth: int  # candidates before it
    token: int
    survival: float  # estimated chance that it is kept
    context: list[int]  # the last tokens, its own included


class Expansion:
    """Asks the draft model what follows leaves, where the governor expects that to pay.

    Args:
        plan: of the round.
        model: that drafts the row.
        builder: of the round, whose chain it has drafted.
        attempt: makes the `with` block around what the model does.
    """

    def __init__(
        self,
        governor: Governor,
        lock: Lock,
        plan: Plan,
        model: RowModel,
        builder: ProposalBuilder,
        attempt: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._governor, self._lock, self._plan, self._model, self._builder = governor, lock, plan, model, builder
        self._attempt = attempt

    def next(self, leaves: list[Leaf]) -> list[tuple[Leaf, list[Guess]]]:
        """What follows the leaves that are worth it, taken off the list; []: none is."""
        builder, reader = self._builder, self._model.reader
        if builder.expansions >= MOST or not isinstance(reader, TreeReader):
            return []
        readable = [leaf for leaf in leaves if reader.can_branch(leaf.parent, leaf.depth)]
        readable.sort(key=lambda leaf: -leaf.survival)
        chances = [leaf.survival for leaf in readable]
        chosen = readable[: self._governor.leaves_to_expand(self._plan, chances, len(builder.drafted))]
        if not chosen or not self._model.reads_trees:  # that may have to be tried: only where it would pay
            return []
        started = time.perf_counter()
        said: list[list[tuple[int, float]]] = []
        with self._attempt(), self._model.model.serving(self._model.base) as served, torch.inference_mode():
            branches = [Branch(leaf.node, leaf.parent, leaf.depth, leaf.token) for leaf in chosen]
            said = self._model.next_of(served, branches, NEXT)
        builder.expansions += 1
        builder.model_s += time.perf_counter() - started
        for leaf in chosen:
            leaves.remove(leaf)
        return [(leaf, self._guesses(leaf, best)) for leaf, best in zip(chosen, said, strict=False)]  # none has failed

    def _guesses(self, leaf: Leaf, best: list[tuple[int, float]]) -> list[Guess]:
        """The draft's best tokens (token, probability) behind a leaf, and what others guess there."""
        governor, (token, share) = self._governor, best[0]
        place = self._builder.places.get(leaf.node, NOWHERE)
        with self._lock:
            _, chance = governor.acceptances.rate_by_confidence(share, self._model.base)
            found = governor.guesses.expanded(token, share, chance)
            guesses = [found, *governor.guesses.beside(place, token, found.chance, best)]
        self._builder.beside[leaf.node] = guesses
        return guesses
