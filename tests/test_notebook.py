"""The notebook of the first hour runs from its first cell to its last, and is committed without outputs."""

from __future__ import annotations

import ast
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_hour.ipynb"
SOURCES = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
KERNEL = find_spec("nbclient") is not None and find_spec("ipykernel") is not None


def test_no_outputs_are_committed_and_every_cell_is_short_python() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and len(SOURCES) > 8
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for source in SOURCES:
        ast.parse(source)
        assert len(source.splitlines()) <= 12


@pytest.mark.skipif(not KERNEL, reason='nbclient and ipykernel are not installed: pip install "hf_onlinespec[docs]"')
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_cell_runs_in_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    tables = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(tables) == 4 and all(table.startswith("<table>") for table in tables)
    assert "OnlineSpecConfig(lookahead=4, update_every=1)" in [
        output["data"].get("text/plain") for output in shown if "data" in output
    ]


@pytest.mark.skipif(KERNEL, reason="the cells run in a kernel, see above")
def test_every_cell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a kernel: the cells one after the other, in one namespace."""
    names: dict[str, Any] = {}
    for source in SOURCES:
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert "1 request went through the draft" in capsys.readouterr().out
    assert names["again"].steps > 0 and len(names["lengths"]) == 8
