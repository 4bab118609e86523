"""The memory as one request sees it: its own tokens, and those of earlier requests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..govern.acceptance import Acceptances, Continuation, RequestStats
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
        source: tokens that may be copied: of the text that an encoder has read.
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
        source: Sequence[int] = (),
    ) -> None:
        self._memory, self._lock, self._padding = memory, lock, padding
        self._own = SuffixMemory(size + len(source) + 1)  # an end of sequence takes a place
        self._own.extend(source)
        self._own.close()
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

    def answers(self, context: Sequence[int]) -> list[Continuation]:
        """What followed the longest match of `context` in this request, and in earlier ones."""
        here = self._own.continuation(context)
        with self._lock:
            before = self._memory.continuation(context)
        found = [] if here is None else [here]
        return found if before is None else [*found, replace(before, earlier=True)]

    def lookup(self, context: Sequence[int]) -> Continuation | None:
        """What followed the longest match of `context` in this request, or in earlier ones where that is likelier to be right.

        A long match in an earlier one goes before a short one in this: that request is asked once more, or a part of it.
        """
        answers = self.answers(context)
        if len(answers) < 2:
            return answers[0] if answers else None
        here, before = answers
        if self._acceptances.is_long(before) and not self._acceptances.is_long(here):
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
