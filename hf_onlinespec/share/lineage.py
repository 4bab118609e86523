"""What a folder says of its draft's life, checked in form before anything relies on it: the lineage, and the record of its run.

`model_cards/schema.json` describes both. Keys that are not known here are left alone: whoever reads them checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, brief

LEFT_OUT = "merged_left_out"  # in place of "merged": how many lineages a shortened one does not tell
MOST = 1e15  # of any number in a record: seconds, tokens, requests
NUMBER, TEXT, NOTHING = (int, float), (str,), (type(None),)
FIGURES = {
    "requests": (int,),
    "new_tokens": (int,),
    "acceptance_length": NUMBER,
    "acceptance_rate": NUMBER,
    "tokens_per_s": NUMBER,
    "decode_tokens_per_s": NUMBER,
    "update_share": NUMBER,
}
COUNTS = ("requests", "rounds", "new_tokens", "learned_tokens", "updates", "idle_updates", "rollbacks")
MACHINE = {
    "cpu": TEXT,
    "cores": (int, *NOTHING),
    "threads": (int,),
    "gpu": (str, *NOTHING),
    **{name: TEXT for name in ("platform", "python", "hf_onlinespec", "torch", "transformers", "peft")},
}
# Of what was merged into a draft: merges of merges that a lineage keeps, and lineages in all. Chosen: a card shows them.
MOST_GENERATIONS, MOST_PARTS = 20, 200
STRETCH = 5  # numbers of every stretch in a run's history
TAUGHT = {"warm_start": ("texts", "prompts", "tokens"), "alignment": ("updates", "tokens")}  # and a target each


def check_run(run: Mapping[str, Any], where: str | Path) -> None:
    """Raises ArtifactError where a run is not of the form that a card tells."""
    _check(run, {name: (int,) for name in COUNTS} | {"idle_time_s": NUMBER}, f"{where}: run")
    targets = run.get("targets")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ArtifactError(f"{where}: run has targets={brief(targets)}: expected a list of names.")
    _check(_part(run, "machine", f"{where}: run"), MACHINE, f"{where}: run: machine")
    parts = ("total", "before", "after")
    if any(run.get(name) is not None for name in parts) or not all(name in run for name in parts):
        for name in parts:
            _check(_part(run, name, f"{where}: run"), FIGURES, f"{where}: run: {name}", least=-MOST)
    history = run.get("history")
    whole = isinstance(history, list) and all(
        isinstance(stretch, list) and len(stretch) == STRETCH for stretch in history
    )
    if not whole or not all(_is(number, NUMBER) for stretch in history or [] for number in stretch):
        raise ArtifactError(f"{where}: run has history={brief(history)}: expected stretches of {STRETCH} numbers.")


def check_lineage(lineage: Mapping[str, Any], where: str | Path) -> None:
    """Raises ArtifactError where a lineage is not of the form that a card tells; that of what was merged into it, too."""
    where = f"{where}: lineage"
    for name in ("draft", "data_statement", "license"):
        if name in lineage:
            _check(lineage, {name: TEXT if name == "draft" else (str, *NOTHING)}, where)
    if lineage.get("parent") is not None:
        _check(_part(lineage, "parent", where), {"source": TEXT, "revision": (str, *NOTHING)}, f"{where}: parent")
    for name, counts in TAUGHT.items():
        if name in lineage:
            part = _part(lineage, name, where)
            _check(part, {"target": (str, *NOTHING), **{count: (int,) for count in counts}}, f"{where}: {name}")
    if "distilled" in lineage:
        _check(_part(lineage, "distilled", where), {"rank": (int,), "relative_error": NUMBER}, f"{where}: distilled")
    if LEFT_OUT in lineage:
        _check(lineage, {LEFT_OUT: (int,)}, where)
    merged = lineage.get("merged", [])
    if not isinstance(merged, list) or not all(isinstance(part, Mapping) for part in merged):
        raise ArtifactError(f"{where} has merged={brief(merged)}: expected lineages.")
    for part in merged:
        _check(part, {"weight": NUMBER}, f"{where}: merged", least=-MOST)
        check_lineage(part, where if len(where) > 500 else f"{where}: merged")


def shortened(merged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lineages of what was merged, without the most distant ones: merges of merges would grow without bound.

    Where some are left out, `LEFT_OUT` says how many.
    """
    kept = [dict(part) for part in merged]
    level, n = kept, len(kept)
    for generation in range(1, MOST_GENERATIONS + 1):
        below: list[dict[str, Any]] = []
        for part in level:
            parts = part.get("merged", [])
            if parts and (generation == MOST_GENERATIONS or n + len(parts) > MOST_PARTS):
                part[LEFT_OUT] = min(_count(part.pop("merged")), int(MOST))
            elif parts:
                part["merged"] = [dict(one) for one in parts]
                below += part["merged"]
                n += len(parts)
        level = below
    return kept


def _count(merged: Sequence[Mapping[str, Any]]) -> int:
    """How many lineages there are, those that were left out before included."""
    return sum(1 + part.get(LEFT_OUT, 0) + _count(part.get("merged", [])) for part in merged)


def _part(found: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    part = found.get(name)
    if not isinstance(part, Mapping):
        raise ArtifactError(f"{where} has {name}={brief(part)}: expected a JSON object.")
    return part


def _check(found: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str, least: float = 0) -> None:
    for name, kind in kinds.items():
        if name not in found or not _is(found[name], kind, least):
            seen = brief(found[name]) if name in found else "nothing"
            raise ArtifactError(f"{where} has {name}={seen}: expected {' or '.join(k.__name__ for k in kind)}.")


def _is(value: Any, kinds: tuple[type, ...], least: float = 0) -> bool:
    """Whether a value is of one of these types, and a number within bounds."""
    if type(value) not in kinds:
        return False
    return least <= value <= MOST if type(value) in NUMBER else True
