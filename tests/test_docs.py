"""The pages that are written from the code are those of this code."""

from __future__ import annotations

import runpy
from pathlib import Path

import typer

import hf_onlinespec_cli

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_settings_is_current() -> None:
    written = runpy.run_path(str(DOCS / "write_reference.py"))["settings"]()
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == written, "run python docs/write_reference.py"


def test_the_page_of_commands_names_every_command_and_option() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    group = typer.main.get_command(hf_onlinespec_cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"## `hf-onlinespec {name}`" in page, "run python docs/write_reference.py"
        section = page.partition(f"## `hf-onlinespec {name}`")[2].partition("\n## ")[0]
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert f"`{option}" in section or f", {option}" in section, (
                f"{name} {option}: run python docs/write_reference.py"
            )
