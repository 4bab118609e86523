"""Several rows of a call, read by a causal language model in one forward.

Each row has read as many tokens of its own as it has, drafted ones included, and keeps of them what the target keeps. What a row
lacks in the one cache is a hole: rejected tokens, padding, and whatever other rows read while it read nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from .._compat.attention import has_sinks, takes_positions, tree_obstacle
from .._compat.caches import CACHE, cache_tensors
from ..adapt.trainable import Prefix
from .draft_model import KnownRow, Reader, SharedReader
from .draft_trees import MOST_OFF
from .row_cache import RowCache
from .row_features import RowFeatures


@final
class BatchReader(SharedReader):
    """The KV cache of a causal language model in several rows, each with its own holes.

    Args:
        positions: of the model, and with them the places that its cache should have at most.
        inputs: of every forward.
        rows: by their number in the call.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device,
        positions: int,
        inputs: Mapping[str, int],
        rows: Mapping[int, KnownRow],
    ) -> None:
        self._config, self._device, self._positions, self._inputs = config, device, positions, inputs
        self._padding = {i: row.padding for i, row in rows.items()}
        self._rows = dict(rows)
        self._cache = RowCache(config, list(rows), positions)
        # Tokens that were read, padding included; what all rows have as padding is not read.
        self._lengths = dict.fromkeys(rows, min(row.padding for row in rows.values()))
        # Per row, of the tokens that were read since it was rolled back: which one, and its place.
        self._latest: dict[int, list[tuple[int, int]]] = {row: [] for row in rows}

    @property
    def size(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Reader:
        """What it has read of one row."""
        return _RowReader(self, i)

    @property
    def begun(self) -> bool:
        return bool(self._cache.places)

    def length(self, i: int) -> int:
        """Tokens of a row that need not be read again."""
        return self._lengths[i] if self.begun else 0

    def scores(self, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        """See `SharedReader`. Other rows read on in the same forward, as far as that makes it no wider: it costs nothing."""
        cache = self._cache
        cache.settle()
        for row, prefix in prefixes.items():  # one of padding alone has something to be read too
            self._lengths[row] = min(self._lengths[row], prefix.shape[1] - 1)
        n = max(prefix.shape[1] - self._lengths[row] for row, prefix in prefixes.items())
        feeds = [self._feed(row, prefixes.get(row), n) for row in cache.order]
        cached = cache.places
        positions, kept = [], []
        for row, feed in zip(cache.order, feeds, strict=True):
            m, start, padding = feed.shape[1], self._lengths[row], self._rows[row].padding
            first = cached + n - m  # rows end together
            read = range(start, start + m)
            positions.append([0] * (n - m) + [max(0, at - padding) for at in read])
            kept.append([0] * (n - m) + [int(at >= padding) for at in read])
            self._latest[row] += [(at, first + i) for i, at in enumerate(read)]
        seen = torch.cat([cache.seen, torch.tensor(kept)], dim=1)
        logits: Tensor = served(
            input_ids=torch.cat([F.pad(feed, (n - feed.shape[1], 0)) for feed in feeds]),
            attention_mask=seen.to(self._device),
            position_ids=torch.tensor(positions, device=self._device),
            **{CACHE: cache.past},
            use_cache=True,
            **self._inputs,
        ).logits[:, -1]
        cache.seen = seen
        for row, feed in zip(cache.order, feeds, strict=True):
            self._lengths[row] += feed.shape[1]
        said = [cache.order.index(row) for row in prefixes]
        return logits if said == list(range(len(logits))) else logits[said]

    def _feed(self, row: int, prefix: Tensor | None, n: int) -> Tensor:
        """(1, ≤ n) of a row, what it reads next."""
        start = self._lengths[row]
        if prefix is not None:
            return prefix[:, start:].to(self._device)
        known = self._rows[row].tokens
        assert known is not None
        return known[:, start : min(start + n, self._positions)]

    def rewind(self, i: int, length: int) -> None:
        """Rolls a row back, see `Reader.rewind`."""
        keep = min(self._lengths[i], length - 1)
        self._cache.reject(i, [place for token, place in self._latest[i] if token >= keep])
        self._lengths[i], self._latest[i] = keep, []

    def leave(self, i: int) -> None:
        """A row that has ended is read no further."""
        del self._rows[i]
        self._cache.leave(i)

    def join(self, others: SharedReader) -> None:
        """See `SharedReader`. What was rejected of either leaves its cache first."""
        assert isinstance(others, BatchReader)
        for one in (self, others):
            one._cache.settle()
        places = max(self._cache.places, others._cache.places)
        for one in (self, others):
            more = places - one._cache.places
            one._latest = {i: [(token, at + more) for token, at in read] for i, read in one._latest.items()}
        self._cache.join(others._cache)
        self._rows |= others._rows
        self._lengths |= others._lengths
        self._latest |= others._latest
        self._padding |= others._padding

    def prefix(self, i: int, most: int) -> Prefix | None:
        """See `Reader.prefix`: the row's own places of the cache, one beside the other, behind its padding."""
        if i not in self._cache.order or not self.begun:
            return None
        at, places, padding = self._cache.order.index(i), self._cache.kept(i), self._padding[i]
        kept = torch.tensor(places[: max(0, most - padding)], device=self._device)
        if not len(kept):
            return None
        past = DynamicCache(config=self._config)
        for layer, states in enumerate(cache_tensors(self._cache.past)):
            keys, values = (
                F.pad(one[at : at + 1].index_select(2, kept.to(one.device)), (0, 0, padding, 0)) for one in states
            )
            past.update(keys, values, layer)
        return Prefix(past, padding + len(kept))


@final
class _RowReader(Reader):
    """One of the rows that are read together."""

    def __init__(self, batch: BatchReader, row: int) -> None:
        self._batch, self._row = batch, row

    @property
    def shared(self) -> SharedReader:
        return self._batch

    @property
    def source(self) -> None:
        return None

    @property
    def length(self) -> int:
        return self._batch.length(self._row)

    def can_draft(self, length: int) -> bool:
        return True

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        return self._batch.scores(served, {self._row: prefix})

    def rewind(self, length: int, same: int | None = None) -> None:
        self._batch.rewind(self._row, length if same is None else min(length, same + 1))

    def leave(self) -> None:
        self._batch.leave(self._row)

    def prefix(self, most: int) -> Prefix | None:
        return self._batch.prefix(self._row, most)


@dataclass
class _TriedRow:
    tokens: Tensor | None
    padding: int = 0
    features: RowFeatures | None = None


@torch.no_grad()
def reads_rows(model: PreTrainedModel, inputs: Mapping[str, int]) -> bool:
    """Whether a model reads rows of different lengths as it reads each alone: by its configuration, then tried on two of them.

    Args:
        inputs: of every forward, for the logits of the last position.
    """
    if tree_obstacle(model.config) or has_sinks(model) or not takes_positions(model) or model.training:
        return False
    size, device = model.config.get_text_config(decoder=True).vocab_size, model.device
    tokens = [[token % size for token in row] for row in ((3, 5, 7, 11, 13, 17), (2, 9, 4, 8, 6, 12))]
    rows = {i: torch.tensor([row], device=device) for i, row in enumerate(tokens)}
    try:
        known = {i: _TriedRow(row[:, : 4 - 2 * i]) for i, row in rows.items()}
        reader = BatchReader(model.config, device, 64, inputs, known)
        reader.scores(model, {i: row[:, : 5 - 2 * i] for i, row in rows.items()})
        for i, length in ((0, 5), (1, 2)):  # of the second row a token is taken back, and another one follows
            reader.rewind(i, length)
        found = reader.scores(model, {0: rows[0], 1: torch.cat([rows[1][:, :1], rows[1][:, 2:]], dim=1)})
        whole = [rows[0], torch.cat([rows[1][:, :1], rows[1][:, 2:]], dim=1)]
        alone = torch.cat([model(input_ids=row, use_cache=False).logits[:, -1] for row in whole])
    except Exception:  # a model from elsewhere may raise anything: its rows are read one by one
        return False
    apart = (found - alone).abs().amax(dim=-1) / alone.abs().amax(dim=-1).clamp_min(1e-9)
    return bool((apart <= MOST_OFF).all())
