"""How far to draft, and from which source, by measured times and acceptance.

Let ρ be the rate to beat, in tokens per unit of time. One more drafted token is worth S · a tokens (S: the chance that all before
it are kept, a: its own) and costs ρ · (time to draft it and to verify it) tokens. Drafting while that gains maximises
E[tokens] / E[time]. Only the prefix and the distributions q before the draw enter, so that the output's law stays the target's.

A request is told apart from the others by what it shows itself: how much that counts follows from how much requests differ
(empirical Bayes). Where even the optimistic end of what it may turn out to be would pay, it is tried.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..metrics import Decisions
from .acceptance import Acceptances, RequestStats, TokenSource
from .backoff import Backoff
from .costs import Costs
from .estimates import DecayedMean

NO_MODEL_DRAFTS = "no draft model: the memory drafts where it is expected to pay"


@dataclass(frozen=True)
class PlannerConstants:
    """Of how far is drafted, and of what is tried although it is not expected to pay."""

    max_candidates: int = 64  # of a round, at most; chosen
    # A round is at most so many times as wide as one that was timed. In one row a wide one costs little more than what was extrapolated;
    # of several rows it is the forward of a prompt: see `Governor.for_rows`.
    widening: float = math.inf
    max_expanded: int = 8  # leaves that the draft goes on behind in one forward; chosen
    # A guess has to gain so many times what verifying it costs. Measured: LOG 2026-11-26 "Trees of candidates": on recorded answers
    # 1.3 gives 0.8 to 1.2 % more net speed than 1, and a fifth fewer candidates; costs are never known exactly.
    guess_margin: float = 1.3
    first_lookahead: int = 3  # while times are still unknown; chosen
    min_acceptance_to_start: float = 0.05  # of a draft that is not tried at once, while its times are unknown; chosen
    most_acceptance: float = 0.9  # that the value of tokens behind a kept one is reckoned with; chosen
    rate_decay: float = 0.99  # rounds that tell the rate to beat: the last 100; chosen
    rate_prior: float = 20.0  # rounds at the speed of plain decoding that count beside them; chosen
    refresh: int = 256  # rounds until a plain step is timed again; chosen
    # A draft that does not pay is tried again after so many rounds, later after up to so many. Chosen.
    first_probe: int = 32
    last_probe: int = 256
    probe_change: float = 0.1  # of acceptance since the last probe, that begins with the first interval again; chosen
    probe_lookahead: int = 2  # chosen
    # Of what a probe shows: all else that is known is old. A home-coming draft then needs fewer than ten requests instead of
    # twenty: LOG 2026-11-22 "The cost-padded target, and the demo again"; the number is chosen.
    probe_weight: float = 4.0
    probe_surprise: float = 0.2  # acceptance of a probe above what was believed, that calls for more probes; chosen
    more_probes: int = 2  # so many; chosen
    min_room_to_explore: int = 16  # tokens that must be left for a request to be worth a try; chosen
    explore_margin: float = 2.0  # reading for a try counts as so many times as dear: it may come to nothing; chosen
    # Reading a prompt has to promise so much more time than it takes: promises are not always kept. LOG 2026-11-22 "Longer
    # drifts, one seed, and what is out of reach"; the number is chosen.
    read_margin: float = 2.0
    hoped_rate: float = (
        2.0  # of drafting in a request whose rate is not known to beat plain decoding, for reading; chosen
    )
    length_rate: float = 0.2  # how fast the expected length of an answer follows the lengths; chosen


@dataclass(frozen=True)
class Plan:
    """The draft model's part of one round."""

    lookahead: int  # 0: it does not pay
    rate: float  # expected tokens per plain step; 1 where plain decoding is best
    value: float  # tokens that go on being gained behind a kept token
    calibrate: bool = False  # nobody drafts: a plain step is timed again
    acceptance: float = 0.5  # estimated acceptance rate of the draft model in this request
    serves_base: bool = False  # the base draft serves it


class NextInRow(NamedTuple):
    """The token that the draft model may draft next in one of several rows."""

    plan: Plan
    position: int  # candidates before it
    survival: float  # chance that these are kept
    begun: bool  # whether the model has drafted in this round already


class Planner:
    """Decides what is drafted in a round.

    Args:
        decisions: where probes are counted.
    """

    def __init__(
        self,
        acceptances: Acceptances,
        costs: Costs,
        decisions: Decisions,
        max_lookahead: int,
        constants: PlannerConstants = PlannerConstants(),
    ) -> None:
        self._acceptances, self._costs, self._decisions = acceptances, costs, decisions
        self._max_lookahead, self._constants = max_lookahead, constants
        self._drafts = True  # whether there is a draft model
        # What the last plan found best, and whether it left drafting alone because of what had to be read.
        self._lookahead, self._rate, self._prompt_too_long = 0, 0.0, False
        # Of the rounds: what they have in common is the rate that one more candidate has to beat.
        self._tokens, self._time = DecayedMean(constants.rate_decay), DecayedMean(constants.rate_decay)
        self._length = 0.0  # new tokens of a request, as they come
        self._plain_age = 0  # rounds since the last plain one
        first, last = constants.first_probe, constants.last_probe
        self._draft_probe = Backoff(first, last)  # of rounds in which drafting was not worth it
        self._guess_probe = Backoff(first, last)  # of rounds in which no guess was worth it
        self._width_probe = Backoff(first, last)  # of rounds of a batch in which no width was worth it
        self._probed_acceptance = 0.0
        self._probes_left, self._probing = 0, False

    def plan(self, drafts: bool, seen: RequestStats, room: int, unread: int) -> Plan:
        """How far the draft model should go in this round; counts rounds in which it should not, see `Backoff`.

        Args:
            drafts: whether there is a draft model.
            seen: what this request has shown so far.
            room: tokens that the request may still take.
            unread: tokens that the draft has to read before it can draft.
        """
        self._drafts = drafts
        costs, constants = self._costs, self._constants
        if not drafts or not costs.known:
            # The first round of all shows what a plain step costs.
            lookahead = constants.first_lookahead if drafts and costs.pace_s else 0
            if lookahead and self._acceptances.rate < constants.min_acceptance_to_start:
                lookahead = self._probe(0)
            rate = 1.0 if drafts else self.usual_rate
            return Plan(lookahead, rate, 0.0, serves_base=seen.serves_base)
        a, doubt = self._acceptances.request_rate(seen)
        best, rate = self.best(a, seen.serves_base)
        self._prompt_too_long = not self.prefill_pays(unread, room, rate if best else constants.hoped_rate)
        if self._prompt_too_long:
            best, rate = 0, 1.0
        cost = rate * (costs.verify.step(best) + costs.draft.step())
        value = max(0.0, a - cost) / (1 - min(a, constants.most_acceptance)) if best else 0.0
        self._lookahead, self._rate = best, rate
        calibrate = bool(best) and self._plain_age > constants.refresh
        if calibrate:
            lookahead, value = 0, 0.0
        else:
            lookahead = 0 if self._prompt_too_long else self._probe(best)
            if not lookahead and room >= constants.min_room_to_explore:
                optimistic, rate_then = self.best(a + doubt, seen.serves_base)
                if optimistic and self.prefill_pays(constants.explore_margin * unread, room, rate_then):
                    lookahead = constants.probe_lookahead
        return Plan(lookahead, rate, value, calibrate, a, seen.serves_base)

    @property
    def reason(self) -> str:
        """What the last plan decided, and why, in words; empty while nothing was timed."""
        if not self._drafts:
            return NO_MODEL_DRAFTS
        if not self._costs.pace_s:
            return ""
        if self._lookahead:
            return f"a lookahead of {self._lookahead} is expected to give {self._rate:.2f} times the speed of plain decoding"
        if self._prompt_too_long:
            return "plain decoding: reading the prompt would take longer than drafting saves"
        return f"plain decoding: at acceptance {self._acceptances.rate:.2f} no lookahead of the draft model is faster"

    @property
    def usual_rate(self) -> float:
        """Tokens per plain step of late, whoever has drafted; 1 where plain decoding is as fast."""
        prior = self._constants.rate_prior
        return max(1.0, self._tokens.mean(1.0, prior) / self._time.mean(1.0, prior))

    def prefill_pays(self, unread: float, room: int, rate: float) -> bool:
        """Whether reading so many tokens pays, at a rate over plain decoding on what is likely to come."""
        left = min(room, self._length) if self._length else room
        cost = self._constants.read_margin * self._costs.prefill(unread)
        return not self._costs.is_prompt(unread) or cost <= left * (1 - 1 / rate)

    def best(self, acceptance: float, base: bool) -> tuple[int, float]:
        """The best lookahead at an acceptance rate, and its expected tokens per plain step; 0 and 1: plain decoding."""
        best, rate = 0, 1.0
        survival, tokens = 1.0, 1.0
        for k in range(1, self._max_lookahead + 1):
            survival *= self._acceptances.rate_at(k - 1, acceptance, base)
            tokens += survival
            this = tokens / self._costs.round(k)
            if this > rate:
                best, rate = k, this
        return best, rate

    def _probe(self, best: int) -> int:
        """The best lookahead; where that is none, a try now and then, so that its time and its acceptance are known."""
        constants = self._constants
        self._probing = False
        if best:
            self._draft_probe.reset()
            return best
        if self._probes_left:
            self._probes_left -= 1
            self._probing = True
            return constants.probe_lookahead
        if abs(self._acceptances.rate - self._probed_acceptance) > constants.probe_change:
            self._draft_probe.shorten()
        if not self._draft_probe.due():
            return 0
        self._probed_acceptance = self._acceptances.rate
        self._probes_left = 1  # the next round too: the first one may have to read the prompt, and is not timed
        self._probing = True
        self._decisions.probes += 1
        return constants.probe_lookahead

    def probe_soon(self) -> None:
        """The next rounds are tries, if the draft model is not expected to pay in them."""
        self._probes_left = max(self._probes_left, self._constants.more_probes)

    def model_pays(self, plan: Plan, position: int, survival: float, begun: bool) -> bool:
        """Whether the draft model should draft the token at `position`, see `Governor.model_pays`."""
        if position == 0 or not self._costs.draft.known or not self.may_draft(plan, position):
            return self.may_draft(plan, position)
        cost = plan.rate * (self._costs.drafting(begun) + self._costs.verify.step(position))
        return survival * self._acceptances.rate_at(position, plan.acceptance, plan.serves_base) > cost

    def models_pay(self, next_tokens: Sequence[NextInRow], rows: int) -> bool:
        """Whether the draft model should draft the next token in several rows, see `Governor.models_pay`."""
        costs = self._costs
        if not costs.draft.known or any(not row.position for row in next_tokens):
            return True
        gain = cost = 0.0
        for plan, position, survival, begun in next_tokens:
            gain += survival * self._acceptances.rate_at(position, plan.acceptance, plan.serves_base)
            cost += plan.rate * (costs.drafting(begun) + costs.verify.step(position)) / len(next_tokens)
        return gain > rows * cost

    def may_draft(self, plan: Plan, position: int) -> bool:
        """Whether the draft model may draft the token at `position` at all."""
        if position == 0 or not self._costs.draft.known:
            return position < plan.lookahead
        return 0 < plan.lookahead and position < self._max_lookahead

    @property
    def _widest(self) -> int:
        """Candidates of a row, at most."""
        constants = self._constants
        timed = max(self._costs.verify.widest, constants.first_lookahead)
        return int(min(constants.max_candidates, constants.widening * timed))

    def guess_pays(self, plan: Plan, candidates: int, chance: float) -> bool:
        """Whether one more guess is verified, see `Governor.guess_pays`."""
        costs = self._costs
        if candidates >= self._widest or not costs.pace_s or plan.calibrate:
            return False
        if self.guess_gains(plan, candidates, chance):
            self._guess_probe.shorten()
            return True
        return candidates == 0 and self._guess_probe.due()

    def guess_gains(self, plan: Plan, candidates: int, chance: float) -> bool:
        """Whether one more guess is expected to gain, see `Governor.guess_gains`."""
        # The draft model does not go on behind it: nothing more is gained.
        rate = max(plan.rate, self.usual_rate)
        return chance > self._constants.guess_margin * rate * self._costs.verify.step(candidates)

    def width(self, chances: Sequence[Sequence[float]]) -> int:
        """How many candidates of each row are verified, see `Governor.width`."""
        costs, most = self._costs, max(map(len, chances))
        if not costs.pace_s:
            return most
        rate = self._constants.guess_margin * len(chances) * self.usual_rate
        found, net, gain = 0, 0.0, 0.0
        for n in range(min(most, self._widest)):
            gain += sum(row[n] for row in chances if n < len(row))
            this = gain - rate * (costs.verify.at(n + 1) - costs.verify.at(0))
            if this > net:
                found, net = n + 1, this
        if not found and self._width_probe.due():
            return min(most, self._constants.probe_lookahead)
        return found

    def leaves_to_expand(self, plan: Plan, chances: Sequence[float], candidates: int) -> int:
        """How many leaves the draft model goes on behind, see `Governor.leaves_to_expand`."""
        costs, constants = self._costs, self._constants
        if not plan.lookahead or not costs.draft.known:
            return 0
        rate = constants.guess_margin * max(plan.rate, self.usual_rate)
        verify = rate * costs.verify.step(candidates)
        found, most, gain = 0, 0.0, 0.0
        for n, chance in enumerate(chances[: constants.max_expanded], 1):
            gain += max(0.0, chance * plan.acceptance - verify)
            # Several positions cost the draft in proportion what they cost the target: both are read on the same machine.
            net = gain - rate * costs.draft.step() * costs.verify.at(n - 1)
            if net > most:
                found, most = n, net
        return found

    def guess_beats_model(self, plan: Plan, position: int, survival: float, chance: float, begun: bool) -> bool:
        """Whether a guess is taken for `position` of the chain, see `Governor.guess_beats_model`."""
        costs = self._costs
        if position >= self._widest or not costs.pace_s or plan.calibrate:
            return False
        if self._probing and not position:
            return False  # a try that a guess takes the place of shows nothing
        more = costs.verify.step(position)
        gain = survival * chance * (1 + plan.value) - plan.rate * more
        if gain <= 0:
            return False
        model = self._acceptances.rate_at(position, plan.acceptance, plan.serves_base)
        return gain >= survival * model * (1 + plan.value) - plan.rate * (more + costs.drafting(begun))

    def observe_round(self, k: int, steps: int, outcomes: Sequence[tuple[TokenSource, float]]) -> float:
        """Takes in a round whose times are in `costs` already; returns the weight of what it shows of the draft model.

        Args:
            k: candidates.
            steps: of them, the draft model's.
            outcomes: of the verified ones, each with the chance that it was kept.
        """
        constants = self._constants
        self._plain_age = self._plain_age + 1 if k else 0
        self._tokens.add(1 + sum(chance for _, chance in outcomes))
        self._time.add(self._costs.verify.at(k) + (self._costs.draft.at(steps) if steps else 0.0))
        tried = [chance for drafted, chance in outcomes if drafted.is_drafted]
        if self._probing and tried and statistics.mean(tried) > self._acceptances.rate + constants.probe_surprise:
            self._probes_left = constants.more_probes  # until it is believed, or was luck
        return constants.probe_weight if self._probing else 1.0

    def request_ended(self, new_tokens: int) -> None:
        """Takes in the length of an answer."""
        rate = self._constants.length_rate if self._length else 1.0
        self._length += rate * (new_tokens - self._length)
