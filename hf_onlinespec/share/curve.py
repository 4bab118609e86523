"""The figure of a model card: what a draft gained over the requests that it served."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .history import ServingHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOUR = "#009e73"  # of a learning draft, as the demo draws it


def curve(serving: ServingHistory) -> bytes | None:
    """The figure of what was served, as PNG; None: nothing was, or the package that draws is not installed."""
    if not serving.history or find_spec("matplotlib") is None:
        return None
    ends, lengths, speeds, served = [], [], [], 0.0
    for requests, new_tokens, rounds, wall_time_s, _ in serving.history:
        served += requests
        ends.append(served)
        lengths.append(new_tokens / rounds if rounds else 0.0)
        speeds.append(new_tokens / wall_time_s if wall_time_s else 0.0)
    file = io.BytesIO()
    history_figure(ends, lengths, speeds).savefig(file, format="png", dpi=100)
    return file.getvalue()


def history_figure(requests: Sequence[float], lengths: Sequence[float], speeds: Sequence[float]) -> Figure:
    """A draft's life in two panels: acceptance length and net tokens/s of each bucket of its requests.

    Args:
        requests: how many had been served at the end of each bucket.
    """
    # Only now: matplotlib is an optional package.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, values, label in (
        (upper, lengths, "acceptance length"),
        (lower, speeds, "net tokens/s"),
    ):
        axes.plot(requests, values, color=COLOUR, marker="o", markersize=3, linewidth=1.5)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    lower.set_xlabel("requests served")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
