"""When a request is learned: at a round, at its end or later, as far as that is worth its time, and no further than it fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig

from ..metrics import Counts
from ..metrics.summary import counted
from ..rounds import Rows, Verdict
from ..runtime.clock import finished
from ..runtime.failures import Attempt, Failures
from .feedback import Feedback
from .learned_texts import Request
from .request_feedback import RequestFeedback
from .segment import Segment
from .service import LearningService
from .trainable import Prefix


class DraftedRow(Protocol):
    """A row of a call, as its draft reads it."""

    tokens: Tensor | None  # (1, L) the row so far, on the draft's device; None: it has not begun
    prompt: int  # how much of it was there before
    mask: Tensor | None  # (1, prompt) with zeros where the prompt is padded on the left; None: no padding
    prompt_log_ratio: float | None  # how much the prompt speaks for the learned draft; None: it was not asked

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def common(self) -> int:
        """Ids below it are known to target and draft."""
        ...

    def take(self, tokens: Tensor) -> None:
        """The row as it is now, (1, L)."""
        ...

    def route(self, prompt: Tensor) -> None:
        """Once in a request: whether the learned or the base draft serves it, by its prompt."""
        ...

    def prefix(self, most: int) -> Prefix | None:
        """At most so many tokens that the learned draft has read already."""
        ...


class ExpectedAnswers(Protocol):
    """The suffix memory, as far as learning is held against it."""

    asks: bool  # whether it is asked about every generated token

    @property
    def in_use(self) -> bool: ...

    def expected(self, i: int, tokens: Tensor, new: slice) -> Sequence[float] | None:
        """The estimated acceptance of its answers at new tokens of a row (1, L); None: it was not asked. (): there is no memory."""
        ...


class LearningSchedule:
    """What one call of `generate` teaches its draft, and when.

    Args:
        learning: of the draft, from call to call.
        rows: of the call.
        memory: the suffix memory in this call.
        counts: of the call.
        temperature: of the call, 0 for greedy.
        learns: False: nothing is recorded or learned.
        timed: whether the loop tells times; transformers' own does not.
        waits: whether anything is decided by them: only then is an accelerator waited for.
    """

    def __init__(
        self,
        learning: LearningService,
        failures: Failures,
        rows: Sequence[DraftedRow],
        memory: ExpectedAnswers,
        counts: Counts,
        temperature: float,
        *,
        learns: bool,
        timed: bool,
        waits: bool,
    ) -> None:
        self._learning, self._failures, self._rows, self._memory = learning, failures, rows, memory
        self._counts, self._temperature = counts, temperature
        self._asked, self._timed, self._waits = learns, timed, waits
        self.learns = failures.learning.begin() and learns  # whether the target's logits are recorded
        self._rounds = 0
        self._learned = self._recorded = self._deferred = False
        self._feedback = self._new_feedback()  # of every row
        self._requests: dict[int, Request] = {}  # by row, for the privacy audit, as soon as it is learned from
        settings = learning.settings
        if self.learns and settings.update_every == "auto" and settings.update_when != "idle":
            with self.attempt():
                self._memory.asks = self._affordable_steps() > 0

    # Beside decoding nothing may fail a call, see runtime/failures.py.

    def attempt(self) -> Attempt:
        """A `with` block around whatever is learned."""
        return self._failures.learning.attempt(self._stop)

    def _stop(self) -> None:
        """Nothing more of this call is learned, and what was recorded for it goes."""
        self._counts.failed_updates += 1
        self.learns = self._memory.asks = False
        self._feedback = self._new_feedback()

    def _new_feedback(self) -> list[RequestFeedback]:
        return [self._learning.new_feedback(row.common, self._temperature, row.config) for row in self._rows]

    @property
    def worked(self) -> bool:
        """Whether this call was learned from without a failure."""
        return self._learned and not self._counts.failed_updates

    # A round

    def begin(self, rows: Rows) -> None:
        """Before the first round: the prompts."""
        for i, row in enumerate(self._rows):
            if row.tokens is None:
                with self.attempt():
                    row.take(rows.row(i))

    def copied(self, logits: Tensor) -> Tensor | None:
        """A copy of the target's raw logits of a round, which processors may write into; None: they are not recorded."""
        return logits.clone() if self.learns else None

    def observe(self, verdict: Verdict) -> None:
        """Records a round, and learns if that is due."""
        with self.attempt():
            self.record(verdict.rows, verdict.logits)
            self._learn_of_round()

    def record(self, rows: Rows, logits: Tensor | None) -> None:
        """Keeps the target's raw logits (batch, ≥ new tokens, vocab) at the new tokens, up to the last one that the draft can see."""
        self._rounds += 1
        for i, row in enumerate(self._rows):
            if row.tokens is None:
                continue
            before = row.tokens.shape[1]
            new = rows.lengths[i] - before
            row.take(rows.row(i))
            seen = max(0, min(new, self._learning.positions + 1 - before))
            if self.learns and logits is not None and seen:
                self._recorded = True
                own = logits[i : i + 1, :seen]
                # Logits of rejected tokens are not held with the others.
                own = own if seen == logits.shape[1] else own.clone()
                self._feedback[i].record(own.to(self._learning.device), before + seen)

    @property
    def rounds(self) -> int:
        return self._rounds

    @property
    def _waiting(self) -> list[int]:
        """Rows with tokens that are neither learned from nor deferred."""
        return [i for i, feedback in enumerate(self._feedback) if feedback.waiting]

    def _learn_of_round(self) -> None:
        """Learns what was recorded, if it is due."""
        settings = self._learning.settings
        # Full target distributions are kept for so many tokens at most.
        full = any(feedback.waiting >= settings.context_tokens for feedback in self._feedback)
        due = full
        if settings.update_every == "auto":
            due = (full or settings.update_when == "round") and self._worthwhile_steps() > 0
        elif settings.update_when == "round":
            due = full or self._rounds % int(settings.update_every) == 0
        if due:
            self.update()
        elif full:
            for feedback in self._feedback:
                feedback.defer_to_replay()

    def update(self) -> None:
        """One gradient step of every row on the tokens since the last update, on top of what the draft has read."""
        rows = [i for i in self._waiting if self._rows[i].tokens is not None]
        if not rows:
            return
        started, before = time.perf_counter(), self._counts.updates
        try:
            for i in rows:
                self._step(i)
        finally:  # a step that fails takes its time, too
            self._charge(started, before)
        self._learned = True

    def _step(self, i: int) -> None:
        row, feedback = self._rows[i], self._feedback[i]
        assert row.tokens is not None
        teachers = feedback.teachers()
        prompt, tokens = row.tokens[:, : row.prompt], row.tokens[:, : feedback.end]
        new = slice(feedback.end - len(teachers[0]) - row.prompt, feedback.end - row.prompt)
        prefix = row.prefix(tokens.shape[1] - 1 - len(teachers[0]))
        self._route(row, prompt)
        if any(teacher.teaches for teacher in teachers):
            request = self._requests.setdefault(i, Request(row.prompt))
            self._learning.learn_segment(
                Segment(tokens, teachers, row.mask, self._temperature),
                self._counts,
                prefix=prefix,
                recalled=self._memory.expected(i, row.tokens, new),
                prompt_log_ratio=row.prompt_log_ratio or 0.0,
                request=request,
            )
            self._learning.fold()
        feedback.keep(teachers)

    def _route(self, row: DraftedRow, prompt: Tensor) -> None:
        if self._learning.settings.update_every == "auto":
            row.route(prompt)

    # The end of the request

    def finish(self, unseen: bool) -> None:
        """Learns what is left of the call and rehearses others, as far as that is worth it.

        Args:
            unseen: whether it is long since the draft's acceptance was seen.
        """
        with self.attempt():
            if any(f.waiting or f.kept for f in self._feedback) and all(row.tokens is not None for row in self._rows):
                self._finish(unseen)

    def _finish(self, unseen: bool) -> None:
        settings = self._learning.settings
        steps = 1 + settings.replay_passes
        if settings.update_when == "idle":
            for feedback in self._feedback:
                feedback.defer_to_replay()
            for _, one in self._finished():
                self._learning.learn_later(one, self._temperature)
            self._learned = True
            return
        if settings.update_every == "auto" and self._timed:
            steps = self._worthwhile_steps()
            if not steps:
                self._deferred = True
                self._learning.deferred()
                if unseen:
                    self._score_offline()
        if steps:
            self.update()
        elif self._keeps:
            for feedback in self._feedback:
                feedback.defer_to_replay()
        started, before = time.perf_counter(), self._counts.updates
        try:
            for i, one in self._finished():
                self._learning.remember(one, self._requests.get(i))
            self._learning.replay_steps(self._counts, steps - 1)
            self._learning.fold()
        finally:
            self._charge(started, before)

    def _finished(self) -> list[tuple[int, Feedback]]:
        """Every row as the replay keeps it."""
        found = []
        for i, (row, feedback) in enumerate(zip(self._rows, self._feedback, strict=True)):
            assert row.tokens is not None
            found += [(i, one) for one in feedback.feedback(row.tokens, row.mask)]
        return found

    def close(self) -> None:
        """The end of the call, finished or broken off."""
        with self.attempt():
            self._learning.end_request()

    def outcome(self) -> str:
        """Whether this call was learned from, and why not, in words."""
        counts, learning = self._counts, self._learning
        if not self._asked:
            return "the last request was only drafted for: onlinespec=False"
        if counts.updates:
            return f"the last request was learned from, in {counted(counts.updates, 'gradient step')}"
        if counts.skipped_updates:
            return "the last request was not learned from: its gradients were not finite"
        if not self._recorded:
            return f"the last request was not learned from: it lies beyond the {learning.positions} tokens that the draft can read"
        if learning.settings.update_when == "idle":
            return learning.idle_outcome
        if not self._deferred:
            return (
                "the last request was not learned from: the target has said nothing about tokens that the draft knows"
            )
        if not self._affordable_steps():
            return f"the last request was not learned from: {learning.governor.budget.account()}"
        return (
            "the last request was not learned from: when it began, there was no time to ask the memory at every token"
        )

    @property
    def _keeps(self) -> bool:
        """Whether what is not learned from is worth remembering for the replay."""
        # Of a request, all or nothing.
        return any(f.kept for f in self._feedback) or self._learning.governor.decisions.budget_fraction == 1.0

    def _score_offline(self) -> None:
        """Shows the governor how the draft would have done on a request in which it neither drafts nor learns."""
        rows = self._waiting
        if not rows:
            return
        started = time.perf_counter()
        for i in rows:
            row, feedback = self._rows[i], self._feedback[i]
            assert row.tokens is not None
            teachers = feedback.teachers()
            self._route(row, row.tokens[:, : row.prompt])
            segment = Segment(row.tokens[:, : feedback.end], teachers, row.mask, self._temperature)
            self._learning.score_offline(segment, row.prompt_log_ratio)
            if self._keeps:
                feedback.keep(teachers)
        seconds = time.perf_counter() - started
        self._counts.update_time_s += seconds
        with self._learning.lock:
            self._learning.governor.budget.scored(seconds)

    # What it may cost

    def _worthwhile_steps(self) -> int:
        """Steps that are affordable, if it is known what the memory would have said: else none could tell what they bring."""
        return self._affordable_steps() if self._memory.asks or not self._memory.in_use else 0

    def _affordable_steps(self) -> int:
        with self._learning.lock:
            return self._learning.governor.budget.affordable_steps()

    def _charge(self, started: float, updates_before: int) -> None:
        seconds = (finished(self._learning.device) if self._waits else time.perf_counter()) - started
        self._counts.update_time_s += seconds
        if self._timed:
            with self._learning.lock:
                self._learning.governor.budget.spent(seconds, self._counts.updates - updates_before)
