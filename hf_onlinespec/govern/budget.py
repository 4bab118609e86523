"""How much learning is worth: gradient steps are paid from a share of the decoding time, and have to bring something for it."""

from __future__ import annotations

import math
import statistics
from collections import deque

from ..metrics import Decisions
from .estimates import WINDOW

FIRST_WINDOW, LAST_WINDOW = 4, 64  # comparisons between two looks at what learning gained
LEAST_NOISE = 0.05  # of one comparison: a few that happen to agree prove nothing
FRACTION_STEP, FIRST_FRACTION, LEAST_FRACTION = 4.0, 1 / 4, 1 / 16
LOOK_SHARE = 0.005  # of the time, for looks at requests in which the draft neither drafts nor learns


class _PerDraft:
    """The requests that one of the two drafts serves: the learned one or the base draft."""

    def __init__(self) -> None:
        self.fraction = FIRST_FRACTION
        self.begin()

    def begin(self) -> None:
        """Forgets what was compared."""
        self.window: list[float] = []
        self.window_size, self.before = FIRST_WINDOW, 0.0


class LearningBudget:
    """A bank that earns `budget · fraction` of the decoding time and pays for gradient steps.

    Over windows of doubling length, learning has to gain half of what it costs (the stream is taken to go on for as long as
    it has lasted), else the fraction is cut. It begins at a quarter; the full budget is for a stream that has changed.
    Requests that the base draft serves better are a part of the stream with a fraction of its own (`base` below).

    Args:
        budget: largest share of the time that learning may take.
        passes: most gradient steps on remembered requests after one request.
        decisions: where the fraction and the reason for it are written.
    """

    def __init__(self, budget: float, passes: int, decisions: Decisions) -> None:
        self._budget, self._passes, self._decisions = budget, passes, decisions
        decisions.budget_fraction = FIRST_FRACTION
        self.verdict = ""  # what was found out about learning the last time, and what follows; empty: nothing yet
        self._parts = {base: _PerDraft() for base in (False, True)}
        self._balance_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=WINDOW)
        self._step_s = 0.0  # their median: what a gradient step costs
        self._looks_s: deque[float] = deque(maxlen=WINDOW)
        self._since_look_s = 0.0

    def earn(self, seconds: float, base: bool = False) -> None:
        """So much time was spent on decoding."""
        self._decisions.budget_fraction = self._parts[base].fraction
        if 0 < seconds < float("inf"):
            self._since_look_s += seconds
            self._balance_s += self._budget * self._decisions.budget_fraction * seconds
            if self._step_s:
                self._balance_s = min(self._balance_s, 2 * (1 + self._passes) * self._step_s)

    def affordable_steps(self) -> int:
        """Gradient steps that the bank can pay for now: one on what is new, the others on what is remembered."""
        step = self._step_s
        if not step:
            return 1 + self._passes if self._balance_s >= 0 else 0  # below: it took time, and came to no step
        steps = min(int(self._balance_s / step), 1 + self._passes)
        return 0 if steps < min(2, 1 + self._passes) else steps

    def spent(self, seconds: float, steps: int) -> None:
        """Learning took so many seconds for so many gradient steps."""
        if not 0 <= seconds < float("inf"):
            return
        price = self._step_s
        if price:  # a stall is no reason to stop learning for long
            seconds = min(seconds, 10 * max(steps, 1) * price)
        self._balance_s = max(self._balance_s - seconds, -(1 + self._passes) * price if price else -seconds)
        if steps:
            self._steps_s.append(seconds / steps)
            self._step_s = statistics.median(self._steps_s)

    def should_score(self) -> bool:
        """Whether a look at a request is affordable."""
        return not self._looks_s or LOOK_SHARE * self._since_look_s >= statistics.median(self._looks_s)

    def scored(self, seconds: float) -> None:
        """A look at a request took so long."""
        if 0 <= seconds < float("inf"):
            self._looks_s.append(seconds)
            self._since_look_s = 0.0

    def observe_gain(self, worth: float, base: bool = False) -> None:
        """Takes in tokens per round with what was learned over tokens per round without, on the same tokens."""
        if not math.isfinite(worth):
            return
        part = self._parts[base]
        part.window.append(worth)
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
            doubt: standard error of the gain. It counts twice for a larger fraction, and once for keeping the full one.
        """
        least = max(doubt, LEAST_NOISE * (2 / len(part.window)) ** 0.5)
        share = self._budget * part.fraction
        part.window_size = min(2 * part.window_size, LAST_WINDOW)
        if gain - (1 if part.fraction == 1.0 else 2) * least > share / 2:
            if part.fraction < 1.0:
                part.window_size = FIRST_WINDOW  # more is spent: look again soon
            part.fraction = min(1.0, FRACTION_STEP * part.fraction)
        elif part.fraction > FIRST_FRACTION or gain + doubt < share / 2:
            part.fraction = max(LEAST_FRACTION, part.fraction / FRACTION_STEP)
            if part.fraction == LEAST_FRACTION:  # comparisons are rare there
                part.window_size = 2 * FIRST_WINDOW
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
        for part in self._parts.values():
            part.begin()
            part.fraction, part.window_size = LEAST_FRACTION, 2 * FIRST_WINDOW
        self._decisions.budget_fraction = LEAST_FRACTION
        self.say(f"{reason}: budget fraction {LEAST_FRACTION:.3g}")

    def say(self, verdict: str) -> None:
        """Notes what holds until something else is found out."""
        self.verdict = self._decisions.learning = verdict

    def account(self) -> str:
        """What gradient steps take, and what there is for them, in words."""
        share = f"the {self._budget * self._decisions.budget_fraction:.1%} of the decoding time that learning may take"
        if not self._step_s:
            return f"it took more than {share}, and came to no gradient step"
        steps = 1 + self._passes
        return f"{steps} gradient steps take {steps * self._step_s:.2g} s, and {max(0.0, self._balance_s):.2g} s are left of {share}"
