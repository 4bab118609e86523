"""Whether anybody is asked in a round of a batch: by what rounds take, and bring, in which somebody was and in which nobody was.

Asking costs more there than in a round of one row: every row is asked one by one, while the target reads all of them at once.

A call ends with its slowest row, while rows that end earlier make the rounds behind them cheaper. Where a plain round of n rows takes
a + b · n, rows with r_i tokens to go take a · max r + b · Σ r. A round that brings the row that is behind s tokens, and m tokens to
each in the mean, saves a · s + b · n · m of that: its progress is (1 − β) s + β m plain rounds, with β = b · n / (a + b · n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaceConstants:
    """Of when rounds of a batch are bare."""

    first_bare: int = 2  # rounds at first that nobody is asked in; chosen
    trial: int = 6  # rounds of a trial of asking: the first one reads what was written meanwhile; chosen
    bare_every: int = 48  # rounds of asking until a bare one is timed again; chosen
    # Bare rounds until asking is tried again, the memory fills meanwhile: so many that a trial that does not pay loses this share of
    # them, at least and at most. Chosen: trials that follow each other by a clock of their own took 6 of 70 rounds whatever they lost.
    lost_in_trials: float = 0.01
    most_lost: float = 3.0  # plain rounds, at which a trial ends early; chosen
    least_pause: int = 64
    most_pause: int = 2048
    old: float = 0.3  # of what was known of asking before a trial, that goes on counting; chosen
    rounds: float = 24.0  # of late that tell; chosen
    margin: float = 0.95  # of the time of a bare round, that the same progress may take where somebody is asked; chosen
    stall: float = 4.0  # a round counts as so many times the usual time of its kind at most; chosen
    # Share of the decoding time that learning may take where asking does not pay, from so many rows on: what is learned there may serve
    # calls of fewer rows. With 16 rows a gradient step takes 4 to 6 % of a batch (LOG 2026-11-27 "Many at once: no loss"). Chosen.
    unpaid_learning: float = 0.005
    many_rows: int = 8


def progress(slowest: float, mean: float, share: float) -> float:
    """What a round brought, in plain rounds.

    Args:
        slowest: tokens of the row that is behind.
        mean: tokens of a row.
        share: β, of a plain round's time that grows with its rows.
    """
    return (1 - share) * slowest + share * mean


def share_of_rows(times: Mapping[int, float], rows: int, plain_s: float) -> float:
    """β of batches of so many rows, whose plain rounds take `plain_s`; 0, the least, where no smaller one was timed.

    Args:
        times: by size, what the progress of a plain round takes in the faster way: those that are left when others have ended may be
            asked again.
    """
    least = min(times, default=rows)
    if not plain_s or least >= rows:
        return 0.0
    per_row = (plain_s - times[least]) / (rows - least)
    return min(1.0, max(0.0, rows * per_row / plain_s))


class _Kind:
    """Time of the progress of a plain round, of one kind of rounds."""

    def __init__(self, constants: PaceConstants) -> None:
        self._constants = constants
        self._seconds, self._progress, self.rounds = 0.0, 0.0, 0

    @property
    def plain_round_s(self) -> float:
        return self._seconds / self._progress if self._progress else 0.0

    def fade(self, share: float) -> None:
        """What was seen so far counts as a share of it."""
        self._seconds, self._progress = share * self._seconds, share * self._progress

    def add(self, seconds: float, progress: float) -> None:
        if self._progress:
            seconds = min(seconds, self._constants.stall * self.plain_round_s * progress)
        keep = 1 - 1 / self._constants.rounds
        self._seconds, self._progress = keep * self._seconds + seconds, keep * self._progress + progress
        self.rounds += 1


class BatchPace:
    """Decides for batches of one size, of so many rows at most, round by round."""

    def __init__(self, constants: PaceConstants = PaceConstants(), rows: int = 2) -> None:
        self._constants, self._rows = constants, rows
        self._asking, self._bare = _Kind(constants), _Kind(constants)
        self._trial = constants.trial  # rounds of it that are left
        self._since_bare = 0
        self._unread = True  # whether the next round of asking reads what was written in bare ones
        self._waited = 0  # bare rounds since the last trial
        self._lost = 0.0  # in it, in plain rounds

    @property
    def pays(self) -> bool:
        """Whether asking is the faster of the two; also while that is not known."""
        known = self._asking.rounds and self._bare.rounds
        return not known or self._asking.plain_round_s <= self._constants.margin * self._bare.plain_round_s

    @property
    def learning_limit(self) -> float:
        """Largest share of the decoding time that learning may take, whatever its own budget is."""
        few = self._rows < self._constants.many_rows
        return 1.0 if few or self.pays else self._constants.unpaid_learning

    def fastest_s(self, plain_s: float) -> float:
        """What the progress of a plain round takes, asking or not; `plain_s`: what a plain round takes."""
        return self._asking.plain_round_s if self._asking.rounds and self.pays else plain_s

    def asks(self) -> bool:
        """Counts a round; whether anybody is asked in it."""
        constants = self._constants
        if self._bare.rounds < constants.first_bare:
            return False
        if self._trial:
            self._trial -= 1
            return True
        if self.pays:
            self._waited, self._lost = 0, 0.0
            self._since_bare += 1
            if self._since_bare < constants.bare_every:
                return True
            self._since_bare = 0
            return False
        self._waited += 1
        if self._waited < max(constants.least_pause, min(constants.most_pause, self._lost / constants.lost_in_trials)):
            return False
        self._waited, self._lost = 0, 0.0
        self._trial, self._unread = constants.trial - 1, True
        self._asking.fade(constants.old)
        return True

    def observe(self, asked: bool, seconds: float, progress: float) -> None:
        """Takes in a round and its progress, in plain rounds."""
        plain_s = self._bare.plain_round_s
        if asked and plain_s and 0 < seconds < math.inf:
            self._lost += seconds / plain_s - progress
            if self._asking.rounds and self._lost > self._constants.most_lost:
                self._trial = 0
        if asked and self._unread:  # the memory has read what was written in bare rounds
            self._unread = False
        elif 0 < seconds < math.inf and progress:
            (self._asking if asked else self._bare).add(seconds, progress)

    @property
    def reason(self) -> str:
        """What is known, in words."""
        asking, bare = 1e3 * self._asking.plain_round_s, 1e3 * self._bare.plain_round_s
        return f"one more token in every row takes {asking:.2f} ms with drafting, and {bare:.2f} ms without"
