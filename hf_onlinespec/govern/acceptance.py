"""How likely a drafted token is to be kept: running estimates by source, position, confidence and request."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .estimates import ChangeConstants, ChangeDetector, DecayedMean


@dataclass(frozen=True)
class AcceptanceConstants:
    """Of the estimates of acceptance."""

    change: ChangeConstants = field(default_factory=ChangeConstants)
    max_lookahead: int = 12  # tokens of the draft model in one round, at most; chosen
    decay: float = 0.985  # of what was observed, per observation; chosen
    prior_strength: float = 4.0  # observations that a prior is worth; chosen
    position_strength: float = 10.0  # the same, of the mean rate as the prior of one position's; chosen
    unknown_rate: float = 0.5  # of a draft of which nothing was seen; chosen
    confidence_weight: float = 0.5  # of a distribution's own confidence in the prior, beside the mean rate; chosen
    confidence_edges: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)  # chosen
    # The memory's answers are told apart by the length of the match, the share of the most probable token and how many
    # occurrences voted. Edges: chosen.
    length_edges: tuple[int, ...] = (2, 3, 6, 9)
    share_edges: tuple[float, ...] = (0.4, 0.6, 0.9)
    support_edges: tuple[int, ...] = (2, 3, 5)
    # What an answer is worth before it has shown it, by share, and by support of unanimous ones. Measured: LOG 2026-11-22 "The
    # suffix memory: how it was chosen".
    share_priors: tuple[float, ...] = (0.12, 0.25, 0.4)
    unanimous_priors: tuple[float, ...] = (0.62, 0.8, 0.87, 0.95)
    no_context_factor: float = 0.6  # of these, where the match is shorter than two tokens; chosen
    first_factor: float = 0.85  # of these, for the first token of a round, behind one of the target's own; chosen
    # What a match in an earlier request is worth of one in this request, by its length. Measured: LOG 2026-11-26 "Where the memory
    # drafts, the last siblings, and packages": on 260 answers of SmolLM2 (runs of 1: right .14 against .29, of 2: .24 against
    # .57) and on 144 of the embedded pair, where the two are alike; these lie between.
    earlier_priors: tuple[float, ...] = (0.5, 0.6, 0.9, 1.0, 1.0)
    # Expected acceptances that all other requests are worth as evidence about the memory in this one. Chosen.
    calibration_prior: float = 4.0
    most: float = 0.99  # that an estimate may be; chosen
    # Of scores at positions where nothing was drafted: so many neighbouring tokens count, and each of them as a part of a round.
    offline_tokens: int = 64  # chosen
    offline_weight: float = 0.5  # chosen


def _bin(value: float, edges: Sequence[float]) -> int:
    return sum(value >= edge for edge in edges)


@dataclass(frozen=True)
class Continuation:
    """What followed the longest match of a context, as a distribution over the next token."""

    tokens: tuple[int, ...]  # distinct next tokens, most probable first (ties: newest first)
    probs: tuple[float, ...]  # their shares; sum to 1
    length: int  # how many tokens of context matched
    support: int  # how many occurrences voted
    earlier: bool = False  # whether they stand in earlier requests, and not in this one

    def below(self, vocabulary: int) -> Continuation | None:
        """The distribution on the token ids below `vocabulary`; None: it has none of them."""
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

    source: str  # "model", "memory" or "recycled"
    position: int  # candidates before it in the round
    key: tuple[int, ...] = ()  # confidence bin of a token that the model has drafted; (): it is a guess

    @property
    def is_drafted(self) -> bool:
        """Whether the draft model has drafted it, and not named it as one of its next best."""
        return self.source == "model" and bool(self.key)


@dataclass
class RequestStats:
    """What one request has shown of the draft and of the memory so far."""

    acceptance: float = 0.0  # of the draft model, summed over its verified positions
    positions: int = 0
    right: float = 0.0  # acceptance of the memory's answers, summed
    expected: float = 0.0  # and what was expected of them
    serves_base: bool = False  # the base draft serves it, whatever was learned


@dataclass(frozen=True)
class RowRound:
    """What one row has shown in a round."""

    drafted: Sequence[TokenSource]  # its candidates
    outcomes: Sequence[tuple[TokenSource, float]]  # of each verified one, the chance that it was kept
    seen: RequestStats  # of the row, noted in it
    expansions: int = 0  # forwards of the draft model behind several candidates at once
    read_together: bool = False  # whether the draft model read it in the forwards of other rows

    @property
    def steps(self) -> int:
        """Forwards of the draft model."""
        return sum(token.is_drafted for token in self.drafted) + self.expansions


class Acceptances:
    """Estimates for one draft model and one memory; what the learned draft and the base draft do is kept apart."""

    def __init__(self, constants: AcceptanceConstants = AcceptanceConstants()) -> None:
        self._constants = constants
        # By who serves, the learned draft (False) or the base draft (True): each has its own kind of requests.
        self._pooled = {base: self._new() for base in (False, True)}
        self._levels = {base: ChangeDetector(constants.change) for base in (False, True)}
        self._positions = {base: [self._new() for _ in range(constants.max_lookahead)] for base in (False, True)}
        self.base_served_last = False
        self._confidence: dict[int, DecayedMean] = {}
        self._memory: dict[tuple[int, ...], DecayedMean] = {}

    def _new(self) -> DecayedMean:
        return DecayedMean(self._constants.decay)

    @property
    def rate(self) -> float:
        """Acceptance rate of the draft model, as it served last."""
        return self.mean_rate(self.base_served_last)

    @property
    def known(self) -> bool:
        """Whether any request has shown an acceptance."""
        return any(level.known for level in self._levels.values())

    def mean_rate(self, base: bool) -> float:
        """Acceptance rate of one of the two; what is known of the other one is the best guess where nothing was seen."""
        strength = self._constants.prior_strength
        return self._pooled[base].mean(self._pooled[not base].mean(self._constants.unknown_rate, strength), strength)

    def request_rate(self, seen: RequestStats) -> tuple[float, float]:
        """Acceptance rate in a request, and its standard deviation."""
        strength = self._levels[seen.serves_base].prior_strength
        n = strength + seen.positions
        a = (strength * self.mean_rate(seen.serves_base) + seen.acceptance) / n
        return a, (max(0.0, a * (1 - a)) / (n + 1)) ** 0.5

    def rate_at(self, position: int, rate: float, base: bool = False) -> float:
        """Acceptance at a position of a round, where it is `rate` on average."""
        general = max(self.mean_rate(base), 0.01)  # never divides by nothing
        place = self._position(position, base).mean(general, self._constants.position_strength)
        return min(self._constants.most, rate * place / general)

    def _position(self, position: int, base: bool) -> DecayedMean:
        positions = self._positions[base]
        return positions[min(position, len(positions) - 1)]

    def rate_by_confidence(self, confidence: float, base: bool = False) -> tuple[tuple[int, ...], float]:
        """The key of a distribution whose most probable token has this probability, and its acceptance."""
        key = _bin(confidence, self._constants.confidence_edges)
        weight = self._constants.confidence_weight
        prior = weight * confidence + (1 - weight) * self.mean_rate(base)
        seen = self._confidence.get(key)
        return (key,), prior if seen is None else seen.mean(prior, self._constants.prior_strength)

    def memory(
        self, found: Continuation, first: bool = False, calibration: float = 1.0
    ) -> tuple[tuple[int, int, int, bool, bool], float]:
        """The key of the memory's answer, and its acceptance.

        Args:
            first: at the beginning of a round, behind a token of the target's own.
            calibration: of the request, see `memory_calibration`.
        """
        key = self.memory_key(found, first)
        return key, min(self._constants.most, calibration * self._memory_rate(key))

    def memory_calibration(self, seen: RequestStats) -> float:
        """How right the memory is in a request, over what was expected of it; 1 where it is right more often than that.

        A request that copies is right everywhere for a while. That says nothing about the weaker answers behind the copy: what they
        are worth, other requests tell better (measured: LOG 2026-11-26 "Where the memory drafts, the last siblings, and packages").
        """
        prior = self._constants.calibration_prior
        return min(1.0, (prior + seen.right) / (prior + seen.expected))

    def memory_key(self, found: Continuation, first: bool = False) -> tuple[int, int, int, bool, bool]:
        """Bins of match length, share of the most probable token, how many occurrences voted; `first` in a round, and where from."""
        return (
            _bin(found.length, self._constants.length_edges),
            _bin(found.probs[0], self._constants.share_edges),
            _bin(found.support, self._constants.support_edges),
            first,
            found.earlier,
        )

    def is_long(self, found: Continuation) -> bool:
        """Whether a match is as long as any that are told apart."""
        return found.length >= self._constants.length_edges[-1]

    def _memory_rate(self, key: tuple[int, ...]) -> float:
        constants = self._constants
        length, share, support, first, earlier = key
        unanimous = share == len(constants.share_edges)
        prior = constants.unanimous_priors[support] if unanimous else constants.share_priors[share]
        prior *= (constants.no_context_factor if length == 0 else 1.0) * (constants.first_factor if first else 1.0)
        prior *= constants.earlier_priors[length] if earlier else 1.0
        seen = self._memory.get(key)
        return prior if seen is None else seen.mean(prior, constants.prior_strength)

    def non_finite(self, seen: RequestStats) -> None:
        """The draft's distribution at a position was none: it could draft nothing there."""
        seen.positions += 1
        self._pooled[seen.serves_base].add(0.0)

    def observe_round(
        self, outcomes: Sequence[tuple[TokenSource, float]], seen: RequestStats, weight: float = 1.0
    ) -> None:
        """Takes in the chance that each verified candidate of the draft model's was kept, also into `seen`."""
        self.base_served_last = seen.serves_base
        for drafted, chance in outcomes:
            if drafted.is_drafted:
                seen.acceptance += chance
                seen.positions += 1
                self._pooled[seen.serves_base].add(chance, weight)
                self._position(drafted.position, seen.serves_base).add(chance, weight)
                self._confidence.setdefault(drafted.key[0], self._new()).add(chance)

    def observe_answer(self, key: tuple[int, ...], right: float, seen: RequestStats) -> None:
        """Takes in whether the memory's first answer was right at a verified place, also into `seen`."""
        seen.expected += self._memory_rate(key)
        seen.right += right
        self._memory.setdefault(key, self._new()).add(right)

    def observe_offline(self, acceptances: Sequence[float], base: bool) -> None:
        """Takes in what the draft would have done at positions where it did not draft."""
        self.base_served_last = base
        # Neighbouring tokens say less than as many rounds would.
        weight = min(len(acceptances), self._constants.offline_tokens) * self._constants.offline_weight
        self._pooled[base].add(statistics.mean(acceptances), weight)
        for share in (*self._positions[base], *self._confidence.values()):
            share.fade(weight)

    def observe_request(self, acceptance: float, positions: int, base: bool) -> bool:
        """Takes in the acceptance of a whole request, known from so many positions; whether it has fallen of late."""
        return self._levels[base].detect_drop(acceptance, positions)

    def request_ended(self) -> None:
        """An answer of the memory that was wrong in one domain gets a chance in the next."""
        for share in self._memory.values():
            share.fade(1)
