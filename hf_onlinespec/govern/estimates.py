"""Running estimates: means that forget, and whether the acceptance of requests has fallen."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass


class DecayedMean:
    """A mean that forgets, drawn towards a prior while it has seen little."""

    def __init__(self, decay: float) -> None:
        self._decay = decay  # of the weight of what was seen, per observation
        self._sum, self.weight = 0.0, 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        keep = self._decay**weight
        self._sum = keep * self._sum + weight * value
        self.weight = keep * self.weight + weight

    def fade(self, weight: float) -> None:
        """Forgets as much as so many observations would make it forget."""
        keep = self._decay**weight
        self._sum, self.weight = keep * self._sum, keep * self.weight

    def mean(self, prior: float, strength: float) -> float:
        """The mean, where the prior is worth `strength` observations."""
        return (self._sum + strength * prior) / (self.weight + strength)


@dataclass(frozen=True)
class ChangeConstants:
    """Of what requests' acceptances say about the next request, and about a change of the stream."""

    recent: int = 4  # requests that are held against the ones before; chosen
    least_drop: float = 0.2  # of acceptance: requests of one domain differ so much by chance; chosen
    # Standard errors of the recent requests' mean, by which they have to lie lower; chosen. Requests of several domains differ by more
    # than `least_drop`: test_requests_of_several_domains_are_no_fall.
    deviations: float = 4.0
    decay: float = 0.9  # of the requests before, per request; chosen
    few_requests: float = 3.0  # that do not tell yet how much they differ; chosen
    unknown_strength: float = 10.0  # positions of a request that all others are worth until then; chosen
    least_strength: float = 2.0  # the same, at least and at most, afterwards; chosen
    most_strength: float = 50.0


class ChangeDetector:
    """Request by request, a noisy acceptance: whether it has fallen, and how much requests are alike."""

    def __init__(self, constants: ChangeConstants = ChangeConstants()) -> None:
        self._constants = constants
        self._recent: deque[tuple[float, int]] = deque()
        self._begin()

    def _begin(self) -> None:
        decay = self._constants.decay
        self._before, self._square = DecayedMean(decay), DecayedMean(decay)
        self._means, self._squares, self._positions = DecayedMean(decay), DecayedMean(decay), DecayedMean(decay)
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
        constants = self._constants
        if self._means.weight < constants.few_requests:
            return constants.unknown_strength
        mean = self._means.mean(0.0, 0.0)
        spread = mean * (1 - mean)
        chance = spread / max(1.0, self._positions.mean(0.0, 0.0))
        differ = self._squares.mean(0.0, 0.0) - mean * mean - chance
        if differ <= 1e-4:  # as good as nothing
            return constants.most_strength
        return min(max(spread / differ - 1, constants.least_strength), constants.most_strength)

    def detect_drop(self, value: float, positions: int = 1) -> bool:
        """Takes in a request's acceptance, known from so many positions; whether the last few lie below what was before.

        By `deviations` of their mean, and by no less than `least_drop`. After a drop, what lies below it is all that is known.
        """
        recent, least = self._constants.recent, self._constants.least_drop
        self._note(value, positions)
        self._recent.append((value, positions))
        if len(self._recent) <= recent:
            return False
        old, _ = self._recent.popleft()
        self._before.add(old)
        self._square.add(old * old)
        mean = self._before.mean(0.0, 0.0)
        deviation = max(0.0, self._square.mean(0.0, 0.0) - mean * mean) ** 0.5
        drop = max(least, self._constants.deviations * deviation / recent**0.5)
        if self._before.weight < recent + 1 or statistics.mean(v for v, _ in self._recent) > mean - drop:
            return False
        self._recent = deque(seen for seen in self._recent if seen[0] < mean - least)
        self._begin()
        return True
