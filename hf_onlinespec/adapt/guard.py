"""Never worse: earlier states of the adapter, for a stream that has left it, or comes back.

Acceptance on new tokens is watched. Where it leaves its level, or what was learned does worse than the base draft, the
stream has changed; then, and now and then in any case, earlier states are tried on the same tokens, and the best one takes over
if it is surely better.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArtifactError, brief
from ..state import State, are_numbers

LARGEST_LEAD = 2.0  # of one state's acceptance over another's, and some rounding


@dataclass(frozen=True)
class GuardConstants:
    """Of when earlier states are kept and tried, and when one of them takes over."""

    # Requests between two states that may be kept; chosen. Where the latest one is from just before a change, and too few are kept,
    # what was learned of the domain before is lost: test_back_in_an_old_domain_an_earlier_state_serves.
    keep_every: int = 8
    latest: int = 3  # requests that tell how it is now; chosen
    # Requests after a trial before the next one, where nothing is suspicious; chosen. Some changes do not show in acceptance:
    # test_a_change_that_does_not_show_is_found_by_the_next_trial.
    try_every: int = 8
    # Requests of a trial, on every one of which the state that takes over has to lead. Three cost acceptance on a gradual drift (2.18
    # against 2.30): LOG 2026-11-22 "The learners, compared".
    trial: int = 6
    # Of acceptance, by which it has left its level, at least; chosen. By their spread alone, small changes of a steady stream look
    # like drift: test_a_steady_stream_keeps_what_was_learned.
    least_drift: float = 0.1
    drift_deviations: float = 2.0  # standard errors by which it has; chosen
    worse: float = 0.02  # acceptance below the base draft's that raises suspicion; chosen
    # How fast level and spread follow requests; chosen. The level of the last request alone hides a change:
    # test_after_a_burst_that_led_it_astray_it_goes_back.
    level_rate: float = 0.1
    first_spread_rate: float = 0.5  # part of the first request's acceptance that is the first spread; chosen


@dataclass(frozen=True)
class Winner:
    """Parameters that did better than those that serve, on every request of a trial."""

    params: Tensor  # (parameters,)
    lead: float  # of their acceptance on the requests of the trial, on average


class Trial:
    """Earlier states and the base draft, tried on one request after the other beside what serves."""

    def __init__(self, constants: GuardConstants) -> None:
        # States and their lead on every request; None: the base draft.
        self.candidates: list[tuple[Tensor | None, list[float]]] = []
        self.requests = 0  # that it has taken; 0: no trial is under way
        self._constants = constants

    def begin(self, states: Sequence[Tensor], tries_base: bool) -> None:
        """Begins with these states, and with the base draft if it may win."""
        self.candidates = [(state, []) for state in states]
        self.candidates += [(None, [])] if tries_base else []

    def end(self) -> None:
        """Forgets what was tried."""
        self.candidates, self.requests = [], 0

    def observe(
        self,
        learned: float,
        base_params: Callable[[], Tensor] | None,
        acceptance: Callable[[Tensor], Sequence[float]],
    ) -> Winner | None:
        """Tries every candidate on a request; after `trial` of them the best one of those that led on all wins. It ends early where none is left.

        Args:
            learned: acceptance of what serves; the others are those of `Guard.observe`.
        """
        self.requests += 1
        leading: list[Winner] = []  # on every request so far
        for state, leads in self.candidates:
            # Requests differ more than tokens do: on a mixed stream every state is better on some of them.
            if leads and min(leads) <= 0:
                continue
            params = state
            if params is None:
                assert base_params is not None
                params = base_params()
            leads.append(statistics.mean(acceptance(params)) - learned)
            if leads[-1] > 0:
                leading.append(Winner(params, statistics.mean(leads)))
        if leading and self.requests < self._constants.trial:
            return None  # it goes on with the next request
        self.end()
        return max(leading, key=lambda one: one.lead, default=None)


class Guard:
    """Keeps up to `size` earlier states of an adapter, the latest one included, and says when to go back to one."""

    def __init__(self, size: int, constants: GuardConstants = GuardConstants()) -> None:
        self.states: list[Tensor] = []  # the newest last
        self.rollbacks = 0
        self.reason = ""  # of the last rollback
        self._size, self._constants = size, constants
        self._candidate: Tensor | None = None  # a state from before the latest requests
        self._age = 0  # requests since it was taken
        # Acceptance of the latest requests, of the learned and of the base draft.
        self._latest: deque[tuple[float, float | None]] = deque(maxlen=constants.latest)
        self._level, self._spread = 0.0, 0.0  # acceptance of requests before them, and its mean absolute deviation
        self._requests_to_trial = constants.try_every  # requests until the next trial
        self._trial = Trial(constants)

    @property
    def nbytes(self) -> int:
        kept = [*self.states, *([] if self._candidate is None else [self._candidate])]  # a trial's are among them
        return sum(state.nbytes for state in kept)

    def observe(
        self,
        learned: Sequence[float],
        base: Sequence[float] | None,
        best: Callable[[], Tensor],
        base_params: Callable[[], Tensor] | None,
        acceptance: Callable[[Tensor], Sequence[float]],
    ) -> Tensor | None:
        """Takes in the acceptance on a request that was not learned from yet; the state to go back to, or None.

        Args:
            learned: at every new token, of what is served.
            base: of the base draft; None: it was not looked at.
            best: gives a copy of the parameters (parameters,) that do best now.
            base_params: gives parameters that change nothing, the base draft, worth a trial too; None: not tried.
            acceptance: what other parameters would have reached on the same tokens.
        """
        if not self._size or not learned or not math.isfinite(statistics.mean(learned)):
            return None
        self._latest.append((statistics.mean(learned), None if base is None else statistics.mean(base)))
        self._requests_to_trial -= 1
        self._age += 1
        left = len(self._latest) == self._constants.latest and not self._trial.requests and self._drifted()
        if left:
            self._level = statistics.mean(a for a, _ in self._latest)
            self._latest.clear()
            if self._candidate is not None:
                self._keep(self._candidate)
        if left or self._trial.requests or self._requests_to_trial <= 0:
            return self._try_earlier(learned, best, base_params, acceptance)
        if self._candidate is None or self._age >= self._constants.keep_every:
            self._candidate, self._age = best(), 0
            while len(self.states) >= self._size:
                self._forget(range(len(self.states)))
        self._track_level(statistics.mean(learned))
        return None

    def go_back(self) -> Tensor | None:
        """The newest earlier state, for an adapter that has diverged; None: there is none. A state is handed out once."""
        kept = [*self.states, *([] if self._candidate is None else [self._candidate])]
        self.states, self._candidate = [], None
        self._trial.end()
        self._requests_to_trial = self._constants.try_every
        self._latest.clear()
        found = None
        while kept and found is None:
            newest = kept.pop()
            found = newest if bool(torch.isfinite(newest.float().norm())) else None
        self.states = kept
        if found is not None:
            self.rollbacks += 1
            self.reason = "the adapter was not finite any more: it learns on from its newest earlier state"
        return found

    def _track_level(self, acceptance: float) -> None:
        first, rate = self._spread == 0.0, self._constants.level_rate
        spread_rate = self._constants.first_spread_rate if first else rate
        self._spread += spread_rate * (abs(acceptance - self._level) - self._spread)
        self._level += (1.0 if first else rate) * (acceptance - self._level)

    def _drifted(self) -> bool:
        """Whether acceptance has left its level, up or down, or what was learned does worse than the base draft."""
        constants = self._constants
        now = statistics.mean(a for a, _ in self._latest)
        leads = [a - b for a, b in self._latest if b is not None]
        # A standard deviation is 1.25 mean absolute deviations.
        error = 1.25 * self._spread / constants.latest**0.5
        left = abs(now - self._level) > max(constants.least_drift, constants.drift_deviations * error)
        return left or (len(leads) >= 2 and statistics.mean(leads) < -constants.worse)

    def _try_earlier(
        self,
        learned: Sequence[float],
        best: Callable[[], Tensor],
        base_params: Callable[[], Tensor] | None,
        acceptance: Callable[[Tensor], Sequence[float]],
    ) -> Tensor | None:
        """Everything that was kept is tried on this request, and on the next ones where that leaves a doubt."""
        now = statistics.mean(learned)
        if not self._trial.candidates:
            self._trial.begin(self.states, base_params is not None)
        winner = self._trial.observe(now, base_params, acceptance)
        if not self._trial.requests:
            self._requests_to_trial = self._constants.try_every
        if winner is None:
            return None
        self._keep(best())  # what was learned last may be wanted again, too
        self._latest.clear()
        self.rollbacks += 1
        self.reason = (
            f"an earlier state of the adapter reaches {winner.lead:+.2f} acceptance beside {now:.2f} "
            "on the same tokens: it learns on from there"
        )
        return winner.params.clone()

    def _keep(self, state: Tensor) -> None:
        """Keeps a state beside the others, in the place of the latest one; of too many, an older one goes."""
        self.states.append(state)
        self._candidate, self._age = None, 0
        while len(self.states) > self._size:
            self._forget(range(len(self.states) - 1))

    def _forget(self, choice: range) -> None:
        """Of these states the one goes that is nearest to another."""
        kept = [*self.states, *([] if self._candidate is None else [self._candidate])]
        gaps = [min((float((a.float() - b.float()).norm()) for b in kept if b is not a), default=0.0) for a in kept]
        del self.states[min(choice, key=lambda i: gaps[i])]

    def state(self) -> State:
        """Everything, so that it goes on as if it had never stopped."""
        tensors = {f"states.{i}": state for i, state in enumerate(self.states)}
        if self._candidate is not None:
            tensors["candidate"] = self._candidate
        place = {id(state): i for i, state in enumerate(self.states)}
        values = {
            "states": len(self.states),
            "rollbacks": self.rollbacks,
            "reason": self.reason,
            "age": self._age,
            "latest": [list(pair) for pair in self._latest],
            "level": self._level,
            "spread": self._spread,
            "wait": self._requests_to_trial,
            "tried": [
                [None if state is None else place[id(state)], list(leads)] for state, leads in self._trial.candidates
            ],
            "trials": self._trial.requests,
        }
        return State(tensors, values)

    def resume(self, saved: State, like: Tensor, tries_base: bool = True) -> None:
        """The inverse of `saved`; states have the shape and dtype of `like`.

        Args:
            tries_base: whether the base draft may be among what is tried.
        """
        self.states = [saved.tensor(f"states.{i}", like) for i in range(saved.count("states"))]
        self._candidate = saved.tensor("candidate", like) if "candidate" in saved.tensors else None
        self.rollbacks, self.reason = saved.count("rollbacks"), saved.value("reason", str)
        self._age, self._requests_to_trial = saved.count("age"), saved.value("wait", int)
        self._trial.requests = saved.count("trials")
        self._level, self._spread = saved.value("level", float), saved.value("spread", float)
        latest, tried = saved.value("latest", list), saved.value("tried", list)
        if not are_numbers([self._requests_to_trial, self._level, self._spread]) or len(tried) > len(self.states) + 1:
            raise ArtifactError(f"The saved state of the guard does not fit together: tried={brief(tried)}.")
        try:
            for a, b in latest:
                if not are_numbers([a] if b is None else [a, b], LARGEST_LEAD):
                    raise ValueError(f"latest={brief(latest)}")
                self._latest.append((a, b))
            for at, leads in tried:
                if not are_numbers(leads, LARGEST_LEAD) or not (
                    (at is None and tries_base) or (type(at) is int and 0 <= at < len(self.states))
                ):
                    raise ValueError(f"tried={brief(tried)}")
                self._trial.candidates.append((None if at is None else self.states[at], leads))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"The saved state of the guard does not fit together ({error}).") from error
