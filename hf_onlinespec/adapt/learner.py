"""Learning from feedback: one batched forward and backward per update, and the replay."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import OnlineSpecConfig
from ..metrics import Counts, UpdateReport
from ..state import State
from .experts import Experts
from .feedback import Feedback
from .guard import Guard, GuardConstants
from .judging import Evaluator, Judged
from .learned_texts import LearnedTexts, Request
from .objective import Objective
from .replay import Replay, ReplayConstants, ReplaySchedule
from .returns import StepReturns
from .segment import Scores, Segment, split
from .trainable import Prefix, Trainable, params_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recollection:
    """What a learner knows of requests, beside what is saved: users' text, which never leaves the process."""

    replay: Replay
    texts: LearnedTexts

    @property
    def nbytes(self) -> int:
        return self.replay.nbytes + self.texts.nbytes


@dataclass(frozen=True)
class LearnerConstants:
    """Of the learner's parts."""

    guard: GuardConstants = field(default_factory=GuardConstants)
    replay: ReplayConstants = field(default_factory=ReplayConstants)


class Learner:
    """What turns feedback into a better adapter: loss, experts, guard and replay.

    Args:
        trainable: whose adapter is moved, here and nowhere else.
        experts: that move it.
        on_update: told of every gradient step.
    """

    def __init__(
        self,
        trainable: Trainable,
        experts: Experts,
        settings: OnlineSpecConfig,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        constants: LearnerConstants = LearnerConstants(),
    ) -> None:
        self.trainable, self.experts = trainable, experts
        self._settings, self._constants, self._on_update = settings, constants, on_update
        tokens, top_k = settings.replay_tokens, settings.replay_top_k
        self.replay = Replay(tokens, top_k, settings.seed, settings.replay_sampling, constants.replay)
        self.passes = ReplaySchedule(settings.replay_passes, constants.replay)
        self.texts = LearnedTexts(settings.audit_tokens, prompt_tokens=settings.context_tokens)
        self.loss = math.inf  # on the latest segment, before it was learned
        self._objective = Objective(settings)
        self._evaluator = Evaluator(trainable, experts, self._objective, self._new_guard())
        self._returns = StepReturns() if settings.update_every == "auto" else None
        self._cache_invalid = False  # whether the request's prefix may hold what is not finite

    def _new_guard(self) -> Guard:
        return Guard(self._settings.snapshots, self._constants.guard)

    @property
    def guard(self) -> Guard:
        """What takes back a change that made the draft worse."""
        return self._evaluator.guard

    @property
    def nbytes(self) -> int:
        """Adapter, gradients, folded weights, the learner's state, earlier states, and the requests that are remembered or wait."""
        parts = (self.trainable.adapter, self.experts, self._evaluator, self.replay, self.texts)
        return sum(part.nbytes for part in parts) + (0 if self._returns is None else self._returns.nbytes)

    def segment(
        self,
        segment: Segment,
        prefix: Prefix | None,
        counts: Counts,
        compare: bool = False,
        request: Request | None = None,
    ) -> Scores:
        """One step on the last n tokens of every row.

        A single learner builds on the prefix, without gradients: one forward and backward over the rest; nothing is recomputed but rows of
        a head that its later steps go on from.
        Experts of an ensemble have read nothing themselves, and read everything.

        Args:
            compare: whether the base draft should be looked at too, in a forward of its own; an ensemble always does.
            request: of which the segment is a part; None: it is all that is learned of its request before `remember`.
        """
        written = segment.n if request is None else segment.tokens.shape[1] - request.prompt
        self.texts.grow(segment.rows, written, request)
        judged, finite = self._learn(segment, prefix, counts, compare)
        if finite:
            self._collect([judged])
        return judged.scores

    def rows(
        self, rows: Sequence[Segment], batch: Segment, requests: Sequence[Request], counts: Counts, compare: bool
    ) -> list[Scores]:
        """One step on the new tokens of several rows of one call, each a request of its own; nothing that was read is built on.

        Args:
            rows: of each the segment, with a target's distribution that is one.
            batch: the same, as a padded batch.
            requests: of which these are a part.
            compare: see `segment`.

        Returns:
            Of every row.
        """
        for row, request in zip(rows, requests, strict=True):
            self.texts.grow(row.rows, row.tokens.shape[1] - request.prompt, request)
        judged, finite = self._learn(batch, None, counts, compare)
        lengths = [row.new_tokens for row in rows]
        scores = judged.scores.split(lengths)
        accepted = [split(copy, lengths) for copy in judged.accepted]
        if finite:
            self._collect([Judged(row, [copy[i] for copy in accepted], scores[i]) for i, row in enumerate(rows)])
        return scores

    def _collect(self, judged: Sequence[Judged]) -> None:
        if self._evaluator.collect(judged) and self._returns is not None:
            self._returns.forget()

    def _learn(self, segment: Segment, prefix: Prefix | None, counts: Counts, compare: bool) -> tuple[Judged, bool]:
        """One step on a segment: what the draft showed before it, and whether that can be judged."""
        new_tokens = segment.new_tokens
        gates = self.experts.rows
        prefix = prefix if gates is None and not self._cache_invalid else None

        of_base = self._base_acceptance(segment) if gates is None and compare and self.experts.steps else None
        started = time.perf_counter()
        with torch.enable_grad():
            steps = self._objective.unrolled(self.trainable, segment, gates, prefix)
            accepted = [self._objective.acceptance(segment, row) for row in steps[0].detach()]
            experts = self._objective.copies(segment.taught, [step[: self.trainable.adapter.blocks] for step in steps])
            losses = torch.stack([expert.mean for expert in experts])
        self.loss = float(torch.cat(experts[self.experts.mixture.best_expert].first).detach().mean())
        scores = Scores(accepted[0], of_base)
        if gates is not None:
            scores = Scores(accepted[self.experts.mixture.served_row], accepted[self.trainable.adapter.blocks])
        before, skipped = counts.updates, counts.skipped_updates
        self._step(
            losses,
            counts,
            "new",
            started,
            lambda base: self._objective.segment_losses(self.trainable, segment, base).all,
        )
        if counts.updates > before:
            counts.learned_tokens += new_tokens
            counts.loss_sum += max(0.0, self.loss) * new_tokens  # rounding may leave a divergence just below 0
            self._report("new", self.loss, started)
        if counts.skipped_updates > skipped:
            self._cache_invalid = True
        return Judged(segment, accepted, scores), counts.skipped_updates == skipped and segment.is_finite

    @torch.no_grad()
    def _base_acceptance(self, segment: Segment) -> list[float]:
        """Acceptance of the base draft at the new tokens."""
        logits = self.trainable.training_logits(
            segment.tokens, segment.n, segment.mask, base=True, features=segment.features, sources=segment.sources
        )
        return self._objective.acceptance(segment, logits[0])

    @torch.no_grad()
    def _is_learnable(self, base: bool, losses: Callable[[bool], Tensor]) -> bool:
        """Whether the losses of the base (True) or of the learned draft are finite, in a forward of its own. Experts are not asked."""
        return (base or not self.experts.is_ensemble) and bool(torch.isfinite(losses(base)).all())

    def _step(self, losses: Tensor, counts: Counts, kind: str, started: float, alone: Callable[[bool], Tensor]) -> None:
        """A gradient step, and what the steps before it brought for a request that they did not know.

        Args:
            alone: losses of the base (True) or of the learned draft in a forward of its own.
        """

        def is_finite(base: bool) -> bool:
            return self._is_learnable(base, alone)

        adapter, returns = self.trainable.adapter, self._returns
        if returns is None:
            self.experts.step(losses, counts, is_finite, self._go_back)
            return
        before = adapter.params.clone()
        if not self.experts.step(losses, counts, is_finite, self._go_back):
            returns.forget()
            return
        if kind == "new":
            returns.report(adapter.grads, self.passes)
        returns.note(kind, before, adapter.params, time.perf_counter() - started)

    def _go_back(self) -> Tensor | None:
        state = self._evaluator.go_back()
        if state is not None:
            if self._returns is not None:
                self._returns.forget()
            logger.warning("%s", self.guard.reason)
        return state

    def end_request(self) -> None:
        """Nothing of a request waits any longer than the request."""
        if self._evaluator.evaluate() and self._returns is not None:
            self._returns.forget()
        self._cache_invalid = False

    # Saving

    def state(self) -> State:
        """The state beside the served adapter: of an ensemble also B of its experts, before the weights were put into it.

        What is remembered of requests stays behind: it holds users' tokens.
        """
        own = (
            {}
            if self.trainable.adapter.weights is None
            else self.trainable.adapter.outputs(self.trainable.adapter.params)
        )
        return State.joined(
            experts=State(own),
            adaptation=self.experts.state(),
            guard=self.guard.state(),
            replay=State({"random": self.replay.random_state()}),
            learning=State(values={"loss": self.loss if math.isfinite(self.loss) else None}),
        )

    def resume(self, adapter: Mapping[str, Tensor], saved: State) -> None:
        """The inverse of `saved`, for the served adapter that was written beside it."""
        params = params_of(self.trainable.adapter, adapter)
        self._forget()
        if self.experts.is_ensemble:
            experts = saved.part("experts")
            for name, part in self.trainable.adapter.outputs(params).items():
                part.copy_(experts.tensor(name, part))
        self.trainable.adapter.put(self.trainable.adapter.split(params))
        self.experts.resume(saved.part("adaptation"))
        self.guard.resume(saved.part("guard"), self.experts.best_params(), tries_base=not self.experts.is_ensemble)
        self.replay.resume_random(saved.part("replay"))
        loss = saved.part("learning").values.get("loss")
        self.loss = math.inf if loss is None else saved.part("learning").value("loss", float)

    def adopt(self, adapter: Mapping[str, Tensor]) -> None:
        """Goes on from an adapter that was trained elsewhere, with a new state."""
        self.experts.adopt(params_of(self.trainable.adapter, adapter))
        self.texts.examined = None  # that was of the adapter before
        self._forget()

    def move(self, seen: Tensor, common: Tensor) -> None:
        """Goes from where the adapter was seen (parameters,) to a common one, with what it has learned since; see replicas.py."""
        params = self.trainable.adapter.params
        seen, common = seen.to(params), common.to(params)
        # Where nothing was learned since, to the bit: all replicas have the same adapter then.
        self.experts.move(common if torch.equal(params, seen) else params + (common - seen))
        if self._returns is not None:
            self._returns.forget()

    def _forget(self) -> None:
        """What was known of the adapter that another one replaces: its earlier states, what is not evaluated, what steps brought."""
        self._evaluator.begin_anew(self._new_guard())
        self.passes = ReplaySchedule(self._settings.replay_passes, self._constants.replay)
        if self._returns is not None:
            self._returns.forget()
        self._cache_invalid, self.loss = False, math.inf

    @property
    def remembered(self) -> Recollection:
        """What another learner of the same settings can go on with, see `recall`."""
        return Recollection(self.replay, self.texts)

    def recall(self, remembered: Recollection) -> None:
        """Goes on with what an earlier learner of this adapter has remembered."""
        self.replay, self.texts = remembered.replay, remembered.texts

    # The replay

    def remember(self, feedback: Feedback, request: Request | None = None) -> None:
        """Keeps a finished request, unless its steps would be skipped."""
        self.texts.finish(feedback.tokens, feedback.teacher.length, request)
        if feedback.teacher.teaches and not bool(feedback.teacher.log_probs.isnan().any()):
            self.replay.add(feedback, self.loss)

    def replay_step(self, counts: Counts) -> bool:
        """One step on a few remembered requests in one padded batch; whether there were any."""
        started = time.perf_counter()
        remembered = self.replay.sample(self._settings.replay_batch)
        if not remembered:
            return False
        losses = self.learn_from([r.feedback for r in remembered], counts, "old", started)
        for request, loss in zip(remembered, losses, strict=True):
            request.loss = loss
        return True

    def learn_from(
        self, requests: list[Feedback], counts: Counts, kind: str = "new", started: float | None = None
    ) -> list[float]:
        """One step on whole requests, new or old ones; the loss of each before it."""
        started = time.perf_counter() if started is None else started
        gates = torch.eye(self.trainable.adapter.blocks, device=self.trainable.adapter.params.device)
        with torch.enable_grad():
            rows = self._objective.request_losses(self.trainable, requests, gates if self.experts.is_ensemble else None)
            losses = torch.stack([row.mean for row in rows])
        before = counts.updates
        self._step(
            losses,
            counts,
            kind,
            started,
            lambda base: self._objective.request_losses(self.trainable, requests, None, base)[0].all,
        )
        found = [float(loss.detach().mean()) for loss in rows[self.experts.mixture.best_expert].first]
        if counts.updates > before:
            self._report("new" if kind == "new" else "replay", sum(found) / len(found), started)
        return found

    def _report(self, kind: str, loss: float, started: float) -> None:
        self._on_update(UpdateReport(self.experts.steps, kind, loss, time.perf_counter() - started))
