"""A simulated clock for the governor: a target, a draft and a learner that only cost time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from hf_onlinespec.govern.acceptance import RequestStats, TokenSource
from hf_onlinespec.govern.governor import Governor, GovernorConstants

BUDGET, PASSES, TOKENS = 0.1, 2, 64
LOOK = 1.0  # simulated seconds of looking at the acceptance on a request
STEP = 3.0  # simulated seconds of one gradient step; a plain target step takes 1


def outcomes(drafted: Sequence[TokenSource], chances: Sequence[float]) -> list[tuple[TokenSource, float]]:
    """What the governor is told of a chain: the chance of each candidate that was verified, up to the first rejection."""
    return list(zip(drafted, chances, strict=False))


class World:
    """A target, a draft and a learner that only cost time; acceptance is what the test says it is.

    Args:
        alpha: (request, gradient steps so far) -> acceptance of the learned and of the base draft.
        draft_step: seconds per drafted token.
    """

    def __init__(
        self,
        alpha: Callable[[int, int], tuple[float, float]],
        draft_step: float = 0.15,
        seed: int = 0,
        noise: float = 0.1,
        constants: GovernorConstants | None = None,
    ) -> None:
        self.governor = Governor(BUDGET, PASSES, constants=constants or GovernorConstants())
        self.alpha, self.draft_step, self.noise = alpha, draft_step, noise
        self.random = random.Random(seed)
        self.time_s = self.update_s = 0.0
        self.tokens = self.steps = self.request = 0
        self.seen = RequestStats()
        self.prompt_log_ratio = 0.0  # prompts tell nothing

    def noisy(self, seconds: float) -> float:
        return seconds * math.exp(self.random.gauss(0, self.noise))

    def round(self, room: int, fixed: int | None) -> int:
        learned, base = self.alpha(self.request, self.steps)
        a = base if self.seen.serves_base else learned
        drafted: list[TokenSource] = []
        chances: list[float] = []
        if fixed is None:
            plan = self.governor.plan(seen=self.seen, room=room)
            survival = 1.0
            while len(drafted) < room and self.governor.model_pays(plan, len(drafted), survival):
                confidence = min(0.99, max(0.01, self.random.gauss(a, 0.2)))
                key, chance = self.governor.acceptances.rate_by_confidence(confidence)
                drafted.append(TokenSource("model", len(drafted), key))
                chances.append(confidence)
                survival *= chance
        else:
            chances = [a] * min(fixed, room)
        overlaps: list[float] = []
        for chance in chances:
            overlaps.append(float(self.random.random() < chance))
            if not overlaps[-1]:
                break
        k = len(chances)
        draft_s = self.noisy(0.1 + self.draft_step * k) if k else 0.0
        target_s = self.noisy(1.0 if k == 0 else 1.1 + 0.045 * k)
        self.time_s += draft_s + target_s
        if fixed is None:
            self.governor.observe(drafted, outcomes(drafted, overlaps), draft_s, target_s, self.seen)
        return 1 + int(sum(overlaps))

    def run(self, requests: int, fixed: int | None = None, tokens: int = TOKENS) -> float:
        """Tokens per second."""
        for _ in range(requests):
            self.seen = RequestStats(serves_base=self.governor.router.use_base(self.prompt_log_ratio))
            left = tokens
            while left > 0:
                got = self.round(left - 1, fixed)
                left -= got
                self.tokens += got
            if fixed is None:
                self.learn()
            self.request += 1
        return self.tokens / self.time_s

    def learn(self) -> None:
        unseen = self.governor.request_ended(TOKENS, self.seen)
        steps = self.governor.budget.affordable_steps()
        if not steps and not unseen:
            return
        draws = [self.random.random() for _ in range(TOKENS)]  # both do well on the same tokens
        learned, base = ([float(u < a) for u in draws] for a in self.alpha(self.request, self.steps))
        if not steps:
            self.governor.observe_comparison(learned, base, updates=False, prompt_log_ratio=self.prompt_log_ratio)
            self.time_s += LOOK
            self.update_s += LOOK
            self.governor.budget.scoring.spent(LOOK)
            return
        compares = self.governor.decide_comparison(self.prompt_log_ratio)
        self.governor.observe_comparison(learned, base if compares else None, prompt_log_ratio=self.prompt_log_ratio)
        seconds = self.noisy(steps * STEP + compares)
        self.steps += steps
        self.time_s += seconds
        self.update_s += seconds
        self.governor.budget.spent(seconds, steps)


def best_static(alpha: Callable[[int, int], tuple[float, float]], requests: int, draft_step: float = 0.15) -> float:
    """The best fixed lookahead in hindsight, 0 being plain decoding, with the draft as it was."""
    still = lambda request, steps: (alpha(request, 0)[1],) * 2  # noqa: E731
    return max(World(still, draft_step).run(requests, fixed=k) for k in range(9))


STREAMS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "useless draft": lambda request, steps: (0.03, 0.03),
    "good draft, nothing to gain": lambda request, steps: (0.66, 0.66),
    "learning hurts": lambda request, steps: (max(0.5, 0.66 - 0.002 * steps), 0.66),
    "another domain every time": lambda request, steps: ((0.05, 0.66, 0.35)[request % 3],) * 2,
    "at break-even": lambda request, steps: (0.25, 0.25),
}
