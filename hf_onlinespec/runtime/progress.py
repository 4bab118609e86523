"""Progress bars: transformers' own tqdm, which `transformers.utils.logging.disable_progress_bar()` switches off.

A bar shows itself only where something takes longer than `DELAY_S`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from transformers.utils import logging

T = TypeVar("T")
DELAY_S = 2.0  # what is done sooner needs no bar


class Bar(Protocol):
    """What is told of every step that is done."""

    def update(self, n: int = 1) -> object: ...


class NoBar:
    """Where nobody looks."""

    def update(self, n: int = 1) -> None:
        pass


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Bar]:
    """A bar for `total` steps; None: nobody knows how many."""
    with logging.tqdm(total=total, desc=what, unit=f" {unit}", delay=DELAY_S, leave=False) as bar:
        yield bar


def each(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """The items, with a bar over them."""
    with progress(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()
