"""Learning while nothing is generated: a worker thread that stops for every call of `generate`, after the step at hand."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from ..metrics import DraftMetrics
from ..runtime.failures import Backoff
from ..runtime.forks import renew_in_child

Item = TypeVar("Item")
# Of the items that may wait. Chosen: with the default replay_top_k about 160 answers of 512 tokens.
PENDING_BYTES = 64 * 2**20


class IdleWorker(Generic[Item]):
    """Works on items, step by step, while no call is in progress.

    A step that raises never reaches a call: its item is dropped, and the others wait for a growing number of new ones, see
    failures.py. Beyond `most_bytes` the oldest items are dropped. Both are counted.

    Args:
        work: a bound method (kept weakly, so that its owner can go) that yields after every step.
        metrics: where `idle_failures` and `idle_dropped` are counted.
        size: bytes of an item.
    """

    def __init__(
        self,
        work: Callable[[Item], Iterator[None]],
        metrics: DraftMetrics | None = None,
        size: Callable[[Item], int] = lambda item: 0,
        most_bytes: int = PENDING_BYTES,
    ) -> None:
        self.metrics = DraftMetrics() if metrics is None else metrics
        self.nbytes = 0  # of the items that wait
        self._work = weakref.WeakMethod(work)
        self._size, self._most = size, most_bytes
        self._items: deque[tuple[Item, int]] = deque()
        self._backoff = Backoff("Learning when idle", "drafting goes on with what was learned")
        self._lost = 0  # items that were dropped since somebody waited
        self._calls = Counter[int]()  # in progress, by thread
        self._waiters = 0  # who waits wants everything tried now
        self._working = False
        self._closed = False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: the thread begins again with the next item, and the calls of other threads are not in progress."""
        own = threading.get_ident()
        self._change = threading.Condition()
        self._calls = Counter({thread: n for thread, n in self._calls.items() if thread == own})
        self._thread, self._working, self._waiters = None, False, 0

    def add(self, item: Item) -> None:
        """Hands over an item; the thread starts with the first one."""
        nbytes = self._size(item)
        with self._change:
            if self._closed:
                return
            self._backoff.begin()
            self._items.append((item, nbytes))
            self.nbytes += nbytes
            while self.nbytes > self._most:
                self._take()
                self._drop()
            self._start()
            self._change.notify_all()

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._items)

    @property
    def failure(self) -> str:
        """Why nothing is done at present; empty: nothing has failed, or it works again."""
        return self._backoff.reason if self._backoff.failing else ""

    def _take(self) -> Item:
        item, nbytes = self._items.popleft()
        self.nbytes -= nbytes
        return item

    def _drop(self) -> None:
        self._lost += 1
        self.metrics.idle_dropped += 1

    def _start(self) -> None:
        """Starts the thread where there is none and something to do."""
        if not self._items or self._closed or (self._thread is not None and self._thread.is_alive()):
            return
        self._working = False
        self._thread = threading.Thread(target=self._run, name="hf_onlinespec learning", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads: the next item tries again
            self._thread = None
            self._fail(error)

    @contextmanager
    def call(self) -> Iterator[None]:
        """The time of a call, in which no new step begins."""
        own = threading.get_ident()
        with self._change:
            self._calls[own] += 1
        try:
            yield
        finally:
            with self._change:
                self._calls[own] -= 1
                if not self._calls[own]:
                    del self._calls[own]
                self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is left to do, and whether all of it was done.

        False: the time was too short, or since the last time that this returned items were dropped.
        """
        with self._change:
            self._waiters += 1
            try:
                self._start()
                self._change.notify_all()
                done = self._change.wait_for(self._is_done, timeout_s)
            finally:
                self._waiters -= 1
            lost, self._lost = self._lost, 0
            return done and not lost and not self._items

    def _is_done(self) -> bool:
        return self._thread is None or (not self._items and not self._working)

    def close(self) -> None:
        """Ends the thread after the step at hand. What waits is forgotten."""
        with self._change:
            self._closed = True
            self._items.clear()
            self.nbytes = 0
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _rests(self) -> bool:
        """Whether no step may begin now."""
        return bool(self._calls) or (self._backoff.paused and not self._waiters)

    def _run(self) -> None:
        steps: Iterator[None] | None = None
        while True:
            with self._change:
                self._working = steps is not None
                self._change.notify_all()
                while not self._closed and (self._rests() or not (steps or self._items)):
                    self._change.wait()
                if self._closed:
                    self._working = False
                    self._change.notify_all()
                    return
                self._working = True
                item = None if steps else self._take()
            try:
                if item is not None:
                    work = self._work()
                    steps = None if work is None else work(item)
                    del work
                if steps is not None:
                    next(steps)
            except StopIteration:
                steps = item = None
                if self._backoff.worked():
                    self.metrics.decisions.learning = f"learning works again after: {self._backoff.reason}"
            except Exception as error:
                steps = item = None
                with self._change:
                    self._drop()
                    self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._backoff.failed(error)
        self.metrics.idle_failures += 1
        self.metrics.decisions.learning = self._backoff.reason
