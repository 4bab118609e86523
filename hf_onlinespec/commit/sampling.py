"""Drawing tokens from a law."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(law: Tensor) -> Tensor:
    """Tokens (batch, 1) drawn from weights `law` (batch, vocab), which need not sum to one."""
    if law.device.type != "cpu":
        return torch.multinomial(law, 1)
    # By the inverse of the cumulated weights: on a CPU, multinomial takes ten times as long over a vocabulary of thousands.
    # In float64, so that rounding adds nothing to that of the weights; a token of weight 0 has no interval to fall into.
    cumulated = law.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    if not bool((total > 0).all()):
        return torch.multinomial(law, 1)  # not a law: its error is the one that `generate` raises
    u = torch.rand(law.shape[0], 1, dtype=torch.float64, device=law.device)
    return torch.searchsorted(cumulated, u * total, right=True).clamp_max(law.shape[-1] - 1)
