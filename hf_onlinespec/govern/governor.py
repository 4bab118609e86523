"""What is worth doing now: how far to draft, from which source, and how much to learn; from measured times and acceptance.

Drafting: `planner.py`, by the costs of `costs.py` and the estimates of `acceptance.py`. Learning: what it brings is the tokens per
round that the learned draft adds to the base draft and the memory, measured on the same tokens; `budget.py` holds that against
its cost, and `routing.py` says which of the two drafts serves a request.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..metrics import Decisions
from .acceptance import AcceptanceConstants, Acceptances, RequestStats, RowRound, TokenSource
from .account import AccountConstants, DraftAccount
from .batch_pace import BatchPace, PaceConstants, progress, share_of_rows
from .budget import BudgetConstants, LearningBudget
from .costs import CostConstants, Costs
from .fit import Fit, FitConstants
from .guesses import GuessChances, GuessConstants
from .names import NameConstants, NameRouter
from .planner import NextInRow, Plan, Planner, PlannerConstants
from .routing import AdapterRouter, RouterConstants

NOTHING_LEARNS = "there is no draft model: the suffix memory holds what was written, and has nothing to learn"


@dataclass(frozen=True)
class GovernorConstants:
    """Of everything that the governor decides by, and of when there is much to learn."""

    acceptance: AcceptanceConstants = field(default_factory=AcceptanceConstants)
    costs: CostConstants = field(default_factory=CostConstants)
    planner: PlannerConstants = field(default_factory=PlannerConstants)
    budget: BudgetConstants = field(default_factory=BudgetConstants)
    router: RouterConstants = field(default_factory=RouterConstants)
    names: NameConstants = field(default_factory=NameConstants)
    fit: FitConstants = field(default_factory=FitConstants)
    guesses: GuessConstants = field(default_factory=GuessConstants)
    account: AccountConstants = field(default_factory=AccountConstants)
    pace: PaceConstants = field(default_factory=PaceConstants)
    min_positions: int = 5  # drafted positions that tell a request's acceptance; chosen
    # So many requests below the acceptance, and none above so many times of it: the draft has much to learn. Chosen.
    low_acceptance: float = 0.3
    low_requests: int = 4
    well_above: float = 1.5
    # A request of which nothing was seen is scored where so many before it were not seen either, then one of so many. Chosen.
    score_at_once: int = 3
    score_every: int = 4
    batch_widening: float = 2.0  # of `PlannerConstants.widening`, in rounds of several rows; chosen
    compared_lookahead: int = 4  # of the rounds that comparisons are reckoned in; chosen


class Governor:
    """Decides for one draft. Knows no models and reads no clock: it is told times and acceptance.

    Args:
        update_budget: largest share of the time that learning may take.
        replay_passes: most gradient steps on remembered requests after one request.
        lookahead: of the settings; a number is not this class's decision, but is reported by it.
    """

    def __init__(
        self,
        update_budget: float,
        replay_passes: int,
        lookahead: int | str = "auto",
        constants: GovernorConstants = GovernorConstants(),
    ) -> None:
        self.constants = constants
        self.decisions = Decisions()
        self.acceptances = Acceptances(constants.acceptance)
        self.guesses = GuessChances(self.acceptances, constants.guesses)
        self.budget = LearningBudget(update_budget, replay_passes, self.decisions, constants.budget)
        self.router = AdapterRouter(constants.router)
        self.names = NameRouter[str | None](constants.names)  # None: the adapter without a name
        self.fit = Fit(constants.fit)
        self.costs = Costs(constants.costs)
        self.account = DraftAccount(constants.account)
        max_lookahead = constants.acceptance.max_lookahead
        self._planner = Planner(self.acceptances, self.costs, self.decisions, max_lookahead, constants.planner)
        self._fixed = lookahead
        self._rows, self._by_rows = 1, dict[int, Governor]()
        self.pace: BatchPace | None = None  # whether anybody is asked in rounds of several rows
        self._unseen = 0  # requests since the draft model's acceptance was last seen
        self._shown = False  # whether it was shown since the last request
        self._lows = {base: 0 for base in (False, True)}  # requests of low acceptance since one of a better one

    def for_rows(self, rows: int) -> Governor:
        """Decides for rounds of so many rows: by times of their own, and by what is known of acceptance, which they share.

        Rows are reckoned as if each did what the others do: a plain step brings a token to each, and the draft model takes its time
        for all of them, in one forward or in one of each. Sizes up to a power of two are one.
        """
        size = 1 << (rows - 1).bit_length()
        if size == 1:
            return self
        if size not in self._by_rows:
            own, constants = copy.copy(self), self.constants
            # What is tried now and then in one row takes the time of all of them: as often in a round, not in a row.
            planner = constants.planner
            rarely = {name: size * vars(planner)[name] for name in ("first_probe", "last_probe", "refresh")}
            own.costs = Costs(replace(constants.costs, once_is_enough=True))
            own.account = DraftAccount(constants.account)
            most = constants.acceptance.max_lookahead
            # Measured: on the embedded pair 8 rows of up to 64 candidates, reckoned as 2 plain steps from rounds of up to 4, took 6.
            own_planner = replace(planner, **rarely, widening=constants.batch_widening)
            own._planner = Planner(own.acceptances, own.costs, own.decisions, most, own_planner)
            own._rows, own._by_rows, own.pace = size, {}, BatchPace(constants.pace, size)
            self._by_rows[size] = own
        return self._by_rows[size]

    def observe_progress(self, rows: int, asked: bool, seconds: float, slowest: float, mean: float) -> None:
        """Takes in what a round of a batch took, and brought: tokens of the row that is behind, and of a row in the mean.

        Args:
            rows: of the round.
            asked: whether anybody was, in it.
        """
        own = self.for_rows(rows)
        if own.pace is not None:
            times = {size: one._fastest_s for size, one in {1: self, **self._by_rows}.items() if one.costs.pace_s}
            share = share_of_rows(times, own._rows, own.costs.pace_s)
            own.pace.observe(asked, seconds, progress(slowest, mean, share))

    @property
    def _fastest_s(self) -> float:
        """What a token of every row takes, drafted or not."""
        plain_s = self.costs.pace_s
        return plain_s / self._planner.usual_rate if self.pace is None else self.pace.fastest_s(plain_s)

    # Drafting

    def takes_part(self) -> bool:
        """Counts a request; whether the draft model takes part in it, or is left alone because it does not pay, see `DraftAccount`."""
        part = self.account.takes_part()
        if part and not self.account.pays:
            self._planner.probe_soon()
        return part

    def plan(self, drafts: bool = True, seen: RequestStats | None = None, room: int = 0, unread: int = 0) -> Plan:
        """How far the draft model should go in this round; counts rounds in which it should not, and then tries it now and then.

        Args:
            drafts: whether there is a draft model.
            seen: what this request has shown so far.
            room: tokens that the request may still take.
            unread: tokens that the draft has to read before it can draft.
        """
        return self._planner.plan(drafts, RequestStats() if seen is None else seen, room, unread)

    def model_pays(self, plan: Plan, position: int, survival: float, begun: bool = True) -> bool:
        """Whether the draft model should draft the token at `position`, all before it being kept with chance `survival`.

        Args:
            begun: whether it has drafted in this round already. The first time it has to read what was kept of the last one.
        """
        return self._planner.model_pays(plan, position, survival, begun)

    def may_draft(self, plan: Plan, position: int) -> bool:
        """Whether the draft model may draft the token at `position` at all, be it worth its time or not."""
        return self._planner.may_draft(plan, position)

    def models_pay(self, next_tokens: Sequence[NextInRow], rows: int) -> bool:
        """Whether the draft model should draft the next token in several rows, all of which it reads in one forward.

        Args:
            next_tokens: of the rows in which it may draft one.
            rows: that it reads, and that the target verifies: the others, too, are as long in coming.
        """
        return self._planner.models_pay(next_tokens, rows)

    def guess_pays(self, plan: Plan, candidates: int, chance: float) -> bool:
        """Whether one more guess is verified, beside so many candidates, that is kept with this chance.

        Counts the rounds in which none pays, and then tries one now and then: what is never tried is never found to be better.
        """
        return self._planner.guess_pays(plan, candidates, chance)

    def guess_gains(self, plan: Plan, candidates: int, chance: float) -> bool:
        """Whether a guess that is kept with this chance gains more than verifying it beside so many candidates costs."""
        return bool(self.costs.pace_s) and self._planner.guess_gains(plan, candidates, chance)

    def width(self, chances: Sequence[Sequence[float]]) -> int:
        """How many candidates of each row of a batch are verified, the first ones: a wide row makes all of them as wide.

        Args:
            chances: per row, that its candidates are kept.
        """
        return self._planner.width(chances)

    def leaves_to_expand(self, plan: Plan, chances: Sequence[float], candidates: int) -> int:
        """How many leaves of the tree the draft model reads at once, to go on behind them; 0: it does not pay.

        Args:
            chances: that they are kept, the likeliest leaf first.
            candidates: so far.
        """
        return self._planner.leaves_to_expand(plan, chances, candidates)

    def guess_beats_model(self, plan: Plan, position: int, survival: float, chance: float, begun: bool = False) -> bool:
        """Whether a guess is taken for `position` of the chain: where it is better than none, and than the draft model's token.

        Args:
            survival: the chance that all before it are kept.
            chance: that it is kept then.
            begun: whether the model has drafted in this round already.
        """
        return self._planner.guess_beats_model(plan, position, survival, chance, begun)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The draft took so long to read so many tokens of a prompt, in every row."""
        self.costs.observe_prefill(tokens, seconds)

    def observe(
        self,
        drafted: Sequence[TokenSource],
        outcomes: Sequence[tuple[TokenSource, float]],
        draft_s: float,
        target_s: float,
        seen: RequestStats | None = None,
        expansions: int = 0,
    ) -> None:
        """Takes in one round: its candidates, the chance that each verified one was kept, and its times; notes it in `seen`.

        Args:
            expansions: forwards of the draft model behind several candidates at once.
        """
        stats = RequestStats() if seen is None else seen
        self.observe_rows([RowRound(drafted, outcomes, stats, expansions)], draft_s, target_s)

    def observe_rows(self, rows: Sequence[RowRound], draft_s: float, target_s: float) -> None:
        """Takes in one round of one or several rows, and the times of all of them together.

        The target verifies as many candidates of each row as the row with the most has. Of the draft model's steps those of the row
        with the most count where it reads them together, else the mean.
        """
        k = max(len(row.drafted) for row in rows)
        steps = [row.steps for row in rows]
        steps_of_all = max(steps) if any(row.read_together for row in rows) else -(-sum(steps) // len(steps))
        names = {token.source for row in rows for token in row.drafted}
        model, memory = "model" in names, bool(names - {"model"})
        name = "plain" if not k else "model" if not memory else "memory+model" if model else "memory"
        self.decisions.rounds[name] += 1
        self.costs.observe_round(k, steps_of_all, draft_s, target_s)
        for row in rows:
            weight = self._planner.observe_round(k, steps_of_all, row.outcomes)
            self.acceptances.observe_round(row.outcomes, row.seen, weight)
        limit = min(self.account.learning_limit, 1.0 if self.pace is None else self.pace.learning_limit)
        self.budget.earn(draft_s + target_s, self.acceptances.base_served_last, limit)

    def observe_draft(
        self, gained: int, own: int, candidates: int, draft_s: float, reads: bool = False, read: int = 0
    ) -> None:
        """Takes in what the draft model did in a round of a request that it takes part in.

        Args:
            gained: tokens that were kept, and that there would not have been without it.
            own: of the candidates, those that no guess would have had.
            draft_s: that it took, a prompt that it read included; of several rows, as if it had taken as long for each.
            reads: whether the target handed out hidden states for it.
            read: tokens of a prompt that it read in this round.
        """
        costs, verify = self.costs, self.costs.verify
        if costs.pace_s and math.isfinite(draft_s):
            drafting = costs.without_stall(draft_s / costs.pace_s, read)
            taken = drafting + verify.at(candidates) - verify.at(candidates - own)
            self.account.observe(gained / self._planner.usual_rate, taken, reads)

    def _report(self, lookahead: int | str, left_alone: bool) -> None:
        """Says what holds now, and why."""
        self.decisions.acceptance = self.acceptances.rate
        if self.costs.pace_s:
            self.decisions.draft_step = self.costs.draft.step()
            self.decisions.verify_step = self.costs.verify.step(self.constants.planner.first_lookahead)
        if lookahead != "auto":
            self.decisions.drafting = f"lookahead={lookahead} was asked for"
        elif self.pace is not None and not self.pace.pays:
            self.decisions.drafting = (
                f"plain decoding of {self._rows // 2 + 1} to {self._rows} rows: {self.pace.reason}"
            )
        elif left_alone:
            self.decisions.drafting = f"guesses alone: {self.account.reason}"
        elif self._planner.reason:
            self.decisions.drafting = self._planner.reason

    # Learning

    def decide_comparison(self, prompt_log_ratio: float, router: AdapterRouter | None = None) -> bool:
        """Counts an update; whether it scores the base draft too.

        Args:
            router: of the adapter that is updated; None: of the one without a name.
        """
        return (router or self.router).decide_comparison(prompt_log_ratio, self.decisions.budget_fraction == 1.0)

    def decide_prompt_scoring(
        self, tokens: int = 0, room: int | None = None, router: AdapterRouter | None = None
    ) -> bool:
        """Counts a request; whether its prompt is scored to tell who serves it: not where neither draft is expected to draft.

        Args:
            tokens: that both drafts would have to read.
            room: tokens that the request may take; too few of them are not worth it. None: just enough.
            router: of the adapter that serves the request; None: of the one without a name.
        """
        least = self.constants.planner.min_room_to_explore
        room = least if room is None else room
        if room < least or not (router or self.router).decide_scoring():
            return False
        found = [self._planner.best(self.acceptances.mean_rate(base), base) for base in (False, True)]
        return any(best and self._planner.prefill_pays(2 * tokens, room, rate) for best, rate in found)

    def observe_comparison(
        self,
        learned: Sequence[float],
        base: Sequence[float] | None,
        recalled: Sequence[float] | None = (),
        updates: bool = True,
        prompt_log_ratio: float = 0.0,
        router: AdapterRouter | None = None,
    ) -> None:
        """Acceptance at new positions that the draft has not learned from, and the base draft's at the same ones.

        Args:
            recalled: estimated acceptance of the memory's answers there, 0 where it has none; (): no memory; None: not asked.
            updates: whether the draft learns from them now.
            prompt_log_ratio: of the prompt, see `AdapterRouter`.
            router: of the learned draft; None: of the adapter without a name.
        """
        n = len(learned)
        if not n or not all(map(math.isfinite, (*learned, *(base or ())))):
            return  # a draft whose logits are not finite teaches nothing
        router = router or self.router
        by_base = router.use_base(prompt_log_ratio)
        if base is not None:
            router.observe_difference(prompt_log_ratio, statistics.mean(learned) - statistics.mean(base), n)
            if updates and recalled is not None:
                recalled = recalled or [0.0] * n
                self.budget.observe_gain(self._beside(learned, recalled) / self._beside(base, recalled), by_base)
        elif by_base:
            return  # what would have served was not looked at
        self.fit.note(max(sum(learned), sum(base or ())), n)
        served = base if by_base and base is not None else learned
        self.acceptances.observe_offline(served, by_base)
        if self._unseen and not self._shown:
            self._shown = True  # one request counts once
            self._observe_request(statistics.mean(served), n, by_base)

    def _beside(self, model: Sequence[float], recalled: Sequence[float]) -> float:
        """Tokens per round where at every position the memory drafts if it is likelier to be right than the draft usually is."""
        usual = statistics.mean(model)
        acceptance = statistics.mean(r if r > usual else a for a, r in zip(model, recalled, strict=True))
        # Constant and independent from position to position: (1 − a^(k+1)) / (1 − a).
        return sum(acceptance**i for i in range(self.constants.compared_lookahead + 1))

    def request_ended(
        self,
        new_tokens: int,
        seen: RequestStats | None = None,
        lookahead: int | None = None,
        steps: int = 0,
        *,
        left_alone: bool = False,
        can_score: bool = True,
    ) -> bool:
        """Takes in the end of a request; whether it is scored: where the draft has neither drafted nor learned in it.

        Args:
            lookahead: that was fixed for this request; None: the settings'.
            steps: gradient steps that the draft has taken before this request is learned from.
            left_alone: whether the draft model took no part, see `takes_part`.
            can_score: whether there is what scoring needs: the hidden states that the draft reads.
        """
        constants = self.constants
        self._report(self._fixed if lookahead is None else lookahead, left_alone)
        self._planner.request_ended(new_tokens)
        self._shown = False
        if seen is not None:
            self.fit.note(seen.acceptance, seen.positions)
        settled = self.fit.message
        self.fit.request_ended(steps)
        if self.fit.message != settled:
            self.budget.reset_least("the draft does not fit the target")
        if seen is not None and seen.positions >= constants.min_positions:
            self._unseen = 0
            self._observe_request(seen.acceptance / seen.positions, seen.positions, seen.serves_base)
        else:
            self._unseen += 1
        self.acceptances.request_ended()
        if new_tokens < constants.min_positions or not self._unseen or not can_score:
            return False
        # At once, while the stream may have changed; then now and then.
        wanted = self._unseen <= constants.score_at_once or self._unseen % constants.score_every == 0
        return (wanted and self.budget.scoring.affordable()) or self.fit.decide_scoring()

    def _observe_request(self, acceptance: float, positions: int, base: bool) -> None:
        """Takes in the acceptance of a request, known from so many positions."""
        constants = self.constants
        low = acceptance < constants.low_acceptance
        if low:  # the first request of all is believed at once
            self._lows[base] = self._lows[base] + 1 if self.acceptances.known else constants.low_requests
        elif self.acceptances.mean_rate(base) > constants.well_above * constants.low_acceptance:
            self._lows[base] = 0
        if low and self.fit.message is not None:
            return  # nothing was learned before, with the full budget
        if self.acceptances.observe_request(acceptance, positions, base):
            self.budget.reset_full("acceptance has fallen, the stream has changed", base)
        elif low and self._lows[base] == constants.low_requests:
            self.budget.reset_full(f"acceptance is {acceptance:.2f}, there is much to learn", base)
