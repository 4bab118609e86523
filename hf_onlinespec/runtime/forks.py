"""What a forked child finds: locks that are free, whoever held them, and threads that begin again.

`os.fork` copies a process with the calling thread alone. A lock that another thread held stays locked in the child for ever, and
what that thread was changing stays half changed. So a fork waits for the step at hand, though not for long, and all locks of
this package are renewed in the child.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from types import TracebackType
from typing import Protocol

PATIENCE_S = 2.0  # chosen: longer than a gradient step of a small draft; a fork for a reason of its own must not hang


class Renewed(Protocol):
    """What has something to do in a forked child."""

    def renew(self) -> None: ...


_numbers = itertools.count()
_renewed: weakref.WeakValueDictionary[int, Renewed] = weakref.WeakValueDictionary()
_taken = threading.local()  # .locks: what this thread took before it forks


def renew_in_child(owner: Renewed) -> None:
    """Calls `owner.renew()` in every forked child, as long as the owner lives."""
    _renewed[next(_numbers)] = owner


class Lock:
    """A reentrant lock that is free in a forked child.

    Args:
        order: locks of a higher order are taken while one of a lower order is held, never the other way round.
        waits: whether a fork waits for who holds it, so that the child finds a whole state.
    """

    def __init__(self, order: int = 0, waits: bool = True) -> None:
        self.order, self.waits = order, waits
        self._lock = threading.RLock()
        renew_in_child(self)

    def acquire(self, timeout_s: float = -1.0) -> bool:
        return self._lock.acquire(timeout=timeout_s)

    def release(self) -> None:
        self._lock.release()

    def renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Lock:
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def _living() -> list[Renewed]:
    return [owner for owner in (ref() for ref in _renewed.valuerefs()) if owner is not None]


def _before() -> None:
    deadline = time.monotonic() + PATIENCE_S
    locks = sorted((owner for owner in _living() if isinstance(owner, Lock)), key=lambda lock: lock.order)
    _taken.locks = []
    for lock in locks:
        if lock.acquire(max(0.0, deadline - time.monotonic()) if lock.waits else 0.0):
            _taken.locks.append(lock)


def _in_parent() -> None:
    for lock in reversed(_taken.locks):
        lock.release()


def _in_child() -> None:
    held = {id(lock) for lock in _taken.locks}
    _in_parent()
    for owner in _living():
        if id(owner) not in held:
            owner.renew()


if "register_at_fork" in vars(os):  # there is no fork on Windows
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
