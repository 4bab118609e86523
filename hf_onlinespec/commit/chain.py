"""Candidates one behind the other: the draft model's, or guesses where they are expected to gain more."""

from __future__ import annotations

import time

from transformers import PreTrainedModel

from ..govern.acceptance import RequestStats, TokenSource
from ..govern.governor import Governor
from ..govern.guesses import NOWHERE, Guess
from ..govern.planner import Plan
from ..runtime.clock import finished
from ..runtime.forks import Lock
from .base import Call
from .guessing import Guesser
from .proposal import ProposalBuilder
from .row_model import RowModel

BESIDE = 3  # of the draft's next best tokens are guessed beside the one that it drafts; chosen


class Chain:
    """The draft model's part in one round of one row.

    Args:
        stats: what the row has shown.
        served: the module tree that drafts now, see `DraftModel.serving`.
    """

    reads_prompt = (
        False  # whether the model reads the prompt in this round: that tells nothing about the cost of a step
    )
    trees = False  # whether guesses may stand beside its tokens

    def __init__(
        self,
        governor: Governor,
        lock: Lock,
        call: Call,
        model: RowModel,
        stats: RequestStats,
        served: PreTrainedModel,
    ) -> None:
        self._governor, self._lock, self._call = governor, lock, call
        self._model, self._stats, self._served = model, stats, served

    def pays(self, builder: ProposalBuilder, plan: Plan | None) -> bool:
        """Whether the model may draft the next token; plan: None: there is no clock, it always may."""
        model = self._model
        assert model.tokens is not None
        drafted = len(builder.drafted)
        if model.tokens.shape[1] + drafted >= model.model.positions or drafted == model.model.most:
            return False
        return plan is None or self._governor.model_pays(
            plan, len(builder.drafted), builder.survival, begun=builder.has_model_token
        )

    def add_guess(self, builder: ProposalBuilder, plan: Plan | None, guesser: Guesser) -> bool:
        """Adds the likeliest guess; False: there is none, or the model's token is expected to gain more."""
        if builder.context is None:
            return False
        place = guesser.place(builder.context, not builder.drafted)
        builder.places[len(builder.drafted) - 1] = place
        if not place.guesses:
            return False
        governor, chance = self._governor, place.guesses[0].chance
        if plan is None:  # no clock: whoever is accepted more often
            speaks = chance >= governor.acceptances.mean_rate(self._stats.serves_base)
        else:
            at, begun = len(builder.drafted), builder.has_model_token
            speaks = governor.guess_beats_model(plan, at, builder.survival, chance, begun)
        if speaks:
            builder.add_guess(place.guesses[0])
        return speaks

    def add_model_token(self, builder: ProposalBuilder, plan: Plan | None) -> bool:
        """Adds a token of the model's; False: what it says is not finite, and the chain ends."""
        started, governor, model = time.perf_counter(), self._governor, self._model
        found = model.next_token(self._served, builder.prefix, BESIDE if self.trees else 0)
        if found is None:
            with self._lock:
                governor.acceptances.non_finite(self._stats)
            builder.ended = True
            builder.model_s += time.perf_counter() - started
            return False
        key: tuple[int, ...] = (-1,)
        chance = governor.acceptances.mean_rate(model.base)
        beside: list[Guess] = []
        place = builder.places.get(len(builder.drafted) - 1, NOWHERE)
        if found.confidence is not None:
            key, chance = governor.acceptances.rate_by_confidence(found.confidence, model.base)
        if self.trees and found.known is not None:
            beside = governor.guesses.beside(place, found.known, chance, found.best)
        source = TokenSource("model", len(builder.drafted), key)
        guessed = plan is not None and any(
            guess.token == found.known
            and governor.guess_gains(plan, len(builder.drafted), builder.survival * guess.chance)
            for guess in place.guesses
        )
        builder.add_model_token(found.token, found.known, found.probs, source, chance, beside, guessed)
        if self.reads_prompt and not builder.model_s and self._call.waits:
            seconds = finished(model.model.device) - started
            with self._lock:
                governor.observe_prefill(model.reader.length, seconds)
        builder.model_s += time.perf_counter() - started
        return True

    def wait(self, builder: ProposalBuilder) -> None:
        """What was queued is a part of the draft's time, and would count as the target's."""
        if builder.has_model_token and self._call.waits and not self.reads_prompt:
            started = time.perf_counter()
            builder.model_s += finished(self._model.model.device) - started
