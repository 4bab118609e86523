"""What a learner moves: the parameters of an adapter, and one forward of the draft that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..models.source import Source
from ..state import State


@dataclass(frozen=True)
class Prefix:
    """The beginning of a text, as the draft has read it already: a learner builds on it without gradients."""

    cache: object  # of the trainable's own kind
    length: int  # tokens, or rows of a head, that were read
    first: int = 0  # the first of them


class Adapter(Protocol):
    """Parameters as one flat vector, in blocks of equal size: one per expert."""

    params: Tensor  # (parameters,)
    grads: Tensor  # (parameters,)
    blocks: int
    weights: Tensor | None  # (blocks,) of the blocks in what is served; None: all at 1

    @property
    def nbytes(self) -> int: ...

    def split(self, vector: Tensor) -> Tensor:
        """A vector like `params` as (blocks, parameters of one block)."""
        ...

    def fold(self) -> None:
        """Brings the weights that draft up to date with the parameters."""
        ...

    def put(self, rows: Tensor) -> None:
        """Sets the parameters (blocks, parameters of one block)."""
        ...

    def with_zero_b(self, block: Tensor) -> Tensor:
        """A copy of one block's parameters with which the draft says what its base says."""
        ...

    def named(self, params: Tensor) -> dict[str, Tensor]:
        """The parts of a vector like `params` by their names in files, as views."""
        ...

    def outputs(self, params: Tensor) -> Mapping[str, Tensor]:
        """The same, of those that change where blocks are weighed into what is served."""
        ...


class Trainable(Protocol):
    """A draft as a learner sees it."""

    @property
    def adapter(self) -> Adapter: ...

    def logits(
        self,
        tokens: Tensor,
        n: int,
        base: bool = False,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """What the draft says after each of the last n of `tokens` (rows, L), as it serves and without gradients: (rows, n, vocab).

        `training_logits` is about these n tokens themselves, each from those before it.

        Args:
            features, sources: see `training_logits`.
        """
        ...

    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None, most: int) -> tuple[float, Mapping[bool, object]]:
        """Log-likelihood per token of the last `most` of `tokens` (1, L) under the learned draft minus that under its base, and what was read."""
        ...

    def prompt_log_ratios(self, tokens: Tensor, mask: Tensor | None, most: int) -> list[float]:
        """The same of every row of `tokens` (rows, L), in one forward of each draft."""
        ...

    def training_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """What the draft says about the last n of `tokens` (rows, L), each from the tokens before it; gradients flow to the adapter.

        Args:
            mask: (rows, ≤ L) with zeros where a row is padded on the left; None: no padding.
            gates: (copies, blocks) weights of the blocks, one copy of all rows for each; None: one copy, all at 1.
            prefix: what need not be computed anew.
            base: without the adapter.
            features: (rows, m, width) the target's hidden states at the last m of the tokens but the last one; None: none are read.
            sources: of every row what its text was written from, as the draft reads it; None: nothing is known of it, or read.

        Returns:
            Logits (copies, rows, n, vocab).
        """
        ...

    def unrolled_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        steps: int = 1,
        sources: Sequence[Source | None] | None = None,
    ) -> list[Tensor]:
        """`training_logits`, and what the draft says about the same n tokens where it drafted those right before them itself.

        Args:
            steps: the first one and those of a draft head that follow: step k has gone on for k tokens without the target's hidden
                states. Drafts that read none have the first step alone, and a head no more than the tokens that it can draft.

        Returns:
            Of each step logits (copies, rows, n, vocab). The first tokens of a text are none of a later step's to say, see
            `Segment.taught`.
        """
        ...


def params_of(adapter: Adapter, parts: Mapping[str, Tensor]) -> Tensor:
    """A flat vector (parameters,) like the adapter's, from tensors by their names in files.

    Raises:
        ArtifactError: they are those of another adapter.
    """
    params = torch.empty_like(adapter.params)
    own = adapter.named(params)
    if sorted(parts) != sorted(own):
        odd = sorted(set(parts) ^ set(own))
        raise ArtifactError(
            f"The adapter and this base with these settings do not fit: {len(odd)} tensors differ, {odd[0]} for one."
        )
    for name, part in own.items():
        found = {name: parts[name].to(part.dtype)}  # a fine-tune may have saved it in half of the precision
        part.copy_(State(found).tensor(name, part))
    return params
