"""Rows that leave it to the draft which adapter serves them: `adapter="auto"`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, final

import torch

from ..adapt.feedback import acceptance
from ..adapt.segment import Segment, split
from ..commit.base import Call
from ..commit.draft_model import DraftModel
from ..config import OnlineSpecConfig
from ..config.adapters import AUTO
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..runtime.failures import Failures
from ..runtime.forks import Lock


class Adapted(Protocol):
    """A draft with one adapter."""

    trainable: DraftModel


class Routes(Adapted, Protocol):
    """A draft that has adapters with names."""

    settings: OnlineSpecConfig
    governor: Governor
    failures: Failures
    lock: Lock

    @property
    def adapters(self) -> Collection[str]: ...


class Routing:
    """The adapters of a call's rows.

    Attributes:
        names: per row; None: the adapter without a name. Of a row that asked for "auto", the one that its prompt speaks for, until
            `choose`.

    Args:
        present: the drafts of the adapters with names that are in the process, for the time of a `with` block.
    """

    def __init__(
        self, draft: Routes, call: Call, present: Callable[[], AbstractContextManager[Mapping[str, Adapted]]]
    ) -> None:
        self.names = list(call.adapters or (None,) * call.rows)
        self._draft, self._router, self._present, self._learns = draft, draft.governor.names, present, call.learns
        self._favourites: dict[int, str | None] = {}  # of the rows that asked
        noted = set()  # several sequences may have one prompt
        # Once there are names, requests without any tell what these are not about.
        if call.prompts is None or not (call.adapters or draft.adapters):
            return
        for row, name in enumerate(self.names):
            source = [] if call.source is None else call.source.text(row)
            prompt = tuple(source or call.prompts[row, call.padding(row) :].tolist())
            with draft.lock:
                if name == AUTO:
                    name = self.names[row] = self._favourites[row] = self._router.favourite(
                        prompt, (None, *draft.adapters)
                    )
                if call.learns and (name, prompt) not in noted:
                    self._router.note_prompt(name, prompt)
            noted.add((name, prompt))

    @property
    def routes(self) -> bool:
        """Whether any row asked for it."""
        return bool(self._favourites)

    def choose(self, present: Collection[str]) -> None:
        """Settles the names, among the adapters that are in the process and the one without a name."""
        with self._draft.lock:
            for row, favourite in self._favourites.items():
                self.names[row] = self._router.choose(favourite, (None, *present))

    def comparison(self, rows: Sequence[int]) -> RowsCompared | None:
        """Of all adapters on some rows of the call; None: none of them asked for it."""
        asked = {i: row for i, row in enumerate(rows) if row in self._favourites}
        return RowsCompared(self, asked) if asked else None

    @torch.no_grad()
    def score(self, rows: Sequence[int], batch: Segment) -> None:
        """Holds every adapter against what the target said of rows, before it is learned: none has to serve to be known."""
        lengths, own = list(map(len, batch.teachers)), self._draft.settings.temperature
        features = None if batch.features is None else batch.features[:, :-1]
        found: list[dict[str | None, float]] = [{} for _ in rows]
        with self._present() as others:
            drafts: list[tuple[str | None, Adapted]] = [(None, self._draft), *others.items()]
            for name, draft in drafts:
                tokens = batch.tokens[:, :-1]
                logits = draft.trainable.logits(tokens, batch.n, False, batch.mask, features, batch.sources)
                accepted = acceptance(batch.teachers, logits, batch.temperature, own).tolist()
                for of_row, values in zip(found, split(accepted, lengths), strict=True):
                    of_row[name] = sum(values) / len(values)
        with self._draft.lock:
            for row, of_row in zip(rows, found, strict=True):
                self._router.observe(self._favourites[row], of_row)

    def close(self, stats: Sequence[RequestStats]) -> None:
        """The end of the call: what the rows have shown of the adapters that served them, where none was scored on them.

        Acceptance while drafting is not held beside that of whole answers: guesses take the places that are easy.
        """
        if self._learns:
            return
        least = self._draft.governor.constants.min_positions
        with self._draft.failures.records.attempt(), self._draft.lock:
            for row, favourite in self._favourites.items():
                seen = stats[row]
                if seen.positions >= least:
                    self._router.observe(favourite, {self.names[row]: seen.acceptance / seen.positions})


@final
class RowsCompared:
    """A comparison of all adapters on rows of a call; asked: of these, by how a schedule counts them."""

    def __init__(self, routing: Routing, asked: Mapping[int, int]) -> None:
        self._routing, self._asked = routing, asked

    @property
    def rows(self) -> Collection[int]:
        return self._asked.keys()

    def score(self, rows: Sequence[int], batch: Segment) -> None:
        """See `Comparison`."""
        self._routing.score([self._asked[i] for i in rows], batch)
