"""The command line: `hf-onlinespec demo` shows on this machine what a learning draft gains and costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .demo import Bench, Record, Settings, choose_prompts, summarise
from .embedded import DOMAINS, HOME_DOMAIN
from .errors import ConfigError, MissingExtraError, OnlineSpecError

FAILED, INTERRUPTED = 2, 130  # exit codes: a wrong argument or a missing package; Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; arguments that argparse refuses exit with code 2 at once."""
    arguments = _parser().parse_args(argv)
    try:
        return _demo(arguments)
    except OnlineSpecError as error:
        print(f"hf-onlinespec: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hf-onlinespec: interrupted; no result was completed.", file=sys.stderr)
        return INTERRUPTED


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'The demo needs {" and ".join(missing)}: run pip install "hf_onlinespec[demo]" and try again.'
        )
    from . import plots  # only now: it needs the optional packages

    names = ("prompts", "domain", "new_tokens", "temperature", "seed", "threads")
    settings = Settings(**{name: vars(arguments)[name] for name in names})
    out, as_json = arguments.out, arguments.json
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made ({error.strerror}). Name another one.") from error
    logging.set_verbosity_error()  # transformers remarks on its own assisted generation
    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)

    stream, spare = choose_prompts(settings)
    bench = Bench(settings)
    bench.warm_up(spare)
    calibration = bench.calibrate(spare)
    print(calibration, file=sys.stderr if as_json else sys.stdout, flush=True)
    bench.load_arms(calibration.chosen)
    records: list[Record] = []
    interrupted = False
    try:
        with plots.progress(len(stream), live=sys.stdout.isatty() and not as_json) as show:
            for request in stream:
                records += bench.measure(request)
                show(records)
    except KeyboardInterrupt:
        if not records:
            raise
        interrupted = True

    result = {
        "settings": asdict(settings),
        "machine": machine(),
        "calibration": asdict(calibration),
        "interrupted": interrupted,
        "requests": [asdict(record) for record in records],
        "summary": summarise(records),
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    plots.stream_figure(records).savefig(out / "demo.png", dpi=150)
    if as_json:
        print(text)
    else:
        print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}")
        plots.report(result)
    return INTERRUPTED if interrupted else 0


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() knows only the architecture there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("hf_onlinespec", "torch", "transformers", "peft")},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-onlinespec", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="measure plain, assisted and learning generation on the embedded pair",
        description=(
            "Streams prompts of one domain, of a second one and of the first again through four ways of generating: "
            "plain, transformers' assisted generation with its best number of draft tokens, ours with a frozen draft, "
            "and ours learning. No network."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    away = [domain for domain in DOMAINS if domain != HOME_DOMAIN]
    demo.add_argument("--prompts", type=int, default=30, metavar="N", help="prompts in each of the three segments")
    demo.add_argument("--domain", choices=away, default="orders", help="domain of the middle segment, new to the draft")
    demo.add_argument("--new-tokens", type=int, default=64, metavar="N", help="most tokens generated per prompt")
    demo.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy decoding")
    demo.add_argument("--seed", type=int, default=0, help="chooses the prompts and seeds the sampling")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder of demo.json, demo.png")
    demo.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    demo.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="threads of torch")
    return parser
