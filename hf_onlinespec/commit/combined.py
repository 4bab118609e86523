"""Token by token, the suffix memory or the draft model commits, as the governor expects to pay."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapt.schedule import LearningSchedule
from ..govern.acceptance import Continuation, RequestStats, TokenSource
from ..govern.planner import Plan
from ..rounds import Proposal, Rows, Verdict
from ..runtime.clock import finished
from ..runtime.failures import Attempt
from .base import Call, Draft, Proposer
from .causal_lm import RowModel
from .proposal import ProposalBuilder
from .request_memory import CallMemory, RequestMemory
from .sampling import draw


@final
class Combined(Proposer):
    """Drafts from the suffix memory, and with a draft model where there is one.

    Args:
        models: per row; []: there is no draft model.
        memory: the suffix memory in this call.
        stats: per row, what it shows of who drafts.
        schedule: when the call is learned; None: there is nothing to train.
    """

    def __init__(
        self,
        draft: Draft,
        call: Call,
        models: list[RowModel],
        memory: CallMemory,
        stats: list[RequestStats],
        schedule: LearningSchedule | None = None,
    ) -> None:
        self.schedule = schedule
        self._draft, self._call, self._models, self._memory, self._stats = draft, call, models, memory, stats
        self._governor = draft.governor  # one for the whole call, whatever begins anew meanwhile
        self._drafts = draft.failures.drafting.begin()  # whether the draft model takes part
        self._drafted = False  # whether it has drafted in this call
        self._reads_prompt = (
            True  # whether it reads the prompt in this round: that tells nothing about the cost of a step
        )
        self._rows: Rows | None = None  # as they are now

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

    def propose(self, rows: Rows, room: int) -> Proposal:
        """See `Proposer`. Who drafts a token, and whether to go on, is decided from the prefix and from q before the draw."""
        self._rows = rows
        return Proposal.joined([self._propose(i, rows.row(i), room) for i in range(len(rows.lengths))])

    def _propose(self, i: int, tokens: Tensor, room: int) -> Proposal:
        """The candidates behind one row (1, L)."""
        failed = self._call.counts.failed_drafts
        if not self._call.timed:
            return self._build(i, tokens, room, None, None, failed)
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
        if self._call.lookahead is not None:
            return self._build(
                i, tokens, min(room, self._call.lookahead), None, self._memory.row(i, tokens, stats), failed
            )
        plan = Plan(0, 1.0, 0.0)
        if room > 0:
            with self._draft.lock:
                unread = tokens.shape[1] - (0 if own is None else own.cache.length)
                plan = governor.plan(model is not None, stats, room, unread)
        return self._build(i, tokens, room, plan, self._memory.row(i, tokens, stats), failed)

    def _build(
        self, i: int, tokens: Tensor, most: int, plan: Plan | None, memory: RequestMemory | None, failed: int
    ) -> Proposal:
        """A proposal by plan; None: of `most` candidates, by whoever is more likely to be right.

        Args:
            failed: `failed_drafts` before the round: once more have failed, the model drafts no further.
        """
        model = self._models[i] if self._models else None
        if model is not None:
            model.take(tokens)
            if model.cache.length:  # in plain rounds too: no rejected token may outlive them
                with self._drafting():
                    model.cache.rewind(tokens.shape[1])
            self._reads_prompt = model.cache.length == 0
        builder = ProposalBuilder(tokens, None if memory is None else memory.context, self._call.end_tokens)
        wanted = model is not None and self._drafts and (plan is None or plan.lookahead > 0)
        serving: AbstractContextManager[PreTrainedModel | None] = nullcontext()
        if model is not None and wanted:
            serving = model.model.serving(model.base)
        if most > 0 and (wanted or memory is not None):
            # Lighter than no_grad. What leaves the block is copied by cat, or read by learning without being saved.
            with self._drafting(), serving as served, torch.inference_mode():
                while len(builder.drafted) < most and not builder.ended:
                    model_drafts = served is not None and self._model_speaks(i, tokens, builder, plan)
                    if (
                        memory is not None
                        and builder.context is not None
                        and self._add_memory_token(i, builder, plan, memory, model_drafts)
                    ):
                        continue
                    if model is None or served is None or not model_drafts or self._call.counts.failed_drafts > failed:
                        break
                    self._add_model_token(i, builder, model, served)
                if model is not None and builder.has_model_token and self._call.waits and not self._reads_prompt:
                    # What was queued is a part of the draft's time, and would count as the target's.
                    waits = time.perf_counter()
                    builder.model_s += finished(model.model.device) - waits
        vocabulary = None if model is None else model.vocabulary
        vocabulary = self._call.vocabulary or vocabulary
        return builder.proposal(vocabulary.said if self._call.sample and vocabulary is not None else 0)

    def _model_speaks(self, i: int, tokens: Tensor, builder: ProposalBuilder, plan: Plan | None) -> bool:
        if tokens.shape[1] + len(builder.drafted) >= self._models[i].model.positions:
            return False
        return plan is None or self._governor.model_pays(
            plan, len(builder.drafted), builder.survival, begun=builder.has_model_token
        )

    def _memory_speaks(
        self, i: int, builder: ProposalBuilder, plan: Plan | None, found: Continuation, model_drafts: bool
    ) -> bool:
        governor, stats, place = self._governor, self._stats[i], len(builder.drafted)
        if plan is None:  # no clock: whoever is accepted more often
            known = governor.acceptances
            _, chance = known.memory(found, not place, known.memory_calibration(stats))
            return not model_drafts or chance >= known.mean_rate(stats.serves_base)
        return governor.decide_memory(plan, place, builder.survival, found, model_drafts, begun=builder.has_model_token)

    def _add_memory_token(
        self, i: int, builder: ProposalBuilder, plan: Plan | None, memory: RequestMemory, model_drafts: bool
    ) -> bool:
        """One candidate of the memory's; False: it has none, or is not the one to draft."""
        with self._memory.attempt():
            assert builder.context is not None
            found = memory.lookup(builder.context)
            vocabulary = self._call.vocabulary or (self._models[i].vocabulary if self._models else None)
            if found is not None and vocabulary is not None:
                found = found.below(vocabulary.size)  # the memory may know other targets
            if found is None or not self._memory_speaks(i, builder, plan, found, model_drafts):
                return False
            drawn = 0
            if self._call.sample and len(found.tokens) > 1:
                drawn = int(draw(torch.tensor([found.probs], dtype=torch.float32)))
            place = len(builder.drafted)
            known = self._governor.acceptances
            key, chance = known.memory(found, not place, known.memory_calibration(self._stats[i]))
            builder.add_memory_token(found.tokens[drawn], found, TokenSource("memory", place, key), chance)
            return True
        return False

    def _add_model_token(self, i: int, builder: ProposalBuilder, model: RowModel, served: PreTrainedModel) -> None:
        """One candidate of the draft model's."""
        started, governor = time.perf_counter(), self._governor
        found = model.next_token(served, builder.prefix)
        if found is None:
            with self._draft.lock:
                governor.acceptances.non_finite(self._stats[i])
            builder.ended = True
            builder.model_s += time.perf_counter() - started
            return
        key: tuple[int, ...] = (-1,)
        chance = governor.acceptances.mean_rate(model.base)
        if found.confidence is not None:
            key, chance = governor.acceptances.rate_by_confidence(found.confidence, model.base)
        source = TokenSource("model", len(builder.drafted), key)
        builder.add_model_token(found.token, found.known, found.probs, source, chance)
        self._drafted = True
        if self._reads_prompt and not builder.model_s and self._call.waits:
            seconds = finished(model.model.device) - started
            with self._draft.lock:
                governor.observe_prefill(model.cache.length, seconds)
        builder.model_s += time.perf_counter() - started

    def observe(self, verdict: Verdict) -> None:
        """See `Proposer`: the governor is told what was drafted, how it was accepted, and the times."""
        self._rows, model_s = verdict.rows, verdict.proposal.model_s
        target_s = verdict.target_s
        if target_s:
            target_s += verdict.draft_s - model_s  # the memory's time belongs to every round
        timed_s = 0.0 if self._reads_prompt else model_s
        with self._draft.failures.records.attempt(), self._draft.lock:
            for sources, overlaps, stats in zip(verdict.proposal.sources, verdict.overlaps, self._stats, strict=True):
                self._governor.observe(sources, overlaps, timed_s, target_s, stats)

    # The end of the call

    def finish(self) -> bool:
        """See `Proposer`."""
        draft, unseen = self._draft, False
        if self._memory.in_use and self._call.learns and self._rows is not None:
            with self._memory.attempt(), draft.lock:
                draft.metrics.memory_bytes = self._memory.commit(self._rows)
        with draft.failures.records.attempt(), draft.lock:
            steps = self._models[0].model.steps if self._models else 0
            new_tokens = self._call.counts.new_tokens
            for stats in self._stats:
                unseen |= self._governor.request_ended(new_tokens, stats, self._call.lookahead, steps)
        for worked, what in (
            (bool(self._models), draft.failures.preparing),
            (self._drafted and self._drafts, draft.failures.drafting),
            (self._memory.in_use, draft.failures.memory),
        ):
            if worked and what.worked():
                self._governor.decisions.drafting = f"drafting works again after: {what.reason}"
        return unseen
