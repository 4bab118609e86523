"""What an evolved draft says about itself: the record of its run, the model card made from it, and the curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact import Artifact
from .metrics import DraftMetrics

TENTH = 0.1


def run_record(metrics: DraftMetrics, targets: Sequence[str]) -> dict[str, Any]:
    """What was measured while the draft served, as JSON values."""
    return {"targets": list(targets), "new_tokens": metrics.new_tokens}


def run_targets(run: dict[str, Any]) -> list[str]:
    """The targets of a run that goes on."""
    return list(run.get("targets", []))


def write(
    artifact: Artifact, folder: str | Path, repo_id: str | None = None, data_statement: str | None = None
) -> None:
    """Writes an artifact with its card and its curve."""
    artifact.write(folder)
