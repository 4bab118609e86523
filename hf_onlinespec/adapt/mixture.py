"""The mixture of an ensemble's experts: their weights by Hedge, and which row of a batched forward serves."""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
from torch import Tensor

from ..errors import ArtifactError, brief
from ..state import MOST_COUNT, State, are_numbers
from .hedge import Hedge

LARGEST_LOSS = 2.0  # 1 − acceptance, and some rounding


class Mixture:
    """Weights of n experts and of the base draft.

    Rows of a batched forward: every expert alone (0 to n − 1), the base draft (n), the mixture (n + 1).

    Args:
        compared: updates over which a single row has to do better than the mixture to serve in its place.
    """

    def __init__(self, n: int, hedge: Hedge, compared: int) -> None:
        self._n, self._hedge = n, hedge
        self.active = [True] * n
        self.hedge_state = hedge.init(n + 1)
        self.weights = [1 / (n + 1)] * (n + 1)
        self._losses: deque[list[float]] = deque(maxlen=compared)  # of every row
        self.served_row = n + 1

    @property
    def rows(self) -> Tensor:
        """Gates (rows, experts) of a batched forward."""
        mixture = torch.tensor([self.weights[: self._n]])
        return torch.cat([torch.eye(self._n), torch.zeros(1, self._n), mixture])

    @property
    def best_expert(self) -> int:
        """The active expert of the largest weight."""
        active = [i for i, ok in enumerate(self.active) if ok] or [0]
        return max(active, key=lambda i: self.weights[i])

    @property
    def worst_expert(self) -> int:
        """One that was removed, else the one of the smallest weight."""
        return min(range(self._n), key=lambda i: self.weights[i] if self.active[i] else -1.0)

    def observe(self, acceptance: list[float]) -> None:
        """Moves the weights by the acceptance of every row on new tokens.

        Hedge's loss is 1 − acceptance: bounded, and what the draft is for.
        """
        n = self._n
        if not math.isfinite(acceptance[n]):
            return  # feedback in which the target said nothing: the base draft's acceptance is always a number
        losses = [1 - a if math.isfinite(a) else 1.0 for a in acceptance]
        weights, self.hedge_state = self._hedge.update(torch.tensor(losses[: n + 1]), self.hedge_state)
        self._losses.append(losses)
        self.set_weights(weights.tolist())

    def set_weights(self, weights: list[float]) -> None:
        """Takes weights; those of experts that were removed are shared out among the others."""
        weights = [w * ok for w, ok in zip(weights, [*self.active, True], strict=True)]
        total = sum(weights)
        # A weight of nothing but removed experts: the base draft is left.
        self.weights = [w / total for w in weights] if total > 0 else [0.0] * self._n + [1.0]
        self.served_row = self._best_row()

    def _best_row(self) -> int:
        """The mixture, unless the best single row has done better by more than the noise."""
        n = self._n
        if len(self._losses) < 2:
            return n + 1
        single = [i for i in range(n + 1) if i == n or self.active[i]]
        best = min(single, key=lambda i: statistics.mean(row[i] for row in self._losses))
        lead = [row[n + 1] - row[best] for row in self._losses]
        noise = statistics.stdev(lead) / len(lead) ** 0.5
        return best if statistics.mean(lead) > noise else n + 1

    def readmit(self, expert: int) -> None:
        """An expert goes on from an earlier state, with as much weight as the best one until it is seen."""
        self.active[expert] = True
        scores = self.hedge_state["scores"].clone()
        scores[expert] = scores.max()
        self.hedge_state = self.hedge_state | {"scores": scores}
        self._losses.clear()
        weights = list(self.weights)
        weights[expert] = max(weights)
        self.set_weights(weights)

    # Saving

    def state(self) -> State:
        values = {
            "alive": list(self.active),
            "weights": list(self.weights),
            "losses": [list(row) for row in self._losses],
            "serving": self.served_row,
        }
        return State(dict(self.hedge_state), values)

    def resume(self, saved: State, hedge: State) -> None:
        """The inverse of `state`, whose tensors lie in a part of their own. Raises ArtifactError."""
        n = self._n
        self.hedge_state = {k: hedge.tensor(k, v) for k, v in self.hedge_state.items()}
        for name, tensor in self.hedge_state.items():
            if not bool((tensor.abs() <= MOST_COUNT).all()) or (name == "round" and float(tensor) < 0):
                raise ArtifactError(f"The saved state of the experts has {name}={brief(tensor.tolist())}.")
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
        self._losses = deque(losses, maxlen=self._losses.maxlen)
