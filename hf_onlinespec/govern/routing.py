"""Which draft serves a request, the learned or the base draft: by its prompt, and by how the two did on such requests of late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterConstants:
    """Of how prompts and experience choose the draft."""

    # Tokens of a prompt by which the two are told apart. Measured, cost and hit rate: LOG 2026-11-22 "Why ours lost to the memory
    # alone, and what was changed".
    prompt_tokens: int = 128
    steady: int = 6  # after so many prompts that speak for the same draft, only some are scored; chosen
    score_every: int = 3  # of those, one of so many; chosen
    comparisons: int = 4  # of the two drafts on the same tokens, that decide; chosen
    comparison_tokens: int = 32  # in one of them, at least; chosen
    close: float = 0.05  # a difference of acceptance that may turn; chosen
    sure: float = 0.02  # one that outweighs what the prompt says; chosen
    compare_every: int = 2  # updates, where the difference is not close; chosen


class AdapterRouter:
    """What prompts say, and whether they were right.

    `log_ratio` is the log-likelihood per token of a prompt under the learned draft, minus that under the base draft.
    """

    def __init__(self, constants: RouterConstants = RouterConstants()) -> None:
        self.constants = constants
        # Learned minus base acceptance on so many tokens, by which of the two predicts the prompt better.
        self._advantages = {
            learned: deque[tuple[float, int]](maxlen=constants.comparisons) for learned in (True, False)
        }
        self._updates = 0
        self._last = 0.0  # of the last prompt that was scored
        self._steady, self._unscored = 0, 0  # prompts in a row that spoke for the same draft; requests since

    def use_base(self, log_ratio: float | None = None) -> bool:
        """Whether the base draft is the better one for a request.

        Args:
            log_ratio: of its prompt. Experience with such prompts counts more, where there is any. None: it was not scored,
                and is taken to be like the last one.
        """
        if log_ratio is None:
            log_ratio = self._last
        advantage, sure = self.advantage(log_ratio), self.constants.sure
        return advantage < -sure if log_ratio >= 0 else advantage < sure

    def decide_comparison(self, log_ratio: float, much_is_spent: bool) -> bool:
        """Counts an update; whether it scores the base draft too: while the two are close or much is spent, else now and then."""
        self._updates += 1
        close = abs(self.advantage(log_ratio)) < self.constants.close
        return close or much_is_spent or self._updates % self.constants.compare_every == 0

    def decide_scoring(self) -> bool:
        """Counts a request; whether its prompt is scored: of prompts that all speak for the same draft, only some are."""
        self._unscored += 1
        return self._steady < self.constants.steady or self._unscored >= self.constants.score_every

    def observe_prompt(self, log_ratio: float) -> None:
        """Takes in what a prompt said."""
        self._steady = self._steady + 1 if (log_ratio >= 0) == (self._last >= 0) else 0
        self._last, self._unscored = log_ratio, 0

    def advantage(self, log_ratio: float) -> float:
        """Acceptance of the learned draft minus the base draft's, of late, in requests whose prompts spoke for the same one."""
        found = self._advantages[log_ratio >= 0]
        return sum(difference * n for difference, n in found) / (
            self.constants.comparison_tokens + sum(n for _, n in found)
        )

    def observe_difference(self, log_ratio: float, difference: float, n: int) -> None:
        """Notes the learned minus the base acceptance on n tokens; few tokens join the ones before them."""
        found = self._advantages[log_ratio >= 0]
        if found and found[-1][1] < self.constants.comparison_tokens:
            before, m = found.pop()
            difference, n = (before * m + difference * n) / (m + n), m + n
        found.append((difference, n))
