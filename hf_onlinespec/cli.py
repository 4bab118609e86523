"""The command line: `hf-onlinespec demo` and `bench` show what a learning draft gains and costs, `record` and `regret` why."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import card
from .bench import (
    OWN_ARMS,
    Prompt,
    Record,
    Runner,
    by_arm,
    calibrate_own,
    check_lengths,
    load_prompts,
    loaded,
    own_arms,
    verdict,
)
from .cli_drafts import add_commands
from .config import OnlineSpecConfig
from .demo import Bench, Settings, choose_prompts, summarise
from .embedded import DOMAINS, FOLDER, HOME_DOMAIN
from .errors import ConfigError, MissingExtraError, OnlineSpecError
from .machine import machine
from .recording import Recording, record
from .regret import evaluate
from .vocabulary import check_vocabularies

EVOLVED = "evolved"  # folder of the demo's evolved draft, beside its result
FAILED, INTERRUPTED = 2, 130  # exit codes: a wrong argument or a missing package; Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; arguments that argparse refuses exit with code 2 at once."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except OnlineSpecError as error:
        print(f"hf-onlinespec: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hf-onlinespec: interrupted; no result was completed.", file=sys.stderr)
        return INTERRUPTED


def _check_extra(command: str) -> None:
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'The {command} needs {" and ".join(missing)}: run pip install "hf_onlinespec[demo]" and try again.'
        )


def _demo(arguments: argparse.Namespace) -> int:
    _check_extra("demo")
    from . import plots  # only now: it needs the optional packages

    names = ("prompts", "domain", "new_tokens", "temperature", "seed", "threads")
    settings = Settings(**{name: vars(arguments)[name] for name in names})
    out, as_json = arguments.out, arguments.json
    _check_folder(out, f"--out {out}")
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
    card.write(bench.evolved.artifact(), out / EVOLVED)
    if as_json:
        print(text)
    else:
        print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}; the evolved draft, with its card: {out / EVOLVED}")
        plots.report(result)
    return INTERRUPTED if interrupted else 0


def _own_models(
    arguments: argparse.Namespace, prompts: Sequence[Prompt], compares: bool = False
) -> tuple[Any, Any, Any]:
    """Target, draft and tokenizer of `bench` and `record`; whatever can be refused is refused before weights are read.

    Args:
        compares: whether transformers' own assisted generation is measured too.
    """
    names = {"--target": arguments.target, "--draft": arguments.draft}
    if sum(name is not None for name in names.values()) != (0 if arguments.embedded else 2):
        raise ConfigError("Give both --target and --draft, or --embedded alone.")
    dtype = arguments.dtype
    if arguments.embedded:
        names = {"--target": str(FOLDER / "target"), "--draft": str(FOLDER / "draft")}
        dtype = "float32" if dtype == "auto" else dtype  # it is stored in half of its precision
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without it
        raise ConfigError(f"--device {arguments.device}: torch cannot use it here. Use cpu, for one.") from error
    logging.set_verbosity_error()  # transformers remarks on its own assisted generation
    logging.disable_progress_bar()
    config, other = (loaded(AutoConfig, option, name) for option, name in names.items())
    check_vocabularies(config, other)
    sizes = [c.get_text_config().vocab_size for c in (config, other)]
    if compares and sizes[0] != sizes[1]:
        raise ConfigError(
            f"The target has {sizes[0]} tokens in its vocabulary and the draft {sizes[1]}: our loop takes that, but transformers' "
            "assisted generation, which is measured beside it, does not. Take a draft of the target's size."
        )
    tokenizer = loaded(AutoTokenizer, "--target", names["--target"])
    check_lengths(prompts, tokenizer, config)
    models = (loaded(AutoModelForCausalLM, option, name, dtype=dtype) for option, name in names.items())
    target, draft = (model.to(arguments.device).eval() for model in models)
    return target, draft, tokenizer


def _bench(arguments: argparse.Namespace) -> int:
    _check_extra("bench")
    from . import plots  # only now: it needs the optional packages

    for option, value, least in (
        ("--new-tokens", arguments.new_tokens, 1),
        ("--limit", arguments.limit, 1),
        ("--temperature", arguments.temperature, 0),
    ):
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"{option} {value}: expected a value of at least {least}.")
    prompts = load_prompts(arguments.prompts, arguments.limit, arguments.new_tokens)
    target, draft, tokenizer = _own_models(arguments, prompts, compares=True)
    runner = Runner(target, tokenizer, arguments.temperature, arguments.seed)
    calibration = calibrate_own(runner, draft, prompts)
    print(calibration, flush=True)
    arms = own_arms(draft, calibration.chosen)
    records: list[Record] = []
    interrupted = False
    try:
        for number, prompt in enumerate(prompts):
            records += runner.measure(number, 1, prompt, arms)
            if (number + 1) % plots.PROGRESS_EVERY == 0:
                print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not records:
            raise
        interrupted = True
        print("Interrupted: only the finished prompts count.")
    plots.comparison({OWN_ARMS[arm]: some for arm, some in by_arm(records).items()})
    print(verdict(records))
    return INTERRUPTED if interrupted else 0


def _record(arguments: argparse.Namespace) -> int:
    if arguments.new_tokens < 1 or not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(
            f"--new-tokens {arguments.new_tokens}, --temperature {arguments.temperature}: expected at least 1 and at least 0."
        )
    _check_folder(arguments.out.parent, f"--out {arguments.out}")
    prompts = load_prompts(arguments.prompts, arguments.limit, arguments.new_tokens)
    target, _, tokenizer = _own_models(arguments, prompts)
    found = []
    for recorded in record(target, tokenizer, prompts, arguments.temperature, arguments.seed):
        found.append(recorded)
        if len(found) % 10 == 0:
            print(f"{len(found)} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    Recording(found, arguments.temperature, arguments.draft or "").save(arguments.out)
    print(f"Written: {arguments.out}. It holds your prompts and the answers as tokens.")
    return 0


def _regret(arguments: argparse.Namespace) -> int:
    _check_extra("regret")
    from . import plots  # only now: it needs the optional packages

    recording = Recording.load(arguments.run_file)
    try:
        settings = json.loads(arguments.config)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config {arguments.config}: it is no JSON ({error.msg}).") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {arguments.config}: expected a JSON object of settings.")
    config = OnlineSpecConfig.from_dict(settings)
    _check_folder(arguments.out, f"--out {arguments.out}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = arguments.draft or recording.draft or str(FOLDER / "draft")
    dtype = "float32" if name == str(FOLDER / "draft") else "auto"

    def model() -> Any:
        return loaded(AutoModelForCausalLM, "--draft", name, dtype=dtype).eval()

    def show(text: str) -> None:
        print(f"{text} …", file=sys.stderr, flush=True)

    report = evaluate(recording, model, config, arguments.lookahead, show=show)
    plots.regret_figure(report).savefig(arguments.out / "regret.png", dpi=150)
    (arguments.out / "regret.json").write_text(
        json.dumps(_finite(asdict(report)), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    print(report.text())
    print(f"Written: {arguments.out / 'regret.json'}, {arguments.out / 'regret.png'}")
    return 0


def _finite(value: Any) -> Any:
    """The same with null where JSON has no number: infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: the folder cannot be made ({error.strerror}). Name another one.") from error


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
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder of what is written")
    demo.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    demo.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="threads of torch")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench",
        help="measure whether a learning draft pays for your own models and prompts",
        description=(
            "Sends your prompts through three ways of generating, request by request: plain, transformers' assisted "
            "generation with its best number of draft tokens, and ours learning. The last line says whether it pays."
        ),
    )
    _add_models(bench)
    bench.set_defaults(run=_bench)

    keep = commands.add_parser(
        "record",
        help="record what a target says to your prompts, for `regret`",
        description="Writes the target's answers and laws to a file, so that learning can be replayed without the target.",
    )
    _add_models(keep)
    keep.add_argument("--out", type=Path, required=True, metavar="RUN", help="the recording: a .safetensors file")
    keep.set_defaults(run=_record)

    regret = commands.add_parser(
        "regret",
        help="what learning lost against hindsight on a recorded stream, and what theory promises",
        description=(
            "Replays a recorded stream through a learning draft, and through the best adapters in hindsight, for the whole "
            "stream and for each of its segments (runs of one domain)."
        ),
    )
    regret.add_argument("run_file", type=Path, metavar="RUN", help="a recording made by hf-onlinespec record")
    regret.add_argument("--draft", metavar="NAME_OR_PATH", help="the draft (default: the one that was recorded for)")
    regret.add_argument("--config", default="{}", metavar="JSON", help='settings of the draft, such as {"lr": 1e-3}')
    regret.add_argument("--lookahead", type=int, default=5, metavar="K", help="drafted tokens (default: %(default)s)")
    regret.add_argument(
        "--out", type=Path, default=Path("regret-out"), metavar="DIR", help="folder of regret.json, regret.png"
    )
    regret.set_defaults(run=_regret)
    add_commands(commands)
    return parser


def _add_models(bench: argparse.ArgumentParser) -> None:
    """Which models, which prompts, and how they are run."""
    for name, help in (("target", "the model to be accelerated"), ("draft", "a smaller one with the same tokenizer")):
        bench.add_argument(f"--{name}", metavar="NAME_OR_PATH", help=f"{help}: a folder or a name on the Hub")
    bench.add_argument("--embedded", action="store_true", help="use the pair that ships with the package")
    bench.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help='lines of JSON, {"prompt": "..."}, in their order'
    )
    bench.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="most tokens generated per prompt (default: %(default)s)",
    )
    bench.add_argument("--limit", type=int, metavar="N", help="use the first N prompts only (default: all)")
    bench.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: greedy decoding (default: %(default)s)"
    )
    bench.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of both models (default: as stored)",
    )
    bench.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where both models run (default: %(default)s)",
    )
    bench.add_argument("--seed", type=int, default=0, help="seeds the sampling (default: %(default)s)")
