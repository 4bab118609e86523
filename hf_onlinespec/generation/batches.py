"""Many prompts, a batch at a time: rows that end make room for the next prompts, where the target's cache allows it."""

from __future__ import annotations

from collections.abc import Callable

from ..verify.running import RunningBatch
from .answers import Answer
from .drafting import Drafting
from .prompt_calls import PromptCalls
from .prompts import Encoded

# Batches of prompts that are prepared as one call, of which a batch at a time is decoded. When the last of them have begun, rows that
# end leave their places empty: with so many batches that is a small part of the time. The first calls are of fewer, so that their
# prompts need not be waited for. Chosen.
FIRST_BATCHES, MOST_BATCHES = 2, 16
PADDED = 512  # tokens to which any prompt is padded; a longer one goes with those of at least half its length. Chosen
SORTED_BATCHES = 4  # where one batch follows another, batches that wait: prompts of similar lengths go together; chosen


class Batches:
    """Answers prompts, `size` at a time.

    Args:
        drafting: what drafts, asked at every call; None: nothing does.
    """

    def __init__(self, calls: PromptCalls, drafting: Callable[[], Drafting | None], size: int) -> None:
        self._calls, self._drafting, self._size = calls, drafting, size
        self._waiting: list[Encoded] = []
        self._joins = size > 1  # whether rows may join a batch that runs; until one call has shown that they cannot
        self._batches = FIRST_BATCHES
        self._running: RunningBatch | None = None
        self._begun: list[Encoded] = []  # the prompts of its rows
        self._begins = 0  # tokens that each of its rows begins with

    @property
    def room(self) -> int:
        """How many more prompts may wait."""
        if self._running is not None:
            return 0
        return self._size * (self._batches if self._joins else SORTED_BATCHES) - len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be answered."""
        return not self._waiting and self._running is None

    def add(self, prompt: Encoded) -> None:
        self._waiting.append(prompt)

    def step(self) -> list[Answer]:
        """Goes on with what waits; what was finished."""
        if self._running is None and self._joins:
            prompts = self._alike()
            if len(prompts) > self._size:
                self._begin(prompts)
        return self._calls.answer(self._next()) if self._running is None else self._go_on(self._running)

    def close(self) -> None:
        """The end, or what broke it off; what was learned is kept."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _alike(self) -> list[Encoded]:
        """The prompt that waits longest, and those that may be padded to one length with it; the shortest first."""
        n = len(min(self._waiting, key=lambda prompt: prompt.index).tokens)
        longest, shortest = max(PADDED, 2 * n), n / 2 if n > PADDED else 0
        alike = [prompt for prompt in self._waiting if shortest <= len(prompt.tokens) <= longest]
        return sorted(alike, key=lambda prompt: len(prompt.tokens))

    def _leave(self, taken: list[Encoded]) -> None:
        """Of what waits, all but these."""
        places = {prompt.index for prompt in taken}
        self._waiting = [prompt for prompt in self._waiting if prompt.index not in places]

    def _begin(self, prompts: list[Encoded]) -> None:
        """Prepares these as the rows of one call."""
        try:
            drafting = self._drafting()
            if drafting is not None:
                call = self._calls.prepare(prompts)
                self._running = RunningBatch(
                    call, drafting.draft, drafting.learns, self._size, drafting.adapter, drafting.tokenizers
                )
        except Exception:  # `generate` says why, where it fails at the batch, too
            pass
        self._joins = self._running is not None
        if self._joins:
            self._leave(prompts)
            self._begun = prompts
            self._begins = call.input_ids.shape[1]
            self._batches = min(2 * self._batches, MOST_BATCHES)

    def _go_on(self, running: RunningBatch) -> list[Answer]:
        try:
            ended = running.step()
            found = [
                self._calls.answer_with(self._begun[row], tokens[self._begins :].cpu()) for row, tokens in ended.items()
            ]
        except Exception as error:  # a processor or the model may raise anything
            failed = [self._begun[row] for row in running.running]
            self._waiting = [self._begun[row] for row in running.waiting] + self._waiting
            self.close()
            self._calls.warn(error, len(failed))
            return self._calls.answer_alone(failed)
        if running.done:
            self.close()
        return found

    def _next(self) -> list[Encoded]:
        """Takes the prompt that waits longest, and those of the most similar lengths."""
        alike = self._alike()
        at = min(range(len(alike)), key=lambda i: alike[i].index)
        first = max(0, min(at, len(alike) - self._size))
        batch = alike[first : first + self._size]
        self._leave(batch)
        return batch
