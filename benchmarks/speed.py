"""How fast each way of generating is on a stream of requests, learning included.

    python benchmarks/speed.py --stream drift --prompts 30 --seeds 3

Every request goes through all chosen arms, in a rotating order, before the next one starts; each arm has a draft of its own,
and each seed new ones. Warm-up and calibration use prompts that are in no stream. Rows are written as they come, so that an
interrupted run keeps what it has: `--report FILE.jsonl` makes its report and figure anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import baselines
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from padded import padded
from streams import STREAMS, segments, spare
from transformers.utils import logging

from hf_onlinespec import OnlineDraft
from hf_onlinespec.embedded import load_pair
from hf_onlinespec.measure.bench import Arm, Runner
from hf_onlinespec.measure.records import OUTPUTS, PLAIN, Record, by_arm, speed_ratio, totals
from hf_onlinespec.share.provenance import provenance

WINDOW = 8  # requests in a running mean
COLOURS = ("#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")  # Okabe and Ito


def make_runner(args: argparse.Namespace, seed: int) -> Runner:
    """A target of its own, with nothing kept from other arms or seeds."""
    pair = load_pair()
    target = padded(pair.target, args.extra_layers) if args.extra_layers else pair.target
    return Runner(target, pair.tokenizer, args.temperature, seed)


def run(args: argparse.Namespace, file: TextIO) -> None:
    """Measures, and writes a header and a line per record."""
    prompts = spare(args.new_tokens)
    stream_of = STREAMS[args.stream]
    first = make_runner(args, 0)
    first.warm_up(prompts, {name: make() for name, make in chosen(args, baselines.Settings(), 0).items()})
    settings = baselines.calibrate(first, prompts[: args.calibration])
    header = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": provenance().to_dict(),
        "node": platform.node(),
        "stream": args.stream,
        "temperature": args.temperature,
        "extra_layers": args.extra_layers,
        "settings": settings.to_dict(),
        "arms": args.arms,
        "requests": sum(len(stream_of(seed, args.prompts, args.new_tokens)) for seed in range(args.seeds)),
    }
    write(file, header)
    done = 0
    for seed in range(args.seeds):
        stream = stream_of(seed, args.prompts, args.new_tokens)
        runner = make_runner(args, seed)
        arms = {name: make() for name, make in chosen(args, settings, seed).items()}
        for arm in arms.values():
            if "assistant_model" in arm and not learns(arm):
                runner.watch_draft(arm)
        for number, (segment, prompt) in enumerate(zip(segments(stream), stream, strict=True)):
            for record in runner.measure(number, segment, prompt, arms):
                write(file, asdict(record))
            done += 1
            if done % 10 == 0:
                print(f"{done} of {header['requests']} requests", file=sys.stderr, flush=True)


def chosen(args: argparse.Namespace, settings: baselines.Settings, seed: int) -> dict[str, Any]:
    arms = baselines.arms(settings, seed)
    return {name: arms[name] for name in args.arms}


def learns(arm: Arm) -> bool:
    return isinstance(arm["assistant_model"], OnlineDraft) and arm.get("onlinespec") is not False


def write(file: TextIO, values: dict[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of finished requests."""
    with open(path, encoding="utf-8") as file:
        header, *rows = [json.loads(line) for line in file]
    records = [Record(**row) for row in rows]
    whole = len(records) // len(header["arms"]) * len(header["arms"])
    return header, records[:whole]


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def parts(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The stream cut into its segments where at most one domain returns, else into its domains."""
    few = len({record.segment for record in records}) <= len({record.domain for record in records}) + 1
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(f"{record.segment} {record.domain}" if few else record.domain, []).append(record)
    return found


def report(header: dict[str, Any], records: list[Record]) -> str:
    """The tables, as Markdown."""
    arms = by_arm(records)
    requests = len(next(iter(arms.values())))
    greedy = header["temperature"] == 0
    target = "the embedded target"
    if header["extra_layers"]:
        target = f"the embedded target, cost-padded with {header['extra_layers']} layers that add exactly zero"
    law = "greedy" if greedy else f"temperature {header['temperature']:g}"
    title = f"Stream {header['stream']}, {law}, {target}"
    lines = [f"# {title}", "", f"`{header['command']}`, {header['date']}, commit {header['commit']}", ""]
    lines += [json.dumps(header["machine"]), "", f"Settings of the baselines: {json.dumps(header['settings'])}", ""]
    lines += [f"{requests} of {header['requests']} requests, {len({r.seed for r in records})} seeds."]
    if requests < header["requests"]:
        lines += ["", "**Interrupted: only the finished requests count.**"]

    lines += ["", f"## Speed: {title}", ""]
    lines += ["| part | arm | acceptance length | decode-only tokens/s | net tokens/s | update share |"]
    lines += ["|---|---|---|---|---|---|"]
    cuts = parts(records)
    whole = {"all": records} | (cuts if len(cuts) > 1 else {})
    for part, some in whole.items():
        for arm, own in by_arm(some).items():
            total = totals(own)
            share = f"{total.update_share:.1%}" if total.update_time_s else ""
            lines += [
                f"| {part} | {arm} | {total.acceptance_length:.2f} | {total.decode_tokens_per_s:.1f} | {total.tokens_per_s:.1f} | {share} |"
            ]
    for subject in baselines.SUBJECTS:
        if subject in arms:
            lines += ["", f"## Net tokens/s of {subject!r} over the others: {title}", ""]
            lines += ["Ratios of sums, with bootstrap 95 % intervals over requests.", ""]
            lines += ratios(whole, subject)
    pairs = [(ours, theirs) for ours, theirs in baselines.SAME_LOOKAHEAD.items() if ours in arms and theirs in arms]
    if pairs:
        lines += ["", f"## Ours frozen over transformers' assisted, the same number of tokens: {title}", ""]
        lines += ["| | " + " | ".join(whole) + " |", "|---" * (len(whole) + 1) + "|"]
        for ours, theirs in pairs:
            cells = [str(speed_ratio(own[ours], own[theirs])) for own in map(by_arm, whole.values())]
            lines.append(f"| {ours} ÷ {theirs} | " + " | ".join(cells) + " |")
    if greedy and PLAIN in arms:
        lines += [
            "",
            f"## Outputs against plain: {title}",
            "",
            "| arm | " + " | ".join(OUTPUTS) + " |",
            "|---|---|---|---|",
        ]
        for arm, own in arms.items():
            found = [r.output for r in own]
            if arm != PLAIN:
                lines += [f"| {arm} | " + " | ".join(str(found.count(kind)) for kind in OUTPUTS) + " |"]
    lines += ["", *overheads(arms, title)]
    return "\n".join(lines) + "\n"


def ratios(cuts: dict[str, list[Record]], subject: str) -> list[str]:
    """One arm against every other and the best static one, in every part of the stream."""
    grouped = {part: by_arm(some) for part, some in cuts.items()}
    others = [arm for arm in grouped["all"] if arm != subject]
    lines = [f"| {subject} ÷ | " + " | ".join(grouped) + " |", "|---" * (len(grouped) + 1) + "|"]
    for other in others:
        cells = [str(speed_ratio(arms[subject], arms[other])) for arms in grouped.values()]
        lines.append(f"| {other} | " + " | ".join(cells) + " |")
    cells = []
    for arms in grouped.values():
        speeds = {arm: totals(own).tokens_per_s for arm, own in arms.items() if arm in baselines.STATIC}
        if not speeds:
            return lines
        best = max(speeds, key=lambda arm: speeds[arm])
        cells.append(f"{speed_ratio(arms[subject], arms[best])}: {best}")
    return [*lines, "| **best static choice in hindsight** | " + " | ".join(cells) + " |"]


def overheads(arms: dict[str, list[Record]], title: str) -> list[str]:
    """What a loop costs beside the bare forwards of target and draft, where the draft does not learn."""
    lines = [
        f"## Time ÷ bare forwards: {title}",
        "",
        "Bare forwards: between entering and leaving the forward of target and draft, by hooks on both. "
        "Rounds: all of our decoding loop; whole call: all of `generate`.",
        "",
        "| arm | rounds ÷ bare forwards | whole call ÷ bare forwards | target's share of the call | draft's share |",
        "|---|---|---|---|---|",
    ]
    for arm, own in arms.items():
        wall_s, loop_s = sum(r.wall_time_s for r in own), sum(r.loop_time_s for r in own)
        target_s, draft_s = sum(r.target_forward_s for r in own), sum(r.draft_forward_s for r in own)
        if arm == PLAIN or draft_s:
            rounds = f"{loop_s / (target_s + draft_s):.3f}" if loop_s else "–"
            cells = [
                rounds,
                f"{wall_s / (target_s + draft_s):.3f}",
                f"{target_s / wall_s:.0%}",
                f"{draft_s / wall_s:.0%}",
            ]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def figure(header: dict[str, Any], records: list[Record]) -> Figure:
    """Net tokens/s over the stream, one line per arm: a running mean inside each part, over all seeds."""
    cuts = parts(records)
    cuts = cuts if any(" " in part for part in cuts) else {"all": records}
    drawn = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    names = list(by_arm(records))
    others = [name for name in names if name not in (PLAIN, baselines.OURS)]
    styles = {
        name: (COLOURS[i % len(COLOURS)], 1.0, ("-", "--", ":")[i // len(COLOURS)]) for i, name in enumerate(others)
    }
    styles |= {PLAIN: ("#7f7f7f", 2.0, "-"), baselines.OURS: ("#009e73", 2.5, "-")}
    for at, (part, some) in enumerate(cuts.items()):
        for arm, own in by_arm(some).items():
            numbers = sorted({r.request for r in own})
            speeds = []
            for number in numbers:
                window = [r for r in own if number - WINDOW < r.request <= number]
                speeds.append(totals(window).tokens_per_s)
            colour, width, dashes = styles[arm]
            label = arm if at == 0 else "_nolegend_"
            axes.plot([n + 1 for n in numbers], speeds, color=colour, linewidth=width, linestyle=dashes, label=label)
        edge = min(r.request for r in some) + 0.5
        if at:
            axes.axvline(edge, color="#444444", linewidth=0.8, linestyle="--")
        if len(cuts) > 1:
            axes.annotate(
                part, (edge, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points"
            )
    axes.set_xlim(0.5, max(r.request for r in records) + 1.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("request")
    axes.set_ylabel("tokens/s, learning included")
    padding = f", target cost-padded with {header['extra_layers']} layers" if header["extra_layers"] else ""
    axes.set_title(
        f"net speed, stream {header['stream']}{padding} (mean of the last {WINDOW} requests)", loc="left", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def show(path: Path) -> None:
    """Writes the report and the figure beside the rows."""
    header, records = read(path)
    if not records:
        print("No request was finished.", file=sys.stderr)
        return
    text = report(header, records)
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    figure(header, records).savefig(path.with_suffix(".png"), dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    names = list(baselines.arms(baselines.Settings(), 0))
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stream", choices=STREAMS, default="drift")
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=f"of {names}")
    parser.add_argument("--prompts", type=int, default=30, metavar="N", help="per segment or stream, see streams.py")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add_argument("--extra-layers", type=int, default=0, metavar="N", help="cost-pads the target, see padded.py")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="orders of prompts, first values, draws")
    parser.add_argument(
        "--calibration", type=int, default=12, metavar="N", help="spare prompts that baselines are set by"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="FILE.jsonl", help="measures nothing: reports on these rows")
    args = parser.parse_args(argv)
    if args.report:
        show(args.report)
        return
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    padding = f"_padded{args.extra_layers}" if args.extra_layers else ""
    path = args.out / f"speed_{args.stream}_T{args.temperature:g}{padding}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        try:
            run(args, file)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
    if path.stat().st_size:
        show(path)


if __name__ == "__main__":
    main()
