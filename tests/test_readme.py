"""README as a new user reads it: its commands are there and its snippets run; the tree of the docs is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_onlinespec import online_metrics
from hf_onlinespec.embedded import load_pair

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CODE = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")


def test_the_two_commands_that_ci_runs() -> None:
    lines = README.splitlines()
    assert 'pip install -e ".[demo]" && hf-onlinespec demo' in lines
    assert 'pip install -e ".[test]" && pytest -n 2' in lines


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pair = load_pair()  # in the place of the real model, which a test cannot download
    pair.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pair.target.save_pretrained(tmp_path / "chat")
    pair.tokenizer.save_pretrained(tmp_path / "chat")
    monkeypatch.chdir(tmp_path)  # a snippet saves a draft
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets and REAL_MODEL in snippets[0]
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet.replace(REAL_MODEL, "chat"), "README.md", "exec"), names)
    assert online_metrics(names["chat"].model).rounds > 0  # type: ignore[attr-defined]
    assert "acceptance length" in capsys.readouterr().out


def test_the_snippets_of_the_first_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as somebody pastes them."""
    pair = load_pair()
    pair.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pair.target.save_pretrained(tmp_path / "chat")
    pair.tokenizer.save_pretrained(tmp_path / "chat")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet.replace(REAL_MODEL, "chat"), "getting_started.md", "exec"), names)
    assert "acceptance length" in capsys.readouterr().out


def test_every_file_of_the_tree_exists() -> None:
    tree = re.search(r"```\n(hf_onlinespec/\n.*?)```", CODE, flags=re.DOTALL)
    assert tree is not None
    folder = ROOT
    listed = set()
    for line in tree.group(1).splitlines():
        path = line.split()[0]
        folder = ROOT if not line.startswith(" ") else folder
        file = (folder if line.startswith(" ") else ROOT) / path
        assert file.exists(), path
        if not line.startswith(" ") and path.endswith("/"):
            folder = file
        listed.add(file)
    modules = {file for file in (ROOT / "hf_onlinespec").glob("*.py")}
    assert modules <= listed, sorted(modules - listed)
