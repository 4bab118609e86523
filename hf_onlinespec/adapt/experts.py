"""The draft adapts: one learner or several side by side, who of them speaks, and the gradient step.

Every learner owns one block of the adapter. An ensemble reads its feedback in one batched forward: a row for every expert,
one for the base draft (gate shut) and one for the mixture. What is served is the mixture, or the best single row where
that does better.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ENSEMBLE, OnlineSpecConfig
from ..metrics import Counts
from ..state import State
from .gated_lora import GatedLora
from .gradient_cap import CapConstants, GradientCap
from .learners import HEDGES, RuleState, into_ball, learner_name, make_direction, make_learner
from .mixture import Mixture


@dataclass(frozen=True)
class ExpertsConstants:
    """Of when an adapter is taken to have diverged, and who of an ensemble serves."""

    cap: CapConstants = field(default_factory=CapConstants)
    # Skipped steps in a row, on feedback that the base draft can learn from, after which an adapter of finite parameters is to
    # blame: at once if its loss is not finite in another forward either, later if nothing but its gradients are not. Chosen.
    diverged: int = 4
    stuck: int = 32
    compared: int = 8  # updates over which a single row has to do better than the mixture to serve in its place; chosen


logger = logging.getLogger(__name__)


class Experts:
    """What has been learned, and how it goes on.

    Args:
        lora: the adapter, with one block per expert.
    """

    def __init__(
        self, lora: GatedLora, settings: OnlineSpecConfig, constants: ExpertsConstants = ExpertsConstants()
    ) -> None:
        self.removed = 0  # experts that diverged
        self.is_ensemble = settings.learner == ENSEMBLE
        self._lora, self._settings, self._constants = lora, settings, constants
        self._learner = make_learner(settings, lora.params.device)
        self._experts = lora.blocks
        self._begin()

    def _begin(self) -> None:
        """Learning begins with the parameters as they are: nothing is known of them yet."""
        n, rows = self._experts, self._lora.split(self._lora.params)
        self.steps = 0  # gradient steps taken
        self._skipped = 0  # steps in a row that were not finite, and not on account of the feedback
        self._warned = False  # whether the log has told of skipped steps since the last one that was taken
        self.rule_state: RuleState = self._learner.init(rows)
        self._cap = GradientCap(self._settings.gradient_cap, self._constants.cap)
        # Where each expert's ball is centred.
        self._starts = None if self._settings.radius is None else rows.clone()
        self.mixture = Mixture(n, HEDGES[self._settings.hedge](self._settings.hedge_rate), self._constants.compared)
        self._serve()

    @property
    def nbytes(self) -> int:
        """Bytes of the learners' and of Hedge's state."""
        tensors = [*self.rule_state.values(), *self.mixture.hedge_state.values(), *self._cap.state().tensors.values()]
        tensors += [] if self._starts is None else [self._starts]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def rows(self) -> Tensor | None:
        """Gates (rows, experts) of a batched forward, see `Mixture`; None: a single learner."""
        return self.mixture.rows.to(self._lora.params.device) if self.is_ensemble else None

    @property
    def served(self) -> Tensor | None:
        """Weights (experts,) of the blocks in the served draft; None: a single learner at full weight."""
        rows = self.rows
        return None if rows is None else rows[self.mixture.served_row]

    @property
    def serves_base(self) -> bool:
        """Whether nothing of what was learned speaks."""
        return self.steps == 0 or (self.is_ensemble and self.mixture.served_row == self._experts)

    def step(
        self,
        losses: Tensor,
        counts: Counts,
        learnable: Callable[[bool], bool] = lambda base: False,
        earlier: Callable[[], Tensor | None] = lambda: None,
    ) -> bool:
        """Backward, clip, step, for every expert from its own loss (experts,); whether a step was taken.

        All or nothing: what raises in here leaves parameters, moments and counters as they were. What is not finite skips the
        step and is counted; everything that was learned stays, as long as the parameters themselves are finite. An expert whose
        parameters are not, or that is found to blame for many skipped steps in a row, goes back to an earlier state; without
        one it begins anew as the base draft, or is removed from an ensemble: its numbers would spoil the others'.

        Args:
            learnable: whether a loss on the same feedback is finite in a forward of its own, the base draft's (True) or the
                learned one's (False); asked only where it matters.
            earlier: gives the newest earlier state (parameters,) of one expert; None: there is none.
        """
        lora = self._lora
        lora.grads.zero_()
        with torch.enable_grad():
            losses.sum().backward()
        with torch.no_grad():
            grads = lora.split(lora.grads)  # (experts, parameters)
            norms = grads.norm(dim=-1)
            if not bool((torch.isfinite(losses) & torch.isfinite(norms)).all()):
                self._skip(losses.detach(), counts, learnable, earlier)
                return False
            grads = grads * (self._settings.max_grad_norm / (norms + 1e-6)).clamp_max(1.0)[:, None]
            grads, norms = self._cap.shortened(grads)
            updates, state = self._learner.update(grads, self.rule_state)
            if not _are_finite(updates, *state.values()):
                self._skip_for_moments(counts)
                return False
            active = torch.tensor(self.mixture.active, device=updates.device)[:, None]
            change = lora.join(updates * active)
            # From here on nothing is computed any more that could fail.
            lora.move(change)
            self.rule_state = state
            self._cap.note(norms)
        self.steps += 1
        counts.updates += 1
        self._skipped, self._warned = 0, False
        return True

    def _skip(
        self, losses: Tensor, counts: Counts, learnable: Callable[[bool], bool], earlier: Callable[[], Tensor | None]
    ) -> None:
        """A loss or a gradient was not finite: who is to blame, if anybody is, goes back."""
        counts.skipped_updates += 1
        norms = self._lora.split(self._lora.params).norm(dim=-1)
        blamed = (~torch.isfinite(norms)).nonzero()[:, 0].tolist()
        if not blamed:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "A loss or a gradient was not finite: the step was skipped, and what was learned stays. Further ones are "
                    "counted in metrics.skipped_updates."
                )
            if not learnable(True):
                return
            self._skipped += 1
            if self._skipped < self._constants.diverged or (self._skipped < self._constants.stuck and learnable(False)):
                return
            blamed = _suspects(self._lora.split(self._lora.params), losses, self.mixture.active)
        self._skipped = 0
        for i in blamed:
            state = earlier() if self.mixture.active[i] else None
            if state is None:
                self._begin_anew([i])
            else:
                self.restore(state, i)

    def _skip_for_moments(self, counts: Counts) -> None:
        """A step was not finite though its gradient was: moments that are not finite begin anew, the parameters stay."""
        counts.skipped_updates += 1
        logger.warning("A step of the learner was not finite: it was skipped, and what was learned stays.")
        rows = self._lora.split(self._lora.params)
        for i in range(self._experts):
            if not _are_finite(*(v[i] for v in self.rule_state.values() if v.dim())):
                self.rule_state = {k: _without(v, i) for k, v in self.rule_state.items()}
                if self._starts is not None:
                    self.rule_state["moved"][i] = rows[i] - self._starts[i]

    def _begin_anew(self, experts: list[int]) -> None:
        """As the base draft; of an ensemble they are removed."""
        rows = self._lora.split(self._lora.params).clone()
        for i in experts:
            logger.warning(
                "An adapter has diverged, and there is no earlier state of it: %s.",
                "it is removed" if self.is_ensemble else "it begins anew",
            )
            self.removed += self.mixture.active[i]
            self.mixture.active[i] = not self.is_ensemble
            rows[i] = 0.0 if self.is_ensemble else self._lora.with_zero_b(_noise(rows[i], self._settings))
            self.rule_state = {k: _without(v, i) for k, v in self.rule_state.items()}
        self._lora.put(rows)
        self.mixture.set_weights(self.mixture.weights)
        self._serve()

    def weigh(self, acceptance: list[float]) -> None:
        """Moves the weights: acceptance of every row of `rows` on new tokens, before the update that learns from them."""
        self.mixture.observe(acceptance)
        self._serve()

    def _serve(self) -> None:
        self._lora.serve(self.served)

    def adopt(self, params: Tensor) -> None:
        """Takes parameters (parameters,) that were learned elsewhere: they serve, and learning goes on from there, with new moments."""
        self._lora.put(self._lora.split(params))
        self._begin()
        self.steps = 1  # with none, the base draft would serve

    def move(self, params: Tensor) -> None:
        """Takes parameters (parameters,) that other replicas have learned, too: they serve, and learning goes on with the moments that it has.

        Each expert stays in its ball; in one, an optimistic learner has new moments, because its hint says where it is.
        """
        rows = self._lora.split(params)
        if self._starts is not None and self._settings.radius is not None:
            state = self._learner.init(rows) if learner_name(self._settings) == "optimistic" else self.rule_state
            moved = into_ball(rows - self._starts, self._settings.radius)
            self.rule_state, rows = state | {"moved": moved}, self._starts + moved
        self._lora.put(rows)
        self.steps = max(self.steps, 1)  # with none, the base draft would serve

    # Saving

    def state(self) -> State:
        """Everything but the parameters, so that it goes on as if it had never stopped.

        A hint that is the last direction is not kept: the moments tell it.
        """
        state = {k: v for k, v in self.rule_state.items() if not (k == "hint" and self._tells_hint)}
        mixture = self.mixture.state()
        values = {"steps": self.steps, "removed": self.removed} | mixture.values
        starts = State({} if self._starts is None else {"starts": self._starts})
        parts = State.joined(learner=State(state), hedge=State(mixture.tensors), cap=self._cap.state(), ball=starts)
        return State(parts.tensors, values)

    @property
    def _tells_hint(self) -> bool:
        settings = self._settings
        optimistic = learner_name(settings) == "optimistic" and settings.hint_memory == 0
        return optimistic and make_direction(settings).last is not None

    def resume(self, saved: State) -> None:
        """The inverse of `saved`; the parameters have been put back already."""
        learner = saved.part("learner")
        state = {k: learner.tensor(k, v) for k, v in self.rule_state.items() if not (k == "hint" and self._tells_hint)}
        last = make_direction(self._settings).last
        if self._tells_hint and last is not None:
            state["hint"] = last(state)
        self.rule_state = state
        self._cap = GradientCap(self._settings.gradient_cap, self._constants.cap)
        self._cap.resume(saved.part("cap"), self._lora.params.new_zeros(self._experts))
        if self._starts is not None:
            self._starts = saved.part("ball").tensor("starts", self._starts)
        self.steps, self.removed = saved.count("steps"), saved.count("removed")
        self.mixture.resume(saved, saved.part("hedge"))
        self._serve()

    # Snapshots

    def best_params(self) -> Tensor:
        """A copy of the parameters (parameters,) of the expert that does best now, in bfloat16: half the memory."""
        return self._lora.split(self._lora.params)[self.mixture.best_expert].bfloat16()

    def restore(self, params: Tensor, at: int | None = None) -> None:
        """Puts a snapshot in place of an expert; it learns on from there, with new moments. None: of the one that does worst."""
        at = self.mixture.worst_expert if at is None else at
        rows = self._lora.split(self._lora.params).clone()
        rows[at] = params.float()
        state = {k: _without(v, at) for k, v in self.rule_state.items()}
        if self._starts is not None and self._settings.radius is not None:
            # It came out of the ball whose centre is nearest, and goes on in that one.
            origin = (self._starts - rows[at]).norm(dim=-1).argmin()
            self._starts[at] = self._starts[origin]
            state["moved"][at] = into_ball(rows[at] - self._starts[at], self._settings.radius)
            rows[at] = self._starts[at] + state["moved"][at]
        self.rule_state = state
        self._lora.put(rows)
        if self.is_ensemble:
            self.mixture.readmit(at)
            self._serve()


def _are_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite, told by their sums: one pass over each, and one answer from the device."""
    return bool(torch.isfinite(torch.stack([tensor.sum() for tensor in tensors])).all())


def _without(values: Tensor, row: int) -> Tensor:
    """A copy of a learner's state without what it knows of one expert."""
    if values.dim() == 0:
        return values
    values = values.clone()
    values[row] = 0.0
    return values


def _suspects(rows: Tensor, losses: Tensor, active: list[bool]) -> list[int]:
    """Of experts (experts, parameters), who holds or says what is not finite, else whoever has the largest loss."""
    gone = ~torch.isfinite(rows).all(dim=-1)
    if not bool(gone.any()):  # what is not a number times a gate of zero is none either: only then can losses tell
        gone = ~torch.isfinite(losses)
    if not bool(gone.any()) or (len(rows) > 1 and bool(gone.all())):
        size = rows.abs().amax(dim=-1) if bool(gone.all()) else losses
        gone = torch.zeros_like(gone)
        gone[torch.where(torch.tensor(active, device=losses.device), size, -torch.inf).argmax()] = True
    found: list[int] = gone.nonzero()[:, 0].tolist()
    return found


def _noise(row: Tensor, settings: OnlineSpecConfig) -> Tensor:
    """First values of a new adapter in the place of one (parameters,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randn(row.shape, generator=generator).to(row) / settings.rank
