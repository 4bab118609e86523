"""When a call is learned whose rows have adapters of their own: each by its own schedule, which sees its own rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..metrics import Counts, DraftMetrics
from ..rounds import Rows, Verdict
from ..runtime.failures import Attempt, Failures
from .schedule import ExpectedAnswers, LearningSchedule

LEARNED = ("updates", "learned_tokens", "skipped_updates", "update_time_s", "failed_updates", "loss_sum")
UNNAMED = "without a name"


@final
class AnswersOfRows:
    """The suffix memory, as far as learning of some rows of a call is held against it.

    Args:
        rows: of the call.
    """

    def __init__(self, memory: ExpectedAnswers, rows: Sequence[int]) -> None:
        self._memory, self._rows, self._asks = memory, rows, False

    @property
    def asks(self) -> bool:
        """Whether it is asked about every generated token of these rows."""
        return self._asks

    @asks.setter
    def asks(self, asks: bool) -> None:
        self._asks = asks
        self._memory.asks = self._memory.asks or asks  # other rows may go on asking

    @property
    def in_use(self) -> bool:
        return self._memory.in_use

    def expected(self, i: int, tokens: Tensor, new: slice | Sequence[int]) -> Sequence[float] | None:
        """See `ExpectedAnswers`."""
        known = self._memory.expected(self._rows[i], tokens, new)
        return known if self._asks or known == () else None


@dataclass(frozen=True)
class AdapterRows:
    """The rows of a call that have the same adapter.

    Args:
        name: of the adapter; None: it has none.
        rows: of the call.
        schedule: of these rows, which counts them from 0.
        counts: of these rows, which `metrics` take in at the end.
    """

    name: str | None
    rows: tuple[int, ...]
    schedule: LearningSchedule
    counts: Counts
    metrics: DraftMetrics | None  # of the adapter; None: those of the draft, which take in the whole call

    def of(self, rows: Rows) -> tuple[list[int], Rows]:
        """Which of `rows` these are by their place there, and these rows as the schedule counts them."""
        number = {row: i for i, row in enumerate(self.rows)}
        places = [at for at, row in enumerate(rows.of_call) if row in number]
        own = rows if len(places) == len(rows.lengths) else rows.of_rows(places)
        return places, replace(own, numbers=tuple(number[row] for row in own.of_call))


@final
class Schedules:
    """What one call teaches several adapters, or one that has a name; the methods are those of a `LearningSchedule`.

    Args:
        counts: of the call.
        closed: called at its end: the adapters are not in use any more.
    """

    def __init__(
        self, parts: Sequence[AdapterRows], failures: Failures, counts: Counts, closed: Callable[[], None]
    ) -> None:
        self._parts, self._failures, self._counts, self._closed = parts, failures, counts, closed
        self.rounds = 0
        self._begun: set[int] = set()  # rows of the call

    @property
    def learns(self) -> bool:
        """Whether the target's logits are recorded."""
        return any(part.schedule.learns for part in self._parts)

    @property
    def may_learn(self) -> bool:
        """See `LearningSchedule`."""
        return any(part.schedule.may_learn for part in self._parts)

    @property
    def worked(self) -> bool:
        """Whether any rows were learned from, and none failed."""
        return any(part.schedule.worked for part in self._parts) and not any(
            part.counts.failed_updates for part in self._parts
        )

    def attempt(self) -> Attempt:
        """A `with` block around what concerns all rows."""
        return self._failures.learning.attempt(self._stop)

    def _stop(self) -> None:
        for part in self._parts:
            part.schedule.stop()

    def leave_out(self, reason: str) -> None:
        """See `LearningSchedule`."""
        for part in self._parts:
            part.schedule.leave_out(reason)

    # A round

    def begin(self, rows: Rows) -> None:
        """Before the first round of rows: their prompts."""
        if self._begun.issuperset(rows.of_call):
            return
        self._begun.update(rows.of_call)
        for part in self._parts:
            places, own = part.of(rows)
            if places:
                part.schedule.begin(own)

    def copied(self, logits: Tensor) -> Tensor | None:
        """See `LearningSchedule`."""
        return logits.clone() if self.learns else None

    def count(self, verdict: Verdict) -> None:
        """Counts a round for the adapters of its rows, of whose time each row takes an equal share."""
        proposal, n = verdict.proposal, len(verdict.rows.lengths)
        for part in self._parts:
            places, _ = part.of(verdict.rows)
            counts, share = part.counts, len(places) / n
            counts.rounds += len(places)
            counts.draft_time_s += share * verdict.draft_s
            counts.target_time_s += share * verdict.target_s
            counts.wall_time_s += share * (verdict.draft_s + verdict.target_s)
            for at in places:
                counts.new_tokens += verdict.new_tokens[at]
                counts.drafted_tokens += proposal.lengths[at]
                counts.accepted_tokens += len(verdict.paths[at])
                counts.verified_positions += len(verdict.overlaps[at])
                counts.overlap += sum(verdict.overlaps[at])
                names = {token.source for token in proposal.sources[at]}
                counts.drafted_by(bool(names - {"model"}), "model" in names)

    def record(self, rows: Rows, logits: Tensor | None) -> None:
        """See `LearningSchedule`."""
        self.rounds += 1
        for part in self._parts:
            places, own = part.of(rows)
            if not places:
                continue
            with part.schedule.attempt():
                of_part = logits
                if logits is not None and len(places) < len(rows.lengths):
                    of_part = logits[torch.tensor(places, device=logits.device)]
                part.schedule.record(own, of_part)

    def learn_of_round(self) -> None:
        """Learns what was recorded, where it is due."""
        for part in self._parts:
            part.schedule.learn_of_round()

    def update(self, most: int | None = None) -> int:
        """See `LearningSchedule`; `most`: of each adapter's rows."""
        return sum(part.schedule.update(most) for part in self._parts)

    # The end of the call

    def finish(self, unseen: bool, rows: Rows | None = None) -> None:
        """See `LearningSchedule`."""
        for part in self._parts:
            places, own = ([], None) if rows is None else part.of(rows)
            if rows is None or places:
                part.schedule.finish(unseen, own)

    def close(self) -> None:
        """The end of the call, finished or broken off: it is counted, and the adapters may leave the memory."""
        for part in self._parts:
            part.schedule.close()
            self._counts.add(Counts(**{name: getattr(part.counts, name) for name in LEARNED}))
            if part.metrics is not None:
                part.counts.wall_time_s += part.counts.update_time_s
                part.metrics.close(part.counts)
        self._closed()

    def outcome(self) -> str:
        """Whether the rows were learned from, and why not, in words."""
        return "; ".join(f"adapter {part.name or UNNAMED}: {part.schedule.outcome()}" for part in self._parts)


Schedule = LearningSchedule | Schedules  # of one call
