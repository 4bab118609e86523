"""Whether anybody is asked in a round of a batch: by the time per token of rounds in which somebody was, and in which nobody was.

Asking costs more there than in a round of one row: every row is asked one by one, while the target reads all of them at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .backoff import Backoff


@dataclass(frozen=True)
class PaceConstants:
    """Of when rounds of a batch are bare."""

    first_bare: int = 2  # rounds at first that nobody is asked in; chosen
    trial: int = 6  # rounds of a trial of asking: the first one reads what was written meanwhile; chosen
    bare_every: int = 48  # rounds of asking until a bare one is timed again; chosen
    # Bare rounds until asking is tried again, at first and at most: the memory fills meanwhile. Chosen: a trial that does not pay takes
    # up to twice the time of its rounds, 6 of 22 at first and 6 of 262 later.
    first_pause: int = 16
    last_pause: int = 256
    old: float = 0.3  # of what was known of asking before a trial, that goes on counting; chosen
    rounds: float = 24.0  # of late that tell; chosen
    # Of the time of a bare round's token, that one of asking may take. Rows that are ahead end earlier, and the rounds of those that are
    # left take more for each token: batches of 8 of the embedded pair whose rounds were timed at 0.99 took 1.10 as a whole.
    margin: float = 0.9
    stall: float = 4.0  # a round counts as so many times the usual time of its kind at most; chosen


class _Kind:
    """Time per token of one kind of rounds."""

    def __init__(self, constants: PaceConstants) -> None:
        self._constants = constants
        self._seconds, self._tokens, self.rounds = 0.0, 0.0, 0

    @property
    def token_s(self) -> float:
        return self._seconds / self._tokens if self._tokens else 0.0

    def fade(self, share: float) -> None:
        """What was seen so far counts as a share of it."""
        self._seconds, self._tokens = share * self._seconds, share * self._tokens

    def add(self, seconds: float, tokens: int) -> None:
        if self._tokens:
            seconds = min(seconds, self._constants.stall * self.token_s * tokens)
        keep = 1 - 1 / self._constants.rounds
        self._seconds, self._tokens = keep * self._seconds + seconds, keep * self._tokens + tokens
        self.rounds += 1


class BatchPace:
    """Decides for batches of one size, round by round."""

    def __init__(self, constants: PaceConstants = PaceConstants()) -> None:
        self._constants = constants
        self._asking, self._bare = _Kind(constants), _Kind(constants)
        self._trial = constants.trial  # rounds of it that are left
        self._since_bare = 0
        self._unread = True  # whether the next round of asking reads what was written in bare ones
        self._pause = Backoff(constants.first_pause, constants.last_pause)

    @property
    def pays(self) -> bool:
        """Whether asking is the faster of the two; also while that is not known."""
        known = self._asking.rounds and self._bare.rounds
        return not known or self._asking.token_s <= self._constants.margin * self._bare.token_s

    def asks(self) -> bool:
        """Counts a round; whether anybody is asked in it."""
        constants = self._constants
        if self._bare.rounds < constants.first_bare:
            return False
        if self._trial:
            self._trial -= 1
            return True
        if self.pays:
            self._pause.reset()
            self._since_bare += 1
            if self._since_bare < constants.bare_every:
                return True
            self._since_bare = 0
            return False
        if not self._pause.due():
            return False
        self._trial, self._unread = constants.trial - 1, True
        self._asking.fade(constants.old)
        return True

    def observe(self, asked: bool, seconds: float, tokens: int) -> None:
        """Takes in a round that gave all its rows so many tokens."""
        if asked and self._unread:  # the memory has read what was written in bare rounds
            self._unread = False
        elif 0 < seconds < math.inf and tokens:
            (self._asking if asked else self._bare).add(seconds, tokens)

    @property
    def reason(self) -> str:
        """What is known, in words."""
        asking, bare = 1e3 * self._asking.token_s, 1e3 * self._bare.token_s
        return f"a token takes {asking:.2f} ms where anybody drafts, and {bare:.2f} ms where nobody does"
