"""What the demo shows of its numbers: the figure, the tables, and the last line in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .demo import ARMS, summarise
from .records import Ratio, Record
from .regret import RegretReport

PROGRESS_EVERY = 10  # requests, where there is no live table
WINDOW = 8  # requests in a running mean
# Distinct for colour-blind eyes too (Okabe and Ito); plain stays in the background.
COLOURS_OF_CURVES = ("#009e73", "#e69f00", "#0072b2", "#cc79a7")
COLOURS = {"plain": "#7f7f7f", "transformers": "#0072b2", "frozen": "#e69f00", "learning": "#009e73"}


def stream_figure(records: Sequence[Record]) -> Figure:
    """Two panels over the requests of the stream: acceptance length of the drafting arms, net tokens/s of all.

    Args:
        records: the finished requests, in order.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # a figure of our own: pyplot's global state stays untouched
    upper, lower = figure.subplots(2, 1, sharex=True)
    drafting = {arm: label for arm, label in ARMS.items() if arm != "plain"}
    _draw(upper, records, drafting, "target_forwards")
    upper.set_ylabel("tokens per target forward")
    upper.set_title(f"acceptance length (mean of the last {WINDOW} requests of the segment)", fontsize=10, loc="left")
    _draw(lower, records, ARMS, "wall_time_s")
    lower.set_ylabel("tokens/s, learning included")
    lower.set_title(f"net speed (mean of the last {WINDOW} requests of the segment)", fontsize=10, loc="left")
    lower.set_xlabel("request")
    lower.legend(ncols=len(ARMS), loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=9)
    upper.set_xlim(0.5, records[-1].request + 1.5)
    for axes in (upper, lower):
        _mark_segments(axes, records)
    return figure


def regret_figure(report: RegretReport) -> Figure:
    """Two panels over the requests: acceptance length of what served and of its comparators, and cumulative regret."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    numbers = range(1, len(report.domains) + 1)
    for (name, curve), colour in zip(report.curves().items(), COLOURS_OF_CURVES, strict=True):
        spans = [range(max(0, i + 1 - WINDOW), i + 1) for i in range(len(numbers))]
        values = [sum(report.new_tokens[j] for j in span) / sum(curve.rounds[j] for j in span) for span in spans]
        upper.plot(numbers, values, color=colour, label=name, linewidth=1.5)
    upper.set_title(f"acceptance length (mean of the last {WINDOW} requests)", fontsize=10, loc="left")
    upper.set_ylabel("tokens per round")
    upper.legend(frameon=False, fontsize=9)
    lower.plot(numbers, report.static_regret(), color="#0072b2", label="against the best fixed adapter")
    lower.plot(numbers, report.dynamic_regret(), color="#d55e00", label="against the best adapter per segment")
    lower.set_title("cumulative regret of what served", fontsize=10, loc="left")
    lower.set_ylabel("sum of mean losses")
    lower.set_xlabel("request")
    lower.legend(frameon=False, fontsize=9)
    for axes in (upper, lower):
        for at in range(1, len(report.domains)):
            if report.domains[at] != report.domains[at - 1]:
                axes.axvline(at + 0.5, color="#444444", linewidth=0.8, linestyle="--")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axes: Axes, records: Sequence[Record], labels: Mapping[str, str], per: str) -> None:
    """One line per arm and segment: new tokens over the sum of the field `per`."""
    for arm, label in labels.items():
        own = [record for record in records if record.arm == arm]
        for _, group in groupby(own, key=lambda record: record.segment):
            segment = list(group)
            windows = [segment[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(segment))]
            values = [sum(r.new_tokens for r in w) / sum(getattr(r, per) for r in w) for w in windows]
            numbers = [record.request + 1 for record in segment]
            axes.plot(numbers, values, color=COLOURS[arm], label=label, marker="o", markersize=3, linewidth=1.5)
            label = "_nolegend_"  # the later segments of an arm share its entry
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_segments(axes: Axes, records: Sequence[Record]) -> None:
    """A line between segments, and each one's domain at its left edge."""
    for _, group in groupby(records, key=lambda record: record.segment):
        first = next(group)
        edge = first.request + 0.5
        if first.segment > 1:
            axes.axvline(edge, color="#444444", linewidth=0.8, linestyle="--")
        axes.annotate(
            first.domain, (edge, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points"
        )


@contextmanager
def progress(requests: int, live: bool) -> Iterator[Callable[[Sequence[Record]], None]]:
    """Gives a function that shows the records so far: as a live table, or as a line now and then on stderr."""
    if live:
        console = Console()
        try:
            with Live(console=console, auto_refresh=False, transient=True) as screen:
                yield lambda records: screen.update(speed_table(summarise(records), whole=False), refresh=True)
        finally:  # a Ctrl-C while it was being drawn for the first time leaves it hidden
            console.show_cursor()
        return

    def line(records: Sequence[Record]) -> None:
        done = records[-1].request + 1
        if done % PROGRESS_EVERY == 0 or done == requests:
            arms = summarise(records)["whole"]["arms"]
            speeds = ", ".join(f"{ARMS[arm]} {numbers['tokens_per_s']:.0f}" for arm, numbers in arms.items())
            print(f"{done} of {requests} requests, net tokens/s: {speeds}", file=sys.stderr, flush=True)

    yield line


def report(result: dict[str, Any]) -> None:
    """Prints the tables and what they say."""
    summary = result["summary"]
    if result["interrupted"]:
        print("Interrupted: only the finished requests count.")
    console = Console(highlight=False)
    console.print(speed_table(summary, whole=True), "")
    console.print("Net tokens/s of ours learning over the others: of the sums (median over prompts)", soft_wrap=True)
    console.print(ratio_table(summary), "")
    ratios = {arm: Ratio(**found) for arm, found in result["intervals"].items()}
    console.print(outputs_line(summary), conclusion(summary, ratios), sep="\n", soft_wrap=True)


def speed_table(summary: dict[str, Any], whole: bool) -> Table:
    """Per segment and arm, and for the whole stream if asked: acceptance length and speeds."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("segment", "arm"):
        table.add_column(title, no_wrap=True)
    for title in ("acceptance\nlength", "decode-only\ntokens/s", "net\ntokens/s", "update\nshare"):
        table.add_column(title, justify="right")
    for name, block in _blocks(summary) if whole else _blocks(summary)[:-1]:
        for arm, numbers in block["arms"].items():
            table.add_row(
                name,
                ARMS[arm],
                f"{numbers['acceptance_length']:.2f}",
                f"{numbers['decode_tokens_per_s']:.1f}",
                f"{numbers['tokens_per_s']:.1f}",
                f"{numbers['update_share']:.1%}" if arm == "learning" else "",
            )
            name = ""
        table.add_section()
    return table


def ratio_table(summary: dict[str, Any]) -> Table:
    """Per segment: net tokens/s of the learning arm over each other arm's."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("segment", no_wrap=True)
    for arm in summary["whole"]["learning_over"]:
        table.add_column(f"/ {ARMS[arm]}", justify="right")
    for name, block in _blocks(summary):
        cells = [f"{ratio['total']:.2f} ({ratio['median']:.2f})" for ratio in block["learning_over"].values()]
        table.add_row(name, *cells)
    return table


def _blocks(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The segments by number and domain, then the whole stream."""
    segments = [(f"{block['segment']} {block['domain']}", block) for block in summary["segments"]]
    return [*segments, ("all", summary["whole"])]


def outputs_line(summary: dict[str, Any]) -> str:
    """How many outputs are those of plain generation."""
    if not summary["outputs"]:
        return (
            "Outputs are not compared when sampling: draws differ, their distribution is the target's exactly, "
            "which the test suite checks."
        )
    parts = []
    for arm, found in summary["outputs"].items():
        part = f"{ARMS[arm]} {found['identical']} of {found['compared']}"
        if found["tie"]:
            part += f" ({found['tie']} more parted at a tie of the target's two best tokens)"
        if found["different"]:
            part += f" ({found['different']} different)"
        parts.append(part)
    return f"Outputs identical to plain: {'; '.join(parts)}."


def conclusion(summary: dict[str, Any], ratios: Mapping[str, Ratio]) -> str:
    """What learning gained or lost, in words, from the sums; where an interval leaves that open, it says so.

    Args:
        ratios: of the learning arm over each other one.
    """
    whole = summary["whole"]
    n = whole["arms"]["learning"]["requests"]
    *most, last = [f"{ratio} times as fast as {ARMS[arm]}" for arm, ratio in ratios.items()]
    words = f"With learning's own cost included, {ARMS['learning']} was {', '.join(most)} and {last} "
    words += f"(95 % intervals over {n} requests)."
    for arm, ratio in ratios.items():
        if not ratio.is_decided:
            words += f" {_undecided(ratio, n, ARMS[arm])}"
    for block in summary["segments"][1:2]:
        frozen, learning = (block["arms"][arm]["acceptance_length"] for arm in ("frozen", "learning"))
        words += f" On {block['domain']}, each target forward gave {learning:.2f} tokens with learning, {frozen:.2f} without."
    return words


def _undecided(ratio: Ratio, requests: int, other: str) -> str:
    more = ratio.more_requests(requests)
    if more is None:
        return f"That and {other} are equally fast, as far as can be told."
    return f"Whether that is faster than {other} is not decided: it takes about {more} more requests."
