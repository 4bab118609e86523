"""Runs the fast tests in environments of several versions, and prints the table that docs/versions.md shows.

    python .ci/versions.py WORK_FOLDER [NAME ...]

Each environment is made once in the work folder and kept; needs the package registry and some GB of disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {
    "floor": ("torch==2.6.0", "transformers==5.0.0", "peft==0.18.0"),
    "older": ("torch==2.9.1", "transformers==5.10.2", "peft==0.20.0"),
    "usual": ("torch==2.13.0", "transformers==5.18.0", "peft==0.21.2"),
    "newest": ("torch==2.14.1", "transformers==5.24.0", "peft==0.21.2"),
    "trl": ("torch==2.14.1", "transformers==5.24.0", "peft==0.21.2", "trl==1.16.0"),
}
TOOLS = ("accelerate", "safetensors", "pytest", "pytest-xdist", "rich", "matplotlib", "optax>=0.2.8")
# Left out: what takes over half a minute, or looks at the repository instead of the package.
FAST = (
    "accept",
    "adapters",
    "artifact",
    "attach",
    "checks",
    "config",
    "decoding",
    "draft",
    "embedded",
    "failures",
    "generation",
    "governor",
    "layers",
    "learning",
    "loading",
    "memory",
    "positions",
    "tree",
    "verifier",
    "vocabulary",
)


def python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def build(folder: Path, packages: tuple[str, ...]) -> None:
    """An environment with these packages and this checkout, whose own ranges are not asked."""
    if (folder / "built").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [python(folder), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *packages, *TOOLS], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    (folder / "built").touch()


def run(folder: Path) -> str:
    """What pytest says of the fast tests, in its last line."""
    files = [str(path) for name in FAST if (path := ROOT / "tests" / f"test_{name}.py").exists()]
    command = [python(folder), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (folder / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return re.sub(r" in [\d.]+s.*|=", "", last[-1]).strip() if last else f"pytest ended with {done.returncode}"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    work, names = Path(arguments[0]).resolve(), arguments[1:] or list(ENVIRONMENTS)
    work.mkdir(parents=True, exist_ok=True)
    print("| torch | transformers | peft | beside | fast tests |\n|---|---|---|---|---|")
    for name in names:
        packages = ENVIRONMENTS[name]
        build(work / name, packages)
        versions = [package.partition("==")[2] for package in packages[:3]]
        print(f"| {' | '.join(versions)} | {', '.join(packages[3:])} | {run(work / name)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
