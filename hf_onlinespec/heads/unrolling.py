"""A head drafts behind many rows of a text at once, a token further with every step: training-time test (arXiv:2503.01840)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .base import HeadOutput
from .layer import positions_of, seen_keys


class Unroll:
    """Drafts behind the last rows of a text.

    Step 0 reads the target's features; step k what step k - 1 said in the same row. A row of step k stands k positions further than
    at step 0, and sees the keys of step 0 up to its own row and its own key of each step since, as it does when it drafts from there.

    Args:
        head: a `Head`, with or without an adapter.
        rows: how many of the last rows of step 0 are drafted from.
        mask: (B, m) with zeros at padding, of the m rows of step 0; None: no padding.
        cache: the rows before those of step 0, if any, which has no mask then; the rows of every step are added to it. None: there is
            no step but the first.
    """

    def __init__(
        self, head: PreTrainedModel, rows: int, mask: Tensor | None = None, cache: Cache | None = None
    ) -> None:
        self._head, self._rows, self._mask, self._cache = head, rows, mask, cache
        self._later: list[int] = []  # rows of each step since the first one

    def first(self, tokens: Tensor, features: Tensor, n: int = 0) -> HeadOutput:
        """Step 0: all rows of the text are read.

        Args:
            tokens: (B, m) the token behind each row.
            features: (B, m, features) of the target.
            n: of how many of the last rows there are logits; 0: of all m.

        Returns:
            Logits (B, n, Vd), and what the next step reads, (B, rows, width).
        """
        m, past = tokens.shape[1], 0 if self._cache is None else int(self._cache.get_seq_length())
        self._positions = positions_of(self._mask, m, past, tokens.device)[:, -self._rows :]
        if self._cache is not None:
            self._seen = seen_keys(self._mask, m, past, tokens.device)[:, :, -self._rows :]
        out: HeadOutput = self._head(
            tokens=tokens,
            features=features,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=max(n, self._rows) if n else 0,  # a head may have `hidden` of these rows alone
        )
        return HeadOutput(out.logits[:, -n:], out.hidden[:, -self._rows :])

    def next(self, tokens: Tensor, hidden: Tensor, n: int = 0) -> HeadOutput:
        """A further step, of the first r of the rows.

        Args:
            tokens: (B, r) what each row reads.
            hidden: (B, r or more, width) what the step before said.
            n: of how many of these rows, the last ones, there are logits; 0: of all r.

        Returns:
            Logits (B, n, Vd), and what the next step reads, (B, r, width).
        """
        r = tokens.shape[1]
        self._later.append(r)
        seen = self._seen[:, :, :r]
        own = [torch.eye(r, size, dtype=torch.bool, device=tokens.device) for size in self._later]
        out: HeadOutput = self._head(
            tokens=tokens,
            hidden=hidden[:, :r],
            attention_mask=torch.cat([seen, *(one.expand(len(seen), 1, -1, -1) for one in own)], dim=-1),
            position_ids=self._positions[:, :r] + len(self._later),
            past_key_values=self._cache,
            logits_to_keep=n,
        )
        return HeadOutput(out.logits, out.hidden)

    def teacher_forced(self, tokens: Tensor, features: Tensor, steps: int, n: int = 0) -> list[Tensor]:
        """Logits of each step, where a row of step k reads the text's token k places further than at step 0.

        It says what the row k places further says at step 0: the last k rows have no step k.

        Args:
            tokens: (B, m) the token behind each row of step 0.
            features: (B, m, features) of the target.
            steps: most of them; there are no more than rows.
            n: of how many of the last rows of each step there are logits; 0: of all.

        Returns:
            Of step k (B, at most n, Vd).
        """
        out = self.first(tokens, features, n or self._rows)
        found = [out.logits]
        for k in range(1, min(steps, self._rows)):
            out = self.next(tokens[:, k - self._rows :], out.hidden, n)
            found.append(out.logits)
        return found
