"""Every class of the installed transformers that can generate stands in a table of the documentation; those that no other table has are run here.

pytest tests/test_other_classes.py -m all_architectures     # those too that are left out of a usual run
python -m tests.test_other_classes > docs/other_classes.md  # the table of the documentation, from a run of all of them
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

from hf_onlinespec import OnlineSpecConfig, OnlineSpecError, online_memory
from tests.architectures import PLAIN, SERVED
from tests.other_classes import GIVEN, OTHERS, Other, defined, generates

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "other_classes.md"
TABLES = ("architectures.md", "encoder_decoders.md", "multimodal.md", "other_classes.md")
TABLE_OF = "5.24"  # the release of transformers that the table is of
OF_TABLE = transformers.__version__.startswith(TABLE_OF + ".")
RUN_ON = "2026-11-27"  # when all rows were run
MEMORY = OnlineSpecConfig(lookahead=4)
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "num_beams": 1}
FIRST_CELL = re.compile(r"^\| (\w+) \|", re.MULTILINE)


def run(row: Other) -> str:
    """How a class goes in two requests: the memory knows the second from the first."""
    target, given = row.build(), GIVEN[row.given]()
    plain = target.generate(**given, **OPTIONS)
    for _ in range(2):
        try:
            found = target.generate(**given, onlinespec=MEMORY, **OPTIONS)
        except OnlineSpecError as error:
            return str(error)
        if not torch.equal(found, plain):
            return "differs"
    return SERVED if online_memory(target).metrics.drafted_tokens else PLAIN


def check(row: Other) -> None:
    if row.name not in defined() or not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    found = run(row)
    assert found == row.found if row.found in (SERVED, PLAIN) else row.found in found, found


RUN = [row for row in OTHERS if not row.reason]


@pytest.mark.filterwarnings("default")  # some classes use what torch or transformers itself will drop
@pytest.mark.parametrize("row", [row for row in RUN if row.every_run], ids=lambda row: row.name)
def test_equals_plain_generate_or_is_refused_for_the_stated_reason(row: Other) -> None:
    check(row)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", [row for row in RUN if not row.every_run], ids=lambda row: row.name)
def test_each_other_class_equals_plain_generate_or_is_refused_for_the_stated_reason(row: Other) -> None:
    check(row)


def test_every_class_that_can_generate_stands_in_a_table() -> None:
    """Of the installed release: a newer one that brings a class fails here, until the class has a row."""
    known = {name for table in TABLES for name in FIRST_CELL.findall((DOCS / table).read_text(encoding="utf-8"))}
    found = {name for name in defined() if generates(name)}
    assert len(found) > 200, "the walk over transformers' modelling files finds hardly any class"
    assert sorted(found - known) == []


def test_no_class_stands_in_this_table_and_in_another() -> None:
    others = {name for table in TABLES[:-1] for name in FIRST_CELL.findall((DOCS / table).read_text(encoding="utf-8"))}
    names = [row.name for row in OTHERS]
    assert not others & set(names) and len(names) == len(set(names))


def test_the_page_has_these_rows() -> None:
    stated = document([row.found for row in OTHERS])
    assert PAGE.read_text(encoding="utf-8") == stated, "run python -m tests.test_other_classes > docs/other_classes.md"


# The documentation


def document(found: list[str]) -> str:
    """docs/other_classes.md, from how every row went."""
    rows, counts = [], Counter[str]()
    for row, went in zip(OTHERS, found, strict=True):
        if row.reason:
            cell = f"not run: {row.reason}"
        elif row.found in (SERVED, PLAIN):
            cell = row.found if went == row.found else f"**{went}**"
        else:
            cell = f"refused: {row.found}" if row.found in went else f"**{went}**"
        counts[cell] += 1
        rows.append(f"| {row.name} | {'' if row.reason else row.given} | {cell} |")
    said = "; ".join(f"{number} {cell}" for cell, number in counts.most_common())
    return "\n".join([HEADING, "", f"- as target: {said}", "", *COLUMNS, *rows, ""])


HEADING = f"""# Which other classes that generate are served

Every class of transformers {TABLE_OF} that has `generate` stands in one of four tables: [decoders](architectures.md), [encoder–decoders](encoder_decoders.md), [classes that read pictures or sounds](multimodal.md), and here all others. A test walks the modelling files of the installed transformers and fails where a class stands in none.

Tiny configurations in float32, the memory drafts in two requests; "served": the same tokens as plain `generate`. Written by `python -m tests.test_other_classes`, all rows run on {RUN_ON}; a usual test run has some of them."""
COLUMNS = ("| class | given | as target |", "|---|---|---|")

if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(document([row.found if row.reason else run(row) for row in OTHERS]), end="")
