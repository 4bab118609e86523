"""Running estimates: means that forget, medians of times, and whether something has fallen."""

from __future__ import annotations

import statistics
from collections import deque

DECAY = 0.985  # of acceptance counts, per observation
PRIOR = 4.0  # observations that a prior is worth
WINDOW = 48  # recent times whose median counts
SURE = 3  # times that make a measurement
RECENT = 4  # values that are held against the ones before


class Share:
    """A mean that forgets, drawn towards a prior while it has seen little."""

    def __init__(self, decay: float = DECAY) -> None:
        self._decay = decay
        self._sum, self.weight = 0.0, 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        keep = self._decay**weight
        self._sum = keep * self._sum + weight * value
        self.weight = keep * self.weight + weight

    def fade(self, weight: float) -> None:
        """Forgets as much as so many observations would make it forget."""
        keep = self._decay**weight
        self._sum, self.weight = keep * self._sum, keep * self.weight

    def mean(self, prior: float, strength: float = PRIOR) -> float:
        return (self._sum + strength * prior) / (self.weight + strength)


class Times:
    """How long n positions take, in plain target steps: medians, and a line through them for unseen n."""

    def __init__(self, slope: float) -> None:
        self._slope = slope  # relative to one position, until two sizes were seen
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._start, self._step = 0.0, 0.0  # the line

    def add(self, n: int, steps: float) -> None:
        seen = self._seen.setdefault(n, deque(maxlen=WINDOW))
        # One stall is a stall, however long.
        seen.append(min(steps, 10 * self.at(n)) if self.known else steps)
        self._medians[n] = statistics.median(seen)
        self._start, self._step = self._line()

    @property
    def known(self) -> bool:
        return sum(map(len, self._seen.values())) >= SURE

    def at(self, n: int) -> float:
        """Time of n ≥ 1 positions; 0 while nothing was seen."""
        return self._start + self._step * n

    def step(self) -> float:
        """Time that one more position adds; 0 while nothing was seen."""
        return self._step

    def _line(self) -> tuple[float, float]:
        """Least squares through the medians, never falling, never below zero."""
        often = {n: s for n, s in self._medians.items() if len(self._seen[n]) >= SURE}
        points = often or self._medians  # a size that was hardly seen may have met a stall
        weights = {n: len(self._seen[n]) for n in points}
        total = sum(weights.values())
        mean_n = sum(weights[n] * n for n in points) / total
        mean_s = sum(weights[n] * s for n, s in points.items()) / total
        spread = sum(weights[n] * (n - mean_n) ** 2 for n in points)
        if spread == 0:
            slope = self._slope * mean_s / (1 + self._slope * (mean_n - 1))
        else:
            slope = max(0.0, sum(weights[n] * (n - mean_n) * (s - mean_s) for n, s in points.items()) / spread)
            slope = min(slope, mean_s / mean_n)  # nothing takes less than no time
        return mean_s - slope * mean_n, slope


class Level:
    """Tells when a noisy value has fallen: its last few lie below what it was before by three deviations of their mean."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._before, self._square = Share(0.95), Share(0.95)

    def fell(self, value: float) -> bool:
        """Takes in a value. After a fall, the recent values are all that is known."""
        self._recent.append(value)
        if len(self._recent) <= RECENT:
            return False
        old = self._recent.popleft()
        self._before.add(old)
        self._square.add(old * old)
        mean = self._before.mean(0.0, 0.0)
        deviation = max(0.0, self._square.mean(0.0, 0.0) - mean * mean) ** 0.5
        if self._before.weight < RECENT or statistics.mean(self._recent) > mean - max(
            0.05, 3 * deviation / RECENT**0.5
        ):
            return False
        self._before, self._square = Share(0.95), Share(0.95)
        return True
