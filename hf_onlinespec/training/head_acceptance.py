"""How much of recorded answers a head foretells, without its target: greedy drafts of the head alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.base import Head
from .head_features import BLOCK, FeatureCache, HeadBatch
from .head_loss import unroll_of

CHAIN = 5  # tokens of the drafts that a head is measured by


@torch.no_grad()
def accepted_behind(head: Head, batch: HeadBatch, length: int) -> Tensor:
    """How many tokens of a greedy draft of `length` are the answer's, (B, n): behind row i, the draft that begins at answer token i + 1."""
    p, n = batch.prompt_tokens.shape[1], batch.best.shape[1]
    unroll = unroll_of(head, batch)
    out = unroll.first(batch.read, batch.features, n)
    right = batch.real[:, p:]
    accepted = torch.zeros_like(batch.best)
    for k in range(length):
        drafted = out.logits.argmax(-1)
        drafted = drafted if head.draft_ids is None else head.draft_ids[drafted]
        answer = F.pad(batch.tokens[:, k + 1 :], (0, k))[:, :n]
        left = F.pad(batch.real[:, p + k :], (0, k))[:, :n]  # behind the answer nothing is accepted
        right = right & left & (drafted == answer)
        accepted += right
        if k + 1 < length:
            out = unroll.next(drafted, out.hidden)
    return accepted


def forwards(accepted: list[int]) -> int:
    """Target forwards of one answer behind its first token: the next draft begins behind what was accepted, and a token of the target's."""
    i = count = 0
    while i < len(accepted):
        i, count = i + accepted[i] + 1, count + 1
    return count


def acceptance_by_kind(head: Head, cache: FeatureCache, length: int = CHAIN) -> dict[str, float]:
    """Tokens per target forward with greedy drafts of the head, on the answers of a cache: of each kind, and of all ("all")."""
    tokens: dict[str, int] = {}
    rounds: dict[str, int] = {}
    order = sorted(range(len(cache)), key=lambda i: len(cache.answers[i].prompt) + len(cache.answers[i].tokens))
    for at in range(0, len(order), BLOCK):
        indices = order[at : at + BLOCK]
        accepted = accepted_behind(head, cache.batch(indices).to(head.device), length).tolist()
        for index, row in zip(indices, accepted, strict=True):
            answer = cache.answers[index]
            for kind in {answer.kind, "all"}:
                tokens[kind] = tokens.get(kind, 0) + answer.learned
                rounds[kind] = rounds.get(kind, 0) + forwards(row[: answer.learned])
    return {kind: tokens[kind] / rounds[kind] for kind in sorted(tokens)}
