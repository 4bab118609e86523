"""Running estimates: means that forget, medians of times, and whether something has fallen."""

from __future__ import annotations

import statistics
from collections import deque

DECAY = 0.985  # of acceptance counts, per observation
PRIOR = 4.0  # observations that a prior is worth
WINDOW = 48  # recent times whose median counts
SURE = 3  # times that make a measurement
RECENT = 4  # values that are held against the ones before
LEAST_FALL = 0.2  # requests of one domain differ so much by chance
ALIKE_LEAST, ALIKE_MOST = 2.0, 50.0  # positions of a request that all others may be worth


class DecayedMean:
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


class DraftCost:
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


class VerifyCost:
    """How long verifying k drafted tokens takes, in plain target steps: 1 + a·(1 − 2^(−k/2)) + b·k, through medians.

    The first few positions may cost more than further ones (other kernels, masks): a. Neither a nor b is below zero.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._bend, self._slope = 0.2, 0.05  # until something was seen

    def add(self, k: int, steps: float) -> None:
        """Verifying k ≥ 1 tokens took so many plain steps."""
        seen = self._seen.setdefault(k, deque(maxlen=WINDOW))
        seen.append(min(steps, 10 * self.at(k)))  # one stall is a stall, however long
        self._medians[k] = statistics.median(seen)
        if sum(map(len, self._seen.values())) >= SURE:
            self._fit()

    def at(self, k: int) -> float:
        return 1 + self._bend * (1 - 2 ** (-k / 2)) + self._slope * k

    def step(self, k: int) -> float:
        """Time that one more token adds to k of them."""
        return self.at(k + 1) - self.at(k)

    def _fit(self) -> None:
        often = [k for k, seen in self._seen.items() if len(seen) >= SURE]
        xx = xk = kk = xy = ky = 0.0
        for k in often or self._seen:  # a size that was hardly seen may have met a stall
            weight, x, y = len(self._seen[k]), 1 - 2 ** (-k / 2), self._medians[k] - 1
            xx, xk, kk = xx + weight * x * x, xk + weight * x * k, kk + weight * k * k
            xy, ky = xy + weight * x * y, ky + weight * k * y
        # One size alone cannot tell the two apart: a little of what is usual decides.
        xx, xy, kk, ky = xx + 0.01, xy + 0.01 * 0.2, kk + 0.01, ky + 0.01 * 0.05
        det = xx * kk - xk * xk
        bend, slope = (xy * kk - ky * xk) / det, (ky * xx - xy * xk) / det
        if bend < 0:
            bend, slope = 0.0, ky / kk
        elif slope < 0:
            bend, slope = xy / xx, 0.0
        self._bend, self._slope = max(0.0, bend), max(0.0, slope)


class ChangeDetector:
    """Request by request, a noisy acceptance: whether it has fallen, and how much requests are alike."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()
        self._begin()

    def _begin(self) -> None:
        self._before, self._square = DecayedMean(0.95), DecayedMean(0.95)
        self._means, self._squares, self._positions = DecayedMean(0.9), DecayedMean(0.9), DecayedMean(0.9)
        for value, positions in self._recent:
            self._note(value, positions)

    def _note(self, value: float, positions: int) -> None:
        self._means.add(value)
        self._squares.add(value * value)
        self._positions.add(positions)

    @property
    def known(self) -> bool:
        return self._means.weight > 0

    @property
    def prior_strength(self) -> float:
        """How many positions of a request all other requests are worth: few where they differ by more than chance.

        The strength of a beta prior with the mean and variance of the requests' acceptance (empirical Bayes).
        """
        if self._means.weight < 3:
            return 10.0
        mean = self._means.mean(0.0, 0.0)
        spread = mean * (1 - mean)
        chance = spread / max(1.0, self._positions.mean(0.0, 0.0))
        differ = self._squares.mean(0.0, 0.0) - mean * mean - chance
        return min(max(spread / differ - 1, ALIKE_LEAST), ALIKE_MOST) if differ > 1e-4 else ALIKE_MOST

    def detect_drop(self, value: float, positions: int = 1) -> bool:
        """Takes in a request's acceptance, known from so many positions; whether the last few lie below what was before.

        By four deviations of their mean, and by no less than `LEAST_FALL`. After a fall, what lies below it is all that is known.
        """
        self._note(value, positions)
        self._recent.append((value, positions))
        if len(self._recent) <= RECENT:
            return False
        old, _ = self._recent.popleft()
        self._before.add(old)
        self._square.add(old * old)
        mean = self._before.mean(0.0, 0.0)
        deviation = max(0.0, self._square.mean(0.0, 0.0) - mean * mean) ** 0.5
        fall = max(LEAST_FALL, 4 * deviation / RECENT**0.5)
        if self._before.weight < RECENT + 1 or statistics.mean(v for v, _ in self._recent) > mean - fall:
            return False
        self._recent = deque(seen for seen in self._recent if seen[0] < mean - LEAST_FALL)
        self._begin()
        return True
