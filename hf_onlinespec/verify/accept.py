"""Which drafted tokens are kept: greedy ones that are the target's own, sampled ones so that the target's law is kept (arXiv:2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .._compat.generation import processed_scores
from ..commit.proposal import Proposal
from ..commit.sampling import draw
from ..models.vocabulary import widened


@dataclass(frozen=True)
class Outcome:
    """One verified round."""

    tokens: Tensor  # (batch, L + new) the sequence with its new tokens
    accepted: int  # drafted tokens kept
    verified: int  # drafted positions looked at: the accepted ones and the first rejection
    overlaps: list[float]  # at each of them Σ min(p, q)
    scores: tuple[Tensor, ...] | None  # processed scores (batch, vocab) of every generated token, if asked for
    done: bool


def accept(
    proposal: Proposal,
    logits: Tensor,
    tokens: Tensor,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    sample: bool,
    scores: tuple[Tensor, ...] | None,
) -> Outcome:
    """Keeps drafted tokens up to the first rejection or stop, then one token of the target's own.

    Position by position, so that a stateful processor or criterion sees every kept prefix once and in order, and
    nothing behind a rejection.

    Args:
        proposal: k drafted tokens.
        logits: (batch, k + 1, vocab) raw target logits.
        tokens: (batch, L) the sequence before this round.
    """
    k = proposal.tokens.shape[1]
    accepted = 0
    overlaps: list[float] = []
    for i in range(k + 1):
        processed = processed_scores(processors, tokens, logits[:, i])  # (batch, vocab)
        drafted = proposal.tokens[:, i] if i < k else None
        if not sample:
            token = processed.argmax(-1)
            kept = drafted is not None and bool((token == drafted).all())
            if drafted is not None:
                overlaps.append(float(kept))
        elif drafted is None:
            token, kept = draw(processed.softmax(-1)).squeeze(1), False
        else:
            assert proposal.q is not None
            p, q = processed.softmax(-1), proposal.q[:, i]
            # A law is 0 at ids that the other one has alone.
            p, q = widened(p, q.shape[-1], 0.0), widened(q, p.shape[-1], 0.0)
            token, kept = speculative_sample(p, q, drafted)
            overlaps.append(torch.minimum(p, q).sum().item())
        tokens = torch.cat([tokens, token[:, None]], dim=-1)
        if scores is not None:
            scores = (*scores, processed)
        accepted += kept
        # generate() passes the scores to the criteria only where the caller asked for them.
        done = bool(stopping_criteria(tokens, scores).all())
        if done or not kept:
            break
    return Outcome(tokens, accepted, len(overlaps), overlaps, scores, done)


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
