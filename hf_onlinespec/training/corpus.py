"""The user's own texts and prompts: files of lines, and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def check_text(text: str, where: str) -> None:
    """Raises ConfigError where a text cannot be written as UTF-8, as no tokenizer takes it then."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ConfigError(
            f"{where}: character {error.start + 1} is {half}, one half of a character alone. Leave it out."
        ) from error


def read_corpus(path: str | Path) -> tuple[list[str], list[str]]:
    """Texts and prompts of a file, as `warm_start` takes them.

    A .txt file holds texts with empty lines between them; a .jsonl file on every line {"text": "..."} or {"prompt": "..."}.

    Raises:
        ConfigError: the file cannot be read, holds nothing, is of another kind, or has a line that is malformed.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path}: expected a .txt or a .jsonl file.")
    lines = read_lines(path, str(path))
    found: dict[str, list[str]] = {"text": [], "prompt": []}
    wanted = 'expected {"text": "..."} or {"prompt": "..."}'
    if path.suffix == ".txt":
        found["text"] = list(_documents(lines))
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                key, item = parse_text(line, f"{path}, line {number}", tuple(found), wanted)
                found[key].append(str(item[key]))
    if not any(found.values()):
        raise ConfigError(f"{path}: the file holds no text.")
    return found["text"], found["prompt"]


def _documents(lines: Sequence[str]) -> Iterator[str]:
    """Runs of lines that are not empty."""
    document: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []


def parse_text(line: str, where: str, keys: Sequence[str], wanted: str) -> tuple[str, dict[str, object]]:
    """A line of JSON with a text under one of these keys: the key, and the whole object.

    Args:
        wanted: what is expected, for the error.

    Raises:
        ConfigError: it is no such line, or a text that no tokenizer takes.
    """
    item = parse_json(line, where, wanted)
    found = [key for key in keys if isinstance(item, dict) and key in item]
    text = item[found[0]] if isinstance(item, dict) and len(found) == 1 else None
    if not isinstance(item, dict) or not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: {wanted}; found {line.strip()[:60]}")
    check_text(text, where)
    return found[0], item


def parse_json(line: str, where: str, wanted: str) -> object:
    """A line of JSON; `wanted`: what is expected, for the error. Raises ConfigError where it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {wanted}; it is no JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; brackets in brackets
        raise ConfigError(f"{where}: {wanted}; it cannot be read as JSON ({error}).") from error
