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
    """A token that may follow."""

    token: int
    chance: float  # that it is kept
    source: str  # "memory", "recycled" or "model"
    keys: tuple[Hashable, ...]  # what its estimates are kept by
    law: Continuation | None = None  # what it was drawn from; None: it was not drawn


@dataclass(frozen=True)
class Place:
    """What may follow one prefix."""

    guesses: list[Guess]  # the likeliest first
    # The likeliest token of each of the memory's answers, and what the acceptance of such an answer is kept by.
    answers: tuple[tuple[int, tuple[int, ...]], ...] = ()


NOWHERE = Place([])


@dataclass
class _Remembered:
    """A token that the memory says, in one answer or in several."""

    chance: float = 0.0  # by the answer that makes it likeliest
    keys: tuple[Hashable, ...] = ()
    answers: int = 0


class GuessChances:
    """Estimates for one memory and one table."""

    def __init__(self, acceptances: Acceptances, constants: GuessConstants = GuessConstants()) -> None:
        self._acceptances, self._constants = acceptances, constants
        self._seen: dict[Hashable, DecayedMean] = {}

    def place(
        self, answers: Sequence[Continuation], recycled: Sequence[int], first: bool, calibration: float = 1.0
    ) -> Place:
        """The guesses behind one prefix.

        Args:
            answers: of the memory.
            recycled: next tokens of the table, best first.
            first: at the beginning of a round, behind a token of the target's own.
            calibration: of the memory in this request, see `Acceptances.memory_calibration`.
        """
        said: dict[int, _Remembered] = {}
        likeliest = []
        for answer in answers:
            key, top = self._acceptances.memory(answer, first, calibration)
            likeliest.append((answer.tokens[0], key))
            self._note(said, answer.tokens[0], top, ("answer", key))
            for rank in range(1, min(len(answer.tokens), self._constants.answers)):
                share = answer.probs[rank]
                later = ("later", min(answer.length, 3), rank, int(share * 10), answer.earlier)
                chance = calibration * self._mean(later, min(share, 1 - top) * self._constants.later_answer)
                self._note(said, answer.tokens[rank], chance, later)
        ranks = {token: rank for rank, token in enumerate(recycled)}
        surest = max((one.chance for one in said.values()), default=0.0)
        guesses = [self._remembered(token, one, surest, ranks.get(token), bool(ranks)) for token, one in said.items()]
        sure = min(sum(one.chance for one in said.values()), 0.99)
        beside = self._bin(sure)
        for token, rank in ranks.items():
            if token not in said:
                alone = ("recycled", rank, beside)
                chance = self._mean(alone, (1 - sure) * self._rank(rank))
                guesses.append(Guess(token, chance, "recycled", (alone, ("rank", rank))))
        guesses.sort(key=lambda guess: -guess.chance)
        return Place(guesses, tuple(likeliest))

    def drawn(self, answer: Continuation, token: int, first: bool, calibration: float = 1.0) -> Guess:
        """A token that was drawn from the memory's answer: of one guess alone, that is kept more often than the likeliest token."""
        key, chance = self._acceptances.memory(answer, first, calibration)
        kept_by = ("drawn", key)
        return Guess(token, self._mean(kept_by, chance), "memory", (kept_by,), answer)

    def _note(self, said: dict[int, _Remembered], token: int, chance: float, key: Hashable) -> None:
        one = said.setdefault(token, _Remembered())
        one.chance = max(one.chance, chance)
        one.keys += (key,)
        one.answers += 1

    def _remembered(self, token: int, one: _Remembered, surest: float, rank: int | None, known: bool) -> Guess:
        """A guess of the memory's.

        Args:
            surest: the chance of the memory's likeliest token.
            rank: in the table; None: the table does not have it.
            known: whether the table knows the last token.
        """
        prior, keys = one.chance, one.keys
        if rank is not None:
            prior = 1 - (1 - prior) * (1 - self._rank(rank))
            keys += (("rank", rank),)
        elif known:
            prior *= self._constants.unsupported
        beside = -1
        if one.chance < surest:  # something else is likelier
            beside = self._bin(surest)
            prior *= 1 - surest
        joint = ("memory", self._bin(one.chance), beside, rank if known else -1, one.answers > 1)
        return Guess(token, self._mean(joint, prior), "memory", (*keys, joint))

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

    def expanded(self, token: int, share: float, prior: float) -> Guess:
        """The draft model's likeliest token behind a candidate that is none of its chain's.

        Args:
            share: its probability.
            prior: the chance of such a token in the chain.
        """
        key = ("expanded", self._bin(share))
        return Guess(token, self._mean(key, prior), "model", (key,))

    def _beside(self, token: int, chance: float, drafted: float, source: str) -> Guess:
        key = ("beside", source, self._bin(chance), self._bin(drafted))
        return Guess(token, self._mean(key, chance * (1 - drafted)), source, (key,))

    def observe(self, place: Place, token: int, seen: RequestStats) -> None:
        """Takes in the target's own token at a verified place, also into what the request has shown of the memory."""
        for likeliest, key in place.answers:
            self._acceptances.observe_answer(key, float(token == likeliest), seen)
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
