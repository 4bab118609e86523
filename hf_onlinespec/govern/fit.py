"""Fit: whether a draft says anything that the target says. One with another tokenizer, or with random weights, never does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitConstants:
    """Of when it is settled that a draft fits its target, or does not.

    The two rates, measured: LOG 2026-11-26 "Right everywhere: the faults found, each as a kind". Of the embedded draft on the two
    domains that it has never seen 2 to 15 % of the tokens are accepted, 6 to 23 % after its first three gradient steps; of a
    draft with random weights at most 1 %, at any time. Between the two rates it is open.
    """

    misfit_rate: float = 0.03  # below it does not fit
    fit_rate: float = 0.08  # from here on it does
    fit_rate_at_once: float = 0.2  # a single request that shows so much settles it; chosen
    tokens_at_once: int = 16  # if it has as many tokens; chosen
    least_tokens: int = 96  # of evidence; chosen
    least_requests: int = 4  # of evidence; chosen
    least_steps: int = 3  # gradient steps before any of it counts; chosen
    score_every: int = 6  # requests without evidence until one is scored; chosen
    most_scorings: int = 8  # chosen


class Fit:
    """Takes in the acceptance of every request, and settles once whether the draft fits its target.

    Only what was seen after the draft has learned counts: an unknown domain is no misfit.
    """

    def __init__(self, constants: FitConstants = FitConstants()) -> None:
        self._constants = constants
        self.message: str | None = None  # what to tell the user; None: it fits, or it is open
        self._settled = False
        self._steps = 0  # gradient steps before this request
        self._accepted, self._tokens, self._requests = 0.0, 0, 0  # all evidence
        self._now = (0.0, 0)  # of this request
        self._since, self._scorings = 0, 0

    def note(self, accepted: float, tokens: int) -> None:
        """So many of so many tokens of this request were accepted, or would have been."""
        self._now = (self._now[0] + accepted, self._now[1] + tokens)

    def request_ended(self, steps: int) -> None:
        """Takes in what was noted, for a draft that has taken so many gradient steps by now."""
        constants = self._constants
        accepted, tokens = self._now
        self._now = (0.0, 0)
        counts, self._steps = self._steps >= constants.least_steps, steps
        if self._settled or not counts:
            return
        self._since += 1
        if not tokens:
            return
        self._since = 0
        self._accepted, self._tokens, self._requests = (
            self._accepted + accepted,
            self._tokens + tokens,
            self._requests + 1,
        )
        rate = self._accepted / self._tokens
        if tokens >= constants.tokens_at_once and accepted / tokens >= constants.fit_rate_at_once:
            self._settled = True
        elif self._tokens >= constants.least_tokens and self._requests >= constants.least_requests:
            self._settled = rate < constants.misfit_rate or rate >= constants.fit_rate
            if rate < constants.misfit_rate:
                self.message = (
                    f"The draft agrees with the target at {rate:.1%} of {self._tokens} tokens, after {steps} gradient steps: "
                    "most likely it has another tokenizer, with as many tokens, or it was never trained. Use a draft with the "
                    "target's own tokenizer. Learning goes on with the smallest budget."
                )

    def decide_scoring(self) -> bool:
        """Whether a request of which nothing was seen is scored to settle it; one that is counts as one of `most_scorings`."""
        constants = self._constants
        if self._settled or self._steps < constants.least_steps or self._scorings >= constants.most_scorings:
            return False
        if self._since < constants.score_every - 1:
            return False
        self._scorings += 1
        return True
