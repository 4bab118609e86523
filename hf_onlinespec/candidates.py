"""The draft commits: plain forwards on a KV cache that is cropped, never rebuilt, and what the suffix memory knows.

`OnlineCandidateGenerator` serves our own loop (`propose`, `observe`, `finish`) and is a transformers
`CandidateGenerator` as well (`get_candidates`, `update_candidate_strategy`), so that it also works inside theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel

from ._compat import CACHE, CandidateGenerator, cache_tensors, crop, record_past, stateless
from .acceptances import Drafted, Seen
from .clock import finished
from .failures import Attempt
from .feedback import FeedbackRecorder
from .governor import FIRST_LOOKAHEAD, HOPE_ROOM, Plan
from .lesson import Lesson
from .lookahead import fixed_lookahead, replaced
from .memory import Continuation
from .metrics import Counts
from .preference import PREFERENCE_TOKENS
from .proposal import Proposal, Round
from .recall import Recall
from .sampling import draw
from .vocabulary import Vocabulary, widened

if TYPE_CHECKING:
    from .memory_draft import MemoryDraft


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
        draft: MemoryDraft,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        attention_mask: Tensor | None = None,
        learn: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.counts = Counts()
        self._draft, self._neural, self._learn = draft, draft.neural, learn
        # What failed of late is left out of this request; what fails in it, of the rest of it.
        self._failures = draft.failures
        self._proposes = self._failures.proposing.begin()  # whether anything is drafted
        self._drafts = self._failures.drafting.begin()  # whether the draft model takes part
        self._recalls = self._failures.memory.begin()  # whether the suffix memory does
        self._studies = self._failures.learning.begin() and learn and draft.neural is not None
        self._drafted = self._learned = False  # whether the draft model has drafted, and learned, in this request
        self._governor, self._settings = draft.governor, draft.settings
        drafts = None if self._neural is None else self._neural.generation_config
        self._fixed = fixed_lookahead(generation_config, self._settings, drafts)  # None: "auto"
        draft.warn_once(replaced(generation_config, drafts, self._fixed))
        self._sample = bool(generation_config.do_sample)
        self._temperature = float(generation_config.temperature or 1.0) if self._sample else 0.0
        self._max_length: int = generation_config.max_length
        eos = generation_config.eos_token_id
        self._eos = set(torch.tensor([] if eos is None else eos).view(-1).long().tolist())
        self._warpers = stateless(logits_processor)
        self.recorder: FeedbackRecorder | None = None  # of the target's raw logits; None: nothing is learned here
        self._mask: Tensor | None = None
        self._padding = 0  # of the first row
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            self._mask = attention_mask
            self._padding = int((attention_mask[0] == 0).sum())
        self._vocabulary = vocabulary
        self._common: int | None = None  # ids below it may be drafted by the neural draft
        if self._neural is not None:
            self._vocabulary = self._vocabulary or self._neural.vocabulary
            self._common = min(self._vocabulary.size, self._neural.vocabulary.size)
            self._cache = DynamicCache(config=self._neural.config)
            record_past(self._cache)
            self._mask = None if self._mask is None else self._mask.to(self._neural.device)
            if self._studies:
                self.recorder = FeedbackRecorder(self._learning)
                logits_processor.insert(0, self.recorder)
        self._preference: float | None = None  # how much the prompt speaks for the learned draft
        self._frozen = False  # whether the original draft serves this request
        self._cached = 0  # tokens in the draft's cache
        self._began = True  # whether this round is the draft's first
        # The memory is asked what it would have said at every token where learning is affordable.
        auto = self._settings.update_every == "auto" and self._settings.update_when != "idle"
        self._asks_memory = self._studies and auto and self._affordable_steps() > 0
        self._sequence: Tensor | None = None  # (batch, L) the request so far
        self._tokens: Tensor | None = None  # the same as the draft reads it, on its device
        self._prompt = 0  # how much of it was there before
        self._seen = Seen()
        self._recall: Recall | None = None  # one row: the memory as this request sees it
        self._rounds = 0
        self._timed = False  # whether the loop tells times; transformers' own does not
        self._waits = False  # whether anything is decided by them: only then is an accelerator waited for
        self._lesson = self._begin_lesson()

    # Beside decoding nothing may fail a call, see failures.py.

    def _proposing(self) -> Attempt:
        return self._failures.proposing.attempt(self._stop_proposing)

    def _stop_proposing(self) -> None:
        """The request goes on plain: what failed is neither the draft model's nor the memory's."""
        self.counts.failed_drafts += 1
        self._proposes = False

    def _drafting(self) -> Attempt:
        return self._failures.drafting.attempt(self._stop_drafting)

    def _stop_drafting(self) -> None:
        """The request goes on without the draft model, whose cache may hold anything now."""
        self.counts.failed_drafts += 1
        self._drafts, self._cached = False, 0
        if self._neural is not None:
            self._cache = DynamicCache(config=self._neural.config)

    def _recalling(self) -> Attempt:
        return self._failures.memory.attempt(self._stop_recalling)

    def _stop_recalling(self) -> None:
        """The request goes on without the suffix memory."""
        self.counts.failed_drafts += 1
        self._recalls, self._recall = False, None

    def _learning(self) -> Attempt:
        return self._failures.learning.attempt(self._stop_learning)

    def _stop_learning(self) -> None:
        """Nothing more of this request is learned, and what was recorded for it goes."""
        self.counts.failed_updates += 1
        self._studies = self._asks_memory = False
        if self.recorder is not None:
            self.recorder.close()
        self.recorder, self._lesson = None, self._begin_lesson()

    def _begin_lesson(self) -> Lesson:
        config = None if self._neural is None else self._neural.config
        lesson = Lesson(self._settings, self._common, self._temperature, config)
        if self._neural is not None:
            with self._draft.lock:
                self._neural.requests.add(lesson)
        return lesson

    def propose(self, input_ids: Tensor, most: int) -> Proposal:
        """Drafts after `input_ids` (batch, L): at most `most` tokens, and no more than are expected to pay.

        Token by token, the memory or the neural draft speaks. Who does, and whether to go on, is decided from the prefix
        and from q before the draw: every drawn token is submitted. A round ends behind an end of sequence.
        """
        self._timed, self._waits = True, self._fixed is None or self._settings.update_every == "auto"
        proposal = self._attempted(input_ids, lambda: self._planned(input_ids, most))
        if self._tokens is None:
            with self._learning():
                self._see(input_ids)
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
        sees = self._neural is not None and self._drafts and input_ids.shape[1] < self._neural.positions
        if self._tokens is None and sees and self._settings.update_every == "auto":
            with self._draft.lock:
                asked = min(input_ids.shape[1], PREFERENCE_TOKENS)
                asks = most >= HOPE_ROOM and self._governor.asks_prompt(asked, most)
                self._serve(self._governor.preference.frozen_serves())
            if asks:
                with self._drafting():
                    self._choose(self._readable(input_ids))
        if self._fixed is not None:
            return self._propose(input_ids, min(most, self._fixed), None)
        plan = Plan(0, 1.0, 0.0)
        if most > 0:
            with self._draft.lock:
                plan = self._governor.plan(sees, self._seen, most, input_ids.shape[1] - self._cached)
        return self._propose(input_ids, most, plan)

    def _see(self, input_ids: Tensor) -> None:
        if self._tokens is None:
            self._prompt = input_ids.shape[1]
        self._take(input_ids)

    def _propose(self, input_ids: Tensor, most: int, plan: Plan | None, recalls: bool = True) -> Proposal:
        """A proposal by plan; None: of `most` tokens, by whoever is more likely to be right."""
        failed = self.counts.failed_drafts
        self._see(input_ids)
        memory = self._draft.memory if recalls and self._recalls and input_ids.shape[0] == 1 else None
        if memory is not None:
            with self._recalling():
                if self._recall is None:
                    asks = self._governor.acceptances if self._asks_memory else None
                    size = min(self._max_length + 1, self._settings.memory_tokens)
                    self._recall = Recall(memory, self._draft.lock, size, self._padding, self._seen, asks)
                self._recall.read(input_ids)
        if self._cached:  # in silent rounds too: no rejected token may outlive them
            with self._drafting():
                self._rewind(input_ids.shape[1])
        recall = None if memory is None else self._recall
        round_ = Round(input_ids, None if recall is None else recall.context, self._eos)
        serving: AbstractContextManager[PreTrainedModel | None] = nullcontext()
        wanted = self._neural is not None and self._drafts and (plan is None or plan.lookahead > 0)
        if self._neural is not None and wanted:
            serving = self._neural.serving(self._frozen)
        self._began = self._cached == 0  # a round that reads the prompt tells nothing about the cost of a step
        if most > 0 and (wanted or recall is not None):
            # Lighter than no_grad. What leaves the block is copied by cat, or read by learning without being saved.
            with self._drafting(), serving as model, torch.inference_mode():
                while len(round_.drafted) < most and not round_.ended:
                    neural = model is not None and self._neural_speaks(round_, plan)
                    if recall is not None and round_.context is not None and self._recite(round_, plan, recall, neural):
                        continue
                    if model is None or not neural or self.counts.failed_drafts > failed:
                        break
                    self._think(round_, model)
                if self._neural is not None and round_.neural and self._waits and not self._began:
                    # What was queued is a part of the draft's time, and would count as the target's.
                    waits = time.perf_counter()
                    round_.neural_s += finished(self._neural.device) - waits
        return round_.proposal(self._vocabulary.said if self._sample and self._vocabulary is not None else 0)

    def _take(self, input_ids: Tensor) -> None:
        """The request as it is now, (batch, L)."""
        self._sequence = self._tokens = input_ids
        if self._neural is not None:
            self._tokens = self._readable(input_ids).to(self._neural.device)

    def _readable(self, tokens: Tensor) -> Tensor:
        """`tokens` as the draft reads them."""
        assert self._neural is not None and self._vocabulary is not None
        own = self._neural.vocabulary
        return own.readable(tokens) if self._vocabulary.read > own.size else tokens

    def _choose(self, tokens: Tensor) -> None:
        """Once in a request: whether the learned or the original draft serves it, by its prompt `tokens` as the draft reads it."""
        if self._neural is not None and self._preference is None and self._settings.update_every == "auto":
            started = time.perf_counter()
            self._preference, caches = self._neural.preference(tokens, self._mask)
            with self._draft.lock:
                if caches:
                    self._governor.read(2 * tokens.shape[1], time.perf_counter() - started)
                self._governor.preference.asked(self._preference)
                if not self._cached:  # who has begun goes on
                    self._serve(self._governor.preference.frozen_serves(self._preference))
            if caches and not self._cached:  # the prompt is read already
                self._cache, self._cached = caches[self._frozen], tokens.shape[1] - 1

    def _serve(self, frozen: bool) -> None:
        self._frozen = self._seen.frozen = self._governor.decisions.serves_frozen = frozen

    def _neural_speaks(self, round_: Round, plan: Plan | None) -> bool:
        assert self._neural is not None
        if self._tokens is None or self._tokens.shape[1] + len(round_.drafted) >= self._neural.positions:
            return False
        return plan is None or self._governor.neural_pays(
            plan, len(round_.drafted), round_.survival, begun=round_.neural
        )

    def _memory_speaks(self, round_: Round, plan: Plan | None, found: Continuation, neural: bool) -> bool:
        if plan is None:  # no clock: whoever is accepted more often
            acceptances = self._governor.acceptances
            _, chance = acceptances.memory(found, not round_.drafted, self._seen.trust)
            return not neural or chance >= acceptances.usual(self._frozen)
        return self._governor.memory_pays(
            plan, len(round_.drafted), round_.survival, found, neural, begun=round_.neural
        )

    def _recite(self, round_: Round, plan: Plan | None, recall: Recall, neural: bool) -> bool:
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
            key, chance = self._governor.acceptances.memory(found, not round_.drafted, self._seen.trust)
            round_.recite(found.tokens[place], found, Drafted("memory", len(round_.drafted), key), chance)
            return True
        return False

    def _think(self, round_: Round, model: PreTrainedModel) -> None:
        """One token of the neural draft's."""
        assert self._neural is not None and self._vocabulary is not None
        started = time.perf_counter()
        prefix = round_.prefix  # the warpers may hold tensors on the target's device: theirs is the place to warp
        scores = self._forward(model, self._readable(prefix[:, self._cached :]).to(self._neural.device))
        common = scores.shape[-1]
        if self._warpers:
            # They index the target's vocabulary; what the draft does not propose is impossible before and after them.
            scores = widened(scores.to(prefix.device), self._vocabulary.said, -torch.inf)
            scores = self._warpers(prefix, scores)
        scores = scores.to(prefix.device)
        host = prefix.device.type == "cpu" and prefix.shape[0] == 1  # elsewhere, reading a value waits for the device
        law = None
        if self._sample:
            law = scores.softmax(-1)
            if host and not math.isfinite(float(law.sum())):
                with self._draft.lock:
                    self._governor.acceptances.unsound(self._seen)
                round_.ended = True
                round_.neural_s += time.perf_counter() - started
                return
            if not host:
                # Asking would wait for the device: the uniform law takes the place of none, what is drawn from q stays exact.
                uniform = widened(law.new_full((common,), 1 / common), law.shape[-1], 0.0)
                law = torch.where(torch.isfinite(law).all(-1, keepdim=True), law, uniform)
            token = draw(law)
        else:
            token = scores.argmax(-1, keepdim=True)
        key: tuple[int, ...] = (-1,)
        acceptances = self._governor.acceptances
        chance, known = acceptances.usual(self._frozen), None
        if host:
            most_probable = float((scores.softmax(-1) if law is None else law).max())
            key, chance = acceptances.confident(most_probable, self._frozen)
            known = int(token)
        round_.think(token, known, law, Drafted("neural", len(round_.drafted), key), chance)
        self._drafted = True
        if self._began and not round_.neural_s and self._waits:  # it has read the prompt
            seconds = finished(self._neural.device) - started
            with self._draft.lock:
                self._governor.read(self._cached, seconds)
        round_.neural_s += time.perf_counter() - started

    def _rewind(self, length: int) -> None:
        """Rolls the draft's cache back to what was kept."""
        keep = min(self._cached, length - 1)
        crop(self._cache, self._cached - keep)
        self._cached = keep

    def _forward(self, model: PreTrainedModel, feed: Tensor) -> Tensor:
        """The draft's logits (batch, common ids) after `feed` (batch, n), which joins the cache."""
        assert self._neural is not None
        inputs = self._neural.inputs(feed, self._cached, self._mask)
        logits = model(**{CACHE: self._cache}, use_cache=True, **inputs, **self._neural.keep(1)).logits
        self._cached += feed.shape[1]
        return logits[:, -1, : self._common].float()

    def hear(self, logits: Tensor) -> None:
        """Keeps the target's raw logits (batch, k + 1, vocab) of a round, if they are learned from."""
        if self.recorder is not None:
            with self._learning():
                self.recorder.hear(logits)

    def observe(
        self, input_ids: Tensor, proposal: Proposal, overlaps: Sequence[float], draft_s: float, target_s: float
    ) -> None:
        """Takes in the outcome of a round.

        Args:
            input_ids: (batch, L) the request with its new tokens.
            overlaps: Σ min(p, q) at every verified position.
            draft_s, target_s: times of the round; a target_s of 0 is not counted.
        """
        neural_s = proposal.neural_s
        if target_s:
            target_s += draft_s - neural_s  # the memory's time belongs to every round
        with self._failures.records.attempt(), self._draft.lock:
            self._governor.observe(proposal.drafted, overlaps, 0.0 if self._began else neural_s, target_s, self._seen)
        with self._learning():
            self._record(input_ids)
            self._learn_of_round()

    def _learn_of_round(self) -> None:
        settings = self._settings
        full = self._lesson.waiting >= settings.context_tokens  # full target laws are kept for so many tokens at most
        due = full
        if settings.update_every == "auto":
            due = (full or settings.update_when == "round") and self._worthwhile_steps() > 0
        elif settings.update_when == "round":
            due = full or self._rounds % int(settings.update_every) == 0
        if due:
            self._update()
        elif full:
            self._lesson.put_off()

    def finish(self) -> None:
        """Ends the request: remembers it, learns from what is left of it and rehearses, as far as that is worth it."""
        failures, unseen = self._failures, False
        if self._recall is not None and self._learn and self._sequence is not None:
            with self._recalling(), self._draft.lock:
                self._draft.metrics.memory_bytes = self._recall.remember(self._sequence)
        with failures.records.attempt(), self._draft.lock:
            steps = 0 if self._neural is None else self._neural.steps
            unseen = self._governor.request_ended(self.counts.new_tokens, self._seen, self._fixed, steps)
        with self._learning():
            self._learn_of_request(unseen)
        decisions = self._governor.decisions
        for worked, what in (
            (self._proposes, failures.proposing),
            (self._drafted and self._drafts, failures.drafting),
            (self._recall is not None, failures.memory),
        ):
            if worked and what.worked():
                decisions.drafting = f"drafting works again after: {what.reason}"
        if self._learned and not self.counts.failed_updates and failures.learning.worked():
            decisions.learning = f"learning works again after: {failures.learning.reason}"

    def close(self, started: float) -> None:
        """The end of the call, finished or broken off; `started`: when it began."""
        if self.recorder is not None:
            self.recorder.close()
        if self._neural is not None:
            with self._learning():
                self._neural.end_request()
        self.counts.wall_time_s = time.perf_counter() - started
        with self._failures.records.attempt(), self._draft.lock:
            self._draft.metrics.close(self.counts)
            decisions = self._governor.decisions
            if self._failures.learning.failing:
                decisions.learning = self._failures.learning.reason
            for what in (self._failures.memory, self._failures.drafting, self._failures.proposing):
                if what.failing:
                    decisions.drafting = what.reason

    def _learn_of_request(self, unseen: bool) -> None:
        if self._neural is None or self._tokens is None or not (self._lesson.waiting or self._lesson.kept):
            return
        settings = self._settings
        steps = 1 + settings.replay_passes
        if settings.update_when == "idle":
            self._lesson.put_off()
            for feedback in self._lesson.feedback(self._tokens, self._mask):
                self._neural.learn_later(feedback, self._temperature)
            self._learned = True
            return
        if settings.update_every == "auto" and self._timed:
            steps = self._worthwhile_steps()
            if not steps:
                self._governor.decisions.updates_put_off += 1
                if unseen:
                    self._look()
        if steps:
            self._update()
        elif self._keeps:
            self._lesson.put_off()
        started, before = time.perf_counter(), self.counts.updates
        try:
            for feedback in self._lesson.feedback(self._tokens, self._mask):
                self._neural.remember(feedback)
            self._neural.rehearse(self.counts, steps - 1)
            self._neural.fold()
        finally:
            self._charge(started, before)

    @property
    def _keeps(self) -> bool:
        """Whether what is not learned from is worth remembering for the replay."""
        return self._lesson.kept or self._governor.decisions.effort == 1.0  # of a request, all or nothing

    def _look(self) -> None:
        """Shows the governor how the draft would have done on a request in which it neither drafts nor learns."""
        if self._lesson.waiting and self._neural is not None and self._tokens is not None:
            started = time.perf_counter()
            teachers = self._lesson.teachers()
            self._choose(self._tokens[:, : self._prompt])
            self._neural.look(
                self._tokens[:, : self._lesson.end], teachers, self._mask, self._temperature, self._preference
            )
            if self._keeps:
                self._lesson.keep(teachers)
            seconds = time.perf_counter() - started
            self.counts.update_time_s += seconds
            with self._draft.lock:
                self._governor.effort.looked(seconds)

    def _worthwhile_steps(self) -> int:
        """Steps that are affordable, if it is known what the memory would have said: else none could tell what they bring."""
        return self._affordable_steps() if self._asks_memory or self._recall is None else 0

    def _affordable_steps(self) -> int:
        with self._draft.lock:
            return self._governor.effort.affordable_steps()

    def _charge(self, started: float, updates_before: int) -> None:
        assert self._neural is not None
        seconds = (finished(self._neural.device) if self._waits else time.perf_counter()) - started
        self.counts.update_time_s += seconds
        if self._timed:
            with self._draft.lock:
                self._governor.effort.spent(seconds, self.counts.updates - updates_before)

    def _record(self, input_ids: Tensor) -> None:
        """Keeps the target's laws for the new tokens, up to the last position that the draft can see."""
        if self._tokens is None:
            return
        before = self._tokens.shape[1]
        n = input_ids.shape[1] - before
        self._take(input_ids)
        self._rounds += 1
        if self.recorder is None or self._neural is None:
            return
        rows = self.recorder.take(n)  # (batch, n, vocab)
        seen = max(0, min(n, self._neural.positions + 1 - before))
        if seen:
            self._lesson.record(rows[:, :seen].to(self._neural.device), before + seen)

    def _update(self) -> None:
        """One gradient step on the tokens since the last update, on top of the cached prefix."""
        if not self._lesson.waiting or self._tokens is None or self._neural is None:
            return
        started, before = time.perf_counter(), self.counts.updates
        try:
            self._step()
        finally:  # a step that fails takes its time, too
            self._charge(started, before)
        self._learned = True

    def _step(self) -> None:
        assert self._tokens is not None and self._neural is not None
        teachers = self._lesson.teachers()
        tokens = self._tokens[:, : self._lesson.end]
        prefix = min(self._cached, tokens.shape[1] - 1 - len(teachers[0]))
        dropped = any(keys.shape[-2] != self._cached for keys, _ in cache_tensors(self._cache))
        if dropped or self._frozen:
            prefix = 0  # a sliding window has dropped the start, or the frozen draft read it: read everything anew
        recalled: list[float] | None = []
        if not self._recalls:
            recalled = None
        elif self._recall is not None and self._sequence is not None:
            new = slice(self._lesson.end - len(teachers[0]) - self._prompt, self._lesson.end - self._prompt)
            recalled = self._recall.read(self._sequence)[new] if self._asks_memory else None
        self._choose(self._tokens[:, : self._prompt])
        if any(teacher.teaches for teacher in teachers):
            self._neural.learn_segment(
                tokens,
                teachers,
                self._cache,
                prefix,
                self._mask,
                self.counts,
                temperature=self._temperature,
                recalled=recalled,
                preference=self._preference or 0.0,
            )
            self._neural.fold()
        self._lesson.keep(teachers)

    # The protocol of transformers' own loop. It tells no times and has no end of request: the lookahead is a number, the
    # memory is not asked, and the draft learns every `update_every` rounds whatever `update_when` says; whoever made the
    # generator may call `finish()` for the rest and for the replay.

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`(input_ids with the drafted tokens, log q)`, for transformers' assisted decoding."""
        k = FIRST_LOOKAHEAD if self._fixed is None else self._fixed
        k = max(0, min(k, self._max_length - input_ids.shape[1] - 1))
        with torch.inference_mode(False), torch.no_grad():
            tokens = input_ids.clone()
            proposal = self._attempted(tokens, lambda: self._propose(tokens, k, None, recalls=False))
        candidates = torch.cat([input_ids, proposal.tokens], dim=-1)
        return candidates, None if proposal.q is None else proposal.q.log()

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Learns from a round of transformers' loop; the raw logits come from the recorder, not from `scores`."""
        every = self._settings.update_every
        with torch.inference_mode(False), torch.no_grad(), self._learning():
            self._record(input_ids.clone())
            if self._rounds % (every if isinstance(every, int) else 1) == 0:
                self._update()
