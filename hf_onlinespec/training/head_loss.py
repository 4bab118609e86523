"""What a head is trained on: its loss along the target's answers by training-time test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ..heads.base import Head
from ..heads.unrolling import Unroll
from .head_features import HeadBatch


@dataclass(frozen=True)
class Unrolled:
    """The loss of a batch, and what it is made of."""

    loss: Tensor  # sum over steps of decay^k times the step's mean
    steps: list[float]  # mean of -sum p log q of each step


def unroll_of(head: Head, batch: HeadBatch) -> Unroll:
    """Drafts behind every answer row of a batch."""
    return Unroll(head, batch.best.shape[1], batch.real, DynamicCache())


def unrolled_loss(
    head: Head, batch: HeadBatch, target_logits: Tensor, steps: int, decay: float, known: Tensor | None = None
) -> Unrolled:
    """The loss of training-time test: sum over k of decay^k · mean of -sum p log q_k, teacher-forced.

    p is the target's law restricted to the draft vocabulary; a token is left out where the target's likeliest one is not in it.

    Args:
        target_logits: (B, n, Vd) behind answer token i.
        steps: k goes from 0 to steps - 1.
        known: (V,) True for the tokens of the draft vocabulary; None: all.
    """
    counted = batch.real[:, batch.prompt_tokens.shape[1] :]
    if known is not None:
        counted = counted & known[batch.best]
    law = target_logits.softmax(-1)
    losses: list[Tensor] = []
    for k, logits in enumerate(unroll_of(head, batch).teacher_forced(batch.read, batch.features, steps)):
        rows, p = counted[:, k:].flatten(), law[:, k:].flatten(0, 1)  # (tokens,), (tokens, Vd)
        each = F.cross_entropy(logits.flatten(0, 1).float(), p, reduction="none")
        losses.append((each * rows).sum() / rows.sum().clamp_min(1))
    total = torch.stack([decay**k * loss for k, loss in enumerate(losses)]).sum()
    return Unrolled(total, [float(loss.detach()) for loss in losses])
