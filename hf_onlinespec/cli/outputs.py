"""Results that a command writes where its options say: one that cannot be written costs none of the others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from .common import FAILED, INTERRUPTED, explain


class Outputs:
    """What was written, and what could not be."""

    def __init__(self) -> None:
        self._written: list[str] = []  # in words
        self._lost: dict[str, BaseException] = {}  # by option and path

    def write(self, option: str, path: Path | None, write_to: Callable[[Path], None], words: str) -> None:
        """Writes one of them; None: it was not asked for.

        Args:
            words: what is told once it is written.
        """
        if path is None:
            return
        try:
            write_to(path)
            self._written.append(words)
        except (KeyboardInterrupt, Exception) as error:  # the others are still to be written
            self._lost[f"{option} {path}"] = error

    def tell(self, console: Console) -> None:
        """Says what was written on the console, and what was not on stderr."""
        for words in self._written:
            console.print(words, markup=False, soft_wrap=True)
        for option, error in self._lost.items():
            line = explain(error) if isinstance(error, Exception) else "interrupted"
            if line is None:
                traceback.print_exception(error)
            print(f"hf-onlinespec: error: {option}: {line or repr(error)}", file=sys.stderr, flush=True)

    @property
    def exit_code(self) -> int:
        if any(isinstance(error, KeyboardInterrupt) for error in self._lost.values()):
            return INTERRUPTED
        return FAILED if self._lost else 0
