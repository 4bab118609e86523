"""How many prompts, of how many new tokens, fit into the time that a trial may take."""

from __future__ import annotations

from collections.abc import Callable

LEAST_PROMPTS = 8  # fewer decide nothing: they are measured even where that takes longer than was asked for
WANTED_PROMPTS = (
    24  # answers are shortened, down to SHORT, so that so many fit: the shipped kinds come three times (chosen)
)
LONG, SHORT, SHORTEST = 96, 48, 16  # new tokens per prompt (chosen)
ROOM = (
    1.25  # a prompt's time over its forwards' in the measured arms: reading the prompt, examining what differs (chosen)
)
RESERVE_S = 3.0  # for the verdict and the report


class Budget:
    """The time of one trial.

    Args:
        minutes: that the whole command may take, loading included.
        started_s: when it started, by `clock`.
        clock: seconds.
    """

    def __init__(self, minutes: float, started_s: float, clock: Callable[[], float]) -> None:
        self.total_s, self._started_s, self._clock = 60 * minutes, started_s, clock
        self._prompts, self._first_s = 0, 0.0  # finished ones, and when the first one began

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    @property
    def left_s(self) -> float:
        return self.total_s - self.elapsed_s - RESERVE_S

    def new_tokens(self, token_s: float) -> int:
        """How many new tokens each prompt gets.

        Args:
            token_s: time of one token in every arm, together.
        """
        token_s *= ROOM
        room = max(0.0, self.left_s)
        wanted = int(room / (WANTED_PROMPTS * token_s))
        if wanted >= SHORT:
            return min(LONG, wanted)
        return min(SHORT, max(SHORTEST, int(room / (LEAST_PROMPTS * token_s))))

    def begin(self) -> None:
        """The first prompt begins."""
        self._first_s = self.elapsed_s

    def finish_prompt(self) -> None:
        self._prompts += 1

    @property
    def prompt_s(self) -> float:
        """Mean time of the finished prompts; 0: none is finished."""
        return (self.elapsed_s - self._first_s) / self._prompts if self._prompts else 0.0

    def has_room(self) -> bool:
        """Whether another prompt should be measured: it is expected to fit, or too few are done."""
        return self._prompts < LEAST_PROMPTS or self.prompt_s <= self.left_s

    @property
    def is_exceeded(self) -> bool:
        return self.left_s < 0
