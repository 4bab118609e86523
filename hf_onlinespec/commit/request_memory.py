"""The memory as one request sees it: its own tokens, and those of earlier requests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..govern.acceptance import Acceptances, Continuation, RequestStats
from ..metrics import Counts
from ..rounds import Rows
from ..runtime.failures import Attempt, Backoff
from .suffix_memory import REACH, SuffixMemory


class RequestMemory:
    """Answers from the request itself and from earlier ones; a request of one row.

    Args:
        memory: of earlier requests; the draft's, and shared with other threads.
        lock: held while it is asked.
        size: tokens that the request can have at most.
        padding: tokens on the left that are none.
        stats: what the request has shown of the memory.
        acceptances: how likely its answers are.
        asks: whether it is asked about every generated token before it reads it, for learning to be held against.
    """

    def __init__(
        self,
        memory: SuffixMemory,
        lock: AbstractContextManager[Any],
        size: int,
        padding: int,
        stats: RequestStats,
        acceptances: Acceptances,
        asks: bool = False,
    ) -> None:
        self._memory, self._lock, self._padding = memory, lock, padding
        self._own = SuffixMemory(size)
        self._stats, self._acceptances, self._asks = stats, acceptances, asks
        self._written: list[int] = []  # the request, without padding
        # Per generated token the estimated acceptance of the memory's answer; 0: it had none.
        self._expected: list[float] = []

    @property
    def context(self) -> list[int]:
        """The last tokens, as many as a question needs."""
        return self._written[-REACH:]

    def read(self, tokens: Tensor) -> list[float]:
        """Takes in what is new in `tokens` (1, L); the estimated acceptance at every generated token so far."""
        new = tokens[0, self._padding + len(self._written) :].tolist()
        if not self._written or not self._asks:
            self._own.extend(new)
            self._written += new
            return self._expected
        for token in new:
            found = self.lookup(self.context)
            calibration = self._acceptances.memory_calibration(self._stats)
            expected = 0.0 if found is None else self._acceptances.memory(found, calibration=calibration)[1]
            self._expected.append(expected)
            self._own.extend((token,))
            self._written.append(token)
        return self._expected

    def lookup(self, context: Sequence[int]) -> Continuation | None:
        """What followed the longest match of `context` in this request, or in earlier ones where that is likelier to be right.

        A long match in an earlier one goes before a short one in this: that request is asked once more, or a part of it.
        """
        here = self._own.continuation(context)
        with self._lock:
            before = self._memory.continuation(context)
        if before is None:
            return here
        before = replace(before, earlier=True)
        if here is None or (self._acceptances.is_long(before) and not self._acceptances.is_long(here)):
            return before
        chances = [self._acceptances.memory(found)[1] for found in (here, before)]
        return before if chances[1] > chances[0] else here

    def commit(self, tokens: Tensor) -> int:
        """Gives the whole request to the memory, once what it would have said is known; its bytes."""
        self.read(tokens)
        with self._lock:
            try:
                self._memory.extend(self._written)
            finally:  # whatever interrupts it, the next request is another sequence
                self._memory.close()
            return self._memory.nbytes


class CallMemory:
    """The suffix memory in one call of `generate`, as each of its rows sees it.

    Args:
        memory: of earlier requests; None: there is none.
        backoff: of what fails in it: whether it is left out of this call.
        counts: of the call.
        lock: held while it is asked.
        acceptances: how likely its answers are.
        size: tokens that a row can have at most.
        padding: per row, tokens on the left that are none.
    """

    def __init__(
        self,
        memory: SuffixMemory | None,
        backoff: Backoff,
        counts: Counts,
        lock: AbstractContextManager[Any],
        acceptances: Acceptances,
        size: int,
        padding: Sequence[int],
    ) -> None:
        self.asks = False  # whether it is asked about every generated token, for learning to be held against
        self._usable, self._memory = backoff.begin(), memory
        self._backoff, self._counts = backoff, counts
        self._lock, self._acceptances, self._size, self._padding = lock, acceptances, size, padding
        self._rows: dict[int, RequestMemory] = {}

    @property
    def in_use(self) -> bool:
        """Whether it takes part in this call."""
        return bool(self._rows)

    def row(self, i: int, tokens: Tensor, stats: RequestStats) -> RequestMemory | None:
        """The memory once it has read a row (1, L); None: there is none, or it has failed."""
        memory = self._memory
        if memory is None or not self._usable:
            return None
        with self.attempt():
            if i not in self._rows:
                self._rows[i] = RequestMemory(
                    memory, self._lock, self._size, self._padding[i], stats, self._acceptances, self.asks
                )
            self._rows[i].read(tokens)
            return self._rows[i]
        return None

    def expected(self, i: int, tokens: Tensor, new: slice) -> Sequence[float] | None:
        """The estimated acceptance of its answers at new tokens of a row; None: it was not asked. No memory expects nothing."""
        if not self._usable:
            return None
        if i not in self._rows:
            return ()
        return self._rows[i].read(tokens)[new] if self.asks else None

    def attempt(self) -> Attempt:
        """A `with` block around whatever is asked of it."""
        return self._backoff.attempt(self._stop)

    def _stop(self) -> None:
        """The call goes on without it."""
        self._counts.failed_drafts += 1
        self._usable, self._rows = False, {}

    def commit(self, rows: Rows) -> int:
        """Gives every row to the memory; its bytes."""
        return max(row.commit(rows.row(i)) for i, row in self._rows.items())
