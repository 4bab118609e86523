"""Padding between the tokens of prompts, as a batch has it behind the answers of an earlier turn.

A draft knows padding on the left alone: it is shown all of it there, and what the target has read of each row in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rounds import Rows


@dataclass(frozen=True)
class Gaps:
    """The prompts of a call some of which have padding between their tokens."""

    order: Tensor  # (batch, prompt) which token of a prompt is shown at each place: the padding first
    mask: Tensor  # (batch, prompt) 0 at padding, in that order
    fed_order: Tensor  # (batch, fed) the same of the tokens that the target reads first, among themselves
    first_fed: tuple[int, ...]  # per row, places before the first token of these that is no padding

    @classmethod
    def of(cls, mask: Tensor | None, read: int) -> Gaps | None:
        """None: there is padding on the left alone.

        Args:
            mask: (batch, prompt) 0 at padding; None: there is none.
            read: tokens of each prompt, the first ones, that the target has read in an earlier turn.
        """
        if mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all()):
            return None
        order, fed = mask.argsort(dim=1, stable=True), mask[:, read:]
        first_fed = mask.shape[1] - fed.sum(dim=1)
        return cls(order, mask.gather(1, order), fed.argsort(dim=1, stable=True), tuple(first_fed.tolist()))

    def shown_tokens(self, prompts: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Prompts (rows, prompt) of these rows of the call as they are shown."""
        return prompts.gather(1, self.order[list(rows)])

    def shown(self, rows: Rows) -> Rows:
        """Rows as they are shown."""
        n = self.order.shape[1]
        tokens = torch.cat([self.shown_tokens(rows.tokens[:, :n], rows.of_call), rows.tokens[:, n:]], dim=1)
        return replace(rows, tokens=tokens)

    def shown_features(self, features: Tensor, rows: tuple[int, ...], candidates: int) -> Tensor:
        """What belongs to the tokens of a round (batch, fed, width), those of the prompts in the order in which they are shown."""
        fed = features.shape[1] - candidates
        if fed == 1 or fed != self.fed_order.shape[1]:
            return features
        order = self.fed_order[list(rows)].to(features.device)[..., None].expand(-1, -1, features.shape[2])
        return torch.cat([features[:, :fed].gather(1, order), features[:, fed:]], dim=1)
