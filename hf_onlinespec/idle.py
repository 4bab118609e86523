"""Learning while nothing is generated: a worker thread that stops for every call of `generate`, after the step at hand."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
PENDING = 16  # items that may wait; the oldest are forgotten

_log = logging.getLogger(__name__)


class IdleWorker(Generic[Item]):
    """Works on items, step by step, while no call is in progress.

    A step that raises never reaches a call: it is counted and logged, and the worker takes no more work.

    Args:
        work: a bound method (kept weakly, so that its owner can go) that yields after every step.
    """

    def __init__(self, work: Callable[[Item], Iterator[None]]) -> None:
        self.failures = 0
        self._work = weakref.WeakMethod(work)
        self._items: deque[Item] = deque(maxlen=PENDING)
        self._calls = 0  # in progress
        self._working = False
        self._closed = False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, item: Item) -> None:
        """Hands over an item; the thread starts with the first one."""
        with self._change:
            if self._closed or self.failures:
                return
            self._items.append(item)
            if self._thread is None or not self._thread.is_alive():  # a forked process has lost it
                self._start()
            self._change.notify_all()

    def _start(self) -> None:
        self._working = False
        self._thread = threading.Thread(target=self._run, name="hf_onlinespec learning", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads: the call that hands over its feedback has done its work already
            self._thread = None
            self._fail()

    @contextmanager
    def call(self) -> Iterator[None]:
        """The time of a call, in which no new step begins."""
        with self._change:
            self._calls += 1
        try:
            yield
        finally:
            with self._change:
                self._calls -= 1
                self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is left to do; False: the time was too short."""
        with self._change:
            return self._change.wait_for(lambda: not self._items and not self._working, timeout_s)

    def close(self) -> None:
        """Ends the thread after the step at hand. What waits is forgotten."""
        with self._change:
            self._closed = True
            self._items.clear()
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        steps: Iterator[None] | None = None
        while True:
            with self._change:
                self._working = steps is not None
                self._change.notify_all()
                while not self._closed and (self._calls or not (steps or self._items)):
                    self._change.wait()
                if self._closed:
                    self._working = False
                    self._change.notify_all()
                    return
                self._working = True
                item = None if steps else self._items.popleft()
            try:
                if item is not None:
                    work = self._work()
                    steps = None if work is None else work(item)
                    del work
                if steps is not None:
                    next(steps)
            except StopIteration:
                steps = None
            except Exception:
                steps = None
                self._fail()

    def _fail(self) -> None:
        _log.exception("Learning in the background failed and stops here; drafting goes on with what was learned.")
        with self._change:
            self.failures += 1
            self._items.clear()
