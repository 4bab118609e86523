"""The user's own texts: files of lines, and lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_lines(path: Path, name: str) -> list[str]:
    """The lines of a file of UTF-8 text, also as Windows writes it.

    Lines end with a line feed and nothing else: other separators may stand inside of JSON's strings.

    Args:
        name: as it stands in errors.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{name}: the file cannot be read ({reason}).") from error
    return content.replace("\r\n", "\n").split("\n")


def parse_line(line: str, where: str, wanted: str) -> Any:
    """A line of JSON. Raises ConfigError where it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {wanted}; it is no JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; brackets in brackets
        raise ConfigError(f"{where}: {wanted}; it cannot be read as JSON ({error}).") from error


def check_text(text: str, where: str) -> None:
    """Raises ConfigError where a text cannot be written as UTF-8, as no tokenizer takes it then."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ConfigError(
            f"{where}: character {error.start + 1} is {half}, one half of a character alone. Leave it out."
        ) from error
