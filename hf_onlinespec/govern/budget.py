"""How much learning is worth: gradient steps are paid from a share of the decoding time, and have to bring something for it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from ..metrics import Decisions


@dataclass(frozen=True)
class BudgetConstants:
    """Of how the fraction of the budget follows what learning gains. Its beginning: LOG 2026-11-22 "Why ours lost to the memory
    alone, and what was changed"."""

    first_fraction: float = 1 / 4  # of the budget, to begin with; chosen
    fraction_step: float = 4.0  # by which it is multiplied or divided; chosen
    first_window: int = 4  # comparisons between two looks at what learning gained; chosen
    # The same, at most; chosen. Without it, what begins to pay late is noticed ever later:
    # test_what_begins_to_pay_late_is_noticed_as_soon.
    last_window: int = 64
    payback: float = 0.5  # part of its cost that learning has to gain within as long as it took; chosen
    least_noise: float = 0.05  # of one comparison: a few that happen to agree prove nothing; chosen
    price_window: int = 48  # recent times whose median is the price of a gradient step, or of scoring; chosen
    stall: float = (
        10.0  # a step counts as so many times its price at most: a stall is no reason to stop for long; chosen
    )
    saved_rounds: float = 2.0  # learning after, or scoring, so many requests is what may be saved up; chosen
    scoring_share: float = (
        0.005  # of the time, for scoring requests in which the draft neither drafts nor learns; chosen
    )
    # The same, for scoring a request under every adapter, where the draft is asked to choose among them; chosen.
    comparing_share: float = 0.02

    @property
    def least_fraction(self) -> float:
        """Of the budget, where nothing is gained."""
        return self.first_fraction / self.fraction_step


class _PerDraft:
    """The requests that one of the two drafts serves: the learned one or the base draft."""

    def __init__(self, constants: BudgetConstants) -> None:
        self._constants = constants
        self.fraction = constants.first_fraction
        self.begin()

    def begin(self) -> None:
        """Forgets what was compared."""
        self.window: list[float] = []
        self.window_size, self.before = self._constants.first_window, 0.0


class Allowance:
    """A share of the decoding time that something now and then may take."""

    def __init__(self, share: float, constants: BudgetConstants) -> None:
        self._share, self._constants = share, constants
        self._prices_s, self._price_s, self._saved_s = deque[float](maxlen=constants.price_window), 0.0, 0.0

    def earn(self, seconds: float) -> None:
        """So much time was spent on decoding."""
        self._saved_s += self._share * seconds
        if self._prices_s:
            self._saved_s = min(self._saved_s, self._constants.saved_rounds * self._price_s)

    def affordable(self) -> bool:
        """Whether there is time for it; the first time, which tells what it takes, always."""
        return not self._prices_s or self._saved_s >= self._price_s

    def spent(self, seconds: float) -> None:
        """It took so long."""
        if not 0 <= seconds < math.inf:
            return
        known = bool(self._prices_s)
        self._saved_s = self._saved_s - min(seconds, self._constants.stall * self._price_s) if known else 0.0
        self._prices_s.append(seconds)
        self._price_s = statistics.median(self._prices_s)


class LearningBudget:
    """Earns `budget · fraction` of the decoding time and pays for gradient steps.

    Over windows of doubling length, learning has to gain half of what it costs (the stream is taken to go on for as long as
    it has lasted), else the fraction is cut. It begins at a quarter; the full budget is for a stream that has changed.
    Requests that the base draft serves better are a part of the stream with a fraction of its own (`base` below).

    Args:
        budget: largest share of the time that learning may take.
        passes: most gradient steps on remembered requests after one request.
        decisions: where the fraction and the reason for it are written.

    Attributes:
        scoring: of requests in which the draft neither drafts nor learns.
        comparing: of requests under every adapter.
    """

    def __init__(
        self, budget: float, passes: int, decisions: Decisions, constants: BudgetConstants = BudgetConstants()
    ) -> None:
        self._budget, self._passes, self._decisions = budget, passes, decisions
        self._constants = constants
        decisions.budget_fraction = constants.first_fraction
        self.verdict = ""  # what was found out about learning the last time, and what follows; empty: nothing yet
        self._parts = {base: _PerDraft(constants) for base in (False, True)}
        self._balance_s, self._limit = 0.0, 1.0
        self._steps_s: deque[float] = deque(maxlen=constants.price_window)
        self._step_s = 0.0  # their median: what a gradient step costs
        self.scoring = Allowance(constants.scoring_share, constants)
        self.comparing = Allowance(constants.comparing_share, constants)

    def earn(self, seconds: float, base: bool = False, limit: float = 1.0) -> None:
        """So much time was spent on decoding, and learning may take no larger share of it than `limit`."""
        self._decisions.budget_fraction, self._limit = self._parts[base].fraction, limit
        if 0 < seconds < math.inf:
            self.scoring.earn(seconds)
            self.comparing.earn(seconds)
            self._balance_s += min(limit, self._budget * self._decisions.budget_fraction) * seconds
            if self._step_s:
                most = self._constants.saved_rounds * (1 + self._passes) * self._step_s
                self._balance_s = min(self._balance_s, most)

    def affordable_steps(self) -> int:
        """Gradient steps that can be paid for now: one on what is new, the others on what is remembered."""
        step = self._step_s
        if not step:
            return 1 + self._passes if self._balance_s >= 0 else 0  # below: it took time, and came to no step
        steps = min(int(self._balance_s / step), 1 + self._passes)
        return 0 if steps < min(2, 1 + self._passes) else steps

    def spent(self, seconds: float, steps: int) -> None:
        """Learning took so many seconds for so many gradient steps."""
        if not 0 <= seconds < math.inf:
            return
        price = self._step_s
        if price:
            seconds = min(seconds, self._constants.stall * max(steps, 1) * price)
        self._balance_s = max(self._balance_s - seconds, -(1 + self._passes) * price if price else -seconds)
        if steps:
            self._steps_s.append(seconds / steps)
            self._step_s = statistics.median(self._steps_s)

    def observe_gain(self, ratio: float, base: bool = False) -> None:
        """Takes in tokens per round with what was learned over tokens per round without, on the same tokens."""
        if not math.isfinite(ratio):
            return
        part = self._parts[base]
        part.window.append(ratio)
        if len(part.window) < part.window_size:
            return
        now = statistics.mean(part.window)
        doubt = statistics.stdev(part.window) * (2 / len(part.window)) ** 0.5 / now  # of two such means' ratio
        if part.before:
            self._judge(part, now / part.before - 1, doubt)
        part.before, part.window = now, []

    def _judge(self, part: _PerDraft, gain: float, doubt: float) -> None:
        """Raises the fraction where the last window paid for itself; lowers it where it did not, or nothing shows that it did.

        Args:
            doubt: standard error of the gain, which counts against it.
        """
        constants = self._constants
        least = max(doubt, constants.least_noise * (2 / len(part.window)) ** 0.5)
        share = self._budget * part.fraction
        part.window_size = min(2 * part.window_size, constants.last_window)
        if gain - least > share * constants.payback:
            if part.fraction < 1.0:
                part.window_size = constants.first_window  # more is spent: look again soon
            part.fraction = min(1.0, constants.fraction_step * part.fraction)
        elif part.fraction > constants.first_fraction or gain + doubt < share * constants.payback:
            part.fraction = max(constants.least_fraction, part.fraction / constants.fraction_step)
            if part.fraction == constants.least_fraction:  # comparisons are rare there
                part.window_size = 2 * constants.first_window
        self._decisions.budget_fraction = part.fraction
        self.say(
            f"the last {len(part.window)} comparisons show a gain of {gain:+.1%} (±{doubt:.1%}) in tokens per round, "
            f"at {share:.1%} of the time: budget fraction {part.fraction:.3g}"
        )

    def reset_full(self, reason: str, base: bool = False) -> None:
        """The full budget: there is something to learn."""
        part = self._parts[base]
        part.fraction = self._decisions.budget_fraction = 1.0
        self.say(f"{reason}: full budget")
        part.begin()

    def reset_least(self, reason: str) -> None:
        """The smallest fraction: there is nothing to learn."""
        least = self._constants.least_fraction
        for part in self._parts.values():
            part.begin()
            part.fraction, part.window_size = least, 2 * self._constants.first_window
        self._decisions.budget_fraction = least
        self.say(f"{reason}: budget fraction {least:.3g}")

    def say(self, verdict: str) -> None:
        """Notes what holds until something else is found out."""
        self.verdict = self._decisions.learning = verdict

    def account(self) -> str:
        """What gradient steps take, and what there is for them, in words."""
        most = min(self._limit, self._budget * self._decisions.budget_fraction)
        share = f"the {most:.1%} of the decoding time that learning may take"
        if not self._step_s:
            return f"it took more than {share}, and came to no gradient step"
        steps = 1 + self._passes
        return f"{steps} gradient steps take {steps * self._step_s:.2g} s, and {max(0.0, self._balance_s):.2g} s are left of {share}"
