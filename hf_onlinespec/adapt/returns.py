"""What gradient steps brought for requests that they did not know: what the number of replay passes is decided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .replay import ReplaySchedule


@dataclass
class _Moved:
    """What the steps of one kind have moved since the last request."""

    change: Tensor  # (parameters,) in bfloat16: it is a hint, and as large as the adapter
    seconds: float
    steps: int


class StepReturns:
    """What gradient steps brought for a request that they did not know: steps on new tokens, and on remembered ones."""

    def __init__(self) -> None:
        self._moved: dict[str, _Moved] = {}  # "new", "old"

    @property
    def nbytes(self) -> int:
        return sum(moved.change.nbytes for moved in self._moved.values())

    def forget(self) -> None:
        """The parameters went back: what steps moved is gone."""
        self._moved = {}

    def report(self, grads: Tensor, passes: ReplaySchedule) -> None:
        """Tells what was moved before a new request, whose gradient (parameters,) this is."""
        if "new" in self._moved:
            brought = {
                kind: (-float(grads @ moved.change.float()) / moved.steps, moved.seconds / moved.steps)
                for kind, moved in self._moved.items()
            }
            if "old" in brought:
                passes.observe(brought["new"], brought["old"])
        self._moved = {}

    def note(self, kind: str, before: Tensor, after: Tensor, seconds: float) -> None:
        """A step moved the parameters (parameters,)."""
        moved = self._moved.get(kind) or _Moved(torch.zeros_like(before), 0.0, 0)
        change = (moved.change.float() + after - before).bfloat16()
        self._moved[kind] = _Moved(change, moved.seconds + seconds, moved.steps + 1)
