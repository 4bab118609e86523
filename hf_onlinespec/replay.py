"""A bounded memory of past requests with the target's top-k probabilities: learning from it costs no target forward."""

from __future__ import annotations

import random
from collections import deque

from .feedback import Feedback


class Replay:
    """The newest requests that fit into `max_tokens`, at `top_k` target probabilities per generated position.

    Bytes are bounded by `max_tokens * (12 + 12 * top_k)`: an int64 token, a float32 tail, and float32 + int64 per kept
    probability.
    """

    def __init__(self, max_tokens: int, top_k: int, seed: int) -> None:
        self.max_tokens = max_tokens
        self.top_k = top_k
        self.requests: deque[Feedback] = deque()
        self.tokens = 0
        self._random = random.Random(seed)

    def add(self, feedback: Feedback) -> None:
        """Remembers a request and forgets the oldest ones beyond the bound. A request above the bound is not kept."""
        small = Feedback(feedback.tokens, feedback.teacher.top(self.top_k))
        if len(small.tokens) > self.max_tokens:
            return
        self.requests.append(small)
        self.tokens += len(small.tokens)
        while self.tokens > self.max_tokens:
            self.tokens -= len(self.requests.popleft().tokens)

    def sample(self, n: int) -> list[Feedback]:
        """Up to n different requests, uniformly."""
        return self._random.sample(list(self.requests), min(n, len(self.requests)))

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def nbytes(self) -> int:
        return sum(feedback.nbytes for feedback in self.requests)
