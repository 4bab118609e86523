"""Learning from call to call: one gradient step at a time, and what governor and counters are told."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..config import OnlineSpecConfig
from ..govern.governor import Governor
from ..govern.routing import AdapterRouter
from ..metrics import Counts, DraftMetrics
from ..models.common_strings import CommonStrings
from ..runtime.forks import Lock
from ..state import State, copied
from .feedback import Feedback, acceptance
from .learned_texts import Learned, Request
from .learner import Learner, Recollection
from .request_feedback import Held, RequestFeedback
from .segment import Segment, split
from .trainable import Prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnedRow:
    """One of several rows of a call that are learned together; see `LearningService.learn_segment`."""

    segment: Segment
    recalled: Sequence[float] | None
    prompt_log_ratio: float
    request: Request


class LearningService:
    """What learns for one draft; safe with several threads.

    Args:
        lock: of the draft, held for the moments in which the served weights or the counters change. It may be taken while `steps`
            is held, not the other way round.
        steps: held for one gradient step at a time.
    """

    def __init__(self, settings: OnlineSpecConfig, metrics: DraftMetrics, lock: Lock, steps: Lock) -> None:
        self.settings, self.metrics, self.lock, self.steps_lock = settings, metrics, lock, steps
        self._requests = weakref.WeakSet[RequestFeedback]()  # feedback of those in progress
        self.learner: Learner
        self.governor: Governor
        self.router: AdapterRouter  # whether the learned or the base draft serves a request
        self._away: Recollection | None = None  # of the learner, while its adapter is away
        self._loaded_rollbacks = 0  # of the guard, before it was loaded
        self.positions = 0  # the longest context that the draft may see
        self.learned_elsewhere = False  # whether other processes have learned of it, too, from texts that are not here

    def begin(self, learner: Learner, governor: Governor, positions: int, router: AdapterRouter | None = None) -> None:
        """Learning begins with this learner; the counters go on.

        Args:
            router: of an adapter with a name; None: the governor's own.
        """
        learner.guard.rollbacks, learner.experts.removed = self.metrics.rollbacks, self.metrics.removed_experts
        self.learner, self.governor, self.positions = learner, governor, positions
        self.router = governor.router if router is None else router
        if self._away is not None:
            learner.recall(self._away)
            self._away = None

    def put_away(self) -> None:
        """Lets go of the learner, whose state is kept elsewhere; the next one goes on with what it remembers of requests."""
        self._away = self.learner.remembered
        del self.learner

    @property
    def device(self) -> torch.device:
        return self.learner.trainable.adapter.params.device

    @property
    def nbytes(self) -> int:
        """Memory that learning holds now: of the learner, and of what was recorded in requests that are in progress."""
        with self.lock:
            recorded = sum(request.nbytes for request in list(self._requests))
        return (self._away or self.learner).nbytes + recorded

    @contextmanager
    def at_rest(self) -> Iterator[Learned]:
        """What was learned from in this process; no gradient step is taken inside of the context."""
        with self.steps_lock:
            texts = self.learner.texts
            yield Learned(
                self.learner.experts.steps,
                self.learner.guard.rollbacks,
                self._loaded_rollbacks,
                texts.seen,
                texts.repeats,
                tuple(texts.texts),
                texts.examined,
                self.learned_elsewhere,
            )

    def move(self, seen: Tensor, common: Tensor) -> None:
        """Goes from where an adapter was seen (parameters,) to one that several replicas have learned; steps since then stay."""
        with self.steps_lock, self.lock, torch.inference_mode(False), torch.no_grad():
            self.learner.move(seen, common)

    def adapter_params(self) -> dict[str, Tensor]:
        """A copy of the adapter by PEFT's names: of all experts, with no weight of theirs in it."""
        with self.steps_lock:
            adapter = self.learner.trainable.adapter
            return copied(adapter.named(adapter.params))

    def replayed(self) -> list[Feedback]:
        """What the replay remembers."""
        with self.steps_lock:
            return self.learner.replay.requests

    def fold(self) -> None:
        """Brings the weights that draft up to date with what was learned."""
        with self.steps_lock, self.lock:
            self.learner.trainable.adapter.fold()

    # A request

    def new_feedback(
        self,
        taught: int | Tensor | CommonStrings,
        temperature: float,
        config: PretrainedConfig,
        features: Held | None = None,
    ) -> RequestFeedback:
        """Where a row that begins keeps what it will be learned from."""
        feedback = RequestFeedback(self.settings, taught, temperature, config, features)
        with self.lock:
            self._requests.add(feedback)
        return feedback

    def learn_segment(
        self,
        segment: Segment,
        counts: Counts,
        *,
        prefix: Prefix | None = None,
        recalled: Sequence[float] | None = (),
        prompt_log_ratio: float = 0.0,
        request: Request | None = None,
    ) -> None:
        """One step on new tokens; the governor is told how the draft would have done on them.

        Args:
            prefix: what the learned draft has read of them: it is not computed anew, and no gradient flows into it.
            recalled: estimated acceptance of the memory's answers at the n tokens of one row; (): no memory; None: not asked.
            prompt_log_ratio: how much the prompt speaks for the learned draft.
            request: of which the tokens are; None: they are all that is learned of their request before `remember`.
        """
        with self.steps_lock:
            governed = self.settings.update_every == "auto"
            compare = governed and self.governor.decide_comparison(prompt_log_ratio, self.router)
            scores = self.learner.segment(segment, prefix, counts, compare, request)
            self.note()
        if governed:
            with self.lock:
                self.governor.observe_comparison(
                    scores.learned, scores.base, recalled, True, prompt_log_ratio, self.router
                )

    def learn_rows(self, rows: Sequence[LearnedRow], batch: Segment, counts: Counts) -> None:
        """One step on the new tokens of several rows of a call; the governor is told of each how the draft would have done.

        Args:
            batch: their segments as one.
        """
        with self.steps_lock:
            governed = self.settings.update_every == "auto"
            compare = governed and any(
                [self.governor.decide_comparison(row.prompt_log_ratio, self.router) for row in rows]
            )
            segments, requests = [row.segment for row in rows], [row.request for row in rows]
            scores = self.learner.rows(segments, batch, requests, counts, compare)
            self.note()
        if governed:
            with self.lock:
                for row, own in zip(rows, scores, strict=True):
                    self.governor.observe_comparison(
                        own.learned, own.base, row.recalled, True, row.prompt_log_ratio, self.router
                    )

    @torch.no_grad()
    def score_offline(self, segment: Segment, prompt_log_ratio: float | None = None) -> None:
        """Tells the governor the acceptance of the learned and of the base draft, as `learn_segment` does."""
        trainable, n = self.learner.trainable, segment.teachers[0].length
        if prompt_log_ratio is None:
            prompt_log_ratio, _ = trainable.prompt_log_ratio(
                segment.tokens[:, :-n], segment.mask, self.router.constants.prompt_tokens
            )
        self._compare(segment, [len(segment.teachers[0])], [prompt_log_ratio])

    @torch.no_grad()
    def score_rows(self, batch: Segment, prompt_log_ratios: Sequence[float]) -> None:
        """The same of several rows of a call, together."""
        self._compare(batch, list(map(len, batch.teachers)), prompt_log_ratios)

    def _compare(self, segment: Segment, lengths: Sequence[int], prompt_log_ratios: Sequence[float]) -> None:
        """Tells the governor of every row, by how many tokens each has."""
        trainable, seen = self.learner.trainable, []
        for base in (False, True) if self.learner.experts.steps else (True,):
            features = None if segment.features is None else segment.features[:, :-1]
            logits = trainable.logits(segment.tokens[:, :-1], segment.n, base, segment.mask, features, segment.sources)
            found = acceptance(segment.teachers, logits, segment.temperature, self.settings.temperature)
            seen.append(split(found.tolist(), lengths))
        with self.lock:
            for learned, of_base, ratio in zip(seen[0], seen[-1], prompt_log_ratios, strict=True):
                self.governor.observe_comparison(learned, of_base, (), False, ratio, self.router)

    def end_request(self) -> None:
        """Evaluates what the draft showed in a request that is over, or was broken off."""
        with self.steps_lock:
            self.learner.end_request()
            self.note()

    def remember(self, feedback: Feedback, request: Request | None = None) -> None:
        """Keeps a finished request for the replay."""
        with self.steps_lock:
            self.end_request()
            self.learner.remember(feedback, request)
            replay = self.learner.replay
            self.metrics.replay_bytes, self.metrics.replay_refused = replay.nbytes, replay.refused

    def replay_steps(self, counts: Counts, passes: int) -> None:
        """The replay's gradient steps: each on a few remembered requests, in one padded batch.

        With `update_every="auto"` no more than were worth their time of late.
        """
        if self.settings.update_every == "auto":
            passes = min(passes, self.learner.passes.now)
            self.metrics.decisions.replay_passes = self.learner.passes.now
        for _ in range(passes):
            with self.steps_lock:
                if not self.learner.replay_step(counts):
                    return

    # Whole texts

    def learn(self, examples: Sequence[Feedback], counts: Counts) -> None:
        """One gradient step on whole texts, together; the privacy audit will look at them."""
        with self.steps_lock:
            for example in examples:
                self.learner.texts.grow([example.tokens], example.teacher.length)
                self.learner.texts.finish(example.tokens, example.teacher.length)
            self.learner.learn_from(list(examples), counts)

    def learn_request(self, request: Feedback) -> Counts:
        """Learns a request as after a call of `generate`, replay included, however little time there is."""
        counts = Counts()
        self.learn_segment(Segment.of(request, 1.0), counts)
        self.remember(request)
        self.replay_steps(counts, self.settings.replay_passes)
        return counts

    def note(self) -> None:
        """What the learner says about itself."""
        experts, guard = self.learner.experts, self.learner.guard
        if experts.is_ensemble:
            self.metrics.expert_weights = tuple(experts.mixture.weights)
        self.metrics.removed_experts = experts.removed
        if guard.rollbacks > self.metrics.rollbacks:
            self.metrics.rollbacks = guard.rollbacks
            self.metrics.decisions.rollback = guard.reason
            logger.info("%s", guard.reason)

    def resume(self, adapter: Mapping[str, Tensor], learned: State, metrics: State) -> None:
        """Goes on from states that were saved beside an adapter, by PEFT's names: of the learner, and of the metrics.

        Raises:
            ArtifactError: they belong to other settings, or to another base.
        """
        with self.steps_lock, self.lock, torch.inference_mode(False):
            self.learner.resume(adapter, learned)
            self.metrics.resume(metrics)
            self.learner.replay.refused = self.metrics.replay_refused
            self._loaded_rollbacks = self.learner.guard.rollbacks
            self.metrics.decisions.rollback = self.learner.guard.reason
            self.note()

    def take_back(self, adapter: Mapping[str, Tensor], learned: State) -> None:
        """Goes on from the state that a learner had when it was put away. Raises ArtifactError."""
        with self.steps_lock, self.lock, torch.inference_mode(False):
            self.learner.resume(adapter, learned)

    def adopt(self, adapter: Mapping[str, Tensor], texts: Sequence[Tensor] = (), left_out: int = 0) -> None:
        """Goes on from an adapter that was trained elsewhere, by PEFT's names; the learner begins anew.

        Args:
            texts: (L,) tokens each, what it was trained on, for the privacy audit.
            left_out: how many more there were, which cannot be judged.
        """
        with self.steps_lock, self.lock, torch.inference_mode(False):
            self.learner.adopt(adapter)
            router, unnamed = AdapterRouter(), self.router is self.governor.router
            self.router = router  # which of the two serves was found out with the one before
            if unnamed:
                self.governor.router = router
            self.note()
            for text in texts:
                self.learner.texts.finish(text, 0)  # it counts how often each stands, whole
            self.learner.texts.dropped += left_out
