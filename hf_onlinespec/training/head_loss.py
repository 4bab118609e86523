"""A head drafts behind every row of an answer at once: to learn (training-time test), and to count how much would be accepted."""

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
    p = batch.prompt_tokens.shape[1]
    counted = batch.real[:, p:]
    if known is not None:
        counted = counted & known[batch.best]
    law = target_logits.softmax(-1)
    unroll, n = Unroll(head, batch), counted.shape[1]
    losses: list[Tensor] = []
    out = unroll.first()
    for k in range(steps):
        if k:
            # row i reads answer token i + k
            out = unroll.next(F.pad(batch.tokens[:, k:-1], (0, k)), out.hidden)
        rows = counted[:, k:] if k < n else counted[:, :0]
        logits = out.logits[:, : rows.shape[1]][rows]  # (tokens, Vd)
        loss = F.cross_entropy(logits.float(), law[:, k:][rows], reduction="sum") if len(logits) else logits.sum()
        losses.append(loss / max(1, len(logits)))
    total = torch.stack([decay**k * loss for k, loss in enumerate(losses)]).sum()
    return Unrolled(total, [float(loss.detach()) for loss in losses])


@torch.no_grad()
def accepted_behind(head: Head, batch: HeadBatch, length: int) -> Tensor:
    """How many tokens of a greedy draft of `length` tokens are those of the answer, (B, n): behind row i, the draft of answer token i + 1."""
    ids = head.draft_ids
    unroll, n = Unroll(head, batch), batch.best.shape[1]
    out = unroll.first()
    p = batch.prompt_tokens.shape[1]
    right = batch.real[:, p:]  # behind the answer nothing is accepted
    accepted = torch.zeros_like(batch.best)
    for k in range(length):
        drafted = out.logits.argmax(-1)
        drafted = drafted if ids is None else ids[drafted]
        answer = F.pad(batch.tokens[:, k + 1 :], (0, k), value=-1)[:, :n]
        left = F.pad(batch.real[:, p + k :], (0, k), value=False)
        right = right & left & (drafted == answer)
        accepted += right
        if k + 1 < length:
            out = unroll.next(drafted, out.hidden)
    return accepted


def acceptance_length(accepted: Tensor, batch: HeadBatch) -> tuple[int, int]:
    """Tokens and target forwards of the answers of a batch, walked from draft to draft; accepted (B, n): `accepted_behind`."""
    p = batch.prompt_tokens.shape[1]
    tokens = forwards = 0
    for row, n in zip(accepted.tolist(), batch.real[:, p:].sum(-1).tolist(), strict=True):
        i = 0
        while i < n:
            tokens, forwards = tokens + min(row[i] + 1, n - i), forwards + 1
            i += row[i] + 1
    return tokens, forwards
