"""Which adapter serves a request whose caller names none: by its prompt, and by how the adapters did on such requests of late.

The prompt says whose requests it looks like: each adapter has a profile, how often each token stood in the prompts that came with its
name, and the profile under which this one is likeliest tells the context. (The likelihood under the adapters themselves does not: they
learn answers, and what they say about prompts tells nothing of their domain.) In each context the one serves that did best of late,
the context's own adapter being a little ahead from the beginning. A request that is learned is scored under every adapter, so that
none has to serve to be known: where all were seen as often, this follows the leader. Where nothing is learned, only the one that
serves is seen, and the adapters are the arms of a bandit, UCB1 with discounted counts (arXiv:0805.3415).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

A = TypeVar("A", bound=Hashable)  # what tells adapters apart


@dataclass(frozen=True)
class NameConstants:
    """Of how prompts and experience choose an adapter.

    Chosen. `ahead`, `prior_requests` and `width`: of 27 settings the one that loses least in four simulated worlds of four adapters and
    three kinds of requests, noise 0.12 in acceptance: 0.6 to 6 % of the best adapter's after 50 requests, 2.6 to 3.9 % after 150.
    """

    prompt_tokens: int = 128  # at the end of a prompt, by which requests are told apart
    profile_tokens: int = 16_384  # that a profile holds: beyond it, all counts are halved
    common: float = 20.0  # tokens that what all prompts have in common counts for in a profile
    least_known: float = 0.5  # of a prompt's tokens in earlier prompts: else it looks like none of them
    unnoted: float = -0.3  # the score of a name without a profile, in nats per token
    ahead: float = 0.05  # acceptance by which the context's own adapter is ahead, and the requests that this counts for
    prior_requests: float = 1.0
    width: float = 0.05  # of the confidence bound
    discount: float = 0.97  # per request of a context: adapters learn, and about 33 requests count
    unknown: float = 0.5  # acceptance where nothing is known yet; it is the same for all


class _Profile:
    """How often tokens stood in prompts of one kind."""

    def __init__(self) -> None:
        self.counts = Counter[int]()
        self.total = 0

    def add(self, prompt: Sequence[int], most: int) -> None:
        self.counts.update(prompt)
        self.total += len(prompt)
        if self.total > most:
            self.counts = Counter({token: n // 2 for token, n in self.counts.items() if n > 1})
            self.total = sum(self.counts.values())


@dataclass
class _Seen:
    """What one adapter has shown in one context."""

    requests: float = 0.0  # discounted
    acceptance: float = 0.0  # summed, discounted


@dataclass
class _Context(Generic[A]):
    """Requests whose prompts look like those of one adapter."""

    seen: dict[A, _Seen] = field(default_factory=dict)

    @property
    def level(self) -> float | None:
        """Acceptance of the requests so far, whoever served them; None: there were none."""
        requests = self.requests
        return sum(one.acceptance for one in self.seen.values()) / requests if requests else None

    @property
    def requests(self) -> float:
        return sum(one.requests for one in self.seen.values())


class NameRouter(Generic[A]):
    """Chooses among adapters, of which some may come and go. It holds users' tokens, and is never saved."""

    def __init__(self, constants: NameConstants = NameConstants()) -> None:
        self.constants = constants
        self._profiles: dict[A, _Profile] = {}
        self._all = _Profile()
        self._contexts: dict[A, _Context[A]] = {}

    def _end(self, prompt: Sequence[int]) -> Sequence[int]:
        return prompt[-self.constants.prompt_tokens :]

    def note_prompt(self, name: A, prompt: Sequence[int]) -> None:
        """A prompt came with this name, or looked like those that did."""
        for profile in (self._profiles.setdefault(name, _Profile()), self._all):
            profile.add(self._end(prompt), self.constants.profile_tokens)

    def score(self, name: A, prompt: Sequence[int]) -> float:
        """Log-likelihood per token of the end of a prompt under the profile of a name, minus that under all prompts together.

        Tokens that no prompt had speak for nobody.
        """
        profile, end, common = self._profiles.get(name), self._end(prompt), self.constants.common
        if profile is None:
            return self.constants.unnoted
        kinds, found = len(self._all.counts) + 1, 0.0
        for token in end:
            if not self._all.counts[token]:
                continue
            usual = (self._all.counts[token] + 0.5) / (self._all.total + 0.5 * kinds)
            found += math.log((profile.counts[token] / usual + common) / (profile.total + common))
        return found / max(1, len(end))

    def favourite(self, prompt: Sequence[int], among: Collection[A]) -> A:
        """The adapter whose prompts a prompt looks like, the first one where it looks like none: the context of its request."""
        end = self._end(prompt)
        known = sum(self._all.counts[token] > 0 for token in end)
        if known < self.constants.least_known * len(end) or not known:
            return next(iter(among))
        return max(among, key=lambda name: self.score(name, prompt))

    def choose(self, favourite: A, among: Collection[A]) -> A:
        """The adapter that serves a request of this context."""
        context, constants = self._contexts.get(favourite, _Context()), self.constants
        level = constants.unknown if context.level is None else context.level
        tried = math.log1p(context.requests)

        def bound(name: A) -> float:
            seen, prior = context.seen.get(name, _Seen()), constants.prior_requests
            weight = seen.requests + prior
            expected = level + constants.ahead * (name == favourite)
            return (seen.acceptance + prior * expected) / weight + constants.width * math.sqrt(tried / weight)

        return max(among, key=bound)

    def observe(self, favourite: A, acceptances: Mapping[A, float]) -> None:
        """Takes in a request of this context: the acceptance of every adapter that it was scored under, or of the one that served it."""
        found = {name: acceptance for name, acceptance in acceptances.items() if math.isfinite(acceptance)}
        if not found:
            return
        context = self._contexts.setdefault(favourite, _Context())
        for one in context.seen.values():
            one.requests *= self.constants.discount
            one.acceptance *= self.constants.discount
        for name, acceptance in found.items():
            seen = context.seen.setdefault(name, _Seen())
            seen.requests += 1
            seen.acceptance += acceptance
