"""Rows that have ended, where the caller of `generate` has the cache afterwards: for the next turn of all of them.

Their cache is left as plain decoding leaves it: a place for each token of the padded result but the last. What is read of a row there
is at its own tokens; the mask of the next turn has to hide the padding, as it has to in plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ..rounds import Proposal, Rows
from .lockstep import Lockstep
from .ragged import RaggedVerifier


class EndedRows:
    """The rows of a call that have ended, with what the target has read of them.

    Args:
        shown: (batch, prompt) 0 where there is padding, of all tokens that the rows began with.
        prompt: of these, tokens that are part of the result: the others are in the caller's cache alone.
    """

    def __init__(self, shown: Tensor, prompt: int) -> None:
        self._shown, self._prompt = shown.cpu(), prompt
        self._parts: list[tuple[tuple[int, ...], RaggedVerifier]] = []  # rows by their number in the call

    def add(self, rows: tuple[int, ...], verifier: RaggedVerifier) -> None:
        """Takes rows over from those that go on."""
        if rows:
            self._parts.append((rows, verifier))

    def fill(self, cache: Cache, tokens: Sequence[Tensor], lockstep: Lockstep) -> None:
        """Leaves the cache to the next turn, when all rows have ended.

        Args:
            tokens: per row of the call, what it is as a part of the result (L,), without padding on the right.
        """
        ended, *others = [verifier for _, verifier in self._parts]
        for other in others:
            ended.join(other)
        order = tuple(chain.from_iterable(rows for rows, _ in self._parts))
        longest, known = max(map(len, tokens)), self._shown.shape[1]
        places = known + longest - self._prompt - 1
        columns: list[list[int]] = []  # per row, where its tokens are
        for row in order:
            end = known + len(tokens[row]) - self._prompt
            columns.append([*torch.nonzero(self._shown[row])[:, 0].tolist(), *range(known, min(end, places))])
        if any(len(own) > read for own, read in zip(columns, ended.read_of(), strict=True)):
            # What has ended earlier than others is read to its end.
            lockstep.end_round(False)
            rows = Rows(
                torch.stack([F.pad(tokens[row], (0, longest - len(tokens[row]))) for row in order]),
                tuple(len(tokens[row]) for row in order),
            )
            ended.verify(rows, Proposal.nothing(rows))
        back = sorted(range(len(order)), key=order.__getitem__)
        ended.leave(back)
        ended.lay_out([columns[i] for i in back], places, cache)
