"""What was measured while a draft served: the record that its card tells, and the curve. Neither holds any text of a prompt."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..metrics import Counts, DraftMetrics
from .provenance import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TENTH = 0.1  # of the requests: the first are "before", the last "after"
APART = 20  # requests from which these two are told: of fewer they are the same handful
HISTORY = ("requests", "new_tokens", "rounds", "wall_time_s", "update_time_s")  # of each stretch of requests
COLOUR = "#009e73"  # of a learning draft, as the demo draws it
DIGITS = 4  # behind the point, of what is recorded


def run_record(metrics: DraftMetrics, targets: Sequence[str]) -> dict[str, Any]:
    """What was measured while the draft served, as JSON values.

    Args:
        targets: names of the models that it drafted for.
    """
    served = metrics.requests > 0
    return {
        "targets": list(targets),
        "machine": machine(),
        "requests": metrics.requests,
        "rounds": metrics.rounds,
        "new_tokens": metrics.new_tokens,
        "learned_tokens": metrics.learned_tokens,
        "updates": metrics.updates,
        "idle_updates": metrics.idle_updates,
        "idle_time_s": round(metrics.idle_time_s, DIGITS),
        "rollbacks": metrics.rollbacks,
        "total": _figures(metrics) if served else None,
        "before": _figures(metrics.part(0, TENTH)) if served else None,
        "after": _figures(metrics.part(1 - TENTH, 1)) if served else None,
        "history": [[round(getattr(stretch, name), DIGITS) for name in HISTORY] for stretch in metrics.history],
    }


def _figures(counts: Counts) -> dict[str, float]:
    return {
        "requests": counts.requests,
        "new_tokens": counts.new_tokens,
        "acceptance_length": round(counts.acceptance_length, DIGITS),
        "acceptance_rate": round(counts.acceptance_rate, DIGITS),
        "tokens_per_s": round(counts.tokens_per_s, DIGITS),
        "decode_tokens_per_s": round(counts.decode_tokens_per_s, DIGITS),
        "update_share": round(counts.update_share, DIGITS),
    }


def run_targets(run: Mapping[str, Any]) -> list[str]:
    """The targets of a run that goes on. Raises ArtifactError."""
    targets = run.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ArtifactError(f"The run of the draft has targets={targets!r}: expected a list of names.")
    return list(targets)


def is_told_apart(run: Mapping[str, Any]) -> bool:
    """Whether what was served first and what was served last are requests enough, and different ones, to be compared."""
    if run["total"] is None:
        return False
    served: int = run["total"]["requests"]
    return served >= APART and run["before"]["requests"] + run["after"]["requests"] <= served


def curve(run: Mapping[str, Any]) -> bytes | None:
    """The figure of a run as PNG; None: no request was served, or the package that draws is not installed."""
    if not run["history"] or find_spec("matplotlib") is None:
        return None
    ends, lengths, speeds, served = [], [], [], 0
    for requests, new_tokens, rounds, wall_time_s, _ in run["history"]:
        served += requests
        ends.append(served)
        lengths.append(new_tokens / rounds if rounds else 0.0)
        speeds.append(new_tokens / wall_time_s if wall_time_s else 0.0)
    file = io.BytesIO()
    history_figure(ends, lengths, speeds).savefig(file, format="png", dpi=100)
    return file.getvalue()


def history_figure(requests: Sequence[int], lengths: Sequence[float], speeds: Sequence[float]) -> Figure:
    """A draft's life in two panels: acceptance length and net tokens/s of each stretch of its requests.

    Args:
        requests: how many had been served at the end of each stretch.
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
