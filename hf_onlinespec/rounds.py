"""What is handed on in a round: rows → proposal → verdict. Plain data, below commit, verify and adapt.

A batch has a length per row. Lengths and counts are numbers of the host: a round decides by them, and a tensor of an accelerator
would be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .govern.acceptance import TokenSource


@dataclass(frozen=True)
class Rows:
    """Sequences while they are generated."""

    tokens: Tensor  # (batch, longest), padded on the right; a prompt may be padded on the left, see `Call.mask`
    lengths: tuple[int, ...]  # (batch,) of a row's tokens, padding on the left included
    # (batch,) which rows of the call these are: those that have ended are not among them. None: all of them, in order.
    numbers: tuple[int, ...] | None = None

    @property
    def of_call(self) -> tuple[int, ...]:
        """(batch,) which rows of the call these are."""
        return tuple(range(len(self.lengths))) if self.numbers is None else self.numbers

    def of_rows(self, rows: Sequence[int]) -> Rows:
        """Some of the rows."""
        lengths, numbers = tuple(self.lengths[row] for row in rows), tuple(self.of_call[row] for row in rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        return Rows(self.tokens[index, : max(lengths, default=0)], lengths, numbers)

    def joined(self, others: Rows) -> Rows:
        """These rows, then others of the same call."""
        longest = max(*self.lengths, *others.lengths)
        tokens = torch.cat([_padded(one.tokens[:, :longest], longest) for one in (self, others)])
        return Rows(tokens, self.lengths + others.lengths, self.of_call + others.of_call)

    @classmethod
    def of(cls, tokens: Tensor) -> Rows:
        """Rows of one length: tokens (batch, length)."""
        return cls(tokens, (tokens.shape[1],) * tokens.shape[0])

    def row(self, i: int) -> Tensor:
        """(1, length) of one row."""
        return self.tokens[i : i + 1, : self.lengths[i]]


@dataclass(frozen=True)
class Proposal:
    """What a draft commits to in one round: per row a tree of candidates, of which a chain is a special case; a row may have none.

    A candidate that was drawn from a q is kept by speculative sampling. Every other one is a point guess: it is kept where the
    target's own draw is this token, whatever else was guessed.
    """

    tokens: Tensor  # (batch, n) candidates, padded on the right; each stands behind the one that it follows
    # (batch, m, target's vocab) what the drawn candidates were drawn from, see `drawn`; None: none was drawn. Of several drawn ones
    # behind the same prefix each was drawn without replacement: its q is 0 at those before it.
    q: Tensor | None
    sources: tuple[tuple[TokenSource, ...], ...]  # per row, of every candidate: where it came from
    model_s: float = 0.0  # time that the draft model took
    # Per row, of every candidate: the one that it follows; -1: it follows the row itself. None: chains, each follows the one before.
    parents: tuple[tuple[int, ...], ...] | None = None
    # Per row, the candidates that q is about, in its order; None: all of them, where there is a q.
    drawn: tuple[tuple[int, ...], ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """(batch,) candidates of every row."""
        return tuple(map(len, self.sources))

    def parents_of(self, row: int) -> tuple[int, ...]:
        """Of every candidate of a row the one that it follows; -1: the row itself."""
        return tuple(range(-1, len(self.sources[row]) - 1)) if self.parents is None else self.parents[row]

    def depths_of(self, row: int) -> tuple[int, ...]:
        """Of every candidate of a row how many candidates lie before it."""
        depths: list[int] = []
        for parent in self.parents_of(row):
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def drawn_of(self, row: int) -> tuple[int, ...]:
        """The candidates of a row that were drawn, in the order of q."""
        if self.q is None:
            return ()
        return tuple(range(len(self.sources[row]))) if self.drawn is None else self.drawn[row]

    def is_chain(self, row: int) -> bool:
        """Whether each candidate of a row follows the one before it."""
        return self.parents is None or self.parents[row] == tuple(range(-1, len(self.sources[row]) - 1))

    def check(self, rows: Rows, room: int, ids: int | None) -> None:
        """Raises ValueError where it cannot be verified behind these rows.

        Args:
            room: how far a row may reach: most candidates that follow each other.
            ids: candidates lie below it; asked on the host alone, elsewhere it would wait for the device. None: not known.
        """
        batch, n = self.tokens.shape
        if batch != len(rows.lengths) or len(self.sources) != batch or n != max(self.lengths):
            raise ValueError(
                f"A proposal of {tuple(self.tokens.shape)} tokens with sources of {self.lengths}, for {len(rows.lengths)} rows."
            )
        for name, per_row in (("parents", self.parents), ("drawn", self.drawn), ("q", self.q)):
            if per_row is not None and len(per_row) != batch:
                raise ValueError(f"A proposal for {batch} rows has {name} for {len(per_row)}.")
        for row in range(batch) if n else ():
            self._check_tree(row, room)
        if n and ids is not None and self.tokens.device.type == "cpu":
            least, most = map(int, self.tokens.aminmax())
            if least < 0 or most >= ids:
                raise ValueError(f"A proposal has the token {least if least < 0 else most}: expected 0 to {ids - 1}.")

    def _check_tree(self, row: int, room: int) -> None:
        length, parents = len(self.sources[row]), self.parents_of(row)
        if len(parents) != length or any(not -1 <= parent < i for i, parent in enumerate(parents)):
            raise ValueError(
                f"A proposal of {length} tokens has the parents {parents}: expected of each -1 or an earlier token."
            )
        reach = max(self.depths_of(row), default=-1) + 1
        if reach > room:
            raise ValueError(f"A proposal reaches {reach} tokens far: there is room for {room}.")
        places = 0 if self.q is None else self.q.shape[1]
        drawn = self.drawn_of(row) if self.drawn is None else self.drawn[row]
        if len(drawn) > places or len(set(drawn)) < len(drawn) or any(not 0 <= i < length for i in drawn):
            raise ValueError(f"A proposal of {length} tokens has q for {places} drawn ones, and drawn are {drawn}.")

    def of(self, rows: Sequence[int]) -> Proposal:
        """What it says of some of the rows."""
        index = torch.tensor(rows, device=self.tokens.device)
        return Proposal(
            self.tokens[index],
            None if self.q is None else self.q[index],
            tuple(self.sources[row] for row in rows),
            parents=None if self.parents is None else tuple(self.parents[row] for row in rows),
            drawn=None if self.drawn is None else tuple(self.drawn[row] for row in rows),
        )

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
        with_q = [(row, proposal.q) for row, proposal in enumerate(proposals) if proposal.q is not None]
        q, drawn = None, None
        if with_q:
            drawn = tuple(proposal.drawn_of(0) for proposal in proposals)
            shape = max(own.shape[1] for _, own in with_q), max(own.shape[2] for _, own in with_q)
            q = torch.zeros(len(proposals), *shape, dtype=torch.float32, device=tokens.device)
            for row, own in with_q:
                q[row, : own.shape[1], : own.shape[2]] = own[0]
        sources = tuple(source for proposal in proposals for source in proposal.sources)
        parents = None
        if any(proposal.parents is not None for proposal in proposals):
            parents = tuple(proposal.parents_of(0) for proposal in proposals)
        return cls(tokens, q, sources, sum(proposal.model_s for proposal in proposals), parents, drawn)


def _padded(tokens: Tensor, length: int) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], length - tokens.shape[1])], dim=1)


@dataclass(frozen=True)
class Verdict:
    """What the target decided about a proposal."""

    proposal: Proposal
    rows: Rows  # with their new tokens
    new_tokens: tuple[int, ...]  # (batch,) how many of them every row has got
    paths: tuple[tuple[int, ...], ...]  # per row, the candidates that were kept, each follows the one before
    # Per row, of the verified places (those behind a kept prefix that have a candidate, the last one included): the chance that the
    # target kept one of the candidates there, before its draw. With one drawn candidate that is Σ min(p, q).
    overlaps: tuple[tuple[float, ...], ...]
    # Per row, of every candidate at these places, the chance that it was kept before the draw: (candidate, chance).
    chances: tuple[tuple[tuple[int, float], ...], ...]
    done: tuple[bool, ...]  # (batch,) whether a criterion ended the row
    scores: (
        tuple[tuple[Tensor, ...], ...] | None
    )  # per row, of every new token: processed scores (vocab,), if asked for
    draft_s: float = 0.0
    target_s: float = 0.0  # 0: not counted

    @property
    def accepted(self) -> tuple[int, ...]:
        """(batch,) candidates kept."""
        return tuple(map(len, self.paths))

    def of_new_tokens(self, values: Tensor) -> Tensor:
        """Of `values` (batch, n + 1, …) behind the rows and behind each candidate, those that the new tokens were chosen from.

        Returns:
            (batch, most new tokens, …), padded on the right.
        """
        places = [[0, *(candidate + 1 for candidate in path)] for path in self.paths]
        n = max(self.new_tokens)
        if all(path[:n] == list(range(n)) for path in places):
            return values[:, :n]
        index = torch.tensor([(path + [0] * n)[:n] for path in places], device=values.device)
        return values[torch.arange(len(places), device=values.device)[:, None], index]
