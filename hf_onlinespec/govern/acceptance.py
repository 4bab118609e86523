"""How likely a drafted token is to be kept: running estimates by source, position, confidence and request."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .estimates import ChangeDetector, DecayedMean

MAX_LOOKAHEAD = 12  # draft tokens of the neural draft in one round, at most
CONFIDENCE_EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
LENGTH_EDGES = (2, 3, 6, 9)
SHARE_EDGES = (0.4, 0.6, 0.9)
SUPPORT_EDGES = (2, 3, 5)
# What a memory is worth before it has shown it, by share and by support of unanimous ones: measured, see benchmarks/LOG.md.
SHARE_PRIORS, UNANIMOUS_PRIORS = (0.12, 0.25, 0.4), (0.62, 0.8, 0.87, 0.95)
# What a match in an earlier request is worth of one in this request, by its length as in LENGTH_EDGES. Measured on 260 answers of
# SmolLM2 (runs of 1: right .14 against .29, of 2: .24 against .57) and on 144 of the embedded pair, where the two are alike: between.
EARLIER_PRIORS = (0.5, 0.6, 0.9, 1.0, 1.0)
CALIBRATION_PRIOR = (
    4.0  # expected acceptances that all other requests are worth as evidence about the memory in this one
)


def _bin(value: float, edges: Sequence[float]) -> int:
    return sum(value >= edge for edge in edges)


@dataclass(frozen=True)
class Continuation:
    """What followed the longest match of a context, as a law over the next token."""

    tokens: tuple[int, ...]  # distinct next tokens, most probable first (ties: newest first)
    probs: tuple[float, ...]  # their shares; sum to 1
    length: int  # how many tokens of context matched
    support: int  # how many occurrences voted
    earlier: bool = False  # whether they stand in earlier requests, and not in this one

    def below(self, vocabulary: int) -> Continuation | None:
        """The law on the token ids below `vocabulary`; None: it has none of them."""
        if max(self.tokens) < vocabulary:
            return self
        kept = [(token, share) for token, share in zip(self.tokens, self.probs, strict=True) if token < vocabulary]
        if not kept:
            return None
        tokens, shares = zip(*kept, strict=True)
        total = sum(shares)
        return replace(self, tokens=tokens, probs=tuple(share / total for share in shares))


@dataclass(frozen=True)
class TokenSource:
    """Where one drafted token came from, and what the acceptance estimates are kept by."""

    source: str  # "model" or "memory"
    position: int  # in the round, from 0
    key: tuple[int, ...]  # neural: confidence bin; memory: see `memory_key`


@dataclass
class RequestStats:
    """What one request has shown of the draft and of the memory so far."""

    acceptance: float = 0.0  # of the neural draft, summed over its verified positions
    positions: int = 0
    right: float = 0.0  # acceptance of the memory's answers, summed
    expected: float = 0.0  # and what was expected of them
    serves_base: bool = False  # the base draft serves it, whatever was learned

    @property
    def memory_calibration(self) -> float:
        """How right the memory is in this request, over what was expected of it; 1 where it is right more often than that.

        A request that copies is right everywhere for a while. That says nothing about the weaker answers behind the copy: what they
        are worth, other requests tell better (measured: LOG 2026-11-26, "Where the loss of `try` was").
        """
        return min(1.0, (CALIBRATION_PRIOR + self.right) / (CALIBRATION_PRIOR + self.expected))


class Acceptances:
    """Estimates for one neural draft and one memory; what the draft and the base draft do is kept apart."""

    def __init__(self) -> None:
        # By who serves, the learned draft (False) or the base draft (True): each has its own kind of requests.
        self._pooled = {base: DecayedMean() for base in (False, True)}
        self._levels = {base: ChangeDetector() for base in (False, True)}
        self.base_served_last = False  # who served last
        self._positions = {base: [DecayedMean() for _ in range(MAX_LOOKAHEAD)] for base in (False, True)}
        self._confidence: dict[int, DecayedMean] = {}
        self._memory: dict[tuple[int, ...], DecayedMean] = {}

    @property
    def rate(self) -> float:
        """Acceptance rate of the neural draft, as it served last."""
        return self.mean_rate(self.base_served_last)

    @property
    def known(self) -> bool:
        """Whether any request has shown an acceptance."""
        return any(level.known for level in self._levels.values())

    def mean_rate(self, base: bool) -> float:
        """Acceptance rate of one of the two; what is known of the other one is the best guess where nothing was seen."""
        return self._pooled[base].mean(self._pooled[not base].mean(0.5))

    def request_rate(self, seen: RequestStats) -> tuple[float, float]:
        """Acceptance rate in a request, and its standard deviation."""
        strength = self._levels[seen.serves_base].prior_strength
        n = strength + seen.positions
        a = (strength * self.mean_rate(seen.serves_base) + seen.acceptance) / n
        return a, (max(0.0, a * (1 - a)) / (n + 1)) ** 0.5

    def rate_at(self, position: int, rate: float, base: bool = False) -> float:
        """Acceptance at a position of a round, where it is `rate` on average."""
        general = max(self.mean_rate(base), 0.01)
        place = self._positions[base][min(position, MAX_LOOKAHEAD - 1)].mean(general, 10.0)
        return min(0.99, rate * place / general)

    def rate_by_confidence(self, confidence: float, base: bool = False) -> tuple[tuple[int, ...], float]:
        """The key of a law whose most probable token has this probability, and its acceptance."""
        key = _bin(confidence, CONFIDENCE_EDGES)
        share = self._confidence.get(key)
        prior = 0.5 * (confidence + self.mean_rate(base))
        return (key,), prior if share is None else share.mean(prior)

    def memory(
        self, found: Continuation, first: bool = False, calibration: float = 1.0
    ) -> tuple[tuple[int, int, int, bool, bool], float]:
        """The key of the memory's answer, and its acceptance.

        Args:
            first: at the beginning of a round, behind a token of the target's own.
            calibration: of the request, see `RequestStats`.
        """
        key = self.memory_key(found, first)
        return key, min(0.99, calibration * self._memory_rate(key))

    @staticmethod
    def memory_key(found: Continuation, first: bool = False) -> tuple[int, int, int, bool, bool]:
        """Bins of match length, share of the most probable token, how many occurrences voted; `first` in a round, and where from."""
        return (
            _bin(found.length, LENGTH_EDGES),
            _bin(found.probs[0], SHARE_EDGES),
            _bin(found.support, SUPPORT_EDGES),
            first,
            found.earlier,
        )

    def _memory_rate(self, key: tuple[int, ...]) -> float:
        length, share, support, first, earlier = key
        prior = UNANIMOUS_PRIORS[support] if share == len(SHARE_EDGES) else SHARE_PRIORS[share]
        prior *= (0.6 if length == 0 else 1.0) * (0.85 if first else 1.0)
        prior *= EARLIER_PRIORS[length] if earlier else 1.0
        seen = self._memory.get(key)
        return prior if seen is None else seen.mean(prior)

    def non_finite(self, seen: RequestStats) -> None:
        """The draft's law at a position was none: it could draft nothing there."""
        seen.positions += 1
        self._pooled[seen.serves_base].add(0.0)

    def observe_round(
        self, drafted: Sequence[TokenSource], overlaps: Sequence[float], seen: RequestStats, weight: float = 1.0
    ) -> None:
        """Takes in Σ min(p, q) at the verified positions of a round, also into `seen`."""
        self.base_served_last = seen.serves_base
        for d, overlap in zip(drafted, overlaps, strict=False):
            if d.source == "model":
                seen.acceptance += overlap
                seen.positions += 1
                self._pooled[seen.serves_base].add(overlap, weight)
                self._positions[seen.serves_base][min(d.position, MAX_LOOKAHEAD - 1)].add(overlap, weight)
                self._confidence.setdefault(d.key[0], DecayedMean()).add(overlap)
            else:
                seen.expected += self._memory_rate(d.key)
                seen.right += overlap
                self._memory.setdefault(d.key, DecayedMean()).add(overlap)

    def observe_offline(self, acceptances: Sequence[float], base: bool) -> None:
        """Takes in what the draft would have done at positions where it did not draft."""
        self.base_served_last = base
        weight = min(len(acceptances), 64) / 2  # neighbouring tokens say less than as many rounds would
        self._pooled[base].add(statistics.mean(acceptances), weight)
        for share in (*self._positions[base], *self._confidence.values()):
            share.fade(weight)

    def observe_request(self, acceptance: float, positions: int, base: bool) -> bool:
        """Takes in the neural acceptance of a whole request, known from so many positions; whether it has fallen of late."""
        return self._levels[base].detect_drop(acceptance, positions)

    def request_ended(self) -> None:
        """An answer of the memory that was wrong in one domain gets a chance in the next."""
        for share in self._memory.values():
            share.fade(1)
