"""Which adapter serves a request whose caller names none: by its prompt, and by how the adapters did on such requests of late.

Of several adapters, the one that predicts a prompt best is mostly the one that does best on its continuation, as it is with the learned
and the base draft (`routing.py`). Where it is not, experience says so: the adapter that a prompt speaks for is the context, and in
each context the adapters are the arms of a bandit, UCB1 with discounted counts (arXiv:0805.3415), whose prior is what the prompt says.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

A = TypeVar("A", bound=Hashable)  # what tells adapters apart


@dataclass(frozen=True)
class NameConstants:
    """Of how prompts and experience choose an adapter."""

    prompt_tokens: int = 128  # of a prompt by which adapters are told apart, as of `RouterConstants`
    # Acceptance that one nat per token of the prompt is taken to be worth, and the requests that this counts for. Chosen.
    per_nat: float = 0.3
    prior_requests: float = 4.0
    width: float = 0.1  # of the confidence bound, of the order of what requests of one kind differ by; chosen
    discount: float = 0.97  # per request of a context: adapters learn, and about 33 requests count; chosen
    unknown: float = 0.5  # acceptance where nothing is known yet; it is the same for all


@dataclass
class _Seen:
    """What one adapter has shown in one context."""

    requests: float = 0.0  # discounted
    acceptance: float = 0.0  # summed, discounted


@dataclass
class _Context(Generic[A]):
    """Requests whose prompts speak for the same adapter."""

    seen: dict[A, _Seen] = field(default_factory=dict)

    @property
    def requests(self) -> float:
        return sum(one.requests for one in self.seen.values())

    @property
    def acceptance(self) -> float:
        return sum(one.acceptance for one in self.seen.values())


class NameRouter(Generic[A]):
    """Chooses among adapters, of which some may come and go."""

    def __init__(self, constants: NameConstants = NameConstants()) -> None:
        self.constants = constants
        self._contexts: dict[A | None, _Context[A]] = {}

    def favourite(self, scores: Mapping[A, float]) -> A:
        """The adapter that a prompt speaks for: the context of its request."""
        return max(scores, key=lambda name: scores[name])

    def choose(self, scores: Mapping[A, float]) -> A:
        """The adapter that serves a request.

        Args:
            scores: log-likelihood per token of its prompt under each adapter that could serve it; all the same where they cannot say.
        """
        first, constants = self.favourite(scores), self.constants
        context = self._contexts.get(first, _Context())
        total = context.requests
        level = context.acceptance / total if total else constants.unknown

        def bound(name: A) -> float:
            seen, prior = context.seen.get(name, _Seen()), constants.prior_requests
            expected = level + constants.per_nat * (scores[name] - scores[first])
            weight = seen.requests + prior
            mean = (seen.acceptance + prior * expected) / weight
            return mean + constants.width * math.sqrt(math.log1p(total) / weight)

        return max(scores, key=lambda name: (bound(name), name == first))

    def observe(self, favourite: A, chosen: A, acceptance: float) -> None:
        """Takes in the acceptance of a request that the chosen adapter served; `favourite`: its context."""
        if not math.isfinite(acceptance):
            return
        context = self._contexts.setdefault(favourite, _Context())
        for one in context.seen.values():
            one.requests *= self.constants.discount
            one.acceptance *= self.constants.discount
        seen = context.seen.setdefault(chosen, _Seen())
        seen.requests += 1
        seen.acceptance += acceptance

    def forget(self) -> None:
        """Nothing is known of any adapter any more."""
        self._contexts.clear()
