"""The files of `hf-onlinespec run`: prompts, a line each, and answers, appended line by line, so that an interrupted run goes on.

Every answer names its prompt and the settings by a checksum: answers to other prompts, or under other settings, are found out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError, brief
from ..generation import Answer
from ..share.files import hold
from ..training.corpus import check_text, parse_json

BEGIN = b'{"index": '  # of every answer
WANTED = 'expected {"prompt": "..."} or {"messages": [...]}, with an "id" where you like'


@dataclass(frozen=True)
class Line:
    """A prompt of the file."""

    index: int  # its place among all prompts, from 0
    content: dict[str, Any]  # "prompt" or "messages", and what else stands in its line
    checksum: str  # of it and of the settings of the run


class PromptFile:
    """Prompts of a file of JSON lines, or of lines of a .txt file; empty lines are left out. Read line by line, every time anew.

    Args:
        settings: of the run, as far as answers depend on them.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, json.dumps(settings, sort_keys=True)

    def __iter__(self) -> Iterator[Line]:
        """Raises ConfigError where the file cannot be read, or a line is malformed."""
        option, index = f"--prompts {self._path}", 0
        try:
            # Lines end with a line feed and nothing else: other separators may stand inside of JSON's strings.
            with open(self._path, encoding="utf-8-sig", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        content = self._content(line.rstrip("\r\n"), f"{option}, line {number}")
                        yield Line(index, content, self._checksum(content))
                        index += 1
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"{option}: the file cannot be read ({reason}).") from error

    def _content(self, line: str, where: str) -> dict[str, Any]:
        if self._path.suffix == ".txt":
            return {"prompt": line}
        found = parse_json(line, where, WANTED)
        if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
            raise ConfigError(f"{where}: {WANTED}; found {brief(line)}")
        if not isinstance(found.get("prompt", ""), str) or not isinstance(found.get("messages", []), list):
            raise ConfigError(f"{where}: {WANTED}; found {brief(line)}")
        check_text(json.dumps(found, ensure_ascii=False), where)
        return found

    def _checksum(self, content: dict[str, Any]) -> str:
        text = json.dumps([self._settings, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class AnswerFile:
    """Answers in the order in which they were finished, a line of JSON each, on the disk as soon as it is written.

    A last line that an interruption has cut off is removed: its prompt is answered again. While it is open, no other process opens it.

    Args:
        retries: whether prompts that failed are tried again: what becomes of them is appended, and the last line of a prompt counts.

    Raises:
        ConfigError: a line is no answer, a prompt has two, or another process writes into the file.
    """

    def __init__(self, path: Path, retries: bool = False) -> None:
        self._path, self._retries = path, retries
        self._done: dict[int, str] = {}  # by the prompt's index, checksums
        self._failed: set[int] = set()  # of these, prompts that have an error in place of an answer
        self._file = open(path, "a+b")
        try:
            if not hold(self._file):
                raise ConfigError(
                    f"--out {path}: another hf-onlinespec run writes into it. Wait for it, or name a new file."
                )
            self._file.truncate(self._read())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Prompts that need not be answered."""
        return len(self._done) - (len(self._failed) if self._retries else 0)

    @property
    def failed(self) -> int:
        """Prompts that have an error in place of an answer."""
        return len(self._failed)

    def _read(self) -> int:
        """Takes in what is answered; the bytes of all whole lines."""
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            where = f"--out {self._path}, line {number}"
            if not line.endswith(b"\n") and line[: len(BEGIN)] == BEGIN[: len(line)]:
                break  # cut off
            try:
                found = json.loads(line)
                index, checksum, failed = int(found["index"]), str(found["checksum"]), "error" in found
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{where}: no answer that this command wrote. Name a new file.") from error
            if index in self._done and index not in self._failed:
                raise ConfigError(f"{where}: a second answer to prompt {index}. Name a new file.")
            self._note(index, checksum, failed)
            whole += len(line)
        return whole

    def _note(self, index: int, checksum: str, failed: bool) -> None:
        self._done[index] = checksum
        (self._failed.add if failed else self._failed.discard)(index)

    def has(self, line: Line) -> bool:
        """Whether a prompt need not be answered. Raises ConfigError where what stands in its place is the answer to something else."""
        return self._knows(line) and not (self._retries and line.index in self._failed)

    def _knows(self, line: Line) -> bool:
        """Whether something stands in the place of a prompt. Raises ConfigError, see `has`."""
        found = self._done.get(line.index)
        if found not in (None, line.checksum):
            raise ConfigError(
                f"--out {self._path} has an answer to prompt {line.index} that is not of this run: the prompts, TARGET, --dtype, "
                "--new-tokens, --temperature or --seed were others. Give these again, or name a new file."
            )
        return found is not None

    def check(self, prompts: PromptFile) -> int:
        """Reads all prompts once, before any work; how many they are.

        Raises:
            ConfigError: a line is malformed, there is none, or the answers are not of this run.
        """
        total = answered = 0
        for line in prompts:
            total, answered = total + 1, answered + self._knows(line)
        if not total:
            raise ConfigError("--prompts: the file has no prompts. Write one per line.")
        if answered < len(self._done):
            raise ConfigError(
                f"--out {self._path} has answers to prompts that the file of --prompts does not have. Name a new file."
            )
        return total

    def write(self, line: Line, answer: Answer) -> None:
        """Appends an answer, or why there is none."""
        fields: dict[str, Any] = {"index": line.index}
        if "id" in line.content:
            fields["id"] = line.content["id"]
        if answer.tokens is None:
            fields["error"] = f"{type(answer.error).__name__}: {answer.error}"
        else:
            fields |= {"text": answer.text, "new_tokens": len(answer.tokens)}
        written = json.dumps(fields | {"checksum": line.checksum}, ensure_ascii=False) + "\n"
        self._file.write(written.encode())
        self._file.flush()
        self._note(line.index, line.checksum, answer.tokens is None)
