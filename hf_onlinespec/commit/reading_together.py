"""The rows of a round that one draft model serves are read in one forward, where it can: those of one call, and those of several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from ..govern.planner import NextInRow
from .chain import Chain, grow_chains
from .draft_model import SharedReader
from .row_model import RowModel


def grow_rows(
    chains: Sequence[Chain],
    models: Sequence[RowModel],
    pays: Callable[[Sequence[NextInRow]], bool],
    observe_prefill: Callable[[int, float, int], None] | None,
    company: bool,
) -> set[RowModel]:
    """Lets the chains of a round grow; the rows for which the draft model has drafted anything.

    Args:
        models: of all rows of the round.
        pays, observe_prefill: see `grow_chains`.
        company: whether they are of several calls.
    """
    groups = defaultdict[tuple[int, bool, int], list[Chain]](list)
    drafted = set[RowModel]()
    _join(models)
    for chain in chains:
        model = chain.model
        if model.reader.shared is None and (company or (model.joins and not model.reader.length)):
            _share(model, models, company)
        groups[id(model.model), model.base, id(model.reader.shared)].append(chain)
    for group in groups.values():
        model = group[0].model
        # Lighter than no_grad. What leaves the block is copied by cat, or read by learning without being saved.
        with model.model.serving(model.base) as served, torch.inference_mode():
            if grow_chains(group, served, pays, observe_prefill):
                drafted.update(chain.model for chain in group)
    return drafted


def _share(model: RowModel, models: Sequence[RowModel], company: bool) -> None:
    """All rows that read nothing yet and that the same model serves are read together from now on, where it can.

    Args:
        company: whether they are of several calls: then a row that was read by itself is read anew, with the others.
    """
    alike = [row for row in models if row.model is model.model and row.base == model.base]
    alone = {row.number: row for row in alike if row.reader.shared is None and (company or not row.reader.length)}
    if len(alone) == 1 and not company and not model.is_joined:
        return
    shared = model.model.shared_reader(alone)
    if shared is not None:
        for number, row in alone.items():
            row.reader = shared.row(number)


def _join(models: Sequence[RowModel]) -> None:
    """Rows that have begun in different rounds, and that the same model serves, are read together from now on."""
    first = dict[tuple[int, bool], SharedReader]()
    for model in models:
        shared = model.reader.shared
        if shared is None or not shared.begun:
            continue
        before = first.setdefault((id(model.model), model.base), shared)
        if before is not shared:
            with torch.inference_mode():
                before.join(shared)
            for other in models:
                if other.reader.shared is shared:
                    other.reader = before.row(other.number)
