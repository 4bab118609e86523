"""Other packages that call `generate` on an attached model: the scripts of examples/integrations/, as a user runs them.

`pipeline` and `TextIteratorStreamer` need no other package: tests/test_attachment.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "integrations"
PACKAGES = {
    "transformers_serve.py": ("fastapi", "uvicorn", "openai", "pydantic"),
    "smolagents_model.py": ("smolagents",),
    "lm_eval_task.py": ("lm_eval",),
}


@pytest.mark.parametrize("script", PACKAGES)
def test_a_script_finds_the_answers_of_plain_generation(script: str) -> None:
    """Each asserts that the answers are equal, that every call was served, and that rounds kept more than one token."""
    missing = [name for name in PACKAGES[script] if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed; pip install 'hf_onlinespec[integrations]'")
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", FOLDER / script], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "answers equal plain generation's" in run.stdout


def test_every_script_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*PACKAGES, "local_model.py"}
