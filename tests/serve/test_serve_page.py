"""The page in a real browser: headless Chromium draws what the server counts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from hf_onlinespec.embedded import prompts
from tests.serving import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_a_browser_draws_the_numbers_of_the_server(tmp_path: Path) -> None:
    with running() as server:
        for prompt in prompts("shell")[:3]:
            server.complete(prompt, 8)
        page = server.page()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
        drawn = subprocess.run(
            [*command, f"{server.url}/onlinespec"], capture_output=True, text=True, timeout=120
        ).stdout

    def shown(name: str) -> str:
        found = re.search(rf'id="{name}"[^>]*>([^<]*)<', drawn)
        assert found is not None
        return found.group(1)

    assert shown("requests") == "3" and shown("new_tokens") == str(page["totals"]["new_tokens"])
    assert shown("acceptance_length") == f"{page['acceptance_length']:.2f}"
    assert shown("tokens_per_s") == f"{page['tokens_per_s']:.1f}"
    assert len(re.findall(r'<circle cx="[0-9.]+"', drawn)) == 6  # a dot per request in two charts
    assert drawn.count("<tr>") == 4 and page["decisions"]["drafting"] in drawn
