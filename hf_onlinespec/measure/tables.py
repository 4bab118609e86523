"""A trial's result in a terminal: tables, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .exactness import FAULT, IDENTICAL, ROUNDING
from .records import PLAIN
from .summary import Summary
from .trial import Learned, Outcome

WIDEST = 16  # of the first column: the longest name of an arm; kinds of one's own prompts are cut


def show_result(console: Console, outcome: Outcome, summary: Summary, learned: Learned, code: str) -> None:
    """Prints everything that is known."""
    console.print(_arms(summary), "")
    console.print(_kinds(summary), "")
    for line in (
        *exactness_lines(summary),
        *learned_lines(summary, learned),
        *([] if outcome.calibration is None else [str(outcome.calibration)]),
        *outcome.notes,
        summary.verdict.text(outcome.prompt_s),
    ):
        console.print(escape(line), soft_wrap=True)
    console.print("\nTo paste into your code:\n")
    console.print(escape(code), soft_wrap=True)


def _arms(summary: Summary) -> Table:
    table = _table(f"{summary.prompts} prompts")
    compared = any(arm.outputs for arm in summary.arms)
    titles = ["tokens/s", "÷ plain (90 %)", "tokens per\nforward"]
    for title in [*titles, "outputs identical\n+ rounding + fault"] if compared else titles:
        table.add_column(title, justify="right", no_wrap=True)
    for arm in summary.arms:
        ratio = "" if arm.over_plain is None else str(arm.over_plain)
        counts = " + ".join(str(arm.outputs[kind]) for kind in (IDENTICAL, ROUNDING, FAULT) if arm.outputs)
        cells = [f"{arm.tokens_per_s:.1f}", ratio, f"{arm.acceptance_length:.2f}"]
        table.add_row(arm.arm, *cells, *([counts] if compared else []))
    return table


def _kinds(summary: Summary) -> Table:
    table = _table("tokens/s")
    for arm in summary.arms:
        table.add_column(arm.arm.replace("prompt ", "prompt\n"), justify="right", no_wrap=True)
    for title in ("ours ÷\nbest other", "prompts"):
        table.add_column(title, justify="right", no_wrap=True)
    for kind in summary.kinds:
        speeds = [f"{kind.tokens_per_s[arm.arm]:.1f}" for arm in summary.arms]
        table.add_row(escape(kind.kind), *speeds, f"{kind.ours_over_best:.2f}", str(kind.prompts))
    return table


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(title, no_wrap=True, max_width=WIDEST)
    return table


def exactness_lines(summary: Summary) -> list[str]:
    """How many outputs are plain's, and what the others' first differences are."""
    if not any(arm.outputs for arm in summary.arms):
        return ["Outputs are not compared when sampling: draws differ, their distribution is the target's."]
    lines = []
    for arm in summary.arms:
        if not arm.outputs:
            continue
        line = f"{arm.arm}: {arm.outputs[IDENTICAL]} of {summary.prompts} outputs are identical to plain's"
        if arm.outputs[ROUNDING]:
            line += (
                f", {arm.outputs[ROUNDING]} differ{'s' * (arm.outputs[ROUNDING] == 1)} from a near-tie on, within the rounding of this "
                f"precision (largest gap {summary.gaps[arm.arm].largest_gap:.3g}, {summary.gaps[arm.arm].largest_share:.0%} of what "
                "rounding allows)"
            )
        line += f", {arm.outputs[FAULT]} by a fault." if arm.outputs[FAULT] else "."
        gaps = summary.gaps.get(arm.arm)
        if gaps is not None and gaps.in_float32:
            line += f" In float32 the other token is the better one, or as good, in {gaps.other_is_better} of {gaps.in_float32}."
        lines.append(line)
    if summary.faults:
        lines.append(
            f"FAULT: {summary.faults} output{'s' * (summary.faults > 1)} of ours differ{'s' * (summary.faults == 1)} from plain "
            "generation by more than rounding. This must not happen: please report it, with the model and the versions."
        )
    return lines


def learned_lines(summary: Summary, learned: Learned) -> list[str]:
    """What was learned, and what that cost."""
    line = f"Learned: {_bytes(learned.memory_bytes)} of suffix memory"
    if learned.learning_bytes:
        line += (
            f", {learned.steps} gradient steps on an adapter ({_bytes(learned.learning_bytes)} with optimizer and replay); gradient "
            f"steps took {learned.learning_share:.1%} of the time of ours."
        )
    else:
        line += "; there is no draft to be trained, and filling the memory is in the time of ours."
    arms: Sequence[str] = [
        f"{arm.arm} {arm.first_third:.2f} to {arm.last_third:.2f}"
        for arm in summary.arms
        if arm.first_third and arm.arm != PLAIN
    ]
    lines = [line]
    if arms:
        lines.append(f"Tokens per target forward, first to last third of the prompts: {', '.join(arms)}.")
    lines.append(f"Drafting by now: {learned.drafting}.")
    if learned.learning_bytes:
        lines.append(f"Learning by now: {learned.learning}.")
    return lines


def _bytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB"
