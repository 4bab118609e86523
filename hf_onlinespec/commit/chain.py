"""Candidates one behind the other: the draft model's, or guesses where they are expected to gain more.

The chains of several rows grow together: what the draft model is to say next in each of them is read in one forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..govern.acceptance import RequestStats, TokenSource
from ..govern.governor import Governor
from ..govern.guesses import NOWHERE, Guess
from ..govern.planner import NextInRow, Plan
from ..runtime.clock import finished
from ..runtime.forks import Lock
from .base import Call
from .guessing import Guesser
from .next_tokens import NextToken, next_tokens
from .proposal import ProposalBuilder
from .row_model import RowModel

BESIDE = 3  # of the draft's next best tokens are guessed beside the one that it drafts; chosen


@dataclass(frozen=True)
class RowPart:
    """One row in one round: what is asked for behind it."""

    row: int  # of the call
    builder: ProposalBuilder
    plan: Plan | None  # how far the draft model should go; None: there is no clock
    most: int  # candidates that follow each other
    guesser: Guesser | None  # None: nobody guesses
    trees: bool  # whether guesses may stand beside the model's tokens


class Chain:
    """The draft model's part in one round of one row.

    Args:
        stats: what the row has shown.
        reads_prompt: whether the model reads the prompt in this round: that tells nothing about the cost of a step.
        attempt: makes the `with` block around what guesses.
    """

    def __init__(
        self,
        governor: Governor,
        lock: Lock,
        call: Call,
        model: RowModel,
        stats: RequestStats,
        part: RowPart,
        reads_prompt: bool,
        attempt: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._governor, self._lock, self._call, self._stats, self._attempt = governor, lock, call, stats, attempt
        self.model, self.part, self.reads_prompt = model, part, reads_prompt
        self._failed = call.counts.failed_drafts  # before it

    def wants_model(self) -> bool:
        """Adds guesses as long as they are expected to gain more; whether the model is to draft the next token."""
        part = self.part
        while len(part.builder.drafted) < part.most and not part.builder.ended and self._pays():
            guessed = False
            if part.guesser is not None:
                with self._attempt():
                    guessed = self._add_guess(part.guesser)
                if self._call.counts.failed_drafts > self._failed:
                    return False
            if not guessed:
                return True
        return False

    def _pays(self) -> bool:
        """Whether the model may draft the next token; where there is no clock, it always may."""
        model, builder, plan = self.model, self.part.builder, self.part.plan
        assert model.tokens is not None
        drafted = len(builder.drafted)
        if model.tokens.shape[1] + drafted >= model.model.positions or drafted == model.model.most:
            return False
        if plan is None:
            return True
        if model.reader.shared is not None:  # what it costs is decided of all rows together
            return self._governor.may_draft(plan, drafted)
        return self._governor.model_pays(plan, drafted, builder.survival, begun=builder.has_model_token)

    @property
    def wanted(self) -> NextInRow | None:
        """The token that the model may draft next; None: there is no clock."""
        builder, plan = self.part.builder, self.part.plan
        if plan is None:
            return None
        return NextInRow(plan, len(builder.drafted), builder.survival, builder.has_model_token)

    def _add_guess(self, guesser: Guesser) -> bool:
        """Adds the likeliest guess; False: there is none, or the model's token is expected to gain more."""
        builder, plan = self.part.builder, self.part.plan
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

    def add(self, found: NextToken | None) -> None:
        """Adds a token of the model's; None: what it says is not finite, and the chain ends."""
        governor, model, builder, plan = self._governor, self.model, self.part.builder, self.part.plan
        if found is None:
            with self._lock:
                governor.acceptances.non_finite(self._stats)
            builder.ended = True
            return
        key: tuple[int, ...] = (-1,)
        chance = governor.acceptances.mean_rate(model.base)
        beside: list[Guess] = []
        place = builder.places.get(len(builder.drafted) - 1, NOWHERE)
        if found.confidence is not None:
            key, chance = governor.acceptances.rate_by_confidence(found.confidence, model.base)
        if self.part.trees and found.known is not None:
            beside = governor.guesses.beside(place, found.known, chance, found.best)
        source = TokenSource("model", len(builder.drafted), key)
        guessed = plan is not None and any(
            guess.token == found.known
            and governor.guess_gains(plan, len(builder.drafted), builder.survival * guess.chance)
            for guess in place.guesses
        )
        builder.add_model_token(found.token, found.known, found.probs, source, chance, beside, guessed)

    def wait(self) -> None:
        """What was queued is a part of the draft's time, and would count as the target's."""
        builder = self.part.builder
        if builder.has_model_token and self._call.waits and not self.reads_prompt:
            started = time.perf_counter()
            builder.model_s += finished(self.model.model.device) - started


def grow_chains(
    chains: Sequence[Chain],
    served: PreTrainedModel,
    pays: Callable[[Sequence[NextInRow]], bool],
    observe_prefill: Callable[[int, float, int], None] | None,
) -> bool:
    """Lets chains grow whose rows one draft model serves; whether it has drafted anything.

    Args:
        served: the module tree that drafts now, see `DraftModel.serving`.
        pays: whether one more forward does, where all rows are read in it.
        observe_prefill: told how many tokens of a prompt were read, the time that took, and in how many rows; None: nobody asks.
    """
    drafted = False
    while going_on := [chain for chain in chains if chain.wants_model()]:
        shared = going_on[0].model.reader.shared
        if shared is not None:
            wanted = [chain.wanted for chain in going_on]
            if not pays([one for one in wanted if one is not None]):
                break
        started = time.perf_counter()
        reads_prompt = any(chain.reads_prompt and not chain.part.builder.model_s for chain in going_on)
        trees = any(chain.part.trees for chain in going_on)
        prefixes = [chain.part.builder.prefix for chain in going_on]
        found = next_tokens([chain.model for chain in going_on], served, prefixes, BESIDE if trees else 0)
        for chain, token in zip(going_on, found, strict=True):
            chain.add(token)
            drafted |= token is not None
        if reads_prompt and observe_prefill is not None and any(token is not None for token in found):
            seconds = finished(going_on[0].model.model.device) - started
            rows = len(going_on) if shared is None else shared.size
            observe_prefill(max(chain.model.reader.length for chain in going_on), seconds, rows)
        share = (time.perf_counter() - started) / len(going_on)
        for chain in going_on:
            chain.part.builder.model_s += share
    for chain in chains:
        chain.wait()
    return drafted
