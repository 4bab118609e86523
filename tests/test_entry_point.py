"""The console script as setup.cfg names it."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def entry_point() -> tuple[str, str]:
    """The module of hf-onlinespec, and its function."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    _, _, where = config["options.entry_points"]["console_scripts"].partition("=")
    module, _, function = where.strip().partition(":")
    return module, function


def test_help_imports_nothing_heavy() -> None:
    module, function = entry_point()
    code = f"""
import sys
from {module} import {function}
try:
    {function}(["--help"])
except SystemExit:
    pass
heavy = {{"torch", "transformers", "peft", "numpy", "huggingface_hub", "hf_onlinespec"}} & set(sys.modules)
print("imported:", sorted(heavy))
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and done.stdout.splitlines()[-1] == "imported: []"


def test_the_demo_speaks_before_it_is_calibrated_and_its_verdict_heeds_its_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, process_settings: None
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from hf_onlinespec.measure import demo

    monkeypatch.setattr(demo, "ASSISTANT_TOKENS", (2,))
    monkeypatch.setattr(demo, "CALIBRATION_PROMPTS", 1)
    said: list[str] = []
    warm_up = demo.Bench.warm_up

    def listening(bench: demo.Bench, *args: object) -> None:
        said.append(capsys.readouterr().err)
        warm_up(bench, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(demo.Bench, "warm_up", listening)
    module, function = entry_point()
    arguments = ["demo", "--prompts", "1", "--new-tokens", "8", "--threads", "1", "--out", str(tmp_path)]
    assert vars(importlib.import_module(module))[function](arguments) == 0
    assert said[0] != ""
    last = capsys.readouterr().out.splitlines()[-1]
    assert len(re.findall(r"\d\.\d\d \(\d\.\d\d–\d+\.\d\d\)", last)) == 3, last
