"""The processes of torch.distributed: which of them this one is, and the store that all of them reach without waiting for each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

PATIENCE = timedelta(seconds=30)  # for one answer of the store, from a thread that nobody waits for; chosen


class Store(Protocol):
    """What we use of a store of torch.distributed; values are bytes."""

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes:
        """The value; one that is not there is waited for."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are there, told at once."""
        ...

    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Process:
    """One of several processes."""

    rank: int
    count: int  # of all of them
    store: Store
    numbers: Iterator[int]  # of what it publishes: what begins as the n-th has the same number in all of them


_numbers = itertools.count()


def has_others() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def this_process() -> Process | None:
    """Which of several processes this one is; None: there is but one, or none has called `init_process_group`."""
    if not has_others():
        return None
    distributed = torch.distributed
    store = distributed.distributed_c10d._get_default_store()
    return Process(distributed.get_rank(), distributed.get_world_size(), _own_connection(store), _numbers)


def _own_connection(store: Any) -> Any:
    """A connection of its own to the same store: nobody else of this process waits for what it sends. Torch has it since 2.8."""
    if "clone" not in vars(torch.distributed.Store):
        return store
    own = store.clone()
    own.set_timeout(PATIENCE)
    return own
