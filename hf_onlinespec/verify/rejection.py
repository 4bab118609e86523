"""Speculative sampling: tokens that follow the target's law and are the candidates where they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..commit.sampling import draw
from ..models.vocabulary import widened


@dataclass(frozen=True)
class Drawn:
    """A drawn candidate behind the prefix of every row."""

    tokens: Tensor  # (rows,)
    q: Tensor  # (rows, draft's vocab) what each was drawn from; 0 throughout where a row has none
    has: Tensor | None = None  # (rows,) whether a row has one; None: every row has


def speculative_sample(
    p: Tensor, drawn: Sequence[Drawn], guesses: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Draws a token per row from p (rows, vocab), a drawn candidate where one can be kept; row by row.

    The first candidate x ~ q is kept with probability min(1, p(x)/q(x)) (arXiv:2211.17192). What is left of p where it is rejected,
    (p − q)₊ normalised, is the p of the next one (recursive rejection, arXiv:2305.09781), and what the last one leaves is drawn from.
    So tokens follow p, whatever each q is, as long as it depends on nothing but the candidates before it.

    Args:
        guesses: (row, token) of candidates that were not drawn, asked for their chances alone.

    Returns:
        Tokens (rows, 1), and the chances of candidates to be the token: per drawn one (rows,), then (guesses,). Each is given the
        drawn ones before it, but not its own draw: that of the first is Σ min(p, q).
    """
    law, kept, reached = p, None, None  # kept, reached: (rows, 1); reached: how likely all before were to be rejected
    tokens = drawn[0].tokens[:, None] if drawn else draw(p)
    chances = []
    for i, one in enumerate(drawn):
        # A distribution is 0 at ids that the other one has alone.
        law, q, x = widened(law, one.q.shape[-1], 0.0), widened(one.q, law.shape[-1], 0.0), one.tokens[:, None]
        p_x, q_x = law.gather(-1, x), q.gather(-1, x)
        keeps = torch.rand_like(p_x) * q_x < p_x
        if one.has is not None:
            keeps &= one.has[:, None]
        tokens = x if kept is None else torch.where(kept, tokens, x)
        kept = keeps if kept is None else kept | keeps
        overlap = torch.minimum(law, q).sum(-1)
        chances.append(overlap if reached is None else reached[:, 0] * overlap)
        last = i == len(drawn) - 1 and not guesses
        if last and bool(kept.all()):
            return tokens, chances
        law = _left(law, q)
        if not last:
            law = law / law.sum(-1, keepdim=True)
            rejected = torch.where(q_x > 0, (1 - p_x / q_x).clamp_min(0), 1.0)
            reached = rejected if reached is None else reached * rejected
    if guesses:
        places = torch.tensor([row * law.shape[-1] + token for row, token in guesses], device=p.device)
        chance = law.take(places)
        chances.append(chance if reached is None else chance * reached.take(places // law.shape[-1]))
    if kept is not None and not bool(kept.all()):
        tokens = torch.where(kept, tokens, draw(law))
    return tokens, chances


def _left(law: Tensor, q: Tensor) -> Tensor:
    """(rows, vocab) what is left of a law where a draw from q is rejected, not normalised."""
    residual = (law - q).clamp_min(0)
    # law = q up to rounding leaves nothing: then the draw is from the law itself.
    return torch.where(residual.sum(-1, keepdim=True) <= torch.finfo(law.dtype).tiny, law, residual)
