"""Several rows of a call, read by a draft head in one forward.

Each row has read the target's features as far as they are known, and its own drafted tokens behind them, which are taken back in
every round: see `HeadReader`, which reads one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..adapt.trainable import Prefix
from ..heads.layer import positions_of, seen_keys
from .draft_model import KnownRow, Reader, SharedReader
from .row_cache import RowCache
from .row_features import RowFeatures


class HeadOfRows(Protocol):
    """A draft head, as far as reading needs it."""

    positions: int
    most: int | None

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def device(self) -> torch.device: ...

    def of_all_ids(self, logits: Tensor) -> Tensor: ...


class _Row:
    """What was read of one row."""

    def __init__(self, known: KnownRow) -> None:
        assert known.features is not None
        self.known, self.features = known, known.features
        self.first = self.end = self.features.start  # of the tokens whose features were read
        self.drafted: list[int] = []  # the places of drafted tokens behind them
        self.steps = 0  # drafted tokens
        self.said: tuple[Tensor, Tensor] | None = None  # logits (1, ids) and (1, 1, width) of the last token
        self.kept: tuple[Tensor, Tensor] | None = None  # the same, of the last one whose features were read

    @property
    def length(self) -> int:
        return self.end + 1 if self.end > self.first else 0

    def unread(self, prefix: Tensor | None) -> int:
        """Features that the head may read on with: each goes with the token behind it."""
        return 0 if prefix is None else max(0, min(self.features.end, prefix.shape[1] - 1) - self.end)


@final
class HeadRows(SharedReader):
    """The KV cache of a draft head in several rows; rows: by their number in the call."""

    def __init__(self, model: HeadOfRows, rows: Mapping[int, KnownRow]) -> None:
        self._model, self._rows = model, {i: _Row(known) for i, known in rows.items()}
        self._left = dict[int, int]()  # rows that are read no further, and how far they were
        self._cache = RowCache(model.config, list(rows), model.positions)
        # Drafted tokens are in the cache of a head that drafts any number of them; Hydra's see each other as one wider row.
        self._keeps_drafted = model.most is None

    @property
    def size(self) -> int:
        return len(self._rows)

    @property
    def begun(self) -> bool:
        return any(row.length for row in self._rows.values())

    def row(self, i: int) -> Reader:
        return _RowReader(self, i)

    def of(self, i: int) -> _Row:
        return self._rows[i]

    def length(self, i: int) -> int:
        """Tokens of a row that need not be read again; of one that has left, when it left."""
        return self._left[i] if i in self._left else self._rows[i].length

    def scores(self, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        """See `SharedReader`. Features of other rows are read in the same forward, as far as that makes it no wider."""
        prefixes = {i: prefix.to(self._model.device) for i, prefix in prefixes.items()}
        self._cache.settle()
        self._begin_anew()
        self._read_features(served, prefixes)
        while behind := [i for i, prefix in prefixes.items() if self._next(i) < prefix.shape[1]]:
            tokens = {i: prefixes[i][:, self._next(i) : self._next(i) + 1] for i in behind}
            if self._keeps_drafted:
                self._draft(served, tokens)
            else:
                self._draft_beside(served, tokens)
        said = [self._rows[i].said for i in prefixes]
        return self._model.of_all_ids(torch.cat([one[0] for one in said if one is not None]))

    def _next(self, i: int) -> int:
        """The first token of a row that was not read."""
        return self._rows[i].end + 1 + self._rows[i].steps

    def _begin_anew(self) -> None:
        """Rows of which features between those that were read and those that are held are not held any more."""
        for i, row in self._rows.items():
            if row.end < row.features.start:
                if self._cache.places:
                    self._cache.reject(i, self._cache.kept(i))
                self._rows[i] = _Row(row.known)
        self._cache.settle()

    def _read_features(self, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> None:
        n, order = max(self._rows[i].unread(prefix) for i, prefix in prefixes.items()), self._cache.order
        if not n:
            return
        known = {i: prefixes.get(i, self._rows[i].known.tokens) for i in order}
        read = {i: min(n, self._rows[i].unread(prefix)) for i, prefix in known.items()}
        tokens, features = dict[int, Tensor](), dict[int, Tensor]()
        for i, prefix in known.items():
            row, m = self._rows[i], read[i]
            if m and prefix is not None:
                tokens[i] = F.pad(prefix[:, row.end + 1 : row.end + 1 + m], (n - m, 0))
                features[i] = F.pad(row.features.rows(row.end, row.end + m), (0, 0, n - m, 0))
        columns = torch.tensor([[0] * (n - read[i]) + [1] * read[i] for i in order])
        said = self._forward(served, _of_all(tokens, order), columns, features=_of_all(features, order))
        for i in tokens:
            row = self._rows[i]
            row.end += read[i]
            row.said = row.kept = self._of_row(said, i)

    def _draft(self, served: PreTrainedModel, tokens: Mapping[int, Tensor]) -> None:
        """One more token (1, 1) of some rows; the others read nothing."""
        hidden = {i: said[1] for i in tokens if (said := self._rows[i].said) is not None}
        place, order = self._cache.places, self._cache.order
        columns = torch.tensor([[int(i in tokens)] for i in order])
        said = self._forward(served, _of_all(tokens, order), columns, hidden=_of_all(hidden, order))
        for i in tokens:
            row = self._rows[i]
            row.said, row.steps = self._of_row(said, i), row.steps + 1
            row.drafted.append(place)

    def _draft_beside(self, served: PreTrainedModel, tokens: Mapping[int, Tensor]) -> None:
        """The same without the cache: rows that have drafted as many tokens are read together."""
        groups = defaultdict[int, list[int]](list)
        for i in tokens:
            groups[self._rows[i].steps].append(i)
        for group in groups.values():
            hidden = [said[1] for i in group if (said := self._rows[i].said) is not None]
            out = served(tokens=torch.cat([tokens[i] for i in group]), hidden=torch.cat(hidden), logits_to_keep=1)
            for at, i in enumerate(group):
                row = self._rows[i]
                row.said = out.logits[at : at + 1, -1], out.hidden[at : at + 1, -1:]
                row.steps += 1

    def _forward(
        self, served: PreTrainedModel, tokens: Tensor, columns: Tensor, **read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (batch, ids) and (batch, 1, width) of the last one of n new places, of which the columns (batch, n) are seen."""
        cache, n = self._cache, columns.shape[1]
        seen, device = torch.cat([cache.seen, columns], dim=1), self._model.device
        before = int(cache.past.get_seq_length())
        out = served(
            tokens=tokens,
            **read,
            # Said here, on the host: the head would ask the device.
            attention_mask=seen_keys(seen, n, cache.places, seen.device).to(device),
            position_ids=positions_of(seen, n, cache.places, seen.device).to(device),
            past_key_values=cache.past,
            use_cache=True,
            logits_to_keep=1,
        )
        if int(cache.past.get_seq_length()) > before:  # Hydra's without a prefix layer keep nothing
            cache.seen = seen
        return out.logits[:, -1], out.hidden[:, -1:]

    def _of_row(self, said: tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
        logits, hidden = said
        return self._cache.of_row(i, logits), self._cache.of_row(i, hidden)

    def rewind(self, i: int) -> None:
        """Rolls a row back to what was read of true features."""
        row = self._rows[i]
        self._cache.reject(i, row.drafted)
        row.drafted, row.steps, row.said = [], 0, row.kept

    def leave(self, i: int) -> None:
        """A row that has ended is read no further."""
        self._left[i] = self._rows.pop(i).length
        self._cache.leave(i)

    def join(self, others: SharedReader) -> None:
        """See `SharedReader`. Between two rounds, when nothing drafted is kept."""
        assert isinstance(others, HeadRows)
        self._cache.join(others._cache)
        self._rows |= others._rows
        self._left |= others._left


def _of_all(own: Mapping[int, Tensor], order: Sequence[int]) -> Tensor:
    """(batch, …) of what some of the rows have, each (1, …), and of nothing in the others."""
    nothing = torch.zeros_like(next(iter(own.values())))
    return torch.cat([own.get(i, nothing) for i in order])


@final
class _RowReader(Reader):
    """One of the rows that are read together. Their candidates are chains."""

    def __init__(self, batch: HeadRows, row: int) -> None:
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
        known: RowFeatures = self._batch.of(self._row).features
        return known.end == length - 1 and known.end > known.start

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        return self._batch.scores(served, {self._row: prefix})

    def rewind(self, length: int, same: int | None = None) -> None:
        self._batch.rewind(self._row)

    def leave(self) -> None:
        self._batch.leave(self._row)

    def prefix(self, most: int) -> Prefix | None:
        """See `Reader.prefix`. A head is one layer: what learning needs of the row is read anew."""
        return None
