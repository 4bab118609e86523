"""Processors and stopping criteria in a batch whose rows have different lengths: each row is shown what it would be shown alone.

What transformers itself has is called with all rows of one length. What comes from elsewhere may keep something from call to call:
each row gets a copy of its own, once it was tried on the prompts whether that says of a row what it says in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from .._compat.generation import known_of_row
from ..errors import UnsupportedError


@dataclass(frozen=True)
class RowCalls:
    """Processors and criteria of a batch.

    Attributes:
        shared: whether those of one row are those of all, and rows of one length may be shown to them together.
    """

    processors: tuple[LogitsProcessorList, ...]  # per row
    criteria: tuple[StoppingCriteriaList, ...]
    shared: bool

    @classmethod
    def of(cls, processors: LogitsProcessorList, criteria: StoppingCriteriaList, rows: int) -> RowCalls:
        """For so many rows. Raises UnsupportedError where one of them cannot be copied."""
        if all(known_of_row(one, 0) is one for one in (*processors, *criteria)):
            return cls((processors,) * rows, (criteria,) * rows, True)
        return cls(
            tuple(LogitsProcessorList([of_row(one, row, rows) for one in processors]) for row in range(rows)),
            tuple(StoppingCriteriaList([of_row(one, row) for one in criteria]) for row in range(rows)),
            False,
        )


def check_row_calls(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    input_ids: Tensor,
    vocabulary: int,
    with_scores: bool = False,
) -> None:
    """Refuses, before any work, what does not say of each row of the prompts (batch, L) what it says of it in the batch.

    Args:
        with_scores: whether criteria are shown the scores of the tokens.

    Raises:
        UnsupportedError: names it.
    """
    numbers = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):  # what others draw is not to change
        scores = torch.randn(len(input_ids), vocabulary, generator=numbers).to(input_ids.device)
        for processor in processors:
            if known_of_row(processor, 0) is None:
                _try(processor, input_ids, scores, lambda own: own.clone())
        for criterion in criteria:
            if known_of_row(criterion, 0) is None:
                _try(criterion, input_ids, scores, lambda own: (own.clone(),) if with_scores else None)


def _try(one: Any, input_ids: Tensor, scores: Tensor, shown: Callable[[Tensor], Any]) -> None:
    """Calls copies with all rows, and with each of them alone; `shown`: of scores (rows, vocab)."""
    name, way_out = type(one).__name__, "Call generate once per sequence, or without onlinespec."
    try:
        together = of_row(one, 0)(input_ids, shown(scores))
        alone = [of_row(one, row)(input_ids[row : row + 1], shown(scores[row : row + 1])) for row in range(len(scores))]
    except UnsupportedError:
        raise
    except Exception as error:  # what comes from elsewhere may raise anything
        raise UnsupportedError(f"{name} was tried on the rows of a batch, and raised {error!r}. {way_out}") from error
    if not isinstance(together, Tensor) or not together.ndim or len(together) != len(scores):
        raise UnsupportedError(f"{name} says one thing of the whole batch, and not of each row. {way_out}")
    same = all(isinstance(own, Tensor) and own.shape == together[:1].shape for own in alone)
    if not same or not torch.equal(torch.cat(alone).float().nan_to_num(), together.float().nan_to_num()):
        raise UnsupportedError(f"{name} says of a row alone something else than in a batch. {way_out}")


def of_row(one: Any, row: int, rows: int = 0) -> Any:
    """What is called with one row alone: itself, where it keeps nothing, else a copy; `rows`: see `known_of_row`."""
    known = known_of_row(one, row, rows)
    if known is not None:
        return known
    try:
        # A tokenizer takes longer to copy than a batch to write; whoever stops at a text has one.
        shared = {
            id(part): part for part in vars(one).values() if isinstance(part, PreTrainedTokenizerBase | nn.Module)
        }
        return copy.deepcopy(one, shared)
    except Exception as error:  # what comes from elsewhere may hold anything
        raise UnsupportedError(
            f"{type(one).__name__} cannot be copied for each row of a batch: {error!r}. Call generate once per sequence, or without "
            "onlinespec."
        ) from error
