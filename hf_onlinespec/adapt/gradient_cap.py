"""Gradients of bounded length: no single request moves an adapter far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..state import State


@dataclass(frozen=True)
class CapConstants:
    """Of what length of a gradient is usual."""

    window: int = 64  # gradients whose median it is; chosen: test_gradients_that_stay_long_are_usual_in_the_end
    # Before so many no length is usual; chosen. A flood raises the median of few at once:
    # test_gradients_longer_than_usual_are_shortened.
    least: int = 8


class GradientCap:
    """Shortens gradients (experts, parameters) that are much longer than usual: no single request moves an adapter far.

    Gradients, not steps: so a learner's moments, hints and projections know of what was really done.

    Args:
        most: times the median of the lengths before; None: no cap.
    """

    def __init__(self, most: float | None, constants: CapConstants = CapConstants()) -> None:
        self._most, self._constants = most, constants
        self._norms: deque[Tensor] = deque(maxlen=constants.window)

    def __call__(self, grads: Tensor) -> Tensor:
        grads, norms = self.shortened(grads)
        self.note(norms)
        return grads

    def shortened(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients as long as they may be, and their lengths (experts,)."""
        norms = grads.norm(dim=-1)
        if self._most is not None and len(self._norms) >= self._constants.least:
            most = self._most * torch.stack(list(self._norms)).median(dim=0).values
            # After gradients of nothing, a first one is not unusual.
            shorter = torch.where(most > 0, (most / norms.clamp_min(1e-30)).clamp_max(1.0), 1.0)
            grads, norms = grads * shorter[:, None], norms * shorter
        return grads, norms

    def note(self, norms: Tensor) -> None:
        """Takes in the lengths (experts,) of gradients that were stepped along."""
        if self._most is not None:
            self._norms.append(norms)

    def state(self) -> State:
        return State({"norms": torch.stack(list(self._norms))} if self._norms else {})

    def resume(self, saved: State, like: Tensor) -> None:
        """The inverse of `saved`; lengths are (experts,) like these."""
        norms = saved.tensors.get("norms")
        if norms is None:
            return
        if norms.dim() != 2 or norms.shape[1:] != like.shape or len(norms) > self._constants.window:
            raise ArtifactError(f"The saved lengths of gradients have shape {tuple(norms.shape)}.")
        self._norms = deque(norms.to(like), maxlen=self._constants.window)
