"""What tests ask of a draft, by its public methods."""

from __future__ import annotations

import torch

from hf_onlinespec import OnlineDraft


def flat_params(draft: OnlineDraft) -> torch.Tensor:
    """A copy of the adapter's parameters (parameters,), of all experts."""
    return torch.cat([part.flatten() for part in draft.adapter_params().values()])
