"""Rounds that several requests have in common: the target verifies what all of them propose in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..rounds import Proposal, Rows, Verdict
from .base import Draft
from .combined import CallRows, Combined
from .request import Request


@dataclass(frozen=True, eq=False)
class RequestRows:
    """The rows of a request in a round.

    Args:
        room: how far they may reach.
    """

    request: Request
    rows: Rows
    room: int

    @cached_property
    def seen(self) -> Rows:
        """What the draft is shown of them."""
        return self.request.seen(self.rows)

    @property
    def combined(self) -> Combined | None:
        """What proposes, where it can do so together with others; None: it proposes by itself, or nothing."""
        proposer = self.request.proposer
        return proposer if isinstance(proposer, Combined) and self.request.proposes else None


class CommonRounds:
    """Drives the requests of one draft through their rounds; nothing beside decoding fails any of them, see `Request`."""

    def __init__(self, draft: Draft) -> None:
        self._failures = draft.failures

    def propose(self, asked: Sequence[RequestRows], trees: bool) -> list[Proposal]:
        """What the draft commits to behind the rows of every request; trees: see `Request.propose`."""
        together = [one for one in asked if one.combined is not None]
        proposals = dict[int, Proposal]()
        with self._failures.proposing.attempt(lambda: _stop(together)):
            calls = [CallRows(one.combined, one.seen, one.room) for one in together if one.combined is not None]
            found = Combined.propose_together(calls, trees) if calls else []
            for one, proposal in zip(together, found, strict=True):
                one.request.check(proposal, one.seen, one.room)
            proposals = {id(one): proposal for one, proposal in zip(together, found, strict=True)}
        for one in asked:
            if one in together:
                proposals.setdefault(id(one), Proposal.nothing(one.seen))
                one.request.begin(one.seen)
            else:
                proposals[id(one)] = one.request.propose(one.rows, one.room, trees)
        return [proposals[id(one)] for one in asked]

    def observe(self, seen: Sequence[tuple[RequestRows, Verdict]], reads_prompts: bool) -> None:
        """Counts a round, and hands its outcome on; the times in the verdicts are shares of the round's.

        Args:
            reads_prompts: whether the target has read the prompts in it: the time of that says nothing about a round's.
        """
        together = [(one, verdict) for one, verdict in seen if one.combined is not None]
        alone = [(one, verdict) for one, verdict in seen if one.combined is None]
        for one, verdict in together:
            one.request.count(verdict)
        with self._failures.proposing.attempt(lambda: _stop([one for one, _ in together])):
            together = [(one, replace(verdict, rows=one.request.seen(verdict.rows))) for one, verdict in together]
            calls = [
                (one.combined, replace(verdict, target_s=0.0) if reads_prompts else verdict)
                for one, verdict in together
                if one.combined is not None
            ]
            if calls:
                Combined.observe_together(calls)
        for one, verdict in together:
            one.request.learn_of(verdict)
        for one, verdict in alone:
            one.request.observe(verdict, reads_prompts)


def _stop(asked: Sequence[RequestRows]) -> None:
    """They go on plain."""
    for one in asked:
        one.request.stop_proposing()
