"""The draft commits: plain forwards on a KV cache that is cropped, never rebuilt, and what the suffix memory knows.

`OnlineCandidateGenerator` serves our own loop (`propose`, `observe`, `finish`) and is a transformers
`CandidateGenerator` as well (`get_candidates`, `update_candidate_strategy`), so that it also works inside theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import CandidateGenerator

from .._compat.generation import stateless
from ..adapt.feedback import FeedbackRecorder
from ..govern.acceptance import Continuation, RequestStats, TokenSource
from ..govern.governor import NOTHING_LEARNS
from ..govern.planner import Plan
from ..metrics import Counts
from ..models.vocabulary import Vocabulary
from ..runtime.clock import finished
from ..runtime.failures import Attempt
from .base import Draft
from .causal_lm import RequestModel
from .learning_draft import LearningDraft
from .lookahead import fixed_lookahead, replaced
from .proposal import Proposal, ProposalBuilder
from .request_memory import MemoryInRequest, RequestMemory
from .sampling import draw
from .schedule import LearningSchedule


class OnlineCandidateGenerator(CandidateGenerator):
    """Drafts for one request and hands its feedback to the draft.

    Args:
        draft: who drafts and learns.
        generation_config: of the call (sampling or greedy, end of sequence, longest length, `num_assistant_tokens`).
        logits_processor: the target's list. A `FeedbackRecorder` is put in front of it; its stateless members are
            applied to the draft too, so that q is warped as p is.
        attention_mask: (batch, prompt) with zeros where the prompt is padded on the left; None: no padding.
        learn: False: this request is only drafted, nothing is recorded, remembered or learned.
        vocabulary: of the target; None: the draft's own. Ids that the draft does not have too are never drafted by it, and it
            reads another token in the place of one that it has no embedding for.
    """

    def __init__(
        self,
        draft: Draft,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        attention_mask: Tensor | None = None,
        learn: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.counts = Counts()
        self._draft, self._learn = draft, learn
        # What failed of late is left out of this request; what fails in it, of the rest of it.
        self._failures = draft.failures
        self._proposes = self._failures.proposing.begin()  # whether anything is drafted
        self._drafts = self._failures.drafting.begin()  # whether the draft model takes part
        self._memory = MemoryInRequest(self._failures.memory.begin())
        self._drafted = False  # whether the draft model has drafted in this request
        self._governor, self._settings = draft.governor, draft.settings
        neural = draft if isinstance(draft, LearningDraft) else None
        drafts = None if neural is None else neural.generation_config
        self._fixed = fixed_lookahead(generation_config, self._settings, drafts)  # None: "auto"
        draft.warn_once(replaced(generation_config, drafts, self._fixed))
        self._sample = bool(generation_config.do_sample)
        temperature = float(generation_config.temperature or 1.0) if self._sample else 0.0
        self._max_length: int = generation_config.max_length
        eos = generation_config.eos_token_id
        self._eos = set(torch.tensor([] if eos is None else eos).view(-1).long().tolist())
        mask: Tensor | None = None
        self._padding = 0  # of the first row
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            mask = attention_mask
            self._padding = int((attention_mask[0] == 0).sum())
        self._vocabulary = vocabulary
        self._sequence: Tensor | None = None  # (batch, L) the request so far
        self._seen = RequestStats()
        self._waits = False  # whether anything is decided by times: only then is an accelerator waited for
        self._model: RequestModel | None = None
        self._schedule: LearningSchedule | None = None
        if self._failures.preparing.begin() and neural is not None:
            with self._failures.preparing.attempt(self._stop_preparing):
                warpers = stateless(logits_processor)
                self._model = RequestModel(neural, mask, vocabulary, warpers, self._sample, self._seen)
                self._vocabulary = self._model.vocabulary
                self._schedule = LearningSchedule(self._model, self.counts, temperature, learn, self._memory)
                if self._schedule.recorder is not None:
                    logits_processor.insert(0, self._schedule.recorder)

    @property
    def recorder(self) -> FeedbackRecorder | None:
        """Hears the target's raw logits; None: nothing is learned here."""
        return None if self._schedule is None else self._schedule.recorder

    # Beside decoding nothing may fail a call, see failures.py.

    def _stop_preparing(self) -> None:
        """The request goes on as if there were no draft model."""
        self.counts.failed_drafts += 1
        self._model = self._schedule = None

    def _proposing(self) -> Attempt:
        return self._failures.proposing.attempt(self._stop_proposing)

    def _stop_proposing(self) -> None:
        """The request goes on plain: what failed is neither the draft model's nor the memory's.

        No later round takes rejected tokens out of the draft model's cache, and learning reads what is in it.
        """
        self.counts.failed_drafts += 1
        self._proposes = False
        if self._model is not None:
            self._model.reset()

    def _drafting(self) -> Attempt:
        return self._failures.drafting.attempt(self._stop_drafting)

    def _stop_drafting(self) -> None:
        """The request goes on without the draft model, whose cache may hold anything now."""
        self.counts.failed_drafts += 1
        self._drafts = False
        if self._model is not None:
            self._model.reset()

    def _recalling(self) -> Attempt:
        return self._failures.memory.attempt(self._stop_recalling)

    def _stop_recalling(self) -> None:
        """The request goes on without the suffix memory."""
        self.counts.failed_drafts += 1
        self._memory.stop()

    def propose(self, input_ids: Tensor, most: int) -> Proposal:
        """Drafts after `input_ids` (batch, L): at most `most` tokens, and no more than are expected to pay.

        Token by token, the memory or the neural draft speaks. Who does, and whether to go on, is decided from the prefix
        and from q before the draw: every drawn token is submitted. A round ends behind an end of sequence.
        """
        self._sequence = input_ids
        self._waits = self._fixed is None or self._settings.update_every == "auto"
        if self._schedule is not None:
            self._schedule.timed, self._schedule.waits = True, self._waits
        proposal = self._attempted(input_ids, lambda: self._planned(input_ids, most))
        if self._schedule is not None and self._model is not None and self._model.tokens is None:
            with self._schedule.attempt():
                self._model.take(input_ids)
        return proposal

    def _attempted(self, input_ids: Tensor, make: Callable[[], Proposal]) -> Proposal:
        """What `make` drafts; nothing where something failed in it: what there is of such a round may be half of it."""
        failed = self.counts.failed_drafts
        proposal = nothing = Proposal(input_ids[:, :0], None)
        if self._proposes:
            with self._proposing():
                proposal = make()
        return nothing if self.counts.failed_drafts > failed else proposal

    def _planned(self, input_ids: Tensor, most: int) -> Proposal:
        model = self._model if self._drafts and input_ids.shape[1] < self._positions else None
        if model is not None and model.tokens is None and self._settings.update_every == "auto":
            with self._draft.lock:
                scored = min(input_ids.shape[1], self._governor.router.constants.prompt_tokens)
                asks = self._governor.decide_prompt_scoring(scored, most)
                model.serve(self._governor.router.use_base())
            if asks:
                with self._drafting():
                    model.choose(model.readable(input_ids))
        if self._fixed is not None:
            return self._propose(input_ids, min(most, self._fixed), None)
        plan = Plan(0, 1.0, 0.0)
        if most > 0:
            with self._draft.lock:
                unread = input_ids.shape[1] - (0 if self._model is None else self._model.cached)
                plan = self._governor.plan(model is not None, self._seen, most, unread)
        return self._propose(input_ids, most, plan)

    @property
    def _positions(self) -> int:
        """The longest context that the draft model may see; 0: there is none."""
        return 0 if self._model is None else self._model.draft.positions

    def _propose(self, input_ids: Tensor, most: int, plan: Plan | None, recalls: bool = True) -> Proposal:
        """A proposal by plan; None: of `most` tokens, by whoever is more likely to be right."""
        failed, model = self.counts.failed_drafts, self._model
        self._sequence = input_ids
        if model is not None:
            model.take(input_ids)
        recall = self._recalled(input_ids) if recalls else None
        if model is not None and model.cached:  # in silent rounds too: no rejected token may outlive them
            with self._drafting():
                model.rewind(input_ids.shape[1])
        round_ = ProposalBuilder(input_ids, None if recall is None else recall.context, self._eos)
        serving: AbstractContextManager[PreTrainedModel | None] = nullcontext()
        wanted = model is not None and self._drafts and (plan is None or plan.lookahead > 0)
        if model is not None:
            if wanted:
                serving = model.draft.serving(model.base)
            model.began = model.cached == 0  # a round that reads the prompt tells nothing about the cost of a step
        if most > 0 and (wanted or recall is not None):
            # Lighter than no_grad. What leaves the block is copied by cat, or read by learning without being saved.
            with self._drafting(), serving as served, torch.inference_mode():
                while len(round_.drafted) < most and not round_.ended:
                    neural = served is not None and self._model_speaks(round_, plan)
                    if (
                        recall is not None
                        and round_.context is not None
                        and self._memory_token(round_, plan, recall, neural)
                    ):
                        continue
                    if model is None or served is None or not neural or self.counts.failed_drafts > failed:
                        break
                    self._model_token(round_, model, served)
                if model is not None and round_.neural and self._waits and not model.began:
                    # What was queued is a part of the draft's time, and would count as the target's.
                    waits = time.perf_counter()
                    round_.model_s += finished(model.draft.device) - waits
        return round_.proposal(self._vocabulary.said if self._sample and self._vocabulary is not None else 0)

    def _recalled(self, input_ids: Tensor) -> RequestMemory | None:
        """The memory, once it has read the request; None: there is none, or it has failed."""
        memory = self._draft.memory
        if memory is None or not self._memory.usable or input_ids.shape[0] != 1:
            return None
        with self._recalling():
            if self._memory.recall is None:
                asks = self._schedule is not None and self._schedule.asks_memory
                size = min(self._max_length + 1, self._settings.memory_tokens)
                known = self._governor.acceptances
                self._memory.recall = RequestMemory(
                    memory, self._draft.lock, size, self._padding, self._seen, known, asks
                )
            self._memory.recall.read(input_ids)
        return self._memory.recall

    def _model_speaks(self, round_: ProposalBuilder, plan: Plan | None) -> bool:
        if self._sequence is None or self._sequence.shape[1] + len(round_.drafted) >= self._positions:
            return False
        return plan is None or self._governor.model_pays(
            plan, len(round_.drafted), round_.survival, begun=round_.neural
        )

    def _memory_speaks(self, round_: ProposalBuilder, plan: Plan | None, found: Continuation, neural: bool) -> bool:
        if plan is None:  # no clock: whoever is accepted more often
            acceptances = self._governor.acceptances
            _, chance = acceptances.memory(found, not round_.drafted, acceptances.memory_calibration(self._seen))
            return not neural or chance >= acceptances.mean_rate(self._seen.serves_base)
        return self._governor.decide_memory(
            plan, len(round_.drafted), round_.survival, found, neural, begun=round_.neural
        )

    def _memory_token(self, round_: ProposalBuilder, plan: Plan | None, recall: RequestMemory, neural: bool) -> bool:
        """One token of the memory's; False: it has none, or is not the one to speak."""
        with self._recalling():
            assert round_.context is not None
            found = recall.ask(round_.context)
            if found is not None and self._vocabulary is not None:
                found = found.below(self._vocabulary.size)  # the memory may know other targets
            if found is None or not self._memory_speaks(round_, plan, found, neural):
                return False
            place = 0
            if self._sample and len(found.tokens) > 1:
                place = int(draw(torch.tensor([found.probs], dtype=torch.float32)))
            known = self._governor.acceptances
            key, chance = known.memory(found, not round_.drafted, known.memory_calibration(self._seen))
            round_.add_memory_token(found.tokens[place], found, TokenSource("memory", len(round_.drafted), key), chance)
            return True
        return False

    def _model_token(self, round_: ProposalBuilder, model: RequestModel, served: PreTrainedModel) -> None:
        """One token of the neural draft's."""
        started, acceptances = time.perf_counter(), self._governor.acceptances
        found = model.next_token(served, round_.prefix)
        if found is None:
            with self._draft.lock:
                acceptances.non_finite(self._seen)
            round_.ended = True
            round_.model_s += time.perf_counter() - started
            return
        key: tuple[int, ...] = (-1,)
        chance = acceptances.mean_rate(model.base)
        if found.confidence is not None:
            key, chance = acceptances.rate_by_confidence(found.confidence, model.base)
        round_.add_model_token(
            found.token, found.known, found.law, TokenSource("model", len(round_.drafted), key), chance
        )
        self._drafted = True
        if model.began and not round_.model_s and self._waits:  # it has read the prompt
            seconds = finished(model.draft.device) - started
            with self._draft.lock:
                self._governor.observe_prefill(model.cached, seconds)
        round_.model_s += time.perf_counter() - started

    def record_round(self, logits: Tensor) -> None:
        """Keeps the target's raw logits (batch, k + 1, vocab) of a round, if they are learned from."""
        if self._schedule is not None and self._schedule.recorder is not None:
            with self._schedule.attempt():
                self._schedule.recorder.record_round(logits)

    def observe(
        self, input_ids: Tensor, proposal: Proposal, overlaps: Sequence[float], draft_s: float, target_s: float
    ) -> None:
        """Takes in the outcome of a round.

        Args:
            input_ids: (batch, L) the request with its new tokens.
            overlaps: Σ min(p, q) at every verified position.
            draft_s, target_s: times of the round; a target_s of 0 is not counted.
        """
        model_s = proposal.model_s
        if target_s:
            target_s += draft_s - model_s  # the memory's time belongs to every round
        timed_s = 0.0 if self._model is None or self._model.began else model_s
        with self._failures.records.attempt(), self._draft.lock:
            self._governor.observe(proposal.drafted, overlaps, timed_s, target_s, self._seen)
        self._sequence = input_ids
        if self._schedule is not None:
            with self._schedule.attempt():
                self._schedule.record(input_ids)
                self._schedule.learn_of_round()

    def finish(self) -> None:
        """Ends the request: remembers it, learns from what is left of it and rehearses, as far as that is worth it."""
        failures, unseen = self._failures, False
        recall, schedule = self._memory.recall, self._schedule
        if recall is not None and self._learn and self._sequence is not None:
            with self._recalling(), self._draft.lock:
                self._draft.metrics.memory_bytes = recall.remember(self._sequence)
        with failures.records.attempt(), self._draft.lock:
            steps = 0 if self._model is None else self._model.draft.steps
            unseen = self._governor.request_ended(self.counts.new_tokens, self._seen, self._fixed, steps)
        if schedule is not None:
            with schedule.attempt():
                schedule.learn_of_request(unseen)
        decisions = self._governor.decisions
        with failures.records.attempt(), self._draft.lock:
            if schedule is not None and schedule.worked and failures.learning.worked():
                self._governor.budget.say(f"learning works again after: {failures.learning.reason}")
            verdict = self._governor.budget.verdict if schedule is not None else ""
            outcome = NOTHING_LEARNS if schedule is None else schedule.outcome()
            decisions.learning = f"{outcome}; {verdict}" if verdict else outcome
        for worked, what in (
            (self._model is not None, failures.preparing),
            (self._proposes, failures.proposing),
            (self._drafted and self._drafts, failures.drafting),
            (self._memory.recall is not None, failures.memory),
        ):
            if worked and what.worked():
                decisions.drafting = f"drafting works again after: {what.reason}"

    def close(self, started: float) -> None:
        """The end of the call, finished or broken off; `started`: when it began."""
        if self._schedule is not None and self._model is not None:
            self._schedule.close()
            with self._schedule.attempt():
                self._model.draft.end_request()
        self.counts.wall_time_s = time.perf_counter() - started
        with self._failures.records.attempt(), self._draft.lock:
            self._draft.metrics.close(self.counts)
            decisions = self._governor.decisions
            failures = self._failures
            for what in (failures.learning, failures.preparing):
                if what.failing:
                    decisions.learning = what.reason
            for what in (failures.memory, failures.drafting, failures.proposing, failures.preparing):
                if what.failing:
                    decisions.drafting = what.reason
        with self._failures.records.attempt():
            self._draft.report(self.counts)

    # The protocol of transformers' own loop. It tells no times and has no end of request: the lookahead is a number, the
    # memory is not asked, and the draft learns every `update_every` rounds whatever `update_when` says; whoever made the
    # generator may call `finish()` for the rest and for the replay.

    def get_candidates(  # type: ignore[override]  # annotated for LongTensor, and as if there were always a q
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`(input_ids with the drafted tokens, log q)`, for transformers' assisted decoding."""
        k = self._governor.constants.planner.first_lookahead if self._fixed is None else self._fixed
        k = max(0, min(k, self._max_length - input_ids.shape[1] - 1))
        with torch.inference_mode(False), torch.no_grad():
            tokens = input_ids.clone()
            proposal = self._attempted(tokens, lambda: self._propose(tokens, k, None, recalls=False))
        candidates = torch.cat([input_ids, proposal.tokens], dim=-1)
        return candidates, None if proposal.q is None else proposal.q.log()

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Learns from a round of transformers' loop; the raw logits come from the recorder, not from `scores`."""
        if self._schedule is None:
            return
        every = self._settings.update_every
        with torch.inference_mode(False), torch.no_grad(), self._schedule.attempt():
            self._sequence = input_ids.clone()
            self._schedule.record(self._sequence)
            if self._schedule.rounds % (every if isinstance(every, int) else 1) == 0:
                self._schedule.update()
