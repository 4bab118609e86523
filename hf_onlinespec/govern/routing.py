"""Which draft serves a request, the learned or the original one: by its prompt, and by how the two did on such requests of late."""

from __future__ import annotations

from collections import deque

STEADY, ASK_EVERY = 6, 3  # after so many prompts that speak for the same draft, one of so many is asked
COMPARISONS = 4  # that decide
COMPARISON_TOKENS = 32  # in one of them, at least
CLOSE = 0.05  # a difference of acceptance that may turn
SURE = 0.02  # one that outweighs what the prompt says
# Tokens of a prompt by which the two are told apart: their cost stays small beside a long prompt.
PREFERENCE_TOKENS = 128


class AdapterRouter:
    """What prompts say, and whether they were right.

    A preference is the log-likelihood per token of a prompt under the learned draft, minus that under the original one.
    """

    def __init__(self) -> None:
        # Learned minus original acceptance on so many tokens, by which of the two predicts the prompt better.
        self._advantages = {learned: deque[tuple[float, int]](maxlen=COMPARISONS) for learned in (True, False)}
        self._compared = 0
        self._last = 0.0  # of the last prompt that was asked
        self._steady, self._unasked = 0, 0  # prompts in a row that spoke for the same draft; requests since

    def use_base(self, preference: float | None = None) -> bool:
        """Whether the original draft is the better one for a request.

        Args:
            preference: of its prompt. Experience with such prompts counts more, where there is any. None: it was not asked,
                and is taken to be like the last one.
        """
        if preference is None:
            preference = self._last
        advantage = self.advantage(preference)
        return advantage < -SURE if preference >= 0 else advantage < SURE

    def compares(self, preference: float, much_is_spent: bool) -> bool:
        """Whether an update should look at the original draft too: while the two are close or much is spent; else now and then."""
        self._compared += 1
        return abs(self.advantage(preference)) < CLOSE or much_is_spent or self._compared % 2 == 0

    def asks(self) -> bool:
        """Whether it is time to ask a prompt: of prompts that all speak for the same draft, only some are asked."""
        self._unasked += 1
        return self._steady < STEADY or self._unasked >= ASK_EVERY

    def asked(self, preference: float) -> None:
        """What a prompt said."""
        self._steady = self._steady + 1 if (preference >= 0) == (self._last >= 0) else 0
        self._last, self._unasked = preference, 0

    def advantage(self, preference: float) -> float:
        """Acceptance of the learned draft minus the original one's, of late, in requests whose prompts spoke for the same one."""
        found = self._advantages[preference >= 0]
        return sum(difference * n for difference, n in found) / (COMPARISON_TOKENS + sum(n for _, n in found))

    def compared(self, preference: float, difference: float, n: int) -> None:
        """Notes the learned acceptance minus the original one on n tokens; few tokens join the ones before them."""
        found = self._advantages[preference >= 0]
        if found and found[-1][1] < COMPARISON_TOKENS:
            before, m = found.pop()
            difference, n = (before * m + difference * n) / (m + n), m + n
        found.append((difference, n))
