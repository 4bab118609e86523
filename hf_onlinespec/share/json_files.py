"""JSON from elsewhere: of bounded size, depth and numbers, or an ArtifactError."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import ArtifactError, brief

# All chosen: far above what any draft needs, far below what hurts.
MOST_JSON_BYTES = 8 << 20  # a model of 10,000 adapted layers needs 1 MB
MOST_JSON_VALUES = 500_000  # the same model's tensors take 160,000; parsed in 0.5 s, where 8 MB of numbers take 3 s
MOST_DEPTH = 100  # of JSON
MOST_INTEGER = 2**63 - 1


def parse_json(data: bytes, path: Path) -> dict[str, object]:
    """A JSON object from a file's bytes: bounded in depth, with finite numbers, whole ones of 64 bits, and no key twice.

    Raises:
        ArtifactError: it is not one.
    """
    try:
        if (n := data.count(b",") + data.count(b"[") + data.count(b"{")) > MOST_JSON_VALUES:
            raise ValueError(f"{n:,} values, expected at most {MOST_JSON_VALUES:,}")
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        _check_values(found)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({brief(str(error))}).") from error
    return found


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {brief([key for key, _ in pairs])}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MOST_INTEGER:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{brief(digits)} is no finite number")
    return value


def _check_values(found: object) -> None:
    """Raises ValueError for what is nested too deep to be copied, and for text that cannot be written."""
    level = [found]
    for _ in range(MOST_DEPTH):
        for value in level:
            for text in value if isinstance(value, dict) else [value]:
                if isinstance(text, str):
                    text.encode()  # a lone half of a character cannot be written
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEPTH} levels deep")
