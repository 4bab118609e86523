"""Costs: what drafting, verifying and reading a prompt take, in plain target steps of the machine's present pace."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class CostConstants:
    """Of how measured times become costs."""

    window: int = 48  # recent times of a size whose median counts; chosen
    sure: int = 3  # times that make a measurement; chosen
    stall: float = (
        10.0  # a time counts as so many times the expected one at most: one stall is a stall, however long; chosen
    )
    draft_slope: float = 0.7  # of drafting, relative to one token, until two sizes were seen; chosen
    verify_bend: float = 0.2  # of verifying, until it is known (see `VerifyCost`); chosen
    verify_slope: float = 0.05  # the same, per token; chosen
    # Whether a size above all that were seen often tells of verifying though it was hardly seen: see `Governor.for_rows`.
    once_is_enough: bool = False
    verify_prior: float = 0.01  # times that these two are worth: one size alone cannot tell them apart; chosen
    pace_rate: float = 0.2  # how fast the pace of the machine follows a round's time; chosen
    # Plain rounds one after the other that take so many times what the pace says: then what was measured against it is forgotten. Chosen;
    # without it, a machine that becomes slower in the first rounds looks too slow for drafting for ever:
    # test_a_machine_that_becomes_slower_at_once_is_drafted_on_again.
    changed: float = 1.5
    changed_rounds: int = 2
    pace_step: float = 2.0  # a round's time changes the pace as if it were so many times off at most; chosen
    prefill_rate: float = 0.2  # how fast the time of reading follows a prompt's; chosen
    prefill_stall: float = 4.0  # a prompt's time counts as so many times the known one at most; chosen
    cached_tokens: int = (
        8  # tokens that the draft has not read: more of them are a prompt, whose reading has to pay; chosen
    )


class DraftCost:
    """How long drafting n tokens takes, in plain target steps: medians, and a line through them for unseen n."""

    def __init__(self, constants: CostConstants = CostConstants()) -> None:
        self._constants = constants
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._start, self._step = 0.0, 0.0  # the line

    def add(self, n: int, steps: float) -> None:
        """Drafting n ≥ 1 tokens took so many plain steps."""
        seen = self._seen.setdefault(n, deque(maxlen=self._constants.window))
        seen.append(min(steps, self._constants.stall * self.at(n)) if self.known else steps)
        self._medians[n] = statistics.median(seen)
        self._start, self._step = self._line()

    @property
    def known(self) -> bool:
        return sum(map(len, self._seen.values())) >= self._constants.sure

    def at(self, n: int) -> float:
        """Time of n ≥ 1 tokens; 0 while nothing was seen."""
        return self._start + self._step * n

    def step(self) -> float:
        """Time that one more token adds; 0 while nothing was seen."""
        return self._step

    def _line(self) -> tuple[float, float]:
        """Least squares through the medians, never falling, never below zero."""
        often = {n: s for n, s in self._medians.items() if len(self._seen[n]) >= self._constants.sure}
        points = often or self._medians  # a size that was hardly seen may have met a stall
        weights = {n: len(self._seen[n]) for n in points}
        total = sum(weights.values())
        mean_n = sum(weights[n] * n for n in points) / total
        mean_s = sum(weights[n] * s for n, s in points.items()) / total
        spread = sum(weights[n] * (n - mean_n) ** 2 for n in points)
        if spread == 0:
            relative = self._constants.draft_slope
            slope = relative * mean_s / (1 + relative * (mean_n - 1))
        else:
            slope = max(0.0, sum(weights[n] * (n - mean_n) * (s - mean_s) for n, s in points.items()) / spread)
            slope = min(slope, mean_s / mean_n)  # nothing takes less than no time
        return mean_s - slope * mean_n, slope


class VerifyCost:
    """How long verifying k drafted tokens takes, in plain target steps: 1 + a·(1 − 2^(−k/2)) + b·k, through medians.

    The first few positions may cost more than further ones (other kernels, masks): a. Neither a nor b is below zero.
    """

    def __init__(self, constants: CostConstants = CostConstants()) -> None:
        self._constants = constants
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._bend, self._slope = self._constants.verify_bend, self._constants.verify_slope

    def add(self, k: int, steps: float) -> None:
        """Verifying k ≥ 1 tokens took so many plain steps."""
        seen = self._seen.setdefault(k, deque(maxlen=self._constants.window))
        seen.append(min(steps, self._constants.stall * self.at(k)))
        self._medians[k] = statistics.median(seen)
        if sum(map(len, self._seen.values())) >= self._constants.sure:
            self._fit()

    @property
    def widest(self) -> int:
        """Most tokens that were timed."""
        return max(self._seen, default=0)

    def at(self, k: int) -> float:
        """Time of verifying k ≥ 0 tokens."""
        return 1 + self._bend * (1 - 2 ** (-k / 2)) + self._slope * k

    def step(self, k: int) -> float:
        """Time that one more token adds to k of them."""
        return self.at(k + 1) - self.at(k)

    def _fit(self) -> None:
        constants = self._constants
        often = [k for k, seen in self._seen.items() if len(seen) >= constants.sure]
        if constants.once_is_enough:
            often += [k for k in self._seen if k > max(often, default=0)]
        xx = xk = kk = xy = ky = 0.0
        for k in often or self._seen:  # a size that was hardly seen may have met a stall
            weight, x, y = len(self._seen[k]), 1 - 2 ** (-k / 2), self._medians[k] - 1
            xx, xk, kk = xx + weight * x * x, xk + weight * x * k, kk + weight * k * k
            xy, ky = xy + weight * x * y, ky + weight * k * y
        prior = constants.verify_prior
        xx, xy = xx + prior, xy + prior * constants.verify_bend
        kk, ky = kk + prior, ky + prior * constants.verify_slope
        det = xx * kk - xk * xk
        bend, slope = (xy * kk - ky * xk) / det, (ky * xx - xy * xk) / det
        if bend < 0:
            bend, slope = 0.0, ky / kk
        elif slope < 0:
            bend, slope = xy / xx, 0.0
        self._bend, self._slope = max(0.0, bend), max(0.0, slope)


class Costs:
    """Times in plain target steps of the present pace, so that a machine that slows down changes no decision."""

    def __init__(self, constants: CostConstants = CostConstants()) -> None:
        self._constants = constants
        self.verify, self.draft = VerifyCost(constants), DraftCost(constants)  # of k ≥ 1 drafted tokens
        self.pace_s = 0.0  # seconds of a plain target step; 0: not known
        self._changed = 0  # plain rounds one after the other that took much longer than the pace says
        self._prefill_step = 0.0  # time of the draft for one token of a prompt; 0: not known

    @property
    def known(self) -> bool:
        """Whether plain steps and drafting were timed."""
        return bool(self.pace_s) and self.draft.known

    def round(self, k: int) -> float:
        """Time of drafting and verifying k ≥ 1 tokens."""
        return self.verify.at(k) + self.draft.at(k)

    def without_stall(self, steps: float, read: int = 0) -> float:
        """A time of drafting in plain steps, counted as so many times the usual one at most; `read`: tokens of a prompt that it read."""
        constants = self._constants
        usual = self.draft.at(1) if self.draft.known else 1.0  # a draft's step takes less than one of the target's
        return min(steps, constants.stall * usual + constants.prefill_stall * self.prefill(read))

    def drafting(self, begun: bool) -> float:
        """Time of one more drafted token; the first of a round costs more."""
        return self.draft.step() if begun else self.draft.at(1)

    def is_prompt(self, unread: float) -> bool:
        """Whether so many tokens that the draft has not read are a prompt, and not what the last round left."""
        return unread > self._constants.cached_tokens

    def prefill(self, tokens: float) -> float:
        """Time of the draft for reading so many tokens of a prompt; 0 while it is not known."""
        return tokens * self._prefill_step

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The draft took so long to read so many tokens."""
        if not self.pace_s or not self.is_prompt(tokens) or not 0 < seconds < math.inf:
            return
        step, known = seconds / tokens / self.pace_s, self._prefill_step
        rate = self._constants.prefill_rate if known else 1.0
        self._prefill_step += rate * (min(step, self._constants.prefill_stall * known or step) - known)

    def observe_round(self, k: int, steps: int, draft_s: float, target_s: float) -> None:
        """Takes in the times of a round that verified k tokens, `steps` of them drafted by the model."""
        if not 0 < target_s < math.inf or not 0 <= draft_s < math.inf:
            return
        if not self.pace_s:
            if not k:
                self.pace_s = target_s
            return
        ratio = target_s / (self.pace_s * self.verify.at(k))
        if steps and draft_s:
            self.draft.add(steps, draft_s / self.pace_s)
        if k:
            self.verify.add(k, target_s / self.pace_s)
            self._changed = 0
        else:
            self._changed = self._changed + 1 if ratio > self._constants.changed else 0
            if self._changed == self._constants.changed_rounds:
                self.verify.forget()
                self.draft.forget()
                self._changed, self.pace_s, self._prefill_step = 0, target_s, 0.0
                return
        most = self._constants.pace_step
        self.pace_s *= min(max(ratio, 1 / most), most) ** self._constants.pace_rate
