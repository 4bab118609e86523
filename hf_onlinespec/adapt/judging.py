"""How experts and adapter did on a request, before it was learned: what Hedge and the guard decide by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .experts import Experts
from .guard import Guard
from .objective import Objective
from .segment import PendingRequest, Scores, Segment
from .trainable import Trainable

JUDGED_TOKENS = 32  # of a request, that tell how experts and adapter do


class Evaluator:
    """Collects what experts and adapter showed of a request, and evaluates it a whole request at a time."""

    def __init__(self, trainable: Trainable, experts: Experts, objective: Objective, guard: Guard) -> None:
        self.guard = guard
        self._trainable, self._experts, self._objective = trainable, experts, objective
        self._pending: PendingRequest | None = None

    @property
    def nbytes(self) -> int:
        return self.guard.nbytes + (0 if self._pending is None else self._pending.segment.nbytes)

    def begin_anew(self, guard: Guard) -> None:
        """The adapter is another one: what was known of the one before is forgotten, but for the number of rollbacks."""
        guard.rollbacks = self.guard.rollbacks
        self.guard, self._pending = guard, None

    def go_back(self) -> Tensor | None:
        """The newest earlier state (parameters,) of one expert; None: there is none."""
        state = self.guard.go_back()
        if state is not None:
            self._pending = None
        return state

    def collect(self, segment: Segment, accepted: list[list[float]], scores: Scores) -> bool:
        """Takes in acceptance on a segment; small segments of one request wait for the others. Whether the parameters changed."""
        accepted = [[a if math.isfinite(a) else 0.0 for a in row] for row in accepted]
        scores = Scores([a if math.isfinite(a) else 0.0 for a in scores.learned], scores.base)
        pending, restored = self._pending, False
        if pending is not None and pending.continues(segment):
            pending = pending.joined(segment, accepted, scores)
        else:
            restored = self.evaluate()
            pending = PendingRequest(segment, accepted, scores)
        self._pending = pending
        if len(pending.scores.learned) >= JUDGED_TOKENS:
            restored |= self.evaluate()
        return restored

    def evaluate(self) -> bool:
        """Weighs the experts by what is collected, and asks the guard; whether an earlier state was restored."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
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
                segment.tokens, segment.n, segment.mask, gates, features=segment.features
            )
            found = self._objective.acceptance(segment, logits[0])
            return [a if math.isfinite(a) else 0.0 for a in found]
        finally:
            adapter.params.copy_(before)  # no new memory: there may be none
