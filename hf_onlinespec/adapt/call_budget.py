"""What learning may cost in one call of `generate`, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..metrics import Counts
from ..runtime.clock import finished
from .service import LearningService


class CallBudget:
    """The governor's budget, as one call draws on it.

    Args:
        counts: of the call.
        timed: whether the loop tells times; transformers' own does not.
        waits: whether anything is decided by them: only then is an accelerator waited for.
    """

    def __init__(self, learning: LearningService, counts: Counts, *, timed: bool, waits: bool) -> None:
        self.timed = timed
        self._governed = timed and learning.settings.update_every == "auto"
        self._learning, self._counts, self._waits = learning, counts, waits

    def affordable_steps(self) -> int:
        """Gradient steps that there is time for now."""
        with self._learning.lock:
            return self._learning.governor.budget.affordable_steps()

    @contextmanager
    def charged(self) -> Iterator[None]:
        """The time of some gradient steps; one that fails takes its time, too."""
        started, before = time.perf_counter(), self._counts.updates
        try:
            yield
        finally:
            seconds = (finished(self._learning.device) if self._waits else time.perf_counter()) - started
            self._counts.update_time_s += seconds
            if self.timed:
                with self._learning.lock:
                    self._learning.governor.budget.spent(seconds, self._counts.updates - before)

    @property
    def may_compare(self) -> bool:
        """Whether there is time to score a request under every adapter."""
        with self._learning.lock:
            return not self._governed or self._learning.governor.budget.comparing.affordable()

    @contextmanager
    def scored(self) -> Iterator[None]:
        """The time in which requests are scored without being learned."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._counts.update_time_s += seconds
        with self._learning.lock:
            self._learning.governor.budget.scoring.spent(seconds)

    @contextmanager
    def compared(self) -> Iterator[None]:
        """The time in which a request is scored under every adapter, a part of what is `charged` or `scored`."""
        started = time.perf_counter()
        yield
        with self._learning.lock:
            self._learning.governor.budget.comparing.spent(time.perf_counter() - started)
