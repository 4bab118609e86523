"""Drawing tokens from a distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(weights: Tensor) -> Tensor:
    """Tokens (batch, 1) drawn from `weights` (batch, vocab), which need not sum to one."""
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1)
    # By the inverse of the cumulated weights: on a CPU, multinomial takes ten times as long over a vocabulary of thousands.
    # In float64, so that rounding adds nothing to that of the weights; a token of weight 0 has no interval to fall into.
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    if not bool((total > 0).all()):
        return torch.multinomial(weights, 1)  # no distribution: its error is the one that `generate` raises
    u = torch.rand(weights.shape[0], 1, dtype=torch.float64, device=weights.device)
    return torch.searchsorted(cumulated, u * total, right=True).clamp_max(weights.shape[-1] - 1)
