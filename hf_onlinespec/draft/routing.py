"""Rows that leave it to the draft which adapter serves them: `adapter="auto"`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from ..commit.base import Call
from ..config.adapters import AUTO
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..runtime.failures import Failures
from ..runtime.forks import Lock


class Routes(Protocol):
    """A draft that has adapters with names."""

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
    """

    def __init__(self, draft: Routes, call: Call) -> None:
        self.names = list(call.adapters or (None,) * call.rows)
        self._draft, self._router = draft, draft.governor.names
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

    def close(self, stats: Sequence[RequestStats]) -> None:
        """The end of the call: what the rows have shown of the adapters that were chosen for them."""
        least = self._draft.governor.constants.min_positions
        with self._draft.failures.records.attempt(), self._draft.lock:
            for row, favourite in self._favourites.items():
                seen = stats[row]
                if seen.positions >= least:
                    self._router.observe(favourite, self.names[row], seen.acceptance / seen.positions)
