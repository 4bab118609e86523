"""Divergences between target and draft, one number per position, from log-probabilities.

Every loss maps `(log_p, log_q)`, each (n, K), to (n,). K is the vocabulary, or the teacher's top k tokens and one
bucket for all the others: a divergence of the buckets never exceeds that of the full distributions (data processing).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a (log a − log b), with 0 log 0 = 0 so that impossible tokens cost nothing."""
    possible = log_a > -torch.inf
    difference = torch.where(possible, log_a, 0.0) - torch.where(possible, log_b, 0.0)
    return (log_a.exp() * difference).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q): the gradient in q is that of soft cross-entropy."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ q (log q − log p). Infinite where the target forbids a token that the draft allows."""
    return _kl(log_q, log_p)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The Jensen–Shannon divergence ½ KL(p‖m) + ½ KL(q‖m), m = ½ (p + q); at most log 2."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=log_p.device))
    return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ KL(p‖q) + ½ KL(q‖p): what OSD (arXiv:2310.07177) calls "jsd"."""
    return 0.5 * _kl(log_p, log_q) + 0.5 * _kl(log_q, log_p)


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p − q| = 1 − acceptance of one sampled token."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−log q at the target's most probable token: the loss of greedy decoding."""
    return -log_q.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1)


LOSSES: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "tv": tv,
    "cross_entropy": cross_entropy,
}
