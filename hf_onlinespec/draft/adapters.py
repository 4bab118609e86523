"""The adapters of a draft that have names: made when they are first asked for, and on the disk while others are in use.

Each is a draft of its own on the same base weights, with its own experts, replay, guard and counters. Suffix memory, recycled
tokens, the governor's times and the lock are those of the draft. So learning of one cannot move another.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safetensors import SafetensorError

from ..adapt.idle import IdleLearning
from ..adapt.service import LearningService
from ..commit.draft_model import DraftModel
from ..errors import ArtifactError
from ..metrics import DraftMetrics
from ..metrics.summary import counted, size
from ..runtime.forks import Lock
from ..share.state_file import read_state, write_state
from ..state import State

logger = logging.getLogger(__name__)


class Adapted(Protocol):
    """A draft with one adapter, which may be away."""

    trainable: DraftModel
    learning: LearningService
    idle: IdleLearning
    metrics: DraftMetrics

    @property
    def steps(self) -> int: ...

    def state(self) -> State: ...

    def put_away(self) -> None:
        """Lets go of the adapter, whose state is kept elsewhere; what it remembers of requests stays."""
        ...

    def take_back(self, state: State) -> None:
        """The inverse of `put_away`. Raises ArtifactError."""
        ...

    def begin_adapter(self) -> None:
        """A new adapter on the base's weights."""
        ...


D = TypeVar("D", bound=Adapted)


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter with a name has done.

    A row of a batch takes its share of a round's time; what learning took is that of this adapter alone.
    """

    steps: int  # gradient steps that it has taken
    nbytes: int  # that it takes in the process now
    resident: bool  # whether it is there; else its tensors are on the disk
    metrics: DraftMetrics  # of the rows that it served

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward of its rows."""
        return self.metrics.acceptance_length

    def __str__(self) -> str:
        place = "" if self.resident else ", the rest on disk"
        served = f"{counted(self.metrics.requests, 'request')}, {self.acceptance_length:.2f} tokens per target forward"
        return f"{counted(self.steps, 'gradient step')}, {served}, {size(self.nbytes)}{place}"


@dataclass(eq=False)
class _Adapter(Generic[D]):
    """One of them, wherever it is."""

    draft: D
    used: int = 0  # when it was last asked for
    file: Path | None = None  # where its state lies; None: it is in the process
    steps: int = 0  # of one that is away


@dataclass(eq=False)
class Lease(Generic[D]):
    """The adapters that one call uses, by name: none of them leaves the process before it has ended."""

    drafts: dict[str, D] = field(default_factory=dict)

    def keep(self, names: Collection[str | None]) -> None:
        """The others may leave."""
        self.drafts = {name: draft for name, draft in self.drafts.items() if name in names}

    def end(self) -> None:
        """They may leave."""
        self.drafts = {}


class NamedAdapters(Mapping[str, AdapterSummary], Generic[D]):
    """The adapters of a draft that have names, as numbers; safe with several threads.

    Args:
        make: a bound method, kept weakly, that makes a draft with a new adapter.
        most: that are in the process at once. Of the others, those that were not asked for for longest are put on the disk, unless a
            call uses them or they have something to learn; a batch may have more names than that.
    """

    def __init__(self, make: Callable[[], D], most: int) -> None:
        self._make, self._most = weakref.WeakMethod(make), most
        self._adapters: dict[str, _Adapter[D]] = {}
        self._leases = weakref.WeakSet[Lease[D]]()  # what is forgotten has ended
        self._files, self._clock = _Files(), itertools.count(1)
        self._lock = Lock(order=-1)

    def __getitem__(self, name: str) -> AdapterSummary:
        with self._lock:
            found = self._adapters[name]
            resident = found.file is None
            steps = found.draft.steps if resident else found.steps
            return AdapterSummary(steps, found.draft.learning.nbytes, resident, found.draft.metrics)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._adapters))

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__} ({len(self)})", *(f"  {name}: {self[name]}" for name in self)])

    def file(self, name: str) -> Path | None:
        """Where the state of one that is away lies; None: it is in the process."""
        return self._adapters[name].file

    @property
    def nbytes(self) -> int:
        """Bytes that all of them take in the process."""
        with self._lock:
            return sum(adapter.draft.learning.nbytes for adapter in self._adapters.values())

    def lease(self, names: Iterable[str], present: bool = False) -> Lease[D]:
        """These adapters, made or read where they are not there, for as long as a call uses them.

        Args:
            present: also all others that are in the process.
        """
        lease, wanted = Lease[D](), list(dict.fromkeys(names))
        with self._lock:
            self._make_room(wanted)
            if present:
                lease.drafts |= {name: one.draft for name, one in self._adapters.items() if one.file is None}
            for name in wanted:
                lease.drafts[name] = self._present(name)
            self._leases.add(lease)
        return lease

    @contextmanager
    def using(self, name: str) -> Iterator[D]:
        """One of them, for the time of a `with` block."""
        lease = self.lease([name])
        try:
            yield lease.drafts[name]
        finally:
            lease.end()

    @contextmanager
    def present(self) -> Iterator[Mapping[str, D]]:
        """Those that are in the process, for the time of a `with` block."""
        lease = self.lease([], present=True)
        try:
            yield lease.drafts
        finally:
            lease.end()

    def _present(self, name: str) -> D:
        found = self._adapters.get(name)
        if found is None:
            make = self._make()
            assert make is not None  # whoever asks holds the draft
            found = self._adapters[name] = _Adapter(make())
        elif found.file is not None:
            self._read(name, found, found.file)
        found.used = next(self._clock)
        return found.draft

    def _read(self, name: str, adapter: _Adapter[D], file: Path) -> None:
        try:
            adapter.draft.take_back(read_state(file))
        except (ArtifactError, OSError) as error:
            logger.warning("The adapter %r cannot be read again (%s): it begins anew.", name, error)
            adapter.draft.begin_adapter()
        adapter.file = None
        file.unlink(missing_ok=True)

    def _make_room(self, wanted: list[str]) -> None:
        """Puts adapters away until those that are wanted fit, as far as that is possible."""
        used = {name for lease in self._leases for name in lease.drafts} | set(wanted)
        present = [name for name, adapter in self._adapters.items() if adapter.file is None]
        excess = len(set(present) | set(wanted)) - self._most
        idle = [name for name in present if name not in used and not self._adapters[name].draft.idle.busy]
        for name in sorted(idle, key=lambda one: self._adapters[one].used)[: max(0, excess)]:
            if not self._put_away(name, self._adapters[name]):
                return

    def _put_away(self, name: str, adapter: _Adapter[D]) -> bool:
        """Whether it could be written; else it stays."""
        try:
            file = self._files.new(name)
            write_state(adapter.draft.state(), file)
        except (OSError, SafetensorError) as error:
            logger.warning("The adapter %r stays in the memory: it cannot be written (%s).", name, error)
            return False
        adapter.steps, adapter.file = adapter.draft.steps, file
        adapter.draft.put_away()
        return True


class _Files:
    """Where the states of adapters lie that are away: a folder that this user alone reads, removed at the end."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._process, self._numbers = 0, itertools.count()

    def new(self, name: str) -> Path:
        """A file that is not there yet. Raises OSError."""
        if (
            self._folder is None or self._process != os.getpid()
        ):  # a forked process leaves its parent's files as they are
            self._folder, self._process = Path(tempfile.mkdtemp(prefix="onlinespec-adapters-")), os.getpid()
            weakref.finalize(self, _remove, self._folder, self._process)
        return self._folder / f"{name}-{next(self._numbers)}.safetensors"


def _remove(folder: Path, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
