"""The pages that are written from the code are those of this code."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import typer

import hf_onlinespec_cli

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_settings_is_current() -> None:
    written = runpy.run_path(str(DOCS / "write_reference.py"))["settings"]()
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == written, "run python docs/write_reference.py"


def test_the_page_of_commands_has_the_words_of_every_command_and_option() -> None:
    """Its words, not its form: how a page is laid out is typer's."""
    page = " ".join((DOCS / "commands.md").read_text(encoding="utf-8").split())
    group = typer.main.get_command(hf_onlinespec_cli.app)
    words = [group.help, group.epilog]
    for command in group.commands.values():  # type: ignore[attr-defined]
        words.append(command.help)
        for parameter in command.params:
            words.append(parameter.help)
            if parameter.opts[0].startswith("--"):
                words.append(parameter.opts[0])
            if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
                words.append(f"[default: {parameter.default}]")
    missing = [text for text in words if text and " ".join(text.split()) not in page]
    assert not missing, "run python docs/write_reference.py"
    assert len(words) > 150


def test_the_regression_tests_of_known_faults_exist() -> None:
    page = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", page)
    found = {file: ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8")).body for file, _ in named}
    functions = {
        (file, node.name) for file, body in found.items() for node in body if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 60 and not set(named) - functions
