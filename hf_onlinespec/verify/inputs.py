"""How a target's forward calls its inputs, and which of them have a column for each token that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._compat.caches import CACHE
from .._compat.generation import VECTORS
from ..models.source import Source


@dataclass(frozen=True)
class InputNames:
    """What a target's inputs are called."""

    tokens: str  # those that are read and written
    mask: str  # (batch, L) over them, 0 at padding
    positions: str  # (batch, L) of them, or (kinds, batch, L), as those of time, height and width
    # Inputs with a column for each token. How they go on behind their last column: with ones, by counting, by repeating it, with zeros.
    columns: Mapping[str, str]
    source: tuple[
        str, ...
    ]  # with a row for each sequence: what an encoder has made of its source, and the mask over it
    # With these alone a request is text: a round may draft behind the prompt while it is read.
    text: frozenset[str]

    @classmethod
    def of(cls, target: PreTrainedModel) -> InputNames:
        return ENCODER_DECODER if target.config.is_encoder_decoder else DECODER

    def of_rows(self, inputs: Mapping[str, Any], rows: list[int], one: bool = False) -> dict[str, Any]:
        """The inputs of some rows of a batch, in this order; what is one for all rows stays as it is.

        Args:
            one: whether the batch has one row: then it is repeated.
        """
        index = torch.tensor(rows)
        by_row = {*self.columns, *self.source}
        return {
            name: _rows(value, index, one, -2 if name == self.positions else 0) if name in by_row else value
            for name, value in inputs.items()
        }

    def joined(self, inputs: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of some rows of a call, then those of others, whose source is padded to the same length."""
        return {name: _joined(value, others[name]) if name in self.source else value for name, value in inputs.items()}

    def continued(self, name: str, values: Tensor, length: int) -> Tensor:
        """The values (..., n) of one of `columns`, continued to this length where they are shorter."""
        missing, how = length - values.shape[-1], self.columns[name]
        if missing <= 0:
            return values
        shape = (*values.shape[:-1], missing)
        if how == "count":
            more = values[..., -1:] + torch.arange(1, missing + 1, device=values.device)
        elif how == "repeat":
            more = values[..., -1:].expand(shape)
        else:
            more = values.new_ones(shape) if how == "ones" else values.new_zeros(shape)
        return torch.cat([values, more], dim=-1)


def given(inputs: Mapping[str, Any]) -> set[str]:
    """Names of the inputs that hold anything. With text alone, a model that reads pictures is handed a dict without any (5.24)."""
    return {name for name, value in inputs.items() if value is not None and not (isinstance(value, dict) and not value)}


_COLUMNS = {
    "attention_mask": "ones",
    "position_ids": "count",
    "token_type_ids": "repeat",
    "mm_token_type_ids": "zeros",
    "moe_mm_token_type_ids": "repeat",
}
_BESIDE = {CACHE, "use_cache", "logits_to_keep"}
DECODER = InputNames("input_ids", "attention_mask", "position_ids", _COLUMNS, (), frozenset({*_COLUMNS, *_BESIDE}))
_DECODER_COLUMNS = {"decoder_attention_mask": "ones", "decoder_position_ids": "count"}
_SOURCE = ("encoder_outputs", "attention_mask")
ENCODER_DECODER = InputNames(
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_position_ids",
    _DECODER_COLUMNS,
    _SOURCE,
    frozenset({*_DECODER_COLUMNS, *_BESIDE, *_SOURCE}),
)


def _joined(value: Any, other: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, other])
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _joined(one, other[name]) for name, one in value.items()})
    return tuple(map(_joined, value, other)) if isinstance(value, tuple) else value


def _rows(value: Any, index: Tensor, one: bool, dim: int) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(dim, index.to(value.device)) if one or value.shape[dim] > 1 else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _rows(part, index, one, dim) for name, part in value.items()})
    return tuple(_rows(part, index, one, dim) for part in value) if isinstance(value, tuple) else value


def source_of(
    target: PreTrainedModel, rows: int, inputs_tensor: Tensor | None, model_kwargs: Mapping[str, Any]
) -> Source | None:
    """What an encoder–decoder target has read in a call that writes so many rows; None: it has no encoder.

    Args:
        inputs_tensor: what `generate` gave to the encoder, a row for each prompt; None: it is not known.
    """
    outputs = model_kwargs.get("encoder_outputs")
    if not target.config.is_encoder_decoder or outputs is None:
        return None
    states: Tensor = outputs[0]
    # Vectors in the place of tokens are made of more than a source (a picture, a prompt that was learned): what came of them is kept.
    read = inputs_tensor if model_kwargs.get(VECTORS) is None else None
    if read is not None and len(read) < rows:  # several answers to each prompt
        read = read.repeat_interleave(rows // len(read), dim=0)
    tokens, signal = (None, read) if read is not None and read.is_floating_point() else (read, None)
    # Where encoder outputs were given in place of tokens, `generate` fills in -100.
    if tokens is not None and (tokens.dim() != 2 or bool((tokens < 0).any())):
        tokens = None
    mask = model_kwargs.get("attention_mask")
    expected = states.shape[:2] if tokens is None else tokens.shape
    return Source(tokens, mask if mask is not None and mask.shape == expected else None, states, signal)
