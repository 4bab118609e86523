"""How likely each of several guesses at one place is to be the target's next token, learned online from what was verified.

Two sources guess for nothing: the suffix memory, and the table of recycled tokens. What one says is worth more where the other says
it too, and less where the other is sure of something else: estimates are kept by both. At every verified place it is known which of all
guesses was right, whether they were verified or not.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .acceptance import Acceptances, Continuation, RequestStats
from .estimates import DecayedMean


@dataclass(frozen=True)
class GuessConstants:
    """Of the chances of guesses."""

    answers: int = 4  # of the memory at one place; measured: LOG 2026-11-26 "Trees of candidates"
    # Edges of the chances that are told apart; chosen.
    edges: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
    decay: float = 0.995  # of what was observed, per observation; chosen
    prior_strength: float = 4.0  # observations that a prior is worth; chosen
    # Of a recycled token before anything was seen, by its rank. Measured: LOG 2026-11-26 "Trees of candidates".
    rank_priors: tuple[float, ...] = (0.3, 0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.02)
    later_answer: float = 0.3  # of its share, that the memory's second and later answers are worth; chosen
    unsupported: float = 0.8  # of its chance, that an answer is worth which the table does not have; chosen


class Guess(NamedTuple):
    """A token that may follow, and was not drawn."""

    token: int
    chance: float  # that it does
    source: str  # "memory", "recycled" or "model"
    keys: tuple[Hashable, ...]  # what its estimates are kept by


@dataclass(frozen=True)
class Place:
    """What may follow one prefix."""

    guesses: list[Guess]  # the likeliest first
    answer: tuple[int, ...] | None = (
        None  # what the acceptance of the memory's first answer is kept by; None: it has none
    )
    answer_token: int = -1  # that answer


NOWHERE = Place([])


class GuessChances:
    """Estimates for one memory and one table."""

    def __init__(self, acceptances: Acceptances, constants: GuessConstants = GuessConstants()) -> None:
        self._acceptances, self._constants = acceptances, constants
        self._seen: dict[Hashable, DecayedMean] = {}

    def place(self, found: Continuation | None, recycled: Sequence[int], first: bool, calibration: float) -> Place:
        """The guesses behind one prefix.

        Args:
            found: the memory's answer.
            recycled: next tokens of the table, best first.
            first: at the beginning of a round, behind a token of the target's own.
            calibration: of the memory in this request, see `Acceptances.memory_calibration`.
        """
        own: dict[int, tuple[float, Hashable]] = {}  # of the memory's answers: chance and key
        answer, sure = None, 0.0
        if found is not None:
            answer, top = self._acceptances.memory(found, first, calibration)
            sure = top
            own[found.tokens[0]] = top, ("answer", answer)
            for rank in range(1, min(len(found.tokens), self._constants.answers)):
                share = found.probs[rank]
                key = ("later", min(found.length, 3), rank, int(share * 10), found.earlier)
                chance = calibration * self._mean(key, min(share, 1 - top) * self._constants.later_answer)
                own[found.tokens[rank]] = chance, key
                sure += chance
        ranks = {token: rank for rank, token in enumerate(recycled)}
        guesses = [self._remembered(token, *own[token], ranks.get(token), bool(recycled)) for token in own]
        guesses += [self._recycled(token, rank, min(sure, 0.99)) for token, rank in ranks.items() if token not in own]
        guesses.sort(key=lambda guess: -guess.chance)
        return Place(guesses, answer, -1 if found is None else found.tokens[0])

    def _remembered(self, token: int, chance: float, own: Hashable, rank: int | None, known: bool) -> Guess:
        """A guess of the memory's.

        Args:
            rank: in the table; None: the table does not have it.
            known: whether the table knows the last token.
        """
        prior, keys = chance, [own]
        if rank is not None:
            prior = 1 - (1 - chance) * (1 - self._rank(rank))
            keys.append(("rank", rank))
        elif known:
            prior = self._constants.unsupported * chance
        joint = ("memory", self._bin(chance), rank if known else -1)
        return Guess(token, self._mean(joint, prior), "memory", (*keys, joint))

    def _recycled(self, token: int, rank: int, sure: float) -> Guess:
        """A guess of the table's alone; `sure`: the chance that the memory has answered right."""
        key = ("recycled", rank, self._bin(sure))
        return Guess(token, self._mean(key, (1 - sure) * self._rank(rank)), "recycled", (key, ("rank", rank)))

    def beside(self, place: Place, token: int, drafted: float, best: Sequence[tuple[int, float]] = ()) -> list[Guess]:
        """Guesses beside a token of the draft model's.

        Args:
            drafted: the chance that this token is kept.
            best: the draft's likeliest tokens: (token, probability).
        """
        from_model = {other: share for other, share in best if other != token}
        found = []
        for guess in place.guesses:
            if guess.token == token:
                continue
            share = from_model.pop(guess.token, 0.0)
            found.append(self._beside(guess.token, max(guess.chance, share), drafted, guess.source))
        found += [self._beside(token, share, drafted, "model") for token, share in from_model.items()]
        return found

    def _beside(self, token: int, chance: float, drafted: float, source: str) -> Guess:
        key = ("beside", source, self._bin(chance), self._bin(drafted))
        return Guess(token, self._mean(key, chance * (1 - drafted)), source, (key,))

    def observe(self, place: Place, token: int, seen: RequestStats) -> None:
        """Takes in the target's own token at a verified place, also into what the request has shown."""
        if place.answer is not None:
            self._acceptances.observe_answer(place.answer, float(token == place.answer_token), seen)
        self.observe_guesses(place.guesses, token)

    def observe_guesses(self, guesses: Sequence[Guess], token: int) -> None:
        """Takes in the target's own token at a place with these guesses."""
        for guess in guesses:
            right = float(guess.token == token)
            for key in guess.keys:
                seen = self._seen.get(key)
                if seen is None:
                    seen = self._seen[key] = DecayedMean(self._constants.decay)
                seen.add(right)

    def _bin(self, chance: float) -> int:
        return bisect.bisect_right(self._constants.edges, chance)

    def _rank(self, rank: int) -> float:
        """The chance of a recycled token by its rank."""
        priors = self._constants.rank_priors
        return self._mean(("rank", rank), priors[min(rank, len(priors) - 1)])

    def _mean(self, key: Hashable, prior: float) -> float:
        seen = self._seen.get(key)
        return prior if seen is None else seen.mean(prior, self._constants.prior_strength)
