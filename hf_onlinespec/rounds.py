"""What is handed on in a round: rows → proposal → verdict. Plain data, below commit, verify and adapt.

A batch has a length per row. Lengths and counts are numbers of the host: a round decides by them, and a tensor of an accelerator
would be waited for. One row is all that `verify/checks.py` lets in for now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .govern.acceptance import TokenSource


@dataclass(frozen=True)
class Rows:
    """Sequences while they are generated."""

    tokens: Tensor  # (batch, longest), padded on the right; a prompt may be padded on the left, see `Call.mask`
    lengths: tuple[int, ...]  # (batch,) of a row's tokens, padding on the left included

    @classmethod
    def of(cls, tokens: Tensor) -> Rows:
        """Rows of one length: tokens (batch, length)."""
        return cls(tokens, (tokens.shape[1],) * tokens.shape[0])

    def row(self, i: int) -> Tensor:
        """(1, length) of one row."""
        return self.tokens[i : i + 1, : self.lengths[i]]


@dataclass(frozen=True)
class Proposal:
    """What a draft commits to in one round; a row may have no candidate at all."""

    tokens: Tensor  # (batch, n) candidates, padded on the right
    # (batch, n, target's vocab) the distribution each was drawn from, one-hot where it was not drawn; None: greedy, none is needed.
    q: Tensor | None
    sources: tuple[tuple[TokenSource, ...], ...]  # per row, of every candidate: where it came from
    model_s: float = 0.0  # time that the draft model took

    @property
    def lengths(self) -> tuple[int, ...]:
        """(batch,) candidates of every row."""
        return tuple(map(len, self.sources))

    def check(self, rows: Rows, room: int, sampled: bool, ids: int | None) -> None:
        """Raises ValueError where it cannot be verified behind these rows.

        Args:
            room: most candidates of a row.
            sampled: whether candidates need a q.
            ids: candidates lie below it; asked on the host alone, elsewhere it would wait for the device. None: not known.
        """
        batch, n = self.tokens.shape
        if batch != len(rows.lengths) or len(self.sources) != batch or n != max(self.lengths) or n > room:
            raise ValueError(
                f"A proposal of {tuple(self.tokens.shape)} tokens with sources of {self.lengths}, for {len(rows.lengths)} rows with "
                f"room for {room}."
            )
        if not n:
            return
        if sampled and (self.q is None or self.q.shape[:2] != self.tokens.shape):
            raise ValueError(
                "A proposal for sampling needs q (batch, n, vocab): one-hot where a candidate was not drawn."
            )
        if ids is not None and self.tokens.device.type == "cpu":
            least, most = self.tokens.aminmax()
            if int(least) < 0 or int(most) >= ids:
                raise ValueError(f"A proposal has the token {int(most)} or {int(least)}: expected 0 to {ids - 1}.")

    @classmethod
    def nothing(cls, rows: Rows) -> Proposal:
        """No candidate: the target decodes one token by itself."""
        return cls(rows.tokens[:, :0], None, ((),) * len(rows.lengths))

    @classmethod
    def joined(cls, proposals: list[Proposal]) -> Proposal:
        """Proposals of one row each as one."""
        if len(proposals) == 1:
            return proposals[0]
        most = max(proposal.tokens.shape[1] for proposal in proposals)
        tokens = torch.cat([_padded(proposal.tokens, most) for proposal in proposals])
        size = max((0 if p.q is None else p.q.shape[-1]) for p in proposals)
        q = None
        if size:
            q = torch.zeros(len(proposals), most, size, dtype=torch.float32, device=tokens.device)
            for row, proposal in enumerate(proposals):
                if proposal.q is not None:
                    q[row, : proposal.q.shape[1], : proposal.q.shape[2]] = proposal.q[0]
        sources = tuple(source for proposal in proposals for source in proposal.sources)
        return cls(tokens, q, sources, sum(proposal.model_s for proposal in proposals))


def _padded(tokens: Tensor, length: int) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], length - tokens.shape[1])], dim=1)


@dataclass(frozen=True)
class Verdict:
    """What the target decided about a proposal."""

    proposal: Proposal
    rows: Rows  # with their new tokens
    new_tokens: tuple[int, ...]  # (batch,) how many of them every row has got
    accepted: tuple[int, ...]  # (batch,) candidates kept
    overlaps: tuple[
        tuple[float, ...], ...
    ]  # per row: Σ min(p, q) at its verified candidates, the first rejection included
    done: tuple[bool, ...]  # (batch,) whether a criterion ended the row
    scores: (
        tuple[tuple[Tensor, ...], ...] | None
    )  # per row, of every new token: processed scores (vocab,), if asked for
    draft_s: float = 0.0
    target_s: float = 0.0  # 0: not counted
