"""What a trial shows while it runs, on stderr: a bar on a terminal, a line per prompt elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from .budget import Budget
from .records import by_arm, totals
from .trial import Outcome


def speeds(outcome: Outcome) -> str:
    """Tokens/s of each arm so far, in one line."""
    arms = by_arm(outcome.records)
    return ", ".join(f"{arm.removeprefix('prompt ')} {totals(own).tokens_per_s:.1f}" for arm, own in arms.items())


def time_left(budget: Budget) -> str:
    left = max(0, round(budget.left_s))
    return f"{left // 60}:{left % 60:02d} left"


@contextmanager
def progress(budget: Budget, console: Console | None = None) -> Iterator[Callable[[str, Outcome], None]]:
    """Gives a function that is told what is done now ("" for no change) and what is known.

    The bar is drawn between two measured calls alone: a thread that redraws it would take time from them.
    """
    console = Console(stderr=True, highlight=False) if console is None else console
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(budget)
        return
    bar = Progress(
        TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.fields[left]}"), auto_refresh=False
    )
    task = bar.add_task("loading", total=budget.total_s, left="")
    try:
        with Live(bar, console=console, auto_refresh=False, transient=True) as screen:

            def show(phase: str, outcome: Outcome) -> None:
                done = min(budget.elapsed_s, budget.total_s)
                bar.update(task, description=phase or None, completed=done, left=time_left(budget))
                found = speeds(outcome)
                line = Text(f"tokens/s: {found}" if found else "", no_wrap=True, overflow="ellipsis")
                screen.update(Group(bar, line), refresh=True)

            yield show
    finally:  # a Ctrl-C while it was being drawn for the first time leaves it hidden
        console.show_cursor()


class _Lines:
    """One line for each thing that is begun or finished."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __call__(self, phase: str, outcome: Outcome) -> None:
        if not phase:
            return
        found = speeds(outcome)
        words = f"; tokens/s: {found}" if found else ""
        print(f"{phase}, {time_left(self._budget)}{words}", file=sys.stderr, flush=True)
