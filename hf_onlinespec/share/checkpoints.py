"""Checkpoints of a draft on the Hub, from a thread that no call of `generate` waits for."""

from __future__ import annotations

import logging
import threading
import weakref

from ..runtime.forks import renew_in_child
from .hub import Push, Shared

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0  # between two attempts: doubled each time

_log = logging.getLogger(__name__)


class Checkpoints:
    """Pushes again after every so many requests, from a thread; a push that fails is tried again with the state of then.

    Requests that leave the draft as it was cause no push.

    Args:
        draft: kept weakly, so that it can go.
        push: where to.
        every: requests between two pushes. Those that come due during a push are one more.
    """

    def __init__(self, draft: Shared, push: Push, every: int) -> None:
        self.pushed, self.failures = 0, 0
        self.error = ""  # of the last attempt, if it failed
        self._draft, self._push, self._every = weakref.ref(draft), push, every
        self._requests = 0  # since the last snapshot
        self._version = draft.version  # that the last push had
        self._busy, self._closed = False, False
        self._change = threading.Condition()
        self._start()
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child, which has no thread yet."""
        self._change, self._busy = threading.Condition(), False

    def _start(self) -> None:
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="hf_onlinespec checkpoints", daemon=True)
        self._thread.start()

    def request_done(self) -> None:
        """Counts a finished request; never waits for a push."""
        with self._change:
            self._requests += 1
            if not self._thread.is_alive() and not self._closed:  # a forked process has lost it
                self._start()
            self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until what is due has been pushed; False: the time was too short."""
        with self._change:
            return self._change.wait_for(lambda: not self._busy and self._requests < self._every, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the thread, after the push that is under way; what was learned since is not pushed."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        wait_s = 0.0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._requests >= self._every)
                if wait_s:
                    self._change.wait_for(lambda: self._closed, wait_s)
                if self._closed:
                    return
                self._busy, due, self._requests = True, self._requests, 0
            draft = self._draft()
            if draft is None:
                return
            version, error = draft.version, ""
            try:
                if version != self._version:
                    self._push.send(draft)
            except Exception as failure:  # a thread that ends for whatever reason would end all checkpoints
                error = str(failure) or type(failure).__name__
                _log.warning("A checkpoint was not pushed and will be tried again: %s", error)
            del draft
            with self._change:
                self._busy, self.error = False, error
                if error:
                    self.failures += 1
                    self._requests += due
                    wait_s = min(LONGEST_WAIT_S, 2 * wait_s or FIRST_WAIT_S)
                else:
                    self.pushed += version != self._version
                    self._version, wait_s = version, 0.0
                self._change.notify_all()
