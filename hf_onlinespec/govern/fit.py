"""Fit: whether a draft says anything that the target says. One with another tokenizer, or with random weights, never does."""

from __future__ import annotations

# Of the embedded draft on the two domains that it has never seen 2 to 8 % of the tokens are accepted, 8 to 44 % after its first
# three gradient steps; of a draft with another tokenizer or random weights about one in the size of the vocabulary, at any time.
# Below the first it does not fit, from the second on it does, between them it is open; measured as said.
MISFIT, FITS = 0.03, 0.08
FITS_AT_ONCE, AT_ONCE_TOKENS = 0.2, 16  # chosen: a single request that shows so much settles it
LEAST_TOKENS, LEAST_REQUESTS, LEAST_STEPS = 96, 4, 3  # chosen: of evidence; gradient steps before any of it counts
LOOK_EVERY, MOST_LOOKS = 6, 8  # chosen: requests without evidence until one is looked at, and how often


class Fit:
    """Takes in the acceptance of every request, and settles once whether the draft fits its target.

    Only what was seen after the draft has learned counts: an unknown domain is no misfit.
    """

    def __init__(self) -> None:
        self.message: str | None = None  # what to tell the user; None: it fits, or it is open
        self._settled = False
        self._steps = 0  # gradient steps before this request
        self._accepted, self._tokens, self._requests = 0.0, 0, 0  # all evidence
        self._now = (0.0, 0)  # of this request
        self._since, self._looks = 0, 0

    def note(self, accepted: float, tokens: int) -> None:
        """So many of so many tokens of this request were accepted, or would have been."""
        self._now = (self._now[0] + accepted, self._now[1] + tokens)

    def request_ended(self, steps: int) -> None:
        """Takes in what was noted, for a draft that has taken so many gradient steps by now."""
        accepted, tokens = self._now
        self._now = (0.0, 0)
        counts, self._steps = self._steps >= LEAST_STEPS, steps
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
        if tokens >= AT_ONCE_TOKENS and accepted / tokens >= FITS_AT_ONCE:
            self._settled = True
        elif self._tokens >= LEAST_TOKENS and self._requests >= LEAST_REQUESTS:
            self._settled = rate < MISFIT or rate >= FITS
            if rate < MISFIT:
                self.message = (
                    f"The draft agrees with the target at {rate:.1%} of {self._tokens} tokens, after {steps} gradient steps: "
                    "most likely it has another tokenizer, with as many tokens, or it was never trained. Use a draft with the "
                    "target's own tokenizer. Learning goes on with the smallest budget."
                )

    def decide_scoring(self) -> bool:
        """Whether a request is scored to settle it, where nothing was seen of one; if so, it counts as one of `MOST_LOOKS`."""
        if self._settled or self._steps < LEAST_STEPS or self._looks >= MOST_LOOKS or self._since < LOOK_EVERY - 1:
            return False
        self._looks += 1
        return True
