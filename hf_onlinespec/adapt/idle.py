"""Learning when idle: finished requests are learned while nothing is generated, one gradient step at a time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..metrics import Counts
from ..metrics.summary import counted
from ..runtime.traces import Traces
from .background import IdleWorker
from .feedback import Feedback
from .segment import Segment
from .service import LearningService


@dataclass(frozen=True, eq=False)
class _Handed:
    """A finished request that was handed over."""

    learning: LearningService  # of its adapter
    feedback: Feedback
    temperature: float  # that it was generated at


class IdleLearning:
    """What learns for one draft while nothing is generated, from a worker thread that starts with the first request.

    Args:
        learning: takes the steps.
        traces: told of every step.
        beside: of another adapter of the same draft, whose thread takes the steps; None: a thread of its own.
    """

    def __init__(self, learning: LearningService, traces: Traces, beside: IdleLearning | None = None) -> None:
        self._learning, self._metrics, self._traces = learning, learning.metrics, traces
        self._waiting = weakref.WeakSet[_Handed]()  # of this adapter, and not learned to the end
        if beside is not None:
            self._worker: IdleWorker[_Handed] = beside._worker
            return
        self._worker = IdleWorker(self._learn, learning.metrics, lambda item: item.feedback.nbytes)
        weakref.finalize(self, self._worker.close)  # at the end of the process too

    @property
    def nbytes(self) -> int:
        """Bytes of the requests that wait."""
        return self._worker.nbytes

    def call(self) -> AbstractContextManager[None]:
        """The time of one call of `generate`, in which no new step begins."""
        return self._worker.call()

    def add(self, feedback: Feedback, temperature: float) -> None:
        """Hands over a finished request, which was generated at a temperature."""
        handed = _Handed(self._learning, feedback, temperature)
        self._waiting.add(handed)
        self._worker.add(handed)

    @property
    def busy(self) -> bool:
        """Whether requests of this adapter wait, or one is learned now."""
        return bool(self._waiting)

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `OnlineDraft.catch_up`."""
        return self._worker.wait(timeout_s)

    @property
    def outcome(self) -> str:
        """What becomes of the requests that were handed over, in words."""
        waiting = f"learned when nothing is generated: {counted(self._worker.waiting, 'request')} waiting"
        return self._worker.failure or f"{waiting}, {counted(self._metrics.idle_updates, 'gradient step')} taken so far"

    def _learn(self, item: _Handed) -> Iterator[None]:
        """The gradient steps of one request, one at a time: a call may come in after any of them."""
        learning, feedback, temperature = item.learning, item.feedback, item.temperature
        metrics = learning.metrics
        segment = Segment.of(feedback, temperature)
        if learning.settings.update_every == "auto":
            started = time.perf_counter()
            learning.score_offline(segment)
            metrics.idle_time_s += time.perf_counter() - started
            yield
        for i in range(1 + learning.settings.replay_passes):
            started, counts = time.perf_counter(), Counts()
            with learning.steps_lock:
                if i == 0:
                    learning.learner.segment(segment, None, counts)
                    learning.note()
                    learning.remember(feedback)
                else:
                    learning.learner.replay_step(counts)
                learning.fold()
            with learning.lock:
                metrics.idle_updates += counts.updates
                metrics.learned_tokens += counts.learned_tokens
                metrics.skipped_updates += counts.skipped_updates
                metrics.loss_sum += counts.loss_sum
                metrics.idle_time_s += time.perf_counter() - started
            failed = self._traces.flush()
            with learning.lock:
                metrics.failed_reports += failed
            yield
