"""Runs the fast tests beside several versions of what we build on, and prints the table that docs/versions.md shows.

    python .ci/versions.py WORK_FOLDER [NAME ...]

Each environment is made once in the work folder and kept: 2 to 6 GB each, from the package registry. A run takes about 6 minutes of
one core. What pytest said stands in WORK_FOLDER/NAME/tests.txt.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The first one holds the least of what setup.cfg allows, the last one the newest.
ENVIRONMENTS = {
    "floor": "torch==2.6.0 transformers==5.18.0 peft==0.20.0 accelerate==1.10.1 safetensors==0.8.0 huggingface-hub==1.31.0",
    "between": "torch==2.13.0 transformers==5.20.2 peft==0.21.0",
    "newest": "torch==2.14.1 transformers==5.24.0 peft==0.21.2 trl==1.16.0",
}
COLUMNS = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "trl")
TOOLS = ("pytest", "pytest-xdist", "rich", "matplotlib", "optax>=0.2.8,<0.3", "accelerate", "safetensors")
# What leans on the names and caches of transformers and peft, the Hub's client and the numbers of torch; without what takes longest.
FAST = """
    adapt/test_feedback adapt/test_gated_lora adapt/test_head_learning adapt/test_learner commit/test_combined commit/test_lookahead
    commit/test_sampling commit/test_suffix_memory measure/test_exactness models/test_layers models/test_plain
    share/test_export share/test_hub share/test_lora_options test_attachment test_compat test_draft test_generation
    verify/test_batches verify/test_head_targets verify/test_positions verify/test_probe verify/test_streaming verify/test_target
    commit/test_seq2seq commit/test_text_rows commit/test_translation heads/test_assistants heads/test_mtp test_newer_drafts
    verify/test_compiled verify/test_encoder_decoders verify/test_probe_quantized verify/test_rollback verify/test_running verify/test_trees
""".split()


def python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def build(folder: Path, packages: list[str]) -> None:
    """An environment with these packages and this checkout, whose own ranges are not asked."""
    if not (folder / "bin" / "pytest").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python(folder), "-m", "pip", "install", "--quiet", *packages, *TOOLS], check=True)
    command = [python(folder), "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
    subprocess.run(command, check=True)


def installed(folder: Path) -> list[str]:
    """The versions of COLUMNS in an environment; "" where it has none."""
    found = {
        d.name.replace("-", "_"): d.version for d in distributions(path=map(str, folder.glob("lib/*/site-packages")))
    }
    return [found.get(name, "") for name in COLUMNS]


def run(folder: Path) -> str:
    """What pytest says of the fast tests, in its last line."""
    files = [f"tests/{name}.py" for name in FAST]
    command = [python(folder), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "HF_ONLINESPEC_DATA"} | settings
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    (folder / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return (
        re.sub(r"( in [\d.]+s.*|, \d+ (deselected|warnings?)|=)", "", last[-1]).strip()
        if last
        else f"pytest ended with {done.returncode}"
    )


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    work, names = Path(arguments[0]).resolve(), arguments[1:] or list(ENVIRONMENTS)
    work.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} | fast tests |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in names:
        folder = work / name
        build(folder, ENVIRONMENTS[name].split())
        print(f"| {' | '.join(installed(folder))} | {run(folder)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
