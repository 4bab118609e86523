"""Positions per row for decoders that count them themselves, by the length of their cache: BART, Marian, M2M100 and their like.

Rows of a batch that have accepted different numbers of tokens are at different positions, which such a forward does not take. It runs
through a second module tree over the target's own weights, in which the embedding of positions is asked row by row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.borrow import copy_modules

COUNTED = ("cache_length", "past_key_values_length")  # what an embedding of positions calls the tokens before its own


class RowPositions(nn.Module):
    """An embedding of positions whose rows begin at different ones.

    Args:
        embedding: of the target; its forward is told how many tokens are in the cache.
        counted: the name of that argument.
        padding: the token that it may pass over; behind it a forward of plain decoding would begin anew. None: there is none.
    """

    def __init__(self, embedding: nn.Module, counted: str, padding: int | None) -> None:
        super().__init__()
        self.embedding, self._counted, self._padding = embedding, counted, padding
        self._signature = inspect.signature(embedding.forward)
        self._starts: tuple[int, ...] = ()

    def begin(self, starts: Sequence[int]) -> None:
        """Before a forward: per row, the tokens in front of those that it is fed with."""
        self._starts = tuple(starts)

    def has_padding(self, tokens: Tensor) -> bool:
        """Whether there is a token among these (batch, n) that may be passed over."""
        return self._padding is not None and bool((tokens == self._padding).any().item())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, fed, width)"""
        given = self._signature.bind(*args, **kwargs).arguments
        before = given.get(self._counted, 0)
        rows = []
        for row, start in enumerate(self._starts):
            own = {name: _of_row(value, row, len(self._starts)) for name, value in given.items()}
            own[self._counted] = start
            if own.get("position_ids") is not None:
                own["position_ids"] = given["position_ids"] - before + start
            rows.append(self._of_row(own))
        return torch.cat(rows)

    def _of_row(self, given: dict[str, Any]) -> Tensor:
        """(1, fed, width) of one row; behind a prompt token by token where there is padding among them."""
        tokens = given.get("input_ids")
        start = given[self._counted]
        if not start or not isinstance(tokens, Tensor) or not self.has_padding(tokens):
            found = self.embedding(**given)
            return found if found.dim() == 3 else found[None]
        parts = []
        for i in range(tokens.shape[1]):
            own = {name: value[:, i : i + 1] if _has_columns(value, tokens) else value for name, value in given.items()}
            own[self._counted] = start + i
            if given.get("position_ids") is not None:
                own["position_ids"] = given["position_ids"][..., i : i + 1]
            parts.append(self.embedding(**own))
        return torch.cat([part if part.dim() == 3 else part[None] for part in parts], dim=1)


def _of_row(value: Any, row: int, rows: int) -> Any:
    """What of an argument concerns one row: of tokens and embeddings (batch, …) themselves, or of their shape."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.dim() > 1 and len(value) == rows else value
    return type(value)((1, *value[1:])) if isinstance(value, torch.Size | tuple) else value


def _has_columns(value: Any, tokens: Tensor) -> bool:
    """Whether an argument has a column for each of the tokens (1, n), as their embeddings have."""
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == tokens.shape


def counted_positions(target: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The embedding of positions of an encoder–decoder's decoder that counts its cache, and what it calls that; None: there is none."""
    if not target.config.is_encoder_decoder:
        return None
    for module in target.get_decoder().modules():
        name = next((name for name in COUNTED if name in inspect.signature(module.forward).parameters), None)
        if name is not None:
            return module, name
    return None


def with_row_positions(target: PreTrainedModel) -> tuple[PreTrainedModel, RowPositions | None]:
    """The target, through modules of its own where its decoder counts positions; then with what is told where rows begin."""
    found = counted_positions(target)
    if found is None:
        return target, None
    module, name = found
    positions = RowPositions(module, name, target.config.get_text_config().pad_token_id).eval()
    return copy_modules(target, {id(module): positions}), positions
