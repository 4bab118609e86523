"""The draft adapts: one learner or several side by side, who of them speaks, and the gradient step.

Every learner owns one block of the adapter. An ensemble reads its feedback in one batched forward: a row for every expert,
one for the base draft (gate shut) and one for the mixture. What is served is the mixture, or the best single row where
that does better.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ENSEMBLE, OnlineSpecConfig
from ..errors import ArtifactError, brief
from ..metrics import Counts
from ..state import MOST_COUNT, State, are_numbers
from .gated_lora import GatedLora
from .gradient_cap import CapConstants, GradientCap
from .learners import HEDGES, LEARNERS, Direction, RuleState, UpdateRule, adam, into_ball, optimistic, plain

LARGEST_LOSS = 2.0  # 1 − acceptance, and some rounding


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


def step_sizes(settings: OnlineSpecConfig) -> list[float]:
    """One for every expert: a geometric grid with `lr` in the middle."""
    if settings.learner != ENSEMBLE:
        return [settings.lr]
    middle = (settings.experts - 1) / 2
    return [settings.lr * settings.expert_ratio ** (i - middle) for i in range(settings.experts)]


def learner_name(settings: OnlineSpecConfig) -> str:
    """What every expert runs."""
    return settings.expert_learner if settings.learner == ENSEMBLE else settings.learner


def make_direction(settings: OnlineSpecConfig) -> Direction:
    """What every expert steps along."""
    return adam() if settings.preconditioner == "adam" else plain()


def make_learner(settings: OnlineSpecConfig, device: torch.device) -> UpdateRule:
    """The settings' learner, for all experts at once."""
    direction, name = make_direction(settings), learner_name(settings)
    lr = torch.tensor(step_sizes(settings), device=device)[:, None]  # (experts, 1)
    if name == "optimistic":
        return optimistic(lr, direction, settings.radius, settings.hint_memory)
    return LEARNERS[name](lr, direction, settings.radius)


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
        self._hedge = HEDGES[settings.hedge](settings.hedge_rate)
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
        self.active = [True] * n
        self.hedge_state = self._hedge.init(n + 1)
        self.weights = [1 / (n + 1)] * (n + 1)  # of the experts and of the base draft in the mixture
        self._losses: deque[list[float]] = deque(maxlen=self._constants.compared)  # of every row
        self.served_row = n + 1  # the row that serves: an expert, the base draft (n), the mixture (n + 1)
        self._serve()

    @property
    def nbytes(self) -> int:
        """Bytes of the learners' and of Hedge's state."""
        tensors = [*self.rule_state.values(), *self.hedge_state.values(), *self._cap.state().tensors.values()]
        tensors += [] if self._starts is None else [self._starts]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def rows(self) -> Tensor | None:
        """Gates (rows, experts) of a batched forward: every expert alone, none, the mixture. None: a single learner."""
        if not self.is_ensemble:
            return None
        n = self._experts
        mixture = torch.tensor([self.weights[:n]])
        return torch.cat([torch.eye(n), torch.zeros(1, n), mixture]).to(self._lora.params.device)

    @property
    def served(self) -> Tensor | None:
        """Weights (experts,) of the blocks in the served draft; None: a single learner at full weight."""
        rows = self.rows
        return None if rows is None else rows[self.served_row]

    @property
    def best_expert(self) -> int:
        """The living expert of the largest weight."""
        living = [i for i, ok in enumerate(self.active) if ok] or [0]
        return max(living, key=lambda i: self.weights[i])

    @property
    def serves_base(self) -> bool:
        """Whether nothing of what was learned speaks."""
        return self.steps == 0 or (self.is_ensemble and self.served_row == self._experts)

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
            active = torch.tensor(self.active, device=updates.device)[:, None]
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
            blamed = self._suspects(losses)
        self._skipped = 0
        for i in blamed:
            state = earlier() if self.active[i] else None
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

    def _remove(self, losses: Tensor) -> None:
        """Takes out who has diverged."""
        self._begin_anew(self._suspects(losses))

    def _suspects(self, losses: Tensor) -> list[int]:
        """Who holds or says what is not finite, else whoever has the largest loss."""
        rows = self._lora.split(self._lora.params)
        gone = ~torch.isfinite(rows).all(dim=-1)
        if not bool(gone.any()):  # what is not a number times a gate of zero is none either: only then can losses tell
            gone = ~torch.isfinite(losses)
        if not bool(gone.any()) or (self.is_ensemble and bool(gone.all())):
            active = torch.tensor(self.active, device=losses.device)
            size = rows.abs().amax(dim=-1) if bool(gone.all()) else losses
            gone = torch.zeros_like(gone)
            gone[torch.where(active, size, -torch.inf).argmax()] = True
        found: list[int] = gone.nonzero()[:, 0].tolist()
        return found

    def _begin_anew(self, experts: list[int]) -> None:
        """As the base draft; of an ensemble they are removed."""
        rows = self._lora.split(self._lora.params).clone()
        for i in experts:
            logger.warning(
                "An adapter has diverged, and there is no earlier state of it: %s.",
                "it is removed" if self.is_ensemble else "it begins anew",
            )
            self.removed += self.active[i]
            self.active[i] = not self.is_ensemble
            rows[i] = 0.0 if self.is_ensemble else self._fresh(rows[i])
            self.rule_state = {k: _without(v, i) for k, v in self.rule_state.items()}
        self._lora.put(rows)
        self._weigh(self.weights)

    def _fresh(self, row: Tensor) -> Tensor:
        """A new adapter in the place of one: it says nothing, and can learn."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        noise = torch.randn(row.shape, generator=generator).to(row) / self._settings.rank
        return self._lora.with_zero_b(noise)

    def weigh(self, acceptance: list[float]) -> None:
        """Moves the weights: acceptance of every row of `rows` on new tokens, before the update that learns from them.

        Hedge's loss is 1 − acceptance: bounded, and what the draft is for.
        """
        n = self._experts
        if not math.isfinite(acceptance[n]):
            return  # feedback in which the target said nothing: the base draft's acceptance is always a number
        losses = [1 - a if math.isfinite(a) else 1.0 for a in acceptance]
        weights, self.hedge_state = self._hedge.update(torch.tensor(losses[: n + 1]), self.hedge_state)
        self._losses.append(losses)
        self._weigh(weights.tolist())

    def _weigh(self, weights: list[float]) -> None:
        weights = [w * ok for w, ok in zip(weights, [*self.active, True], strict=True)]
        total = sum(weights)
        # A weight of nothing but dead experts: the base draft is left.
        self.weights = [w / total for w in weights] if total > 0 else [0.0] * self._experts + [1.0]
        self.served_row = self._best_row()
        self._serve()

    def _best_row(self) -> int:
        """The mixture, unless the best single row has done better by more than the noise."""
        n = self._experts
        if len(self._losses) < 2:
            return n + 1
        single = [i for i in range(n + 1) if i == n or self.active[i]]
        best = min(single, key=lambda i: statistics.mean(row[i] for row in self._losses))
        lead = [row[n + 1] - row[best] for row in self._losses]
        noise = statistics.stdev(lead) / len(lead) ** 0.5
        return best if statistics.mean(lead) > noise else n + 1

    def _serve(self) -> None:
        self._lora.serve(self.served)

    def adopt(self, params: Tensor) -> None:
        """Takes parameters (parameters,) that were learned elsewhere: they serve, and learning goes on from there, with new moments."""
        self._lora.put(self._lora.split(params))
        self._begin()
        self.steps = 1  # with none, the base draft would serve

    # Saving

    def state(self) -> State:
        """Everything but the parameters, so that it goes on as if it had never stopped.

        A hint that is the last direction is not kept: the moments tell it.
        """
        state = {k: v for k, v in self.rule_state.items() if not (k == "hint" and self._tells_hint)}
        values = {
            "steps": self.steps,
            "removed": self.removed,
            "alive": list(self.active),
            "weights": list(self.weights),
            "losses": [list(row) for row in self._losses],
            "serving": self.served_row,
        }
        starts = State({} if self._starts is None else {"starts": self._starts})
        parts = State.joined(learner=State(state), hedge=State(self.hedge_state), cap=self._cap.state(), ball=starts)
        return State(parts.tensors, values)

    @property
    def _tells_hint(self) -> bool:
        settings = self._settings
        optimistic = learner_name(settings) == "optimistic" and settings.hint_memory == 0
        return optimistic and make_direction(settings).last is not None

    def resume(self, saved: State) -> None:
        """The inverse of `saved`; the parameters have been put back already."""
        learner, hedge = saved.part("learner"), saved.part("hedge")
        state = {k: learner.tensor(k, v) for k, v in self.rule_state.items() if not (k == "hint" and self._tells_hint)}
        last = make_direction(self._settings).last
        if self._tells_hint and last is not None:
            state["hint"] = last(state)
        self.rule_state = state
        self.hedge_state = {k: hedge.tensor(k, v) for k, v in self.hedge_state.items()}
        for name, tensor in self.hedge_state.items():
            if not bool((tensor.abs() <= MOST_COUNT).all()) or (name == "round" and float(tensor) < 0):
                raise ArtifactError(f"The saved state of the experts has {name}={brief(tensor.tolist())}.")
        self._cap = GradientCap(self._settings.gradient_cap, self._constants.cap)
        self._cap.resume(saved.part("cap"), self._lora.params.new_zeros(self._experts))
        if self._starts is not None:
            self._starts = saved.part("ball").tensor("starts", self._starts)
        self.steps, self.removed = saved.count("steps"), saved.count("removed")
        n = self._experts
        active, losses, serving = saved.value("alive", list), saved.value("losses", list), saved.value("serving", int)
        weights = saved.numbers("weights", n + 1)
        if not all(0 <= weight <= 1 + 1e-6 for weight in weights):
            raise ArtifactError(f"The saved state of the experts has weights={brief(weights)}: expected shares of one.")
        whole = len(active) == n and all(isinstance(ok, bool) for ok in active) and 0 <= serving <= n + 1
        if not whole or not all(are_numbers(row, LARGEST_LOSS) and len(row) == n + 2 for row in losses):
            raise ArtifactError(
                f"The saved state of the experts does not fit together: alive={brief(active)}, expected {n}; losses={brief(losses)}."
            )
        self.active, self.weights, self.served_row = active, weights, serving
        self._losses = deque(losses, maxlen=self._constants.compared)
        self._serve()

    # Snapshots

    def best_params(self) -> Tensor:
        """A copy of the parameters (parameters,) of the expert that does best now, in bfloat16: half the memory."""
        return self._lora.split(self._lora.params)[self.best_expert].bfloat16()

    def restore(self, params: Tensor, at: int | None = None) -> None:
        """Puts a snapshot in place of an expert; it learns on from there, with new moments. None: of the one that does worst."""
        if at is None:
            at = (
                min(range(self._experts), key=lambda i: self.weights[i] if self.active[i] else -1.0)
                if self.is_ensemble
                else 0
            )
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
            self.active[at] = True
            scores = self.hedge_state["scores"].clone()
            scores[at] = scores.max()
            self.hedge_state = self.hedge_state | {"scores": scores}
            self._losses.clear()
            weights = list(self.weights)
            weights[at] = max(weights)
            self._weigh(weights)


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
