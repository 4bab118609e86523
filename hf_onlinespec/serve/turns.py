"""Whose turn it is: requests that can be decoded together are, up to so many; others alone; all begin in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from .._compat.serving import Cancelled
from ..metrics import Counts
from ..verify.running_calls import RunningCall, RunningCalls
from .calls import ServedCall, Serving

# Prompts that are read together take at most so many times the tokens that they have: the shorter ones are padded. Chosen.
MOST_PADDED = 2.0


class Turns:
    """Requests that wait and that run. All methods are called in the one thread that generates.

    Args:
        most: requests that are decoded together; 1: each alone.
        submit: calls a function in that thread, behind whatever was submitted before.
    """

    def __init__(self, serving: Serving, most: int, submit: Callable[[Callable[[], None]], Any]) -> None:
        self._serving, self._most, self._submit = serving, most, submit
        self._waiting = deque[ServedCall]()
        self._rounds = RunningCalls(serving.draft)
        self._served = dict[RunningCall, ServedCall]()  # those that run
        self._steps = False  # whether a step was submitted that is still to come

    def arrived(self, call: ServedCall) -> None:
        """A request waits for its turn."""
        self._waiting.append(call)
        self._go_on()

    def finish(self) -> None:
        """Ends all that waits and runs, once the server is closed."""
        while self._waiting or self._served:
            self._step()

    def _go_on(self) -> None:
        """What arrives while others run is in the thread's queue before the next step, and begins in it."""
        if not self._steps and (self._waiting or self._served):
            self._steps = True
            self._submit(self._next)

    def _next(self) -> None:
        self._steps = False
        try:
            self._step()
        finally:
            self._go_on()

    def _step(self) -> None:
        """One round of those that begin or of those that run, or one request alone."""
        self._drop_stopped()
        new = self._beginning()
        if new:
            self._begin(new)
        elif self._served:
            self._ended(self._rounds.step())
        elif self._waiting:
            self._waiting.popleft().run_alone()

    def _drop_stopped(self) -> None:
        """Requests that nobody waits for any more end before they have begun."""
        for call in [call for call in self._waiting if call.is_stopped]:
            self._waiting.remove(call)
            call.begin()
            call.end(None, Cancelled(), Counts(), 0.0)

    def _beginning(self) -> list[ServedCall]:
        """Takes the requests that begin now. Behind one that is decoded alone all others wait until it had its turn."""
        new, tokens = list[ServedCall](), list[int]()
        while self._most > 1 and self._waiting and len(self._served) + len(new) < self._most:
            call = self._waiting[0].joining
            if call is None:
                break
            with_it = [*tokens, call.input_ids.shape[1]]
            if max(with_it) * len(with_it) > MOST_PADDED * sum(with_it):
                break
            tokens = with_it
            new.append(self._waiting.popleft())
        return new

    def _begin(self, new: list[ServedCall]) -> None:
        opened, serving = list[RunningCall](), self._serving
        beside = len(self._served) + len(new) - 1
        for call in new:
            call.begin()
            prepared = call.joining
            assert prepared is not None
            try:
                serving.draft.begin_anew_if_changed()
                serving.memories.use(call.asked.client)
                running = self._rounds.open(prepared, True, call.asked.adapter, call.streamer, beside)
            except Exception as error:  # a draft that was changed, or a client of a stream that is gone
                call.end(None, error, Counts(), 0.0)
                continue
            opened.append(running)
            self._served[running] = call
        if opened:
            self._ended(self._rounds.begin(opened))

    def _ended(self, calls: list[RunningCall]) -> None:
        for one in calls:
            self._served.pop(one).end(one.tokens, one.error, one.request.counts, one.own_s)
