"""Drawing tokens: from a law, and from the target's law by way of the draft's."""

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


def speculative_sample(p: Tensor, q: Tensor, drafted: Tensor) -> tuple[Tensor, bool]:
    """Draws from p (batch, vocab) that reuse draws from q where they can: `(tokens, whether all are the drafted ones)`.

    Keeps x ~ q with probability min(1, p(x)/q(x)), else draws from the residual (p − q)₊ (arXiv:2211.17192); row by row.
    """
    chosen = drafted[:, None]
    u = torch.rand(chosen.shape, device=p.device)
    kept = (u * q.gather(-1, chosen) < p.gather(-1, chosen)).squeeze(-1)
    if bool(kept.all()):
        return drafted, True
    residual = (p - q).clamp_min(0)
    # p = q up to rounding leaves nothing: then p itself is the law.
    empty = residual.sum(-1, keepdim=True) <= torch.finfo(p.dtype).tiny
    return torch.where(kept, drafted, draw(torch.where(empty, p, residual)).squeeze(1)), False
