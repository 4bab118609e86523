"""What each of several replicas has contributed to one adapter, published in a store, and the adapter that is the sum.

    w = w_0 + Σ_j C_j        C_j ← C_j + a (w_j − c_j)  by replica j alone, after every n updates of its own

w_0 is the adapter that all begin with, c_j the common one that replica j went on from, w_j where its updates have led, and a one
over the number of replicas at work: where all publish, c becomes the mean of all w_j (local SGD, arXiv:1805.09767; DiLoCo,
arXiv:2311.08105, with an outer step of one).

Why sums of contributions, and no collective operation: an all_reduce waits for the last one. A contribution is written by its own
replica alone and replaced as a whole, so it may be read at any time, twice or late, and nobody waits; that of a replica that has died
stays. Who has read the same contributions has the same adapter, to the bit: they are added in the order of the ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from .._compat.processes import Process, Store
from ..errors import ConfigError, brief

# Bytes of one value. TCPStore cuts the connection of who sends more than 8 MiB (torch 2.13, TCPStoreLibUvBackend.cpp).
CHUNK = 4 * 2**20
# Publications of one's own, without one of another replica, after which that one is no longer at work: what is learned counts in full
# again. Chosen: one that takes four times as long still counts.
SILENCE = 4

logger = logging.getLogger(__name__)


class Board:
    """Where replicas publish: vectors by rank and version, of which the newest is read.

    Args:
        store: of torch.distributed; its values are small, and a vector is many of them.
        name: of what is published; the same in all processes.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, f"hf_onlinespec/{name}"

    def introduce(self, rank: int, identity: Mapping[str, str]) -> None:
        self._store.set(self._key(rank, "who"), json.dumps(dict(identity)).encode())

    def identity(self, rank: int) -> dict[str, str] | None:
        """What a replica has introduced itself as; None: it has not yet."""
        found = self._value(self._key(rank, "who"))
        return None if found is None else json.loads(found)

    def publish(self, rank: int, version: int, vector: Tensor) -> None:
        """A vector (parameters,) of a version that is greater than those before; the one before the last is removed.

        The last one stays: somebody may be reading it. A version is told when all of it is there.
        """
        data = vector.numpy().tobytes()
        chunks = -(-len(data) // CHUNK)
        for i in range(chunks):
            self._store.set(self._key(rank, f"{version}.{i}"), data[i * CHUNK : (i + 1) * CHUNK])
        self._store.set(self._key(rank, "version"), str(version).encode())
        for i in range(chunks) if version > 2 else ():
            self._store.delete_key(self._key(rank, f"{version - 2}.{i}"))

    def version(self, rank: int) -> int:
        """The newest that a replica has published; 0: nothing."""
        return int(self._value(self._key(rank, "version")) or 0)

    def vector(self, rank: int, version: int, like: Tensor) -> Tensor | None:
        """A vector of this version, of the size and dtype of `like`; None: it is gone, for there is a newer one."""
        chunks = -(-like.nbytes // CHUNK)
        parts = [self._value(self._key(rank, f"{version}.{i}")) for i in range(chunks)]
        data = b"".join(part for part in parts if part is not None)
        if None in parts or len(data) != like.nbytes:
            return None
        return torch.frombuffer(bytearray(data), dtype=like.dtype)

    def _key(self, rank: int, name: str) -> str:
        return f"{self._name}/{rank}/{name}"

    def _value(self, key: str) -> bytes | None:
        """None: there is none. It is not waited for."""
        return self._store.get(key) if self._store.check([key]) else None


class Contributions:
    """What the replicas have contributed, as far as this one knows.

    Not safe with several threads: whoever exchanges is alone.

    Args:
        start: w_0 (parameters,), float32 on the CPU.
        identity: what has to be the same in all replicas, by names for people.

    Attributes:
        common: w (parameters,), that this replica last went on from.
        refused: by rank, why what it publishes is not taken.

    Raises:
        ConfigError: one that is there already is another draft.
    """

    def __init__(self, process: Process, name: str, start: Tensor, identity: Mapping[str, str]) -> None:
        self.start, self.common = start, start.clone()
        self.refused: dict[int, str] = {}
        self._identity = dict(identity)
        self._rank, self._others = process.rank, [rank for rank in range(process.count) if rank != process.rank]
        self._board = Board(process.store, name)
        self._given: dict[int, Tensor] = {}  # C_j by rank
        self._settled: Tensor | None = None  # of this one, what is in `common`
        self._versions = dict.fromkeys(range(process.count), 0)
        self._silent = dict.fromkeys(self._others, 0)  # publications of our own since its last one
        # First this, then that: of two that begin together, one at least sees the other.
        self._board.introduce(process.rank, identity)
        for rank in self._others:
            difference = self._difference(rank)
            if difference:
                raise ConfigError(
                    f"Process {rank} learns another adapter than process {process.rank}: {difference}. Replicas that learn one adapter "
                    "begin with the same draft, the same settings and the same seed; of several drafts, those belong together that first "
                    "generate as the same one in their processes. average_every=None lets each learn its own."
                )

    @property
    def nbytes(self) -> int:
        own = [] if self._settled is None else [self._settled]
        return sum(vector.nbytes for vector in (self.start, self.common, *own, *self._given.values()))

    @property
    def contributors(self) -> int:
        """Other replicas of which something was taken in."""
        return len(self._given.keys() - {self._rank})

    def go_on(self, common: Tensor) -> None:
        """This replica has gone over to what `exchange` has found last."""
        self.common, self._settled = common, self._given.get(self._rank)

    def exchange(self, params: Tensor) -> Tensor:
        """Publishes where this replica is, w_j (parameters,), and reads what the others have published by now; the new w.

        Where this fails half-way, or the replica stays where it is, the next exchange takes its place. What is not finite is neither published nor taken: all replicas decide that alike, by the same numbers.
        """
        self._publish(params)
        for rank in self._others:
            self._read(rank)
        common = self.start.clone()
        for rank in sorted(self._given):
            common += self._given[rank]
        return common

    def _publish(self, params: Tensor) -> None:
        change = params - self.common
        if not bool(change.any()):
            return
        if not _is_finite(change):
            logger.warning("The adapter is not finite: it is not published to the other processes.")
            return
        active = 1 + sum(silent < SILENCE for silent in self._silent.values())
        contribution = change / active if self._settled is None else self._settled + change / active
        self._versions[self._rank] += 1  # also where this fails half-way: who has read half of it reads the next one
        self._board.publish(self._rank, self._versions[self._rank], contribution)
        self._given[self._rank] = contribution
        self._silent = {rank: silent + 1 for rank, silent in self._silent.items()}

    def _read(self, rank: int) -> None:
        version = self._board.version(rank)
        if version == self._versions[rank] or rank in self.refused:
            return
        difference = self._difference(rank)
        if difference:
            self._refuse(rank, f"it is another draft: {difference}")
            return
        vector = self._board.vector(rank, version, self.start)
        if vector is None:
            return
        self._versions[rank], self._silent[rank] = version, 0
        if _is_finite(vector):
            self._given[rank] = vector
        else:
            logger.warning("What process %d has published is not finite: it is left out.", rank)

    def _refuse(self, rank: int, reason: str) -> None:
        self.refused[rank] = reason
        self._silent[rank] = SILENCE
        logger.warning("What process %d publishes is not taken: %s.", rank, reason)

    def _difference(self, rank: int) -> str:
        """What tells a replica from this one; "": nothing, as far as it is known."""
        theirs = self._board.identity(rank)
        if theirs is None:
            return ""
        names = sorted(self._identity.keys() | theirs.keys())
        told = [
            f"{name} is {brief(theirs.get(name))} there and {brief(self._identity.get(name))} here"
            for name in names
            if theirs.get(name) != self._identity.get(name)
        ]
        return "; ".join(told)


def _is_finite(vector: Tensor) -> bool:
    return bool(torch.isfinite(vector).all())
