"""What a trial shows while it runs, on stderr: a bar on a terminal, a line per prompt elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..bench import by_arm, totals
from .budget import Budget
from .trial import Outcome


def speeds(outcome: Outcome) -> str:
    """Tokens/s of each arm so far, in one line."""
    arms = by_arm(outcome.records)
    return ", ".join(f"{arm} {totals(own).tokens_per_s:.1f}" for arm, own in arms.items())


def time_left(budget: Budget) -> str:
    left = max(0, round(budget.left_s))
    return f"{left // 60}:{left % 60:02d} left"


@contextmanager
def progress(budget: Budget, console: Console | None = None) -> Iterator[Callable[[str, Outcome], None]]:
    """Gives a function that is told what is done now ("" for no change) and what is known.

    The bar is drawn between two measured calls alone: a thread that redraws it would take time from them.
    """
    console = Console(stderr=True, highlight=False) if console is None else console
    if not console.is_terminal:
        yield _Lines(budget)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[left]}  {task.fields[speeds]}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("loading", total=budget.total_s, left="", speeds="")

        def show(phase: str, outcome: Outcome) -> None:
            if phase:
                bar.update(task, description=phase)
            found = speeds(outcome)
            bar.update(
                task,
                completed=min(budget.elapsed_s, budget.total_s),
                left=time_left(budget),
                speeds=f"tokens/s: {found}" if found else "",
                refresh=True,
            )

        bar.refresh()
        yield show


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
