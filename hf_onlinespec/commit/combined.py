"""Guesses and the draft model's tokens, as far as the governor expects them to pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..adapt.schedule import LearningSchedule
from ..govern.acceptance import RequestStats
from ..govern.planner import Plan
from ..rounds import Proposal, Rows, Verdict
from ..runtime.failures import Attempt
from .base import Call, Draft, Proposer
from .chain import Chain
from .expansion import Expansion
from .guessing import Guesser, GuessSources
from .proposal import ProposalBuilder
from .row_model import RowModel
from .tree import grow


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
        schedule: LearningSchedule | None = None,
    ) -> None:
        self.schedule = schedule
        self._draft, self._call, self._models, self._sources, self._stats = draft, call, models, sources, stats
        self._governor = draft.governor  # one for the whole call, whatever begins anew meanwhile
        self._weighed = call.timed and call.lookahead is None  # whether the draft model has to pay
        self._drafts = draft.failures.drafting.begin()  # whether it takes part
        if models and self._drafts and self._weighed:
            with draft.lock:
                self._drafts = self._governor.takes_part()
        self.reads = draft.reads if models else ()
        if schedule is not None and self.reads and not self._drafts and not schedule.may_learn:
            self.reads = ()
            schedule.leave_out("the draft was left alone, and its target handed out no hidden states")
        self._drafted = False  # whether it has drafted in this call
        self._reads_prompt = (
            True  # whether it reads the prompt in this round: that tells nothing about the cost of a step
        )
        self._rows: Rows | None = None  # as they are now
        self._builders: list[ProposalBuilder] = []  # of the latest round, per row

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
        self._rows, self._builders = rows, []
        return Proposal.joined([self._propose(i, rows.row(i), room, trees) for i in range(len(rows.lengths))])

    def _propose(self, i: int, tokens: Tensor, room: int, trees: bool) -> Proposal:
        """The candidates behind one row (1, L)."""
        failed = self._call.counts.failed_drafts
        plan, most, asks = None, room, self._call.timed
        if asks and self._call.lookahead is None:
            plan = self._plan(i, tokens, room)
        elif asks:
            most, trees = min(room, self._call.lookahead or 0), False
        model = self._models[i] if self._models else None
        if model is not None:
            model.take(tokens)
            if model.reader.length:  # in plain rounds too: no rejected token may outlive them
                with self._drafting():
                    model.reader.rewind(tokens.shape[1])
            self._reads_prompt = model.reader.length == 0
        draws = self._call.sample and not trees  # several guesses are better than one that is drawn
        guesser = self._sources.row(i, tokens, self._stats[i], draws) if asks else None
        context = None if guesser is None else guesser.context
        builder = ProposalBuilder(tokens, context, self._call.end_tokens)
        self._builders.append(builder)
        wanted = model is not None and self._drafts and (plan is None or plan.lookahead > 0)
        if model is not None and wanted and most > 0 and model.reader.can_draft(tokens.shape[1]):
            self._build_chain(i, builder, plan, most, guesser, trees, failed)
        if guesser is not None and most > 0 and self._call.counts.failed_drafts == failed:
            self._add_guesses(i, builder, plan, guesser, most, trees)
        vocabulary = None if model is None else model.vocabulary
        vocabulary = self._call.vocabulary or vocabulary
        return builder.proposal(vocabulary.said if self._call.sample and vocabulary is not None else 0)

    def _plan(self, i: int, tokens: Tensor, room: int) -> Plan:
        """How far the draft model should go; where that depends on the prompt, it is scored first."""
        governor, own, stats = self._governor, self._models[i] if self._models else None, self._stats[i]
        model = own if self._drafts and own is not None and tokens.shape[1] < own.model.positions else None
        if model is not None and model.tokens is None and self._draft.settings.update_every == "auto":
            with self._draft.lock:
                scored = min(tokens.shape[1], governor.router.constants.prompt_tokens)
                asks = governor.decide_prompt_scoring(scored, room)
                model.serve(governor.router.use_base())
            if asks:
                with self._drafting():
                    model.route(model.readable(tokens))
        if not room:
            return Plan(0, 1.0, 0.0)
        with self._draft.lock:
            unread = tokens.shape[1] - (0 if own is None else own.reader.length)
            return governor.plan(model is not None, stats, room, unread)

    def _build_chain(
        self,
        i: int,
        builder: ProposalBuilder,
        plan: Plan | None,
        most: int,
        guesser: Guesser | None,
        trees: bool,
        failed: int,
    ) -> None:
        """Candidates one behind the other, with the draft model; `failed`: `failed_drafts` before the round."""
        model = self._models[i]
        # Lighter than no_grad. What leaves the block is copied by cat, or read by learning without being saved.
        with self._drafting(), model.model.serving(model.base) as served, torch.inference_mode():
            chain = Chain(self._governor, self._draft.lock, self._call, model, self._stats[i], served)
            chain.reads_prompt, chain.trees = self._reads_prompt, trees
            while len(builder.drafted) < most and not builder.ended and chain.pays(builder, plan):
                if guesser is not None:
                    with self._sources.attempt():
                        if chain.add_guess(builder, plan, guesser):
                            continue
                if self._call.counts.failed_drafts > failed:
                    break
                self._drafted |= chain.add_model_token(builder, plan)
            chain.wait(builder)

    def _add_guesses(
        self, i: int, builder: ProposalBuilder, plan: Plan | None, guesser: Guesser, most: int, trees: bool
    ) -> None:
        """Guesses beside and behind the chain, as far as they are expected to pay."""
        governor, expansion = self._governor, None
        if trees and plan is not None and builder.has_model_token and not self._reads_prompt:
            expansion = Expansion(governor, self._draft.lock, plan, self._models[i], builder, self._drafting)
        with self._sources.attempt():

            def pays(candidates: int, chance: float) -> bool:
                return candidates < most if plan is None else governor.guess_pays(plan, candidates, chance)

            grow(builder, guesser, pays, most, self._call.end_tokens, trees, expansion)

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        """See `Proposer`: the best next tokens behind everything that was verified, and what a head reads."""
        if features is not None:
            with self._drafting():
                for i, model in enumerate(self._models):
                    model.take_features(features[i : i + 1])
        elif self.reads:  # the target hands out none: no failure, but there is nothing to draft from
            self._drafts = False
            if self.schedule is not None:
                self.schedule.leave_out("its target hands out no hidden states, which the draft reads")
        if self._call.learns:
            self._sources.read(rows, proposal, logits)

    def observe(self, verdict: Verdict) -> None:
        """See `Proposer`: the governor is told what was drafted, how it was accepted, and the times."""
        self._rows, model_s = verdict.rows, verdict.proposal.model_s
        with self._drafting():
            for i, model in enumerate(self._models):
                length = verdict.rows.lengths[i] - verdict.new_tokens[i]
                model.keep_features(length, verdict.proposal.tokens.shape[1], verdict.paths[i])
        target_s = verdict.target_s
        if target_s:
            target_s += verdict.draft_s - model_s  # the time of guesses belongs to every round
        timed_s = 0.0 if self._reads_prompt else model_s
        with self._sources.attempt(), self._draft.lock:
            self._sources.take_in()
            for i, builder in enumerate(self._builders):
                self._observe_guesses(i, builder, verdict)
        with self._draft.failures.records.attempt(), self._draft.lock:
            for i, (sources, chances, stats) in enumerate(
                zip(verdict.proposal.sources, verdict.chances, self._stats, strict=True)
            ):
                outcomes = [(sources[candidate], chance) for candidate, chance in chances]
                expansions = self._builders[i].expansions if self._builders else 0
                self._governor.observe(sources, outcomes, timed_s, target_s, stats, expansions)
            if self._weighed and self._drafts:
                for builder, path in zip(self._builders, verdict.paths, strict=False):
                    self._weigh(builder, path)

    def _weigh(self, builder: ProposalBuilder, path: Sequence[int]) -> None:
        """Tells the governor what the draft model brought in this round: without it, the first of its own would have been the end."""
        first = next((at for at, candidate in enumerate(path) if candidate in builder.own), len(path))
        own, candidates, reads = len(builder.own), len(builder.drafted), bool(self.reads)
        self._governor.observe_draft(len(path) - first, own, candidates, builder.model_s, reads)

    def _observe_guesses(self, i: int, builder: ProposalBuilder, verdict: Verdict) -> None:
        """Every place that was verified has shown which of all guesses was right."""
        if not builder.places and not builder.beside:
            return
        new = verdict.rows.row(i)[0, -verdict.new_tokens[i] :].tolist()
        for at, token in zip((-1, *verdict.paths[i]), new, strict=False):
            if at in builder.places:
                self._governor.guesses.observe(builder.places[at], token, self._stats[i])
            if at in builder.beside:
                self._governor.guesses.observe_guesses(builder.beside[at], token)

    # The end of the call

    def finish(self) -> bool:
        """See `Proposer`."""
        draft, unseen = self._draft, False
        if self._sources.in_use and self._call.learns and self._rows is not None:
            with self._sources.attempt(), draft.lock:
                draft.metrics.memory_bytes = self._sources.commit(self._rows)
        with draft.failures.records.attempt(), draft.lock:
            steps = self._models[0].model.steps if self._models else 0
            new_tokens = self._call.counts.new_tokens
            for stats in self._stats:
                unseen |= self._governor.request_ended(new_tokens, stats, self._call.lookahead, steps)
        for worked, what in (
            (bool(self._models), draft.failures.preparing),
            (self._drafted and self._drafts, draft.failures.drafting),
            (self._sources.worked, draft.failures.memory),
        ):
            if worked and what.worked():
                self._governor.decisions.drafting = f"drafting works again after: {what.reason}"
        return unseen
