"""When a request is learned: at a round, at its end or later, as far as that is worth its time, and no further than it fails."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from .._compat.caches import cache_tensors
from ..adapt.feedback import FeedbackRecorder
from ..adapt.learned_texts import Request
from ..adapt.request_feedback import RequestFeedback
from ..metrics import Counts
from ..metrics.summary import counted
from ..runtime.clock import finished
from ..runtime.failures import Attempt
from .causal_lm import RequestModel
from .request_memory import MemoryInRequest


class LearningSchedule:
    """What one request teaches its draft, and when.

    Args:
        model: the draft model in this request.
        counts: of the request.
        temperature: of the call, 0 for greedy.
        learns: False: nothing is recorded or learned.
        memory: the suffix memory in this request.
    """

    def __init__(
        self,
        model: RequestModel,
        counts: Counts,
        temperature: float,
        learns: bool,
        memory: MemoryInRequest,
    ) -> None:
        self._model, self._draft, self._counts, self._temperature = model, model.draft, counts, temperature
        self._settings, self._governor = self._draft.settings, self._draft.governor
        self._failures = self._draft.failures
        self._asked = learns
        self._learns = self._failures.learning.begin() and learns
        # Of the target's raw logits; None: nothing is learned here.
        self.recorder = FeedbackRecorder(self.attempt) if self._learns else None
        self.asks_memory = False  # what it would have said at every token, where learning is affordable
        self.timed = False  # whether the loop tells times; transformers' own does not
        self.waits = False  # whether anything is decided by them: only then is an accelerator waited for
        self.rounds = 0
        self._memory = memory
        self._learned = self._recorded = self._put_off = False
        self._lesson = self._begin_lesson()
        self._request: Request | None = None  # for the privacy audit, as soon as it is learned from
        if self._learns and self._settings.update_every == "auto" and self._settings.update_when != "idle":
            with self.attempt():
                self.asks_memory = self._affordable_steps() > 0

    # Beside decoding nothing may fail a call, see failures.py.

    def attempt(self) -> Attempt:
        """A `with` block around whatever is learned."""
        return self._failures.learning.attempt(self._stop)

    def _stop(self) -> None:
        """Nothing more of this request is learned, and what was recorded for it goes."""
        self._counts.failed_updates += 1
        self._learns = self.asks_memory = False
        self.close()
        self.recorder, self._lesson = None, self._begin_lesson()

    def _begin_lesson(self) -> RequestFeedback:
        lesson = RequestFeedback(self._settings, self._model.common, self._temperature, self._draft.config)
        with self._draft.lock:
            self._draft.requests.add(lesson)
        return lesson

    def close(self) -> None:
        """The end of the recording."""
        if self.recorder is not None:
            self.recorder.close()

    @property
    def worked(self) -> bool:
        """Whether this request was learned from without a failure."""
        return self._learned and not self._counts.failed_updates

    # A round

    def record(self, input_ids: Tensor) -> None:
        """Keeps the target's laws for the new tokens, up to the last position that the draft can see."""
        model = self._model
        if model.tokens is None:
            return
        before = model.tokens.shape[1]
        n = input_ids.shape[1] - before
        model.take(input_ids)
        self.rounds += 1
        if self.recorder is None:
            return
        rows = self.recorder.take(n)  # (batch, n, vocab)
        seen = max(0, min(n, self._draft.positions + 1 - before))
        if seen:
            self._recorded = True
            self._lesson.record(rows[:, :seen].to(self._draft.device), before + seen)

    def learn_of_round(self) -> None:
        """Learns what was recorded, if it is due."""
        settings = self._settings
        full = self._lesson.waiting >= settings.context_tokens  # full target laws are kept for so many tokens at most
        due = full
        if settings.update_every == "auto":
            due = (full or settings.update_when == "round") and self._worthwhile_steps() > 0
        elif settings.update_when == "round":
            due = full or self.rounds % int(settings.update_every) == 0
        if due:
            self.update()
        elif full:
            self._lesson.defer_to_replay()

    def update(self) -> None:
        """One gradient step on the tokens since the last update, on top of the cached prefix."""
        if not self._lesson.waiting or self._model.tokens is None:
            return
        started, before = time.perf_counter(), self._counts.updates
        try:
            self._step(self._model.tokens)
        finally:  # a step that fails takes its time, too
            self._charge(started, before)
        self._learned = True

    def _step(self, tokens: Tensor) -> None:
        model, lesson = self._model, self._lesson
        teachers = lesson.teachers()
        prompt, tokens = tokens[:, : model.prompt], tokens[:, : lesson.end]
        prefix = min(model.cached, tokens.shape[1] - 1 - len(teachers[0]))
        dropped = any(keys.shape[-2] != model.cached for keys, _ in cache_tensors(model.cache))
        if dropped or model.base:
            prefix = 0  # a sliding window has dropped the start, or the base draft read it: read everything anew
        new = slice(lesson.end - len(teachers[0]) - model.prompt, lesson.end - model.prompt)
        model.choose(prompt)
        if any(teacher.teaches for teacher in teachers):
            self._request = self._request or Request(model.prompt)
            self._draft.learn_segment(
                tokens,
                teachers,
                model.cache,
                prefix,
                model.mask,
                self._counts,
                temperature=self._temperature,
                recalled=self._expected(new),
                prompt_log_ratio=model.prompt_log_ratio or 0.0,
                request=self._request,
            )
            self._draft.fold()
        lesson.keep(teachers)

    def _expected(self, new: slice) -> Sequence[float] | None:
        """The estimated acceptance of the memory's answers at new tokens; None: it was not asked. No memory expects nothing."""
        recall, sequence = self._memory.recall, self._model.sequence
        if not self._memory.usable:
            return None
        if recall is None or sequence is None:
            return ()
        return recall.read(sequence)[new] if self.asks_memory else None

    # The end of the request

    def learn_of_request(self, unseen: bool) -> None:
        """Learns what is left of the request and rehearses others, as far as that is worth it.

        Args:
            unseen: whether it is long since the draft's acceptance was seen.
        """
        tokens, mask = self._model.tokens, self._model.mask
        if tokens is None or not (self._lesson.waiting or self._lesson.kept):
            return
        settings = self._settings
        steps = 1 + settings.replay_passes
        if settings.update_when == "idle":
            self._lesson.defer_to_replay()
            for feedback in self._lesson.feedback(tokens, mask):
                self._draft.learn_later(feedback, self._temperature)
            self._learned = True
            return
        if settings.update_every == "auto" and self.timed:
            steps = self._worthwhile_steps()
            if not steps:
                self._put_off = True
                self._governor.decisions.deferred_updates += 1
                if unseen:
                    self._look(tokens)
        if steps:
            self.update()
        elif self._keeps:
            self._lesson.defer_to_replay()
        started, before = time.perf_counter(), self._counts.updates
        try:
            for feedback in self._lesson.feedback(tokens, mask):
                self._draft.remember(feedback, self._request)
            self._draft.replay_step(self._counts, steps - 1)
            self._draft.fold()
        finally:
            self._charge(started, before)

    def outcome(self) -> str:
        """Whether this request was learned from, and why not, in words."""
        counts, draft = self._counts, self._draft
        if not self._asked:
            return "the last request was only drafted for: onlinespec=False"
        if counts.updates:
            return f"the last request was learned from, in {counted(counts.updates, 'gradient step')}"
        if counts.skipped_updates:
            return "the last request was not learned from: its gradients were not finite"
        if not self._recorded:
            return f"the last request was not learned from: it lies beyond the {draft.positions} tokens that the draft can read"
        if self._settings.update_when == "idle":
            return draft.idle_outcome
        if not self._put_off:
            return (
                "the last request was not learned from: the target has said nothing about tokens that the draft knows"
            )
        if not self._affordable_steps():
            return f"the last request was not learned from: {self._governor.budget.account()}"
        return (
            "the last request was not learned from: when it began, there was no time to ask the memory at every token"
        )

    @property
    def _keeps(self) -> bool:
        """Whether what is not learned from is worth remembering for the replay."""
        return self._lesson.kept or self._governor.decisions.budget_fraction == 1.0  # of a request, all or nothing

    def _look(self, tokens: Tensor) -> None:
        """Shows the governor how the draft would have done on a request in which it neither drafts nor learns."""
        if not self._lesson.waiting:
            return
        started, model = time.perf_counter(), self._model
        teachers = self._lesson.teachers()
        model.choose(tokens[:, : model.prompt])
        self._draft.score_offline(
            tokens[:, : self._lesson.end], teachers, model.mask, self._temperature, model.prompt_log_ratio
        )
        if self._keeps:
            self._lesson.keep(teachers)
        seconds = time.perf_counter() - started
        self._counts.update_time_s += seconds
        with self._draft.lock:
            self._governor.budget.scored(seconds)

    # What it may cost

    def _worthwhile_steps(self) -> int:
        """Steps that are affordable, if it is known what the memory would have said: else none could tell what they bring."""
        return self._affordable_steps() if self.asks_memory or self._memory.recall is None else 0

    def _affordable_steps(self) -> int:
        with self._draft.lock:
            return self._governor.budget.affordable_steps()

    def _charge(self, started: float, updates_before: int) -> None:
        seconds = (finished(self._draft.device) if self.waits else time.perf_counter()) - started
        self._counts.update_time_s += seconds
        if self.timed:
            with self._draft.lock:
                self._governor.budget.spent(seconds, self._counts.updates - updates_before)
