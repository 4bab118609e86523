"""Numbers as a person reads them: lines with units, a table in a notebook, and the values themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True, repr=False)
class Summary:
    """`print(summary)` shows text, a notebook a table; `summary.to_dict()` has the values as plain JSON values."""

    title: str
    rows: tuple[tuple[str, str], ...]  # what, and its value with a unit
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)

    def __str__(self) -> str:
        width = max((len(what) for what, _ in self.rows), default=0)
        return "\n".join([self.title, *(f"  {what:<{width}}  {value}" for what, value in self.rows)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.title, ("", ""), self.rows)


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for notebooks; all texts are escaped."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head) if any(head) else ""
    top = f"<thead><tr>{cells}</tr></thead>" if cells else ""
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align: left">{escape(text)}</td>' for text in row) + "</tr>" for row in rows
    )
    return f"<table><caption>{escape(title)}</caption>{top}<tbody>{body}</tbody></table>"


def counted(n: int, what: str) -> str:
    """A number and its noun: "1 request", "1,200 requests"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def parts(numbers: dict[str, int]) -> str:
    """Those above 0 by name; "none" without any."""
    return ", ".join(f"{name} {n:,}" for name, n in numbers.items() if n) or "none"


def size(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes:,} bytes" if nbytes < 10**4 else f"{nbytes / 10**6:,.2f} MB"
