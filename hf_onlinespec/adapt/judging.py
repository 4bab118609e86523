"""How experts and adapter did on a request, before it was learned: what Hedge and the guard decide by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import Experts
from .guard import Guard
from .objective import Objective
from .segment import PendingRequest, Scores, Segment
from .trainable import Trainable

JUDGED_TOKENS = 32  # of a request, that tell how experts and adapter do


@dataclass(frozen=True)
class Judged:
    """What experts and adapter showed of one row, before it was learned."""

    segment: Segment
    accepted: list[list[float]]  # by row of the batched forward: of every expert, and of what serves
    scores: Scores

    def finite(self) -> Judged:
        """The same, with 0 where acceptance is not finite."""

        def known(values: list[float]) -> list[float]:
            return [a if math.isfinite(a) else 0.0 for a in values]

        scores = Scores(known(self.scores.learned), self.scores.base)
        return Judged(self.segment, [known(row) for row in self.accepted], scores)


class Evaluator:
    """Collects what experts and adapter showed of a request, and evaluates it a whole request at a time."""

    def __init__(self, trainable: Trainable, experts: Experts, objective: Objective, guard: Guard) -> None:
        self.guard = guard
        self._trainable, self._experts, self._objective = trainable, experts, objective
        self._pending: list[PendingRequest] = []  # of the rows of one call

    @property
    def nbytes(self) -> int:
        return self.guard.nbytes + sum(pending.segment.nbytes for pending in self._pending)

    def begin_anew(self, guard: Guard) -> None:
        """The adapter is another one: what was known of the one before is forgotten, but for the number of rollbacks."""
        guard.rollbacks = self.guard.rollbacks
        self.guard, self._pending = guard, []

    def go_back(self) -> Tensor | None:
        """The newest earlier state (parameters,) of one expert; None: there is none."""
        state = self.guard.go_back()
        if state is not None:
            self._pending = []
        return state

    def collect(self, rows: Sequence[Judged]) -> bool:
        """Takes in acceptance on the rows of a step; small segments of one request wait for the others. Whether the parameters changed."""
        found, restored = [row.finite() for row in rows], False
        earlier = [next((one for one in self._pending if one.continues(row.segment)), None) for row in found]
        if not any(one is not None for one in earlier):  # these are other requests
            restored, self._pending = self.evaluate(), []
        for before, row in zip(earlier, found, strict=True):
            if before is None:
                self._pending.append(PendingRequest(row.segment, row.accepted, row.scores))
            else:
                self._pending = [one for one in self._pending if one is not before]
                self._pending.append(before.joined(row.segment, row.accepted, row.scores))
        enough = [one for one in self._pending if len(one.scores.learned) >= JUDGED_TOKENS]
        self._pending = [one for one in self._pending if len(one.scores.learned) < JUDGED_TOKENS]
        return self._evaluate(enough) or restored

    def evaluate(self) -> bool:
        """Weighs the experts by what is collected, and asks the guard; whether an earlier state was restored."""
        pending, self._pending = self._pending, []
        return self._evaluate(pending)

    def _evaluate(self, pending: Sequence[PendingRequest]) -> bool:
        for one in pending:
            if self._evaluate_one(one):
                self._pending = []  # what the others showed is of the state that was left
                return True
        return False

    def _evaluate_one(self, pending: PendingRequest) -> bool:
        experts = self._experts
        if experts.is_ensemble:
            experts.weigh([sum(row) / len(row) for row in pending.accepted])
        state = self.guard.observe(
            pending.scores.learned,
            pending.scores.base,
            experts.best_params,
            None if experts.is_ensemble else self._with_zero_b,
            lambda state: self._score_candidate(state, pending.segment),
        )
        if state is not None:
            experts.restore(state)
        return state is not None

    def _with_zero_b(self) -> Tensor:
        """The adapter, changing nothing. In an ensemble the base draft is a row already."""
        return self._trainable.adapter.with_zero_b(self._experts.best_params())

    @torch.no_grad()
    def _score_candidate(self, state: Tensor, segment: Segment) -> list[float]:
        """Acceptance of other parameters of one block."""
        adapter = self._trainable.adapter
        gates = None
        rows = adapter.split(adapter.params).clone()
        if self._experts.is_ensemble:
            gates = torch.zeros(1, adapter.blocks, device=rows.device)
            gates[0, 0] = 1.0
        before = adapter.params.clone()
        rows[0] = state
        try:
            adapter.put(rows)
            logits = self._trainable.training_logits(
                segment.tokens, segment.n, segment.mask, gates, features=segment.features, sources=segment.sources
            )
            found = self._objective.acceptance(segment, logits[0])
            return [a if math.isfinite(a) else 0.0 for a in found]
        finally:
            adapter.params.copy_(before)  # no new memory: there may be none
