"""What tests ask of a draft, by its public methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_onlinespec import OnlineDraft


def flat_params(draft: OnlineDraft) -> torch.Tensor:
    """A copy of the adapter's parameters (parameters,), of all experts."""
    return torch.cat([part.flatten() for part in draft.adapter_params().values()])


def move(draft: OnlineDraft, change: Callable[[Tensor], Tensor] = lambda part: part + 1) -> None:
    """Lets a draft serve another adapter than it has, as if that had been trained elsewhere."""
    draft.adopt({name: change(part) for name, part in draft.adapter_params().items()})
