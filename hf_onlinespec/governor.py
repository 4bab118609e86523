"""What is worth doing now: how far to draft, from which source, and how much to learn; from measured times and acceptance.

Drafting. Let ρ be the rate to beat, in tokens per unit of time. One more drafted token is worth S · a tokens (S: the chance that
all before it are kept, a: its own) and costs ρ · (time to draft it and to verify it) tokens. Drafting while that gains maximises
E[tokens] / E[time]. Only the prefix and the laws q before the draw enter, so that the law of the output stays the target's.

Learning. A bank earns `update_budget · effort` of the decoding time, and gradient steps are paid from it. Over windows of
doubling length, learning has to make the draft better by half of what it costs (the stream is taken to go on for as long as
it has lasted), else the effort is cut. It is whole again when acceptance falls: the stream has changed.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .estimates import WINDOW, Level, Share, Times
from .memory import Continuation

MAX_LOOKAHEAD = 12  # draft tokens of the neural draft in one round, at most
MAX_MEMORY = 24  # draft tokens from the memory alone, at most
FIRST_LOOKAHEAD = 3  # while times are still unknown
PACE = 0.2  # how fast the measured pace of the machine follows a round's time
CONFIDENCE_EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
LENGTH_EDGES = (2, 3, 6, 9)
SHARE_EDGES = (0.4, 0.6, 0.9)
SUPPORT_EDGES = (2, 3, 5)
# What a memory is worth before it has shown it, by share and by support of unanimous ones: measured, see benchmarks/LOG.md.
SHARE_PRIORS, UNANIMOUS_PRIORS = (0.12, 0.25, 0.4), (0.62, 0.8, 0.87, 0.95)
FIRST_WINDOW, LAST_WINDOW = 4, 64  # updates between two looks at what learning gained
EFFORT_STEP, LEAST_EFFORT = 4.0, 1 / 16
LIVE_LEAST = 5  # drafted positions that tell a request's acceptance
FIRST_PROBE, LAST_PROBE = 32, 256  # plain rounds until an idle draft is tried again
PROBE_LOOKAHEAD = 2
PROBE_WEIGHT = 4.0  # of what a probe shows: all else that is known is old
REFRESH = 256  # rounds until a plain step is timed again


def _bin(value: float, edges: Sequence[float]) -> int:
    return sum(value >= edge for edge in edges)


@dataclass(frozen=True)
class Drafted:
    """Where one drafted token came from, and what the acceptance estimates are kept by."""

    source: str  # "neural" or "memory"
    position: int  # in the round, from 0
    key: tuple[int, ...]  # neural: confidence bin; memory: bins of match length and share


@dataclass(frozen=True)
class Plan:
    """The neural draft's part of one round."""

    lookahead: int  # 0: it does not pay
    rate: float  # expected tokens per plain step; 1 where plain decoding is best
    value: float  # tokens that go on being gained behind a kept token
    silent: bool = False  # nobody drafts: a plain step is timed again


@dataclass
class Decisions:
    """What the governor decided since the draft was made, and why it decides so now."""

    rounds: dict[str, int] = field(
        default_factory=lambda: {"plain": 0, "neural": 0, "memory": 0, "memory+neural": 0}
    )  # by what was proposed
    probes: int = 0
    updates_put_off: int = 0  # requests whose feedback was only remembered: learning was not affordable
    serves_frozen: bool = False  # the original draft drafts: what was learned does worse
    effort: float = 1.0  # part of update_budget that learning may use
    acceptance: float = 0.0  # estimated, of the neural draft's first token
    draft_step: float = 0.0  # time of one more drafted token over a plain target step
    verify_step: float = 0.0  # time of one more verified position over a plain target step
    drafting: str = "nothing was decided yet"
    learning: str = "nothing was decided yet"


class Governor:
    """Decides for one draft. Knows no models and reads no clock: it is told times and acceptance.

    Args:
        update_budget: largest share of the time that learning may take.
        replay_passes: most gradient steps on remembered requests after one request.
        lookahead: of the settings; a number is not this class's decision, but is reported by it.
    """

    def __init__(self, update_budget: float, replay_passes: int, lookahead: int | str = "auto") -> None:
        self.decisions = Decisions()
        self._fixed = lookahead
        self._drafts = True  # whether there is a draft model
        self._budget, self._passes = update_budget, replay_passes
        # Times in plain target steps of the present pace, so that a machine that slows down changes no decision.
        self._pace_s = 0.0  # seconds of a plain target step
        self._target, self._draft = Times(0.05), Times(0.7)  # k ≥ 1 drafted tokens: to verify, to draft
        self._now = 0  # rounds so far
        self._plain_at = 0  # the last plain one
        self._pooled = Share()
        self._positions = [Share() for _ in range(MAX_LOOKAHEAD)]
        self._confidence: dict[int, Share] = {}
        self._memory: dict[tuple[int, ...], Share] = {}
        self._idle_rounds, self._probe_after = 0, FIRST_PROBE
        self._probed_acceptance = 0.0
        self._probe_rounds, self._probing = 0, False
        self._refused, self._recall_after = 0, FIRST_PROBE  # rounds in which the memory's answer was not worth it
        self._lookahead, self._rate = 0, 0.0  # what the last plan found best
        # learning
        self._bank_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=WINDOW)
        self._step_s = 0.0  # their median: what a gradient step costs
        self._window: list[float] = []
        self._window_size, self._before = FIRST_WINDOW, 0.0
        self._level = Level()  # of acceptance, request by request
        self._live: deque[float] = deque(maxlen=256)  # acceptance at this request's drafted positions
        self._unseen = 0  # requests since the neural draft's acceptance was last seen
        self._advantage = Share(0.8)  # acceptance of the learned draft minus the frozen one's, on the same tokens
        self._compared = 0

    # Drafting

    def plan(self, drafts: bool = True) -> Plan:
        """How far the neural draft should go in this round; `drafts`: whether there is one."""
        self._drafts = drafts
        if not drafts or not self._pace_s or not self._draft.known:
            # The first round of all shows what a plain step costs.
            return Plan(FIRST_LOOKAHEAD if drafts and self._pace_s else 0, 1.0, 0.0)
        best, rate = 0, 1.0
        kept, tokens = 1.0, 1.0
        pooled = self.acceptance
        for k in range(1, MAX_LOOKAHEAD + 1):
            kept *= self._positions[k - 1].mean(pooled, 10.0)
            tokens += kept
            this = tokens / (self._verify(k) + self._draft.at(k))
            if this > rate:
                best, rate = k, this
            elif kept < 0.05:
                break
        a, cost = self.acceptance, rate * (self._verify_step() + self._draft.step())
        value = max(0.0, a - cost) / (1 - min(a, 0.9)) if best else 0.0
        self._lookahead, self._rate = best, rate
        if best and self._now - self._plain_at > REFRESH:
            return Plan(0, rate, 0.0, silent=True)
        return Plan(self._probe(best), rate, value)

    def _probe(self, best: int) -> int:
        """What is not done is tried now and then, so that its time is known: ever more rarely while nothing has changed."""
        self._probing = False
        if best:
            self._idle_rounds, self._probe_after = 0, FIRST_PROBE
            return best
        if self._probe_rounds:
            self._probe_rounds -= 1
            self._probing = True
            return PROBE_LOOKAHEAD
        self._idle_rounds += 1
        if abs(self.acceptance - self._probed_acceptance) > 0.1:
            self._probe_after = FIRST_PROBE
        if self._idle_rounds < self._probe_after:
            return 0
        self._idle_rounds, self._probe_after = 0, min(2 * self._probe_after, LAST_PROBE)
        self._probed_acceptance = self.acceptance
        self._probe_rounds = 1  # the next round too: the first one may have to read the prompt, and is not timed
        self._probing = True
        self.decisions.probes += 1
        return PROBE_LOOKAHEAD

    def _verify(self, k: int) -> float:
        """Time of verifying k drafted tokens, in plain steps."""
        if k == 0:
            return 1.0
        return max(1.0, self._target.at(k)) if self._target.known else 1.1 + 0.05 * k

    def _verify_step(self) -> float:
        return self._target.step() if self._target.known else 0.05

    def neural_pays(self, plan: Plan, position: int, survival: float) -> bool:
        """Whether the neural draft should draft the token at `position`, all before it being kept with chance `survival`."""
        if position == 0 or not self._draft.known:
            return position < plan.lookahead
        if not plan.lookahead or position >= MAX_LOOKAHEAD:
            return False
        cost = plan.rate * (self._draft.step() + self._verify_step())
        return survival * self._acceptance_at(position) > cost

    def memory_pays(self, plan: Plan, position: int, survival: float, found: Continuation | None, neural: bool) -> bool:
        """Whether the memory's token is the best one for `position`: better than none, and than the neural draft's."""
        if found is None or position >= MAX_MEMORY or not self._pace_s or plan.silent:
            return False
        a = self.memory_acceptance(found)
        more = self._verify(1) - 1 if position == 0 else self._verify_step()
        gain = survival * a * (1 + plan.value) - plan.rate * more
        if gain <= 0:
            return position == 0 and not neural and self._recalls_anyway()
        self._recall_after = FIRST_PROBE
        if not neural:
            return True
        step = self._draft.at(1) if position == 0 else self._draft.step()
        other = survival * self._acceptance_at(position) * (1 + plan.value) - plan.rate * (more + step)
        return gain >= other

    def _recalls_anyway(self) -> bool:
        """Now and then: what is never asked is never found to have become better."""
        self._refused += 1
        if self._refused < self._recall_after:
            return False
        self._refused, self._recall_after = 0, min(2 * self._recall_after, LAST_PROBE)
        return True

    @property
    def acceptance(self) -> float:
        """Estimated acceptance rate of the neural draft."""
        return self._pooled.mean(0.5)

    def _acceptance_at(self, position: int) -> float:
        return self._positions[min(position, MAX_LOOKAHEAD - 1)].mean(self.acceptance, 10.0)

    def confident(self, confidence: float) -> tuple[tuple[int, ...], float]:
        """The key of a law whose most probable token has this probability, and its estimated acceptance."""
        key = _bin(confidence, CONFIDENCE_EDGES)
        share = self._confidence.get(key)
        prior = 0.5 * (confidence + self.acceptance)
        return (key,), prior if share is None else share.mean(prior)

    def memory_acceptance(self, found: Continuation) -> float:
        """Estimated acceptance of the memory's answer."""
        length, share, support = key = self.memory_key(found)
        prior = UNANIMOUS_PRIORS[support] if share == len(SHARE_EDGES) else SHARE_PRIORS[share]
        prior *= 0.6 if length == 0 else 1.0
        seen = self._memory.get(key)
        return prior if seen is None else seen.mean(prior)

    @staticmethod
    def memory_key(found: Continuation) -> tuple[int, int, int]:
        """Bins of match length, share of the most probable token, and how many occurrences voted."""
        return (
            _bin(found.length, LENGTH_EDGES),
            _bin(found.probs[0], SHARE_EDGES),
            _bin(found.support, SUPPORT_EDGES),
        )

    def observe(self, drafted: Sequence[Drafted], overlaps: Sequence[float], draft_s: float, target_s: float) -> None:
        """Takes in one round: what was drafted, Σ min(p, q) at its verified positions, and its times."""
        k = len(drafted)
        steps = sum(d.source == "neural" for d in drafted)
        memory = k - steps
        name = "plain" if not k else "neural" if not memory else "memory" if not steps else "memory+neural"
        self.decisions.rounds[name] += 1
        self._now += 1
        if not k:
            self._plain_at = self._now
        if 0 < target_s < float("inf") and 0 <= draft_s < float("inf"):
            self._time(k, steps, draft_s, target_s)
        weight = PROBE_WEIGHT if self._probing else 1.0
        tried = [o for d, o in zip(drafted, overlaps, strict=False) if d.source == "neural"]
        if self._probing and tried and statistics.mean(tried) > self.acceptance + 0.2:
            self._probe_rounds = 2  # better than believed: look on until it is believed, or was luck
        for d, overlap in zip(drafted, overlaps, strict=False):
            if d.source == "neural":
                self._pooled.add(overlap, weight)
                self._live.append(overlap)
                self._positions[min(d.position, MAX_LOOKAHEAD - 1)].add(overlap, weight)
                self._confidence.setdefault(d.key[0], Share()).add(overlap)
            else:
                self._memory.setdefault(d.key, Share()).add(overlap)
        self._earn(draft_s + target_s)

    def _time(self, k: int, steps: int, draft_s: float, target_s: float) -> None:
        """Takes in the times of a round that verified k tokens, `steps` of them drafted by the neural draft."""
        if not self._pace_s:
            if not k:
                self._pace_s = target_s
            return
        ratio = target_s / (self._pace_s * self._verify(k))
        if k:
            self._target.add(k, target_s / self._pace_s)
        if steps and draft_s:
            self._draft.add(steps, draft_s / self._pace_s)
        self._pace_s *= min(max(ratio, 0.5), 2.0) ** PACE

    def _report(self) -> None:
        """Says what holds now, and why."""
        self.decisions.acceptance = self.acceptance
        if self._pace_s:
            self.decisions.draft_step = self._draft.step()
            self.decisions.verify_step = self._verify_step()
        if self._fixed != "auto":
            self.decisions.drafting = f"lookahead={self._fixed} was asked for"
        elif not self._drafts:
            self.decisions.drafting = "no draft model: the memory drafts where it is expected to pay"
        elif self._pace_s:
            self.decisions.drafting = (
                f"a lookahead of {self._lookahead} is expected to give {self._rate:.2f} times the speed of plain decoding"
                if self._lookahead
                else f"plain decoding: at acceptance {self.acceptance:.2f} no lookahead of the neural draft is faster"
            )

    # Learning

    def _earn(self, seconds: float) -> None:
        if 0 < seconds < float("inf"):
            self._bank_s += self._budget * self.decisions.effort * seconds
            if self._step_s:
                self._bank_s = min(self._bank_s, 2 * (1 + self._passes) * self._step_s)

    def affordable_steps(self) -> int:
        """Gradient steps that the bank can pay for now: one on what is new, the others on what is remembered."""
        step = self._step_s
        if not step:
            return 1 + self._passes
        steps = min(int(self._bank_s / step), 1 + self._passes)
        return 0 if steps < min(2, 1 + self._passes) else steps

    def spent(self, seconds: float, steps: int) -> None:
        """Learning took so many seconds for so many gradient steps."""
        if not 0 <= seconds < float("inf"):
            return
        price = self._step_s
        if price:  # a stall is no reason to stop learning for long
            seconds = min(seconds, 10 * max(steps, 1) * price)
        self._bank_s = max(self._bank_s - seconds, -2 * (1 + self._passes) * price if price else -seconds)
        if steps:
            self._steps_s.append(seconds / steps)
            self._step_s = statistics.median(self._steps_s)

    def compares(self) -> bool:
        """Whether this update should look at the frozen draft too: always while the two are close, else now and then."""
        self._compared += 1
        return self._advantage.mean(0.0, 1.0) < 0.05 or self._compared % 4 == 0

    def shadow(self, learned: float, frozen: float | None, n: int, updates: bool = True) -> None:
        """Acceptance on n new tokens that the draft has not learned from, and the frozen draft's on the same ones.

        Args:
            updates: whether it learns from them now.
        """
        if not n or not all(math.isfinite(a) for a in (learned, frozen) if a is not None):
            return  # a draft whose logits are not finite teaches nothing
        if frozen is not None:
            self._advantage.add(learned - frozen)
            advantage = self._advantage.mean(0.0, 1.0)
            if self.decisions.serves_frozen and advantage > 0.0:
                self.decisions.serves_frozen = False
            elif not self.decisions.serves_frozen and advantage < -0.02:
                self.decisions.serves_frozen = True
        served = frozen if self.decisions.serves_frozen and frozen is not None else learned
        weight = min(n, 64) / 2  # neighbouring tokens say less than as many rounds would
        self._pooled.add(served, weight)
        for share in (*self._positions, *self._confidence.values()):
            share.fade(weight)
        if self._unseen:
            self._see(served)
        if updates:
            self._window.append(_tokens_per_round(learned))
            if len(self._window) >= self._window_size:
                self._look_back()

    def request_ended(self, new_tokens: int) -> bool:
        """Whether the draft's acceptance on this request should be looked at: it has neither drafted nor learned in it."""
        self._report()
        if len(self._live) >= LIVE_LEAST:
            self._unseen = 0
            self._see(statistics.mean(self._live))
        else:
            self._unseen += 1
        self._live.clear()
        for share in self._memory.values():
            share.fade(1)  # an answer that was wrong in one domain gets a chance in the next
        # At once, while the stream may have changed; then now and then.
        unseen = 0 < self._unseen and (self._unseen <= 3 or self._unseen % 4 == 0)
        return unseen and new_tokens >= LIVE_LEAST and self._bank_s >= -self._step_s

    def _see(self, acceptance: float) -> None:
        if self._level.fell(acceptance):
            self._wake()

    def _look_back(self) -> None:
        """Lowers the effort where the last window did not pay for itself, raises it where it did."""
        now = statistics.mean(self._window)
        doubt = statistics.stdev(self._window) * (2 / len(self._window)) ** 0.5  # of the difference of two such means
        effort, share = self.decisions.effort, self._budget * self.decisions.effort
        if self._before:
            self._window_size = min(2 * self._window_size, LAST_WINDOW)
            gain = now / self._before - 1
            pays = gain - doubt / now > share / 2
            self.decisions.effort = min(1.0, EFFORT_STEP * effort) if pays else max(LEAST_EFFORT, effort / EFFORT_STEP)
            self.decisions.learning = (
                f"the last {len(self._window)} updates changed the tokens per round by {gain:+.1%}, "
                f"at {share:.1%} of the time: effort {self.decisions.effort:.3g}"
            )
        self._before, self._window = now, []

    def _wake(self) -> None:
        self.decisions.effort = 1.0
        self.decisions.learning = "acceptance has fallen: the stream has changed, full effort"
        # A change is evidence that there is something to learn: it is given more time than a beginning.
        self._window, self._window_size, self._before = [], 2 * FIRST_WINDOW, 0.0


def _tokens_per_round(acceptance: float, lookahead: int = 4) -> float:
    """Expected tokens per round at constant, independent acceptance: (1 − a^(k+1)) / (1 − a)."""
    return sum(acceptance**i for i in range(lookahead + 1))
