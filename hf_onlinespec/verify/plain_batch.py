"""What transformers' own loop decodes: what was written is counted and remembered nevertheless."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .._compat.generation import Generated, sample
from ..commit.base import Call, Draft
from ..govern.acceptance import RequestStats
from ..rounds import Rows


def decode_plainly(
    target: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    model_kwargs: dict[str, Any],
    draft: Draft,
    call: Call,
) -> Generated | Tensor:
    """Generates rows without drafting; arguments and result are those of transformers' decoding methods."""
    started = time.perf_counter()
    with draft.generating():
        output = sample(target, input_ids, processors, criteria, call.config, **model_kwargs)
        seconds = time.perf_counter() - started
        with draft.failures.records.attempt():
            tokens = output if isinstance(output, Tensor) else output.sequences
            _note(_written(tokens, input_ids.shape[1], call), input_ids.shape[1], seconds, draft, call)
    return output


def _note(rows: Rows, prompt: int, seconds: float, draft: Draft, call: Call) -> None:
    """Counts what was written, and gives it to the memory."""
    rows = call.shown(rows)
    counts = call.counts
    counts.rounds = counts.plain_rounds = counts.new_tokens = sum(rows.lengths) - len(rows.lengths) * prompt
    counts.wall_time_s = counts.target_time_s = seconds
    if call.learns:
        sources = draft.guess_sources(call)
        for i in rows.of_call:
            sources.row(i, rows.row(i), RequestStats())
        with sources.attempt(), draft.lock:
            draft.metrics.memory_bytes = sources.commit(rows)
    with draft.lock:
        draft.metrics.close(counts)
    draft.report(counts)


def _written(tokens: Tensor, prompt: int, call: Call) -> Rows:
    """Rows (batch, L) without what pads them behind a token that ends them."""
    ends = torch.isin(
        tokens[:, prompt:], torch.tensor(sorted(call.end_tokens), device=tokens.device, dtype=tokens.dtype)
    )
    lengths = []
    for row in ends.tolist():
        lengths.append(prompt + (row.index(True) + 1 if True in row else len(row)))
    return Rows(tokens, tuple(lengths))
