"""What is worth doing now: how far to draft, from which source, and how much to learn; from measured times and acceptance.

Drafting. Let ρ be the rate to beat, in tokens per unit of time. One more drafted token is worth S · a tokens (S: the chance that
all before it are kept, a: its own) and costs ρ · (time to draft it and to verify it) tokens. Drafting while that gains maximises
E[tokens] / E[time]. Only the prefix and the laws q before the draw enter, so that the law of the output stays the target's.

A request is told apart from the others by what it shows itself: how much that counts follows from how much requests differ
(empirical Bayes). Where even the optimistic end of what it may turn out to be would pay, it is tried.

Learning. What it brings is the tokens per round that the learned draft adds to the base draft and the memory, measured on the
same tokens; `budget.py` holds that against its cost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics import Decisions
from .acceptance import MAX_LOOKAHEAD, Acceptances, Continuation, RequestStats, TokenSource
from .backoff import Backoff
from .budget import LearningBudget
from .estimates import DecayedMean, DraftCost, VerifyCost
from .fit import Fit
from .routing import AdapterRouter

# What is decided where there is no draft model.
NO_MODEL_DRAFTS = "no draft model: the memory drafts where it is expected to pay"
NOTHING_LEARNS = "there is no draft model: the suffix memory holds what was written, and has nothing to learn"
MAX_MEMORY = 24  # draft tokens from the memory alone, at most
FIRST_LOOKAHEAD = 3  # while times are still unknown
RATE_DECAY, RATE_PRIOR = 0.99, 20.0  # rounds that tell the rate without a draft model: the last 100; chosen
PACE = 0.2  # how fast the measured pace of the machine follows a round's time
LIVE_LEAST = 5  # drafted positions that tell a request's acceptance
MIN_ROOM_TO_EXPLORE = 16  # tokens that must be left for a request to be worth a try
LOW_ACCEPTANCE, LOW_REQUESTS = 0.3, 4  # so many requests below it, and none well above: the draft has much to learn
MIN_ACCEPTANCE_TO_START = 0.05  # acceptance of a draft that is not asked at once, while its times are unknown
FIRST_PROBE, LAST_PROBE = 32, 256  # plain rounds until an idle draft is tried again
PROBE_LOOKAHEAD = 2
PROBE_WEIGHT = 4.0  # of what a probe shows: all else that is known is old
REFRESH = 256  # rounds until a plain step is timed again
READ_MARGIN = 2.0  # reading a prompt has to promise so much more time than it takes: promises are not always kept
UNREAD = 8  # tokens that the draft has not read: more of them are a prompt, whose reading has to pay


@dataclass(frozen=True)
class Plan:
    """The neural draft's part of one round."""

    lookahead: int  # 0: it does not pay
    rate: float  # expected tokens per plain step; 1 where plain decoding is best
    value: float  # tokens that go on being gained behind a kept token
    calibrate: bool = False  # nobody drafts: a plain step is timed again
    acceptance: float = 0.5  # estimated acceptance rate of the neural draft in this request
    memory_calibration: float = 1.0  # how right the memory is in this request, over what was expected
    serves_base: bool = False  # the base draft serves it


class Governor:
    """Decides for one draft. Knows no models and reads no clock: it is told times and acceptance.

    Args:
        update_budget: largest share of the time that learning may take.
        replay_passes: most gradient steps on remembered requests after one request.
        lookahead: of the settings; a number is not this class's decision, but is reported by it.
    """

    def __init__(self, update_budget: float, replay_passes: int, lookahead: int | str = "auto") -> None:
        self.decisions = Decisions()
        self.acceptances = Acceptances()
        self.budget = LearningBudget(update_budget, replay_passes, self.decisions)
        self._fixed = lookahead
        self._drafts = True  # whether there is a draft model
        # Times in plain target steps of the present pace, so that a machine that slows down changes no decision.
        self._pace_s = 0.0  # seconds of a plain target step
        self._target, self._draft = VerifyCost(), DraftCost(0.7)  # k ≥ 1 drafted tokens: to verify, to draft
        self._read_step = 0.0  # time of the draft for one token of a prompt; 0: not known
        self._too_long = False  # whether the last plan left drafting alone because of what had to be read
        # Of the rounds without a draft model: tokens, and expected time. What they have in common is the rate that a token has to beat.
        self._tokens, self._time_taken = DecayedMean(RATE_DECAY), DecayedMean(RATE_DECAY)
        self._length = 0.0  # new tokens of a request, as they come
        self._now = 0  # rounds so far
        self._plain_at = 0  # the last plain one
        self._draft_probe = Backoff(FIRST_PROBE, LAST_PROBE)  # of rounds in which drafting was not worth it
        self._probed_acceptance = 0.0
        self._probe_rounds, self._probing = 0, False
        self._memory_probe = Backoff(FIRST_PROBE, LAST_PROBE)  # of rounds in which the memory's answer was not worth it
        self._lookahead, self._rate = 0, 0.0  # what the last plan found best
        self._unseen = 0  # requests since the neural draft's acceptance was last seen
        self._shown = False  # whether it was shown since the last request
        self.router = AdapterRouter()
        self.fit = Fit()
        self._lows = {base: 0 for base in (False, True)}  # requests of low acceptance since one of a better one

    # Drafting

    def plan(self, drafts: bool = True, seen: RequestStats | None = None, room: int = 0, unread: int = 0) -> Plan:
        """How far the neural draft should go in this round.

        Args:
            drafts: whether there is a draft.
            seen: what this request has shown so far.
            room: tokens that the request may still take.
            unread: tokens that the draft has to read before it can draft.
        """
        self._drafts = drafts
        seen = RequestStats() if seen is None else seen
        if not drafts or not self._pace_s or not self._draft.known:
            # The first round of all shows what a plain step costs.
            lookahead = FIRST_LOOKAHEAD if drafts and self._pace_s else 0
            if lookahead and self.acceptances.rate < MIN_ACCEPTANCE_TO_START:
                lookahead = self._probe(0)
            return Plan(
                lookahead,
                1.0 if drafts else self._usual_rate(),
                0.0,
                memory_calibration=seen.memory_calibration,
                serves_base=seen.serves_base,
            )
        a, doubt = self.acceptances.request_rate(seen)
        best, rate = self._best(a, seen.serves_base)
        self._too_long = not self._prefill_pays(unread, room, rate if best else 2.0)
        if self._too_long:
            best, rate = 0, 1.0
        cost = rate * (self._target.step(best) + self._draft.step())
        value = max(0.0, a - cost) / (1 - min(a, 0.9)) if best else 0.0
        self._lookahead, self._rate = best, rate
        if best and self._now - self._plain_at > REFRESH:
            return Plan(
                0,
                rate,
                0.0,
                calibrate=True,
                acceptance=a,
                memory_calibration=seen.memory_calibration,
                serves_base=seen.serves_base,
            )
        lookahead = 0 if self._too_long else self._probe(best)
        if not lookahead and room >= MIN_ROOM_TO_EXPLORE:
            optimistic, rate_then = self._best(a + doubt, seen.serves_base)
            if optimistic and self._prefill_pays(2 * unread, room, rate_then):  # it may as well come to nothing
                lookahead = PROBE_LOOKAHEAD
        return Plan(
            lookahead,
            rate,
            value,
            acceptance=a,
            memory_calibration=seen.memory_calibration,
            serves_base=seen.serves_base,
        )

    def _usual_rate(self) -> float:
        """Tokens per plain step of late, without a draft model; 1 where plain decoding is as fast."""
        return max(1.0, self._tokens.mean(1.0, RATE_PRIOR) / self._time_taken.mean(1.0, RATE_PRIOR))

    def _prefill_pays(self, unread: int, room: int, rate: float) -> bool:
        """Whether reading so many tokens pays, at a rate over plain decoding on what is likely to come."""
        left = min(room, self._length) if self._length else room
        return unread <= UNREAD or READ_MARGIN * unread * self._read_step <= left * (1 - 1 / rate)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The draft took so long to read so many tokens of a prompt."""
        if self._pace_s and tokens > UNREAD and 0 < seconds < float("inf"):
            step = seconds / tokens / self._pace_s
            self._read_step += (0.2 if self._read_step else 1.0) * (
                min(step, 4 * self._read_step or step) - self._read_step
            )

    def _best(self, acceptance: float, base: bool) -> tuple[int, float]:
        """The best lookahead at an acceptance rate, and its expected tokens per plain step; 0 and 1: plain decoding."""
        best, rate = 0, 1.0
        kept, tokens = 1.0, 1.0
        for k in range(1, MAX_LOOKAHEAD + 1):
            kept *= self.acceptances.rate_at(k - 1, acceptance, base)
            tokens += kept
            this = tokens / (self._target.at(k) + self._draft.at(k))
            if this > rate:
                best, rate = k, this
            elif kept < 0.05:
                break
        return best, rate

    def _probe(self, best: int) -> int:
        """What is not done is tried now and then, so that its time is known: ever more rarely while nothing has changed."""
        self._probing = False
        if best:
            self._draft_probe.reset()
            return best
        if self._probe_rounds:
            self._probe_rounds -= 1
            self._probing = True
            return PROBE_LOOKAHEAD
        if abs(self.acceptances.rate - self._probed_acceptance) > 0.1:
            self._draft_probe.shorten()
        if not self._draft_probe.due():
            return 0
        self._probed_acceptance = self.acceptances.rate
        self._probe_rounds = 1  # the next round too: the first one may have to read the prompt, and is not timed
        self._probing = True
        self.decisions.probes += 1
        return PROBE_LOOKAHEAD

    def model_pays(self, plan: Plan, position: int, survival: float, begun: bool = True) -> bool:
        """Whether the neural draft should draft the token at `position`, all before it being kept with chance `survival`.

        Args:
            begun: whether it has drafted in this round already. The first time it has to read what was kept of the last one.
        """
        if position == 0 or not self._draft.known:
            return position < plan.lookahead
        if not plan.lookahead or position >= MAX_LOOKAHEAD:
            return False
        cost = plan.rate * (self._drafting(begun) + self._target.step(position))
        return survival * self.acceptances.rate_at(position, plan.acceptance, plan.serves_base) > cost

    def _drafting(self, begun: bool) -> float:
        return self._draft.step() if begun else self._draft.at(1)

    def decide_memory(
        self,
        plan: Plan,
        position: int,
        survival: float,
        found: Continuation | None,
        neural: bool,
        begun: bool = False,
    ) -> bool:
        """Whether the memory's token is the best one for `position`: better than none, and than the neural draft's.

        Counts the rounds in which it is not, and then takes it now and then: what is never tried is never found to be better.
        """
        if found is None or position >= MAX_MEMORY or not self._pace_s or plan.calibrate:
            return False
        _, a = self.acceptances.memory(found, position == 0, plan.memory_calibration)
        more = self._target.step(position)
        gain = survival * a * (1 + plan.value) - plan.rate * more
        if gain <= 0:
            return position == 0 and not neural and self._memory_probe.due()
        self._memory_probe.shorten()
        if not neural:
            return True
        other = survival * self.acceptances.rate_at(position, plan.acceptance, plan.serves_base) * (
            1 + plan.value
        ) - plan.rate * (more + self._drafting(begun))
        return gain >= other

    def observe(
        self,
        drafted: Sequence[TokenSource],
        overlaps: Sequence[float],
        draft_s: float,
        target_s: float,
        seen: RequestStats | None = None,
    ) -> None:
        """Takes in one round: what was drafted, Σ min(p, q) at its verified positions, and its times; notes it in `seen`."""
        k = len(drafted)
        steps = sum(d.source == "model" for d in drafted)
        memory = k - steps
        name = "plain" if not k else "model" if not memory else "memory" if not steps else "memory+model"
        self.decisions.rounds[name] += 1
        self._now += 1
        if not k:
            self._plain_at = self._now
        if 0 < target_s < float("inf") and 0 <= draft_s < float("inf"):
            self._time(k, steps, draft_s, target_s)
        if not self._drafts:
            self._tokens.add(1 + sum(overlaps))
            self._time_taken.add(self._target.at(k))
        weight = PROBE_WEIGHT if self._probing else 1.0
        tried = [o for d, o in zip(drafted, overlaps, strict=False) if d.source == "model"]
        if self._probing and tried and statistics.mean(tried) > self.acceptances.rate + 0.2:
            self._probe_rounds = 2  # better than believed: look on until it is believed, or was luck
        self.acceptances.observe_round(drafted, overlaps, RequestStats() if seen is None else seen, weight)
        self.budget.earn(draft_s + target_s, self.acceptances.base_served_last)

    def _time(self, k: int, steps: int, draft_s: float, target_s: float) -> None:
        """Takes in the times of a round that verified k tokens, `steps` of them drafted by the neural draft."""
        if not self._pace_s:
            if not k:
                self._pace_s = target_s
            return
        ratio = target_s / (self._pace_s * self._target.at(k))
        if k:
            self._target.add(k, target_s / self._pace_s)
        if steps and draft_s:
            self._draft.add(steps, draft_s / self._pace_s)
        self._pace_s *= min(max(ratio, 0.5), 2.0) ** PACE

    def _report(self, lookahead: int | str) -> None:
        """Says what holds now, and why."""
        self.decisions.acceptance = self.acceptances.rate
        if self._pace_s:
            self.decisions.draft_step = self._draft.step()
            self.decisions.verify_step = self._target.step(FIRST_LOOKAHEAD)
        if lookahead != "auto":
            self.decisions.drafting = f"lookahead={lookahead} was asked for"
        elif not self._drafts:
            self.decisions.drafting = NO_MODEL_DRAFTS
        elif self._pace_s:
            self.decisions.drafting = (
                f"a lookahead of {self._lookahead} is expected to give {self._rate:.2f} times the speed of plain decoding"
                if self._lookahead
                else "plain decoding: reading the prompt would take longer than drafting saves"
                if self._too_long
                else f"plain decoding: at acceptance {self.acceptances.rate:.2f} no lookahead of the neural draft is faster"
            )

    # Learning

    def decide_comparison(self, prompt_log_ratio: float) -> bool:
        """Counts an update; whether it scores the base draft too."""
        return self.router.decide_comparison(prompt_log_ratio, self.decisions.budget_fraction == 1.0)

    def decide_prompt_scoring(self, tokens: int = 0, room: int = MIN_ROOM_TO_EXPLORE) -> bool:
        """Counts a request; whether its prompt is scored to tell who serves it: not where neither draft is expected to draft.

        Args:
            tokens: that both drafts would have to read.
            room: tokens that the request may take.
        """
        if not self.router.decide_scoring():
            return False
        found = [self._best(self.acceptances.mean_rate(base), base) for base in (False, True)]
        return any(best and self._prefill_pays(2 * tokens, room, rate) for best, rate in found)

    def observe_comparison(
        self,
        learned: Sequence[float],
        base: Sequence[float] | None,
        recalled: Sequence[float] | None = (),
        updates: bool = True,
        prompt_log_ratio: float = 0.0,
    ) -> None:
        """Acceptance at new positions that the draft has not learned from, and the base draft's at the same ones.

        Args:
            recalled: estimated acceptance of the memory's answers there, 0 where it has none; (): no memory; None: not asked.
            updates: whether the draft learns from them now.
            prompt_log_ratio: of the prompt, see `AdapterRouter`.
        """
        n = len(learned)
        if not n or not all(map(math.isfinite, (*learned, *(base or ())))):
            return  # a draft whose logits are not finite teaches nothing
        bucket = self.router.use_base(prompt_log_ratio)
        if base is not None:
            self.router.observe_difference(prompt_log_ratio, statistics.mean(learned) - statistics.mean(base), n)
            if updates and recalled is not None:
                recalled = recalled or [0.0] * n
                self.budget.observe_gain(_beside(learned, recalled) / _beside(base, recalled), bucket)
        elif bucket:
            return  # what would have served was not looked at
        self.fit.note(max(sum(learned), sum(base or ())), n)
        served = base if bucket and base is not None else learned
        self.acceptances.observe_offline(served, bucket)
        if self._unseen and not self._shown:
            self._shown = True  # one request counts once
            self._see(statistics.mean(served), n, bucket)

    def request_ended(
        self, new_tokens: int, seen: RequestStats | None = None, lookahead: int | None = None, steps: int = 0
    ) -> bool:
        """Whether the draft's acceptance on this request should be looked at: it has neither drafted nor learned in it.

        Args:
            lookahead: that was fixed for this request; None: the settings'.
            steps: gradient steps that the draft has taken before this request is learned from.
        """
        self._report(self._fixed if lookahead is None else lookahead)
        self._length += (0.2 if self._length else 1.0) * (new_tokens - self._length)
        self._shown = False
        if seen is not None:
            self.fit.note(seen.acceptance, seen.positions)
        settled = self.fit.message
        self.fit.request_ended(steps)
        if self.fit.message != settled:
            self.budget.reset_least("the draft does not fit the target")
        if seen is not None and seen.positions >= LIVE_LEAST:
            self._unseen = 0
            self._see(seen.acceptance / seen.positions, seen.positions, seen.serves_base)
        else:
            self._unseen += 1
        self.acceptances.request_ended()
        # At once, while the stream may have changed; then now and then.
        unseen = 0 < self._unseen and (self._unseen <= 3 or self._unseen % 4 == 0)
        if new_tokens < LIVE_LEAST or not self._unseen:
            return False
        return (unseen and self.budget.should_score()) or self.fit.decide_scoring()

    def _see(self, acceptance: float, positions: int, base: bool) -> None:
        """Takes in the acceptance of a request, known from so many positions."""
        low = acceptance < LOW_ACCEPTANCE
        if low:  # the first request of all is believed at once
            self._lows[base] = self._lows[base] + 1 if self.acceptances.known else LOW_REQUESTS
        elif self.acceptances.mean_rate(base) > 1.5 * LOW_ACCEPTANCE:
            self._lows[base] = 0
        if low and self.fit.message is not None:
            return  # nothing was learned before, with the full budget
        if self.acceptances.observe_request(acceptance, positions, base):
            self.budget.reset_full("acceptance has fallen, the stream has changed", base)
        elif low and self._lows[base] == LOW_REQUESTS:
            self.budget.reset_full(f"acceptance is {acceptance:.2f}, there is much to learn", base)


def _beside(neural: Sequence[float], recalled: Sequence[float]) -> float:
    """Tokens per round where at every position the memory drafts if it is likelier to be right than the draft usually is."""
    usual = statistics.mean(neural)
    return _tokens_per_round(statistics.mean(r if r > usual else a for a, r in zip(neural, recalled, strict=True)))


def _tokens_per_round(acceptance: float, lookahead: int = 4) -> float:
    """Expected tokens per round at constant, independent acceptance: (1 − a^(k+1)) / (1 − a)."""
    return sum(acceptance**i for i in range(lookahead + 1))
