"""What learning is worth on a domain that the draft has never seen, and what it costs: acceptance lengths and speed ratios.

    python benchmarks/studies/unseen_domain.py --domain orders --temperature 0 --out benchmarks/results

One segment of prompts, several seeds (order of the prompts, first values of the adapter, sampling). Frozen and learning
draft run on every seed; plain generation and transformers' assisted generation beside them on the first. Arms take turns
request by request, each with a draft of its own; learning time is inside every speed of the learning arm.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import DOMAINS, load_draft, load_pair, prompts
from hf_onlinespec.measure.bench import ASSISTANT_TOKENS, rotated, stock_draft
from hf_onlinespec.share.provenance import provenance

# The neural draft by itself, at a schedule that does not look at the clock.
FIXED = {"lookahead": 5, "update_every": 1, "memory_tokens": 0}
EARLY_TOKENS = 1000  # "after the first 1,000 generated tokens"


@dataclass(frozen=True)
class Row:
    """One request through one arm."""

    seed: int
    request: int
    arm: str
    new_tokens: int
    target_forwards: int
    wall_time_s: float
    draft_time_s: float
    target_time_s: float
    update_time_s: float
    same_as_plain: bool | None


def run_seed(args: argparse.Namespace, seed: int, whole: bool) -> list[Row]:
    pair = load_pair()
    forwards = [0]

    def count(*_: object) -> None:
        forwards[0] += 1

    pair.target.register_forward_hook(count)
    rng = random.Random(seed)
    texts = prompts(args.domain)
    texts = rng.sample(texts, len(texts))
    stream, spare = texts[: args.prompts], texts[args.prompts :][:8]
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_k": 0}
    config = OnlineSpecConfig(**(FIXED | json.loads(args.config) | {"seed": seed}))

    def timed(text: str, arm: dict[str, Any], at: int) -> tuple[torch.Tensor, int, float]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        torch.manual_seed(1000 * seed + at)
        started = time.perf_counter()
        out = pair.target.generate(**inputs, **options, **arm)
        return out, out.shape[1] - inputs["input_ids"].shape[1], time.perf_counter() - started

    warm = OnlineDraft(load_draft(), config)
    for text in spare[:2]:
        timed(text, {"assistant_model": warm}, 0)
    arms: dict[str, dict[str, Any]] = {
        "frozen": {"assistant_model": OnlineDraft(load_draft(), config), "onlinespec": False},
        "learning": {"assistant_model": OnlineDraft(load_draft(), config)},
    }
    if whole:
        speeds = {}
        for k in ASSISTANT_TOKENS:
            arm = {"assistant_model": stock_draft(k)}
            results = [timed(text, arm, i) for i, text in enumerate(spare)]
            speeds[k] = sum(n for _, n, _ in results) / sum(s for _, _, s in results)
        best = max(speeds, key=lambda k: speeds[k])
        same_lookahead = {"assistant_model": stock_draft(config.lookahead)}
        print(
            f"transformers' assisted: tokens/s by assistant tokens { {k: round(v, 1) for k, v in speeds.items()} }",
            flush=True,
        )
        arms = {
            "plain": {},
            f"transformers k={best} (best)": {"assistant_model": stock_draft(best)},
            f"transformers k={config.lookahead} (as ours)": same_lookahead,
        } | arms

    rows: list[Row] = []
    for at, text in enumerate(stream):
        outputs = {}
        for name in rotated(tuple(arms), at):
            before = forwards[0]
            outputs[name], new_tokens, wall_time_s = timed(text, arms[name], at)
            draft = arms[name].get("assistant_model")
            last = draft.metrics.last if isinstance(draft, OnlineDraft) else None
            rows.append(
                Row(
                    seed,
                    at,
                    name,
                    new_tokens,
                    forwards[0] - before,
                    wall_time_s,
                    last.draft_time_s if last else 0.0,
                    last.target_time_s if last else 0.0,
                    last.update_time_s if last else 0.0,
                    None,
                )
            )
        if whole and args.temperature == 0:
            for i in range(len(rows) - len(arms), len(rows)):
                same = torch.equal(outputs["plain"], outputs[rows[i].arm])
                rows[i] = Row(**(asdict(rows[i]) | {"same_as_plain": same}))
    return rows


def acceptance_length(rows: list[Row]) -> float:
    return sum(r.new_tokens for r in rows) / sum(r.target_forwards for r in rows)


def report(rows: list[Row], args: argparse.Namespace) -> str:
    lines = [f"## {args.domain}, temperature {args.temperature:g}, {args.prompts} prompts × {args.new_tokens} tokens\n"]
    lines += ["| seed | arm | AL by quarter | | | | AL after 1,000 tokens |", "|---|---|---|---|---|---|---|"]
    quarter = args.prompts // 4
    for seed in sorted({r.seed for r in rows}):
        late: dict[str, float] = {}
        end: dict[str, float] = {}
        for arm in ("frozen", "learning"):
            own = [r for r in rows if r.seed == seed and r.arm == arm]
            parts = [acceptance_length(own[i * quarter : (i + 1) * quarter]) for i in range(4)]
            generated, first = 0, 0
            while generated < EARLY_TOKENS and first < len(own) - 1:
                generated += own[first].new_tokens
                first += 1
            late[arm], end[arm] = acceptance_length(own[first:]), parts[3]
            lines.append(f"| {seed} | {arm} | " + " | ".join(f"{p:.2f}" for p in parts) + f" | {late[arm]:.2f} |")
        ratio = f"**{end['learning'] / end['frozen']:.2f}×**"
        lines.append(f"| {seed} | learning ÷ frozen | | | | {ratio} | **{late['learning'] / late['frozen']:.2f}×** |")
    first_seed = min(r.seed for r in rows)
    whole = [r for r in rows if r.seed == first_seed]
    arms = list(dict.fromkeys(r.arm for r in whole if r.arm != "plain"))
    arms = ["plain", *arms] if any(r.arm == "plain" for r in whole) else arms
    by_arm = {arm: [r for r in whole if r.arm == arm] for arm in arms}
    wall = {arm: sum(r.wall_time_s for r in own) for arm, own in by_arm.items()}
    tokens = {arm: sum(r.new_tokens for r in own) for arm, own in by_arm.items()}
    lines += ["", f"Speed, seed {first_seed}, all arms in turn; update time inside net tokens/s:\n"]
    lines += [
        "| arm | AL | decode-only tokens/s | net tokens/s | draft | target | update | rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, own in by_arm.items():
        shares = [
            sum(getattr(r, name) for r in own) / wall[arm]
            for name in ("draft_time_s", "target_time_s", "update_time_s")
        ]
        decode = tokens[arm] / (wall[arm] - sum(r.update_time_s for r in own))
        known = own[0].draft_time_s > 0
        split = [f"{s:.0%}" for s in [*shares, 1 - sum(shares)]] if known else ["–"] * 4
        lines.append(
            f"| {arm} | {acceptance_length(own):.2f} | {decode:.1f} | {tokens[arm] / wall[arm]:.1f} | "
            + " | ".join(split)
            + " |"
        )
    lines += ["", "| net tokens/s ratio | of sums | median over requests |", "|---|---|---|"]
    pairs = [("learning", arm) for arm in arms if arm != "learning"]
    pairs += [("frozen", arm) for arm in arms if arm.startswith("transformers")]
    for ours, other in pairs:
        median = statistics.median(
            (a.new_tokens / a.wall_time_s) / (b.new_tokens / b.wall_time_s)
            for a, b in zip(by_arm[ours], by_arm[other], strict=True)
        )
        total = tokens[ours] / wall[ours] / (tokens[other] / wall[other])
        lines.append(f"| {ours} ÷ {other} | {total:.2f} | {median:.2f} |")
    compared = [r for r in whole if r.same_as_plain is not None and r.arm != "plain"]
    if compared:
        for arm in arms[1:]:
            same = [r.same_as_plain for r in compared if r.arm == arm]
            lines.append(f"\nIdentical to plain, {arm}: {sum(map(bool, same))} of {len(same)}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", choices=DOMAINS, default="orders")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--config", default="{}", help="JSON settings of our drafts, beside or instead of the fixed ones"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: list[Row] = []
    for seed in range(args.seeds):
        rows += run_seed(args, seed, whole=seed == 0)
    text = report(rows, args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"unseen_{args.domain}_T{args.temperature:g}"
    command = f"python benchmarks/studies/unseen_domain.py --domain {args.domain} --temperature {args.temperature:g} --prompts {args.prompts} --new-tokens {args.new_tokens} --seeds {args.seeds} --threads {args.threads} --config '{args.config}'"
    Path(f"{stem}.md").write_text(f"`{command}`\n\n{json.dumps(provenance().to_dict())}\n\n{text}")
    with open(Path(f"{stem}.jsonl"), "w") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
