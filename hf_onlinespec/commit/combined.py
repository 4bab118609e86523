"""Guesses and the draft model's tokens, as far as the governor expects them to pay."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..adapt.call_feedback import route
from ..adapt.schedules import Schedule, Schedules
from ..govern.acceptance import RequestStats, RowRound
from ..govern.planner import NextInRow, Plan
from ..rounds import Proposal, Rows, Verdict
from ..runtime.failures import Attempt
from .base import Call, Draft, Proposer
from .chain import Chain, RowPart
from .expansion import Expansion
from .guessing import Guesser, GuessSources
from .proposal import ProposalBuilder
from .reading_together import grow_rows
from .row_model import RowModel
from .tree import grow


@dataclass(frozen=True)
class CallRows:
    """The rows of a call in a round.

    Args:
        room: how far they may reach.
    """

    proposer: Combined
    rows: Rows
    room: int


@final
class Combined(Proposer):
    """Drafts by guesses that cost no model, and with a draft model where there is one.

    Args:
        models: per row; []: there is no draft model.
        sources: of guesses, in this call.
        stats: per row, what it shows of who drafts.
        schedule: when the call is learned; None: there is nothing to train.
    """

    def __init__(
        self,
        draft: Draft,
        call: Call,
        models: list[RowModel],
        sources: GuessSources,
        stats: list[RequestStats],
        schedule: Schedule | None = None,
    ) -> None:
        self.schedule = schedule
        self._draft, self._call, self._models, self._sources, self._stats = draft, call, models, sources, stats
        self._governors = draft.governor  # of the whole call, whatever begins anew meanwhile
        with draft.lock:
            self._governor = self._weighs = self._governors.for_rows(call.at_once or call.rows)  # of so many rows
        self._weighed = call.timed and call.lookahead is None  # whether the draft model has to pay
        failing = not draft.failures.drafting.begin()
        self._left_alone = False  # whether it takes no part because it does not pay
        if models and not failing and self._weighed:
            with draft.lock:
                self._left_alone = not self._governor.takes_part()
        self._drafts = not failing and not self._left_alone  # whether the draft model takes part
        self.reads = draft.reads if models else ()
        if schedule is not None and self.reads and not self._drafts and not schedule.may_learn:
            self.reads = ()
            why = draft.failures.drafting.reason if failing else "the draft was left alone"
            schedule.leave_out(f"{why}, and its target handed out no hidden states")
        self._drafted = False  # whether it has drafted in this call
        self._reads_prompt = (
            True  # whether it reads the prompt in this round: that tells nothing about the cost of a step
        )
        self._latest: dict[int, tuple[Rows, int]] = {}  # by row of the call: where it is now, and its place there
        self._new_tokens = [0] * call.rows
        self._open = set(range(call.rows))  # rows that have not ended, see `leave`
        # Of the latest round, per row of it.
        self._builders: list[ProposalBuilder] = []
        self._parts: list[RowPart] = []
        self._failed_before = 0  # times that drafting had failed before the draft model's part in it
        self._rests = False  # whether nobody is asked in it

    # Beside decoding nothing may fail a call, see runtime/failures.py.

    def _drafting(self) -> Attempt:
        return self._draft.failures.drafting.attempt(self._stop_drafting)

    def _stop_drafting(self) -> None:
        """The call goes on without the draft model, whose cache may hold anything now."""
        self._call.counts.failed_drafts += 1
        self._drafts = False
        self.reset()

    def reset(self) -> None:
        """See `Proposer`. No later round takes rejected tokens out of the draft model's cache, and learning reads what is in it."""
        for model in self._models:
            model.reset()

    # A round

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        """See `Proposer`. Who drafts a token, and whether to go on, is decided from the prefix and from q before the draw."""
        return self.propose_together([CallRows(self, rows, room)], trees)[0]

    @staticmethod
    def propose_together(calls: Sequence[CallRows], trees: bool) -> list[Proposal]:
        """What several calls of one draft propose in a round that the target verifies in one forward; trees: see `Proposer`.

        What depends on the time of the round is decided for all of their rows: whether anybody is asked, and how wide it is.
        """
        n = sum(len(call.rows.lengths) for call in calls)
        weighed = [call.proposer for call in calls if call.proposer._weighed]
        rests = bool(weighed) and weighed[-1]._pauses(n)
        for call in calls:
            call.proposer._enter(call.rows, n, rests)
        asked = [call for call in calls if not call.proposer._rests]
        chains = [chain for call in asked for chain in call.proposer._begin_round(call.rows, call.room, trees)]
        Combined._grow(asked, chains, n)
        for call in asked:
            call.proposer._add_guesses()
        Combined._cut(asked)
        return [call.proposer._proposal(call.rows) for call in calls]

    def _pauses(self, rows: int) -> bool:
        """Counts a round of so many rows; whether nobody is asked in it."""
        with self._draft.lock:
            pace = self._governors.for_rows(rows).pace
            return pace is not None and not pace.asks()

    def _enter(self, rows: Rows, n: int, rests: bool) -> None:
        """Begins a round of n rows, those of other calls included; `rests`: whether only those are asked whose lookahead is fixed."""
        self._note(rows)
        rested = self._rests
        self._builders, self._parts, self._rests = [], [], rests and self._weighed
        with self._draft.lock:
            self._governor = self._governors.for_rows(n)
        if self._rests:
            self._read_on(rows, rested)

    def _begin_round(self, rows: Rows, room: int, trees: bool) -> list[Chain]:
        """What is asked for behind every row; the draft model's part in it."""
        self._reads_prompt = False
        if self._weighed:
            self._choose_drafts(rows, room)
        chains = list[Chain]()
        for at, i in enumerate(rows.of_call):
            part, chain = self._begin(i, rows.row(at), room, trees)
            self._parts.append(part)
            chains += [] if chain is None else [chain]
        self._failed_before = self._call.counts.failed_drafts
        return chains

    def _add_guesses(self) -> None:
        """Guesses beside and behind the chains."""
        for part in self._parts:
            if part.guesser is not None and part.most > 0 and self._call.counts.failed_drafts == self._failed_before:
                self._add_guesses_of(part, part.guesser)

    @staticmethod
    def _cut(calls: Sequence[CallRows]) -> None:
        """Leaves out candidates that would make the round wider than is worth it."""
        weighed = [call.proposer for call in calls if call.proposer._weighed]
        builders = [builder for own in weighed for builder in own._builders]
        if len(builders) > 1:
            with weighed[-1]._draft.lock:
                width = weighed[-1]._governor.width([builder.chances for builder in builders])
            for builder in builders:
                builder.cut(width)

    def _proposal(self, rows: Rows) -> Proposal:
        if self._rests:
            return Proposal.nothing(rows)
        vocabulary = self._call.vocabulary or (self._models[0].vocabulary if self._models else None)
        size = vocabulary.said if self._call.sample and vocabulary is not None else 0
        return Proposal.joined([builder.proposal(size) for builder in self._builders])

    def _note(self, rows: Rows) -> None:
        self._latest |= {i: (rows, at) for at, i in enumerate(rows.of_call)}

    def _take(self, model: RowModel, tokens: Tensor) -> None:
        """The row (1, L) as it is now; also where nobody drafts: no rejected token may outlive that."""
        model.take(tokens)
        if model.reader.length:
            with self._drafting():
                model.rewind()

    def _read_on(self, rows: Rows, rested: bool) -> None:
        """A round in which nobody is asked; `rested`: as in the one before, so that there is nothing to take back."""
        for at, i in enumerate(rows.of_call):
            if self._models and not (rested and self._models[i].begun):
                self._take(self._models[i], rows.row(at))
            if not self._sources.begun(i):
                self._sources.row(i, rows.row(at), self._stats[i])

    def _begin(self, i: int, tokens: Tensor, room: int, trees: bool) -> tuple[RowPart, Chain | None]:
        """What is asked for behind one row (1, L), and the draft model's part in it; i: which one of the call."""
        plan, most, asks = None, room, self._call.timed
        if asks and self._call.lookahead is None:
            plan = self._plan(i, tokens, room)
        elif asks:
            most, trees = min(room, self._call.lookahead or 0), False
        model, reads_prompt = self._models[i] if self._models else None, True
        if model is not None:
            self._take(model, tokens)
            reads_prompt = model.reader.length == 0
        self._reads_prompt |= reads_prompt
        draws = self._call.sample and not trees  # several guesses are better than one that is drawn
        guesser = self._sources.row(i, tokens, self._stats[i], draws) if asks else None
        context = None if guesser is None else guesser.context
        builder = ProposalBuilder(tokens, context, self._call.end_tokens)
        builder.read = tokens.shape[1] if model is not None and reads_prompt else 0
        self._builders.append(builder)
        part = RowPart(i, builder, plan, most, guesser, trees)
        wanted = model is not None and self._drafts and (plan is None or plan.lookahead > 0)
        if model is None or not wanted or most <= 0 or not model.can_draft():
            return part, None
        attempt, lock = self._sources.attempt, self._draft.lock
        chain = Chain(self._governor, lock, self._call, model, self._stats[i], part, reads_prompt, attempt)
        return part, chain

    def _choose_drafts(self, rows: Rows, room: int) -> None:
        """Once for every row, who serves it: where that depends on its prompt, that is scored first, those of all rows together."""
        asked = list[tuple[RowModel, Tensor]]()
        for at, i in enumerate(rows.of_call if self._drafts and self._draft.settings.update_every == "auto" else ()):
            model = self._models[i] if self._models else None
            if model is None or model.tokens is not None or rows.lengths[at] >= model.model.positions:
                continue
            with self._draft.lock:
                scored = min(rows.lengths[at], model.router.constants.prompt_tokens)
                asks = self._governor.decide_prompt_scoring(scored, room, model.router)
                model.serve(model.router.use_base())
            if asks:
                asked.append((model, model.readable(rows.row(at))))
        for own in {id(model.model): model.model for model, _ in asked}.values():
            alike = [(model, prompt) for model, prompt in asked if model.model is own]
            models, prompts = [model for model, _ in alike], [prompt for _, prompt in alike]
            with self._drafting():
                route(models, prompts, own, models[0].router.constants.prompt_tokens)

    def _plan(self, i: int, tokens: Tensor, room: int) -> Plan:
        """How far the draft model should go."""
        governor, own, stats = self._governor, self._models[i] if self._models else None, self._stats[i]
        model = own if self._drafts and own is not None and tokens.shape[1] < own.model.positions else None
        if not room:
            return Plan(0, 1.0, 0.0)
        with self._draft.lock:
            unread = tokens.shape[1] if own is None else own.unread(tokens.shape[1])
            return governor.plan(model is not None, stats, room, unread)

    @staticmethod
    def _grow(calls: Sequence[CallRows], chains: Sequence[Chain], n: int) -> None:
        """The candidates of the draft model, in a round of n rows."""
        models = [call.proposer._models[i] for call in calls if call.proposer._models for i in call.rows.of_call]
        if not models:
            return
        own = [call.proposer for call in calls]
        first, waits = own[-1], any(one._call.waits for one in own)

        def stop() -> None:
            for one in own:
                one._stop_drafting()

        def observe(tokens: int, seconds: float, read: int) -> None:
            # It took so long in some of the rows: in all of them it takes as much longer.
            with first._draft.lock:
                first._governor.observe_prefill(tokens, seconds * n / read)

        def pays(next_tokens: Sequence[NextInRow]) -> bool:
            return not next_tokens or first._governor.models_pay(next_tokens, n)

        with first._draft.failures.drafting.attempt(stop):
            drafted = grow_rows(chains, models, pays, observe if waits else None, company=len(calls) > 1)
            for one in own:
                one._drafted |= any(model in drafted for model in one._models)

    def _add_guesses_of(self, part: RowPart, guesser: Guesser) -> None:
        """Guesses beside and behind the chain, as far as they are expected to pay."""
        governor, expansion, builder, plan = self._governor, None, part.builder, part.plan
        if part.trees and plan is not None and builder.has_model_token and not builder.read:
            model = self._models[part.row]
            expansion = Expansion(governor, self._draft.lock, plan, model, builder, self._drafting)
        with self._sources.attempt():

            def pays(candidates: int, chance: float) -> bool:
                return candidates < part.most if plan is None else governor.guess_pays(plan, candidates, chance)

            grow(builder, guesser, pays, part.most, self._call.end_tokens, part.trees, expansion)

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        """See `Proposer`: the best next tokens behind everything that was verified, and what a head reads."""
        if features is not None:
            with self._drafting():
                for at, i in enumerate(rows.of_call if self._models else ()):
                    self._models[i].take_features(features[at : at + 1])
        elif self.reads:  # the target hands out none: no failure, but there is nothing to draft from
            self._drafts = False
            if self.schedule is not None:
                self.schedule.leave_out("its target hands out no hidden states, which the draft reads")
        if self._call.learns and not self._rests:
            self._sources.read(rows, proposal, logits)

    def observe(self, verdict: Verdict) -> None:
        """See `Proposer`: the governor is told what was drafted, how it was accepted, and the times."""
        self.observe_together([(self, verdict)])

    @staticmethod
    def observe_together(calls: Sequence[tuple[Combined, Verdict]]) -> None:
        """Takes in the outcome of a round of several calls of one draft; the times in their verdicts are shares of the round's."""
        own = [one for one, _ in calls]
        slowest = [one._take_in(verdict) for one, verdict in calls]
        n = sum(len(verdict.rows.lengths) for _, verdict in calls)
        draft_s, target_s, model_s = (
            sum(times) for times in zip(*((v.draft_s, v.target_s, v.proposal.model_s) for _, v in calls), strict=True)
        )
        new = [tokens for _, verdict in calls for tokens in verdict.new_tokens]
        last, draft = own[-1], own[-1]._draft
        # The time of guesses belongs to every round.
        seconds = target_s + draft_s - model_s if target_s else 0.0
        timed_s = 0.0 if any(one._reads_prompt for one in own) else model_s
        with draft.failures.records.attempt(), draft.lock:
            rounds = [one_row for one, verdict in calls for one_row in one._row_rounds(verdict)]
            last._governor.observe_rows(rounds, timed_s, seconds)
            if target_s:
                least, asked = (
                    slowest[0] if len(calls) == 1 else statistics.mean(new),
                    not all(one._rests for one in own),
                )
                last._governors.observe_progress(n, asked, draft_s + target_s, least, statistics.mean(new))
            for one, verdict in calls:
                one._weigh_round(verdict, n)
        for one in own:
            one._builders = []  # if proposing fails now, they are not taken in again

    def _take_in(self, verdict: Verdict) -> float:
        """What the rows have read and shown; what the round has brought the row that is behind."""
        rows = verdict.rows
        self._note(rows)
        if isinstance(self.schedule, Schedules):
            self.schedule.count(verdict)
        slowest = self._add_tokens(verdict)
        with self._drafting():
            for at, i in enumerate(rows.of_call if self._models else ()):
                length = rows.lengths[at] - verdict.new_tokens[at]
                self._models[i].keep(length, verdict.proposal.tokens.shape[1], verdict.paths[at])
                if verdict.done[at]:
                    self._models[i].reader.leave()
        with self._sources.attempt(), self._draft.lock:
            self._sources.take_in()
            for at, builder in enumerate(self._builders):
                self._observe_guesses(at, builder, verdict)
        return slowest

    def _row_rounds(self, verdict: Verdict) -> list[RowRound]:
        """The rows of a round, as the governor is told of them."""
        rounds = []
        for at, i in enumerate(verdict.rows.of_call):
            sources = verdict.proposal.sources[at]
            outcomes = [(sources[candidate], chance) for candidate, chance in verdict.chances[at]]
            expansions = self._builders[at].expansions if self._builders else 0
            together = bool(self._models) and self._models[i].reader.shared is not None
            rounds.append(RowRound(sources, outcomes, self._stats[i], expansions, together))
        return rounds

    def _add_tokens(self, verdict: Verdict) -> float:
        """Counts the new tokens of a round; what it has brought the row that is behind. Where others follow, none is waited for."""
        rows = verdict.rows.of_call
        before = min(self._new_tokens[i] for i in rows)
        for at, i in enumerate(rows):
            self._new_tokens[i] += verdict.new_tokens[at]
        if self._call.at_once is not None:
            return statistics.mean(verdict.new_tokens)
        return min(self._new_tokens[i] for i in rows) - before

    def _weigh_round(self, verdict: Verdict, n: int) -> None:
        """Tells the governor what the draft model brought in a round of n rows."""
        if not (self._weighed and self._drafts and self._models and self._governor is self._weighs):
            return
        for builder, path in zip(self._builders, verdict.paths, strict=False):
            # Without the model, the first candidate of its own would have been the end.
            first = next((at for at, candidate in enumerate(path) if candidate in builder.own), len(path))
            own, candidates, reads = len(builder.own), len(builder.drafted), bool(self.reads)
            self._weighs.observe_draft(len(path) - first, own, candidates, n * builder.model_s, reads, builder.read)

    def _observe_guesses(self, row: int, builder: ProposalBuilder, verdict: Verdict) -> None:
        """Every place of a row of this round that was verified has shown which of all guesses was right."""
        if not builder.places and not builder.beside:
            return
        stats = self._stats[verdict.rows.of_call[row]]
        new = verdict.rows.row(row)[0, -verdict.new_tokens[row] :].tolist()
        for at, token in zip((-1, *verdict.paths[row]), new, strict=False):
            if at in builder.places:
                self._governor.guesses.observe(builder.places[at], token, stats)
            if at in builder.beside:
                self._governor.guesses.observe_guesses(builder.beside[at], token)

    # The end of the call

    def leave(self, rows: Rows) -> bool:
        """See `Proposer`."""
        return self._end(rows.of_call)

    def _end(self, rows: Sequence[int]) -> bool:
        """What is written in rows that have ended is remembered; whether it is long since the draft's acceptance was seen."""
        draft, unseen = self._draft, False
        latest = [self._latest.pop(i) for i in rows if i in self._latest]
        if self._sources.in_use and self._call.learns and latest:
            with self._sources.attempt(), draft.lock:
                for own, at in latest:
                    draft.metrics.memory_bytes = self._sources.commit(own.of_rows([at]))
        with draft.failures.records.attempt(), draft.lock:
            for i in rows:
                self._open.discard(i)
                steps = self._models[i].model.steps if self._models else 0
                can_score = bool(self.reads) or not draft.reads
                unseen |= self._weighs.request_ended(
                    self._new_tokens[i],
                    self._stats[i],
                    self._call.lookahead,
                    steps,
                    left_alone=self._left_alone,
                    can_score=can_score,
                )
        return unseen

    def finish(self) -> bool:
        """See `Proposer`."""
        draft, unseen = self._draft, self._end(sorted(self._open))
        if any(model.translation is not None and not model.translation.is_spelled for model in self._models):
            self._governor.decisions.drafting = "guesses alone: the draft's tokenizer has no tokens for this text"
        for worked, what in (
            (bool(self._models), draft.failures.preparing),
            (self._drafted and self._drafts, draft.failures.drafting),
            (self._sources.worked, draft.failures.memory),
        ):
            if worked and what.worked():
                self._governor.decisions.drafting = f"drafting works again after: {what.reason}"
        return unseen
