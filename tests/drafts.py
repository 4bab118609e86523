"""What tests ask of a draft, by its public methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_onlinespec import OnlineDraft
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.resuming import adopt


def flat_params(draft: OnlineDraft) -> torch.Tensor:
    """A copy of the adapter's parameters (parameters,), of all experts."""
    return torch.cat([part.flatten() for part in draft.learning.adapter_params().values()])


def move(draft: OnlineDraft, change: Callable[[Tensor], Tensor] = lambda part: part + 1) -> None:
    """Lets a draft serve another adapter than it has, as if that had been trained elsewhere."""
    adopt(draft, {name: change(part) for name, part in draft.learning.adapter_params().items()})


def learn_segment(
    draft: OnlineDraft,
    tokens: torch.Tensor,
    teachers: list[Teacher],
    counts: Counts | None = None,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    prefix: Prefix | None = None,
) -> Counts:
    """One step of a draft on the last tokens of every row of `tokens` (rows, L)."""
    counts = Counts() if counts is None else counts
    draft.learning.learn_segment(Segment(tokens, teachers, mask, temperature), counts, prefix=prefix)
    return counts
