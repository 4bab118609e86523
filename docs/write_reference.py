"""Writes docs/settings.md from the help of OnlineSpecConfig, and docs/commands.md from the command line.

python docs/write_reference.py
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

DOCS = Path(__file__).parent


def settings() -> str:
    """The page of settings: a row for each field of OnlineSpecConfig."""
    from hf_onlinespec import OnlineSpecConfig

    rows = []
    for field in fields(OnlineSpecConfig):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        rows.append(f"| `{field.name}` | `{default}` | {field.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(
        (
            "# Settings",
            "",
            "Every field of `hf_onlinespec.OnlineSpecConfig`, from its own help. Defaults of learner, lr, rank, replay and schedule were measured",
            '(`benchmarks/learning.py`, `benchmarks/studies/tune.py`). `lookahead` and `update_every` of `"auto"` decide from measured times; numbers make a run repeatable.',
            "",
            "| setting | default | what it does |",
            "|---|---|---|",
            *rows,
            "",
        )
    )


def commands() -> str:
    """The page of commands, as typer writes it."""
    write = ["utils", "docs", "--name", "hf-onlinespec", "--title", "Command line"]
    done = subprocess.run([sys.executable, "-m", "typer", "hf_onlinespec_cli", *write], check=True, capture_output=True)
    return done.stdout.decode("utf-8")


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands(), encoding="utf-8")
    (DOCS / "settings.md").write_text(settings(), encoding="utf-8")
