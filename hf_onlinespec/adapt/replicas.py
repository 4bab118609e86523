"""Several processes learn one adapter: what each has learned is averaged every n updates, and no request waits for that.

What is published and read travels in a thread of its own, see contributions.py; the adapter moves between two requests alone, and
only when everything is there. What becomes of the state of learning beside the parameters:

- Moments, hints and the cap of gradients stay, as in DiLoCo: they belong to gradients of the replica's own stream, and forget within
  a hundred updates.
- An ensemble's weights and removed experts, the guard's earlier states and the router stay: each replica's own stream tells which of
  its adapters speaks. The guard meets an average as any other change: if it does worse than an earlier state, that one takes over, and
  the way back is published as whatever else moves the parameters.
- Requests that are remembered never leave their process: they hold users' tokens.
- A step that is skipped because it was not finite is one process' own; an adapter that is not finite is published by none.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from .._compat.processes import Process, has_others, this_process
from ..errors import ConfigError
from ..metrics.summary import counted
from ..runtime.failures import Attempt, Backoff
from ..runtime.forks import Lock, renew_in_child
from .contributions import Contributions
from .learner import Learner
from .service import LearningService


class _Exchange(threading.Thread):
    """One exchange with the other replicas, which no request waits for. A process that ends does, as far as the store answers."""

    def __init__(self, shared: Contributions, params: Tensor) -> None:
        super().__init__(name="hf_onlinespec replicas", daemon=False)
        self.params = params  # (parameters,) where this replica was when it began
        self.common: Tensor | None = (
            None  # (parameters,) the new common adapter; None: not yet, or `error` says why not
        )
        self.error: Exception | None = None
        self._shared = shared

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.common = self._shared.exchange(self.params)
        except Exception as error:  # the store's process may have died: learning goes on alone
            self.error = error


class Replicas:
    """The other processes, from the side of one draft's learning. Without a process group of several it does nothing.

    Args:
        learning: whose adapter is averaged, after every `average_every` gradient steps, and at the latest after so many calls.
    """

    def __init__(self, learning: LearningService) -> None:
        self._learning = learning
        self._every = learning.settings.average_every
        self._name = ""  # of the draft, by the order in which drafts first generate; "": it has not yet
        self._process: Process | None = None
        self._shared: Contributions | None = None
        self._learner: Learner | None = None  # whose adapter `_shared` is about
        self._exchange: _Exchange | None = None  # that is under way, or was not taken in yet
        self._steps = self._calls = 0  # gradient steps at the last exchange; calls since then
        self._backoff = Backoff("Averaging with the other processes", "this one learns on alone")
        self._busy = Lock(waits=False)
        renew_in_child(self)

    def renew(self) -> None:
        """A forked child is none of the processes that its parent averages with."""
        if self._process is not None:
            self.leave("")

    @property
    def nbytes(self) -> int:
        """Bytes of the contributions that are known."""
        shared = self._shared
        return 0 if shared is None else shared.nbytes

    def leave(self, reason: str) -> None:
        """From now on this process learns alone, for a reason."""
        self._every = self._shared = self._exchange = None
        self._learning.metrics.decisions.averaging = reason

    @property
    def leaves_names_out(self) -> bool:
        """Whether other processes learn the adapter without a name, and those with names are each process' own."""
        return self._every is not None and has_others()

    def saves(self, is_main_process: bool | None) -> bool:
        """Whether this process saves what all of them have learned; None: the one of rank 0 does."""
        if is_main_process is not None:
            return is_main_process
        process = self._process if self._process is not None or self._every is None else this_process()
        return process is None or process.rank == 0

    # Between requests

    def begin_call(self, base: Mapping[str, str], begun: int) -> None:
        """Before a request: what the others have learned is taken in, if it is there.

        Args:
            base: what tells the base draft from others.
            begun: how often the draft has begun on other weights.

        Raises:
            ConfigError: another process learns another draft.
        """
        if self._every is None or not self._busy.acquire(0.0):
            return
        started = time.perf_counter()
        try:
            if self._learner is not self._learning.learner:
                self._begin(base, begun)
            with self._attempt():
                self._take()
        finally:
            self._end_turn(started)

    def end_call(self) -> None:
        """After a request: what was learned is published, if that is due, and what the others have learned taken in, if it is there."""
        if self._shared is None or self._every is None or not self._busy.acquire(0.0):
            return
        started = time.perf_counter()
        try:
            with self._attempt():
                self._take()
                self._calls += 1
                steps = self._learning.learner.experts.steps
                if steps - self._steps >= self._every or self._calls >= self._every:
                    self._start()
        finally:
            self._end_turn(started)

    def _end_turn(self, started: float) -> None:
        if self._shared is not None:
            self._learning.metrics.averaging_time_s += time.perf_counter() - started
        self._busy.release()

    def catch_up(self, timeout_s: float | None) -> bool:
        """Publishes what was learned and takes in what the others have published by now; False: no time, or no store."""
        if self._shared is None:
            return True
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._busy:
            if not self._settle(end):
                return False
            self._backoff.resume()
            with self._attempt():
                self._start(waits=True)
            return self._settle(end)

    def _settle(self, end: float | None) -> bool:
        """Waits for an exchange that is under way, until a moment of the monotonic clock; whether it is taken in, or there was none."""
        if self._exchange is not None:
            self._exchange.join(None if end is None else max(0.0, end - time.monotonic()))
        settled = False
        with self._attempt():
            settled = self._take(waits=True)
        return settled

    def _attempt(self) -> Attempt:
        """A `with` block that no failure leaves: learning goes on alone."""
        return self._backoff.attempt(self._tell)

    def _tell(self) -> None:
        self._learning.metrics.decisions.averaging = self._backoff.reason

    def _begin(self, base: Mapping[str, str], begun: int) -> None:
        """The adapter is one that the others know, or the store is not there."""
        learning, process = self._learning, this_process()
        if process is None:
            return
        if not self._name:
            self._name = str(next(process.numbers))
        self._process, self._shared, self._exchange = process, None, None
        different: ConfigError | None = None
        with self._attempt():
            try:
                self._shared = self._join(process, base, begun)
            except ConfigError as error:
                different = error
        if different is not None:
            raise different
        self._learner = learning.learner
        with self._attempt():
            self._start()  # the others may have begun before

    def _join(self, process: Process, base: Mapping[str, str], begun: int) -> Contributions:
        learning = self._learning
        with learning.steps_lock:
            start, self._steps = _flat(learning.learner), learning.learner.experts.steps
        values = {name: json.dumps(value) for name, value in learning.settings.to_saved().items()}
        fingerprint = hashlib.sha256(start.numpy().tobytes()).hexdigest()[:16]
        known = {**base, **values, "the adapter that it begins with": fingerprint}
        return Contributions(process, f"{self._name}.{begun}", start, known)

    def _start(self, waits: bool = False) -> None:
        """Begins an exchange, unless one is under way, or a gradient step that is not waited for."""
        learning, shared = self._learning, self._shared
        if self._exchange is not None or shared is None or not self._backoff.begin():
            return
        if not learning.steps_lock.acquire(-1.0 if waits else 0.0):
            return
        try:
            params, self._steps = _flat(learning.learner), learning.learner.experts.steps
        finally:
            learning.steps_lock.release()
        self._calls = 0
        exchange = _Exchange(shared, params)
        exchange.start()
        self._exchange = exchange

    def _take(self, waits: bool = False) -> bool:
        """Takes in what an exchange has found, if it is over and no gradient step is under way; whether none is left, and none failed.

        Args:
            waits: for a gradient step.
        """
        learning, exchange, shared = self._learning, self._exchange, self._shared
        if exchange is None or shared is None:
            return True
        if exchange.is_alive() or not learning.steps_lock.acquire(-1.0 if waits else 0.0):
            return False
        try:
            self._exchange = None
            if exchange.common is None:
                if exchange.error is not None:
                    self._backoff.failed(exchange.error)
                    self._tell()
                return False
            self._backoff.worked()
            if not torch.equal(exchange.common, shared.common):
                learning.move(exchange.params, exchange.common)
                learning.fold()
            shared.go_on(exchange.common)
            learning.learned_elsewhere |= shared.contributors > 0
            learning.metrics.averages += 1
            learning.metrics.decisions.averaging = f"{counted(learning.metrics.averages, 'exchange')}; {counted(shared.contributors, 'other process')} contributed"
        finally:
            learning.steps_lock.release()
        return True


def _flat(learner: Learner) -> Tensor:
    """A copy of the parameters (parameters,), float32 on the CPU."""
    with torch.inference_mode(False), torch.no_grad():
        return learner.trainable.adapter.params.detach().to("cpu", torch.float32, copy=True)
