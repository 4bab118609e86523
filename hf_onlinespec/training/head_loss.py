"""A head drafts behind every row of an answer at once, and learns from it: training-time test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ..heads.base import Head, HeadOutput
from .head_features import HeadBatch


class Unroll:
    """Drafts behind every answer row of a batch, a token further with every step.

    Step 0 reads the target's features; step k what step k - 1 said in the same row. A row of step k stands k positions further than
    at step 0, and sees the keys of step 0 up to its own row and its own key of each step since, as it does when it drafts from there.
    """

    def __init__(self, head: Head, batch: HeadBatch) -> None:
        self._head, self._batch = head, batch
        self._p, self._n = batch.prompt_tokens.shape[1], batch.best.shape[1]
        self._cache = DynamicCache()
        real = batch.real
        total = self._p + self._n
        self._positions = (real.long().cumsum(-1) - 1).clamp_min(0)  # (B, p + n); behind an answer they stand still
        own = torch.eye(total, dtype=torch.bool, device=real.device)
        causal = torch.ones(total, total, dtype=torch.bool, device=real.device).tril()
        self._mask = ((causal & real[:, None, :]) | own)[:, None]  # (B, 1, p + n, p + n)
        self._steps = 0

    def first(self) -> HeadOutput:
        """Step 0: logits (B, n, Vd) of answer token i + 1 in row i."""
        batch = self._batch
        out: HeadOutput = self._head(
            torch.cat([batch.prompt_tokens, batch.tokens[:, :-1]], dim=1),
            features=batch.features,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            logits_to_keep=self._n,
        )
        self._positions, self._mask = self._positions[:, self._p :], self._mask[:, :, self._p :]
        return HeadOutput(out.logits, out.hidden[:, self._p :])

    def next(self, tokens: Tensor, hidden: Tensor) -> HeadOutput:
        """A further step: tokens (B, n), and what the step before said, (B, n, width)."""
        self._steps += 1
        own = torch.eye(self._n, dtype=torch.bool, device=tokens.device).expand(len(tokens), 1, -1, -1)
        self._mask = torch.cat([self._mask, own], dim=-1)
        out: HeadOutput = self._head(
            tokens,
            hidden=hidden,
            attention_mask=self._mask,
            position_ids=self._positions + self._steps,
            past_key_values=self._cache,
        )
        return HeadOutput(out.logits, out.hidden)


@dataclass(frozen=True)
class Unrolled:
    """The loss of a batch, and what it is made of."""

    loss: Tensor  # sum over steps of decay^k times the step's mean
    steps: list[float]  # mean of -sum p log q of each step


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
    unroll, n = Unroll(head, batch), counted.shape[1]
    losses: list[Tensor] = []
    out = unroll.first()
    for k in range(min(steps, n)):
        if k:
            out = unroll.next(F.pad(batch.tokens[:, k:-1], (0, k)), out.hidden)  # row i reads answer token i + k
        rows = counted[:, k:].flatten()
        logits, p = out.logits[:, : n - k].flatten(0, 1), law[:, k:].flatten(0, 1)  # each (tokens, Vd)
        each = F.cross_entropy(logits.float(), p, reduction="none")
        losses.append((each * rows).sum() / rows.sum().clamp_min(1))
    total = torch.stack([decay**k * loss for k, loss in enumerate(losses)]).sum()
    return Unrolled(total, [float(loss.detach()) for loss in losses])
