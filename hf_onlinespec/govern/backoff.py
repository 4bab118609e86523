"""Backoff: what is not done is tried now and then, ever more rarely while nothing has changed."""

from __future__ import annotations


class Backoff:
    """Waits `first` rounds before a try, then twice as many each time, up to `last`."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self.reset()

    def reset(self) -> None:
        """Begins to wait anew."""
        self._waited, self._interval = 0, self._first

    def shorten(self) -> None:
        """Goes back to the first interval; the rounds that were waited count."""
        self._interval = self._first

    def due(self) -> bool:
        """Counts a round, and says whether it is time for a try; then the next wait begins."""
        self._waited += 1
        if self._waited < self._interval:
            return False
        self._waited, self._interval = 0, min(2 * self._interval, self._last)
        return True
