"""When a request is learned: at a round, at its end or later, as far as that is worth its time, and no further than it fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..metrics import Counts
from ..metrics.summary import counted
from ..rounds import Rows
from ..runtime.failures import Attempt, Failures
from .call_budget import CallBudget
from .call_feedback import CallFeedback, DraftedRow, route
from .idle import IdleLearning
from .learned_texts import Request
from .segment import Segment
from .service import LearnedRow, LearningService
from .trainable import Prefix

MOST_ROWS = 16  # in one gradient step, whose forward is kept for its backward; chosen


class ExpectedAnswers(Protocol):
    """The suffix memory, as far as learning is held against it."""

    asks: bool  # whether it is asked about every generated token

    @property
    def in_use(self) -> bool: ...

    def expected(self, i: int, tokens: Tensor, new: slice | Sequence[int]) -> Sequence[float] | None:
        """The estimated acceptance of its answers at new tokens of a row (1, L); None: it was not asked. (): there is no memory."""
        ...


class Comparison(Protocol):
    """Who wants to know how every adapter would have done on rows of a call."""

    @property
    def rows(self) -> Collection[int]:
        """Which ones, as the schedule counts them."""
        ...

    def score(self, rows: Sequence[int], batch: Segment) -> None:
        """Scores the new tokens of some of them under every adapter, before any of these learns from them."""
        ...


class LearningSchedule:
    """What one call of `generate` teaches its draft, and when.

    Args:
        learning, idle: of the draft, from call to call.
        rows: of the call.
        memory: the suffix memory in this call.
        counts: of the call.
        temperature: of the call, 0 for greedy.
        learns: False: nothing is recorded or learned.
        timed: whether the loop tells times; transformers' own does not.
        waits: whether anything is decided by them: only then is an accelerator waited for.
        comparison: of the adapters; None: nobody asked for it.
    """

    def __init__(
        self,
        learning: LearningService,
        idle: IdleLearning,
        failures: Failures,
        rows: Sequence[DraftedRow],
        memory: ExpectedAnswers,
        counts: Counts,
        temperature: float,
        *,
        learns: bool,
        timed: bool,
        waits: bool,
        comparison: Comparison | None = None,
    ) -> None:
        self._learning, self._idle, self._failures, self._comparison = learning, idle, failures, comparison
        self._memory, self._counts, self._temperature, self._asked = memory, counts, temperature, learns
        self._budget = CallBudget(learning, counts, timed=timed, waits=waits)
        self.learns = failures.learning.begin() and learns  # whether the target's logits are recorded
        self.rounds = 0
        self._learned = self._deferred = False
        self._left_out = ""  # why nothing of this call can be learned
        self._feedback = CallFeedback(learning, rows, temperature)
        self._requests: dict[int, Request] = {}  # by row, for the privacy audit, as soon as it is learned from
        self._compares = comparison is not None and self._budget.may_compare
        settings = learning.settings
        if self.learns and settings.update_every == "auto" and settings.update_when != "idle":
            with self.attempt():
                self._memory.asks = self._budget.affordable_steps() > 0

    # Beside decoding nothing may fail a call, see runtime/failures.py.

    def attempt(self) -> Attempt:
        """A `with` block around whatever is learned."""
        return self._failures.learning.attempt(self.stop)

    def stop(self) -> None:
        """What fails ends the learning of this call."""
        self._counts.failed_updates += 1
        self._end()

    def _end(self) -> None:
        """Nothing more of this call is learned, and what was recorded for it goes."""
        self.learns = self._memory.asks = False
        self._feedback.begin_anew()

    def leave_out(self, reason: str) -> None:
        """Learns nothing of this call, for a reason that is no failure."""
        self._left_out = reason
        self._end()

    @property
    def may_learn(self) -> bool:
        """Whether this call may be learned from: not where there was no time for it when it began."""
        settings = self._learning.settings
        waits = settings.update_every == "auto" and settings.update_when != "idle"
        return self.learns and (self._memory.asks or not waits)

    @property
    def worked(self) -> bool:
        """Whether this call was learned from without a failure."""
        return self._learned and not self._counts.failed_updates

    # A round

    def begin(self, rows: Rows) -> None:
        """Before the first round: the prompts."""
        for at, i in enumerate(rows.of_call):
            if self._feedback.rows[i].tokens is None:
                with self.attempt():
                    self._feedback.begin(rows, at)

    def copied(self, logits: Tensor) -> Tensor | None:
        """A copy of the target's raw logits of a round, which processors may write into; None: they are not recorded."""
        return logits.clone() if self.learns else None

    def record(self, rows: Rows, logits: Tensor | None) -> None:
        """Keeps the target's raw logits (batch, ≥ new tokens, vocab) at the new tokens."""
        self.rounds += 1
        self._feedback.record(rows, logits if self.learns else None)

    def learn_of_round(self) -> None:
        """Learns what was recorded, if it is due."""
        with self.attempt():
            self._learn_of_round()

    def _learn_of_round(self) -> None:
        settings = self._learning.settings
        full = self._feedback.full
        due, most = full, None
        if settings.update_every == "auto":
            most = self._worthwhile_steps() if full or settings.update_when == "round" else 0
            due = most > 0
        elif settings.update_when == "round":
            due = full or self.rounds % int(settings.update_every) == 0
        if due:
            self.update(most)
        elif full:
            self._feedback.defer_to_replay()

    def update(self, most: int | None = None, among: Sequence[int] | None = None) -> int:
        """Gradient steps on the tokens since the last update, of up to `MOST_ROWS` rows each; how many.

        One row alone is learned on top of what the draft has read.

        Args:
            most: steps that there is time for, those of the rows with the most tokens; None: all.
            among: rows; None: all.
        """
        waiting = [i for i in self._feedback.waiting if among is None or i in among]
        waiting.sort(key=lambda i: -self._feedback.waiting_tokens(i))
        steps = [waiting[at : at + MOST_ROWS] for at in range(0, len(waiting), MOST_ROWS)][:most]
        if not steps:
            return 0
        with self._budget.charged():
            for rows in steps:
                self._step(rows)
        self._learned = True
        return len(steps)

    def _step(self, rows: Sequence[int]) -> None:
        segments = {i: self._feedback.segment(i) for i in rows}
        self._compare(segments)
        # As the row was read before it may be read anew to tell who serves it.
        one = segments[rows[0]]
        prefix = self._feedback.rows[rows[0]].prefix(one.tokens.shape[1] - 1 - one.n) if len(rows) == 1 else None
        self._route(rows)
        taught = [i for i, segment in segments.items() if segment.teaches]
        # A step on what is not finite is skipped: of a row whose target says such a thing, that row's alone.
        together = [i for i in taught if len(taught) > 1 and segments[i].is_finite]
        for i in taught:
            if i not in together or len(together) == 1:
                self._learn_row(i, segments[i], prefix)
        if len(together) > 1:
            learned = [self._learned_row(i, segments[i]) for i in together]
            self._learning.learn_rows(learned, self._feedback.joined([row.segment for row in learned]), self._counts)
        if taught:
            self._learning.fold()
        for i, segment in segments.items():
            self._feedback.keep(i, segment)

    def _compare(self, segments: Mapping[int, Segment]) -> None:
        """Scores those of them that somebody asks about under every adapter."""
        comparison = self._comparison
        if comparison is None or not self._compares:
            return
        asked = [i for i in segments if i in comparison.rows and segments[i].teaches]
        if asked:
            with self._budget.compared():
                comparison.score(asked, self._feedback.joined([segments[i] for i in asked]))

    def _learn_row(self, i: int, segment: Segment, prefix: Prefix | None) -> None:
        row = self._learned_row(i, segment)
        self._learning.learn_segment(
            segment,
            self._counts,
            prefix=prefix,
            recalled=row.recalled,
            prompt_log_ratio=row.prompt_log_ratio,
            request=row.request,
        )

    def _learned_row(self, i: int, segment: Segment) -> LearnedRow:
        row = self._feedback.rows[i]
        recalled = self._memory.expected(i, self._feedback.latest(i), self._feedback.written(i, segment))
        request = self._requests.setdefault(i, Request(row.prompt))
        return LearnedRow(segment, recalled, row.prompt_log_ratio or 0.0, request)

    def _route(self, rows: Sequence[int]) -> None:
        learning, own = self._learning, [self._feedback.rows[i] for i in rows]
        if learning.settings.update_every == "auto":
            prompts = [row.tokens[:, : row.prompt] for row in own if row.tokens is not None]
            route(own, prompts, learning.learner.trainable, learning.router.constants.prompt_tokens)

    # The end of the request

    def finish(self, unseen: bool, rows: Rows | None = None) -> None:
        """Learns what is left of the call and rehearses others, as far as that is worth it.

        Args:
            unseen: whether it is long since the draft's acceptance was seen.
            rows: those that have ended, of a call that goes on; None: the call has ended.
        """
        ended = sorted(self._feedback.open) if rows is None else rows.of_call
        with self.attempt():
            waits = any(i in ended for i in self._feedback.waiting)
            if self._feedback.begun(ended) and (waits or self._feedback.kept(ended)):
                self._finish(unseen, ended)
        if rows is not None:
            with self.attempt():
                self._feedback.close(ended)

    def _finish(self, unseen: bool, rows: Sequence[int]) -> None:
        settings = self._learning.settings
        steps, most, taken = 1 + settings.replay_passes, None, 1
        if settings.update_when == "idle":
            self._compare_unlearned(rows, keeps=True)
            self._feedback.defer_to_replay(rows)
            for _, one in self._feedback.finished(rows):
                self._idle.add(one, self._temperature)
            self._learned = True
            return
        if settings.update_every == "auto" and self._budget.timed:
            steps = most = self._worthwhile_steps()
            if not steps:
                self._deferred = True
                self._learning.governor.decisions.deferred_updates += 1
                if unseen:
                    self._score_offline(rows)
                self._compare_unlearned(rows, self._keeps(rows))
        if steps:
            updated = self.update(most, rows)
            taken = 1 if most is None else max(1, updated)
        if steps or self._keeps(rows):
            self._feedback.defer_to_replay(rows)
        with self._budget.charged():
            for i, one in self._feedback.finished(rows):
                self._learning.remember(one, self._requests.get(i))
            self._learning.replay_steps(self._counts, steps - taken)
            self._learning.fold()

    def close(self) -> None:
        """The end of the call, finished or broken off."""
        with self.attempt():
            self._learning.end_request()

    def outcome(self) -> str:
        """Whether this call was learned from, and why not, in words."""
        if not self._asked:
            return "the last request was only drafted for: onlinespec=False"
        if self._left_out:
            return f"the last request was not learned from: {self._left_out}"
        if self._feedback.recorded and self._learning.settings.update_when == "idle":
            return self._idle.outcome
        return _outcome(
            self._learning, self._counts, self._feedback.recorded, self._deferred, self._budget.affordable_steps
        )

    def _keeps(self, rows: Sequence[int]) -> bool:
        """Whether what is not learned from of these rows is worth remembering for the replay."""
        # Of a request, all or nothing.
        return self._feedback.kept(rows) or self._learning.governor.decisions.budget_fraction == 1.0

    def _score_offline(self, rows: Sequence[int]) -> None:
        """Shows the governor how the draft would have done on a request in which it neither drafts nor learns."""
        waiting = [i for i in self._feedback.waiting if i in rows]
        if not waiting:
            return
        with self._budget.scored():
            self._route(waiting)
            segments = {i: self._feedback.segment(i) for i in waiting}
            self._compare(segments)
            scored = {i: self._feedback.rows[i].prompt_log_ratio for i, segment in segments.items() if segment.n}
            if len(scored) == 1:
                i, ratio = next(iter(scored.items()))
                self._learning.score_offline(segments[i], ratio)
            elif scored:
                batch = self._feedback.joined([segments[i] for i in scored])
                self._learning.score_rows(batch, [ratio or 0.0 for ratio in scored.values()])
            for i, segment in segments.items():
                if self._keeps(rows):
                    self._feedback.keep(i, segment)

    def _compare_unlearned(self, rows: Sequence[int], keeps: bool) -> None:
        """Compares the adapters on rows that are not learned from now; `keeps`: whether the replay is given them."""
        asked = () if self._comparison is None or not self._compares else self._comparison.rows
        waiting = [i for i in self._feedback.waiting if i in rows and i in asked]
        if not waiting:
            return
        with self._budget.charged():
            segments = {i: self._feedback.segment(i) for i in waiting}
            self._compare(segments)
            for i, segment in segments.items() if keeps else ():
                self._feedback.keep(i, segment)

    def _worthwhile_steps(self) -> int:
        """Steps that are affordable, if it is known what the memory would have said: else none could tell what they bring."""
        return self._budget.affordable_steps() if self._memory.asks or not self._memory.in_use else 0


def _outcome(
    learning: LearningService, counts: Counts, recorded: bool, deferred: bool, affordable_steps: Callable[[], int]
) -> str:
    """Whether a call that learns was learned from, and why not, in words."""
    if counts.updates:
        return f"the last request was learned from, in {counted(counts.updates, 'gradient step')}"
    unlearned = "the last request was not learned from"
    if counts.skipped_updates:
        return f"{unlearned}: its gradients were not finite"
    if not recorded:
        return f"{unlearned}: it lies beyond the {learning.positions} tokens that the draft can read"
    if not deferred:
        return f"{unlearned}: the target has said nothing about tokens that the draft knows"
    if not affordable_steps():
        return f"{unlearned}: {learning.governor.budget.account()}"
    return f"{unlearned}: when it began, there was no time to ask the memory at every token"
