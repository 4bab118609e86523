"""The wheel and the sdist, built as a release would be: what is inside, how large, and that the wheel works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the wheel: pip install setuptools")

ROOT = Path(__file__).parents[1]
IN_BOTH = (
    "hf_onlinespec_cli.py",
    "hf_onlinespec/__init__.py",
    "hf_onlinespec/py.typed",
    "hf_onlinespec/share/card_template.md",
    "hf_onlinespec/embedded_pair/target/model.safetensors",
    "hf_onlinespec/embedded_pair/draft/model.safetensors",
    "hf_onlinespec/embedded_pair/prompts.jsonl",
    "hf_onlinespec/seq2seq_pair/README.md",
    "hf_onlinespec/seq2seq_pair/prompts.jsonl",
    "hf_onlinespec/seq2seq_pair/draft/model.safetensors",
    "hf_onlinespec/seq2seq_pair/target/model.safetensors",
    "hf_onlinespec/seq2seq_pair/target/tokenizer.json",
    "hf_onlinespec/smollm2_head/README.md",
    "hf_onlinespec/smollm2_head/config.json",
    "hf_onlinespec/smollm2_head/model.safetensors",
    "hf_onlinespec/smollm2_head/training.json",
    "hf_onlinespec/adapt/learners.py",
    "hf_onlinespec/measure/prompts/SOURCES.md",
    "hf_onlinespec/measure/prompts/prompts.jsonl",
    "hf_onlinespec/serve/page.html",
)
LARGEST_MB = 44  # the embedded pair is 20 of them, the encoder-decoder pair 4, the head 17


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of a copy of the tree, so that nothing is left behind in it."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "tree"
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "__pycache__", "benchmarks", "demo-out", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = f"from setuptools import build_meta as b; print(b.build_wheel({str(folder)!r})); print(b.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    shutil.rmtree(copy)
    return wheel, sdist


def test_both_hold_what_is_needed_and_no_more(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert set(IN_BOTH) <= in_wheel
    assert {*IN_BOTH, "LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= in_sdist
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_onlinespec").rglob("*.py")}
    assert modules <= in_wheel
    info = next(name.partition("/")[0] for name in in_wheel if name.endswith(".dist-info/METADATA"))
    stray = {name for name in in_wheel if not name.startswith(("hf_onlinespec/", "hf_onlinespec_cli.py", info))}
    assert not stray
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    for path in built:
        assert path.stat().st_size < LARGEST_MB * 2**20


def test_the_wheel_works_without_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(built[0])], check=True, capture_output=True)
    program = (
        "import hf_onlinespec, hf_onlinespec_cli\n"
        "from hf_onlinespec.embedded import load_pair, prompts\n"
        "from hf_onlinespec.share.heads import names_head\n"
        "assert names_head('hf_onlinespec:smollm2_head')\n"
        "pair = load_pair()\n"
        "inputs = pair.tokenizer(prompts('orders')[0], return_tensors='pt')\n"
        "out = pair.target.generate(**inputs, max_new_tokens=8, assistant_model=pair.draft, onlinespec=True)\n"
        "assert (out == pair.target.generate(**inputs, max_new_tokens=8)).all()\n"
        "print(hf_onlinespec.__file__, hf_onlinespec_cli.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(site)) == 2
    command = [str(site / "bin" / "hf-onlinespec"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "hf_onlinespec" in done.stdout, done.stderr[-2000:]
