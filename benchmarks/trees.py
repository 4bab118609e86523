"""Trees of candidates without a draft on a real chat model, beside chains, plain generation and transformers' prompt lookup.

    python ../shared/tools/real_model.py SMOLLM
    git worktree add ../before COMMIT                      # the last one that verified chains
    python benchmarks/trees.py SMOLLM --before ../before --prompts 10 --out greedy.jsonl
    python benchmarks/trees.py SMOLLM --before ../before --temperature 0.8 --top-p 0.95 --out sampled.jsonl
    python benchmarks/trees.py SMOLLM --arms plain ours --dtype float32 --prompts 43        # equal to plain?

Arms in turns, each request through all of them before the next one, in an order that rotates. What is remembered stays from request
to request. `--slope` tells the governor what one more verified position costs, in plain steps, in place of what it has measured: then
its trees are those of another machine, and times say nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from before_after import import_before, interval
from recorded import data_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.verify.custom_generate import GenerateFn

KINDS = ("mt_bench", "chat_arena", "instructions", "gsm8k", "mbpp", "spider", "nq_open")
ARMS = ("plain", "lookup 3", "lookup 10", "before", "ours")


def prompts(n: int, seed: int) -> list[tuple[str, str]]:
    """(kind, prompt): the first n of each kind, shuffled."""
    found = []
    for kind in KINDS:
        lines = (
            (data_folder() / "streams" / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n")
        )  # not splitlines: U+2028
        found += [(kind, json.loads(line)["prompt"]) for line in lines[:n] if line]
    random.Random(seed).shuffle(found)
    return found


def told(draft: MemoryDraft, slope: float) -> MemoryDraft:
    """A draft whose governor is told the cost of verifying."""
    verify = draft.governor.costs.verify
    verify.at = lambda k: 1 + slope * k  # type: ignore[method-assign]
    verify.step = lambda k: slope  # type: ignore[method-assign]
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--prompts", type=int, default=30, help="of each kind")
    parser.add_argument(
        "--skip", type=int, default=0, help="prompts, to go on where an earlier run was ended; the memory begins anew"
    )
    parser.add_argument("--most", type=int, help="prompts behind them; None: all")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slope", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    options: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": args.new_tokens}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    drafts: dict[str, Any] = {}
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "lookup 3": lambda: {"prompt_lookup_num_tokens": 3},
        "lookup 10": lambda: {"prompt_lookup_num_tokens": 10},
    }
    if "before" in args.arms:
        import_before(args.before)
        from hf_onlinespec_before.commit.memory_draft import MemoryDraft as Before  # type: ignore[import-not-found]
        from hf_onlinespec_before.verify.custom_generate import GenerateFn as BeforeFn  # type: ignore[import-not-found]

        drafts["before"] = Before()
        arms["before"] = lambda: {"custom_generate": BeforeFn(drafts["before"], None, None)}
    drafts["ours"] = MemoryDraft()
    if args.slope is not None:
        drafts = {name: told(draft, args.slope) for name, draft in drafts.items()}
    arms["ours"] = lambda: {"custom_generate": GenerateFn(drafts["ours"], None, None)}

    rows: list[dict[str, Any]] = []
    stream = prompts(args.prompts, args.seed)[args.skip :][: args.most]
    for at, (kind, prompt) in enumerate(stream):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(args.device)
        outputs = {}
        turn = at % len(args.arms)
        for arm in [*args.arms[turn:], *args.arms[:turn]]:
            torch.manual_seed(at)
            started = time.perf_counter()
            outputs[arm] = target.generate(**inputs, **options, **arms[arm]())
            row = {"request": at, "kind": kind, "arm": arm, "seconds": time.perf_counter() - started}
            row["tokens"] = outputs[arm].shape[1] - inputs["input_ids"].shape[1]
            if arm in drafts:
                last = drafts[arm].metrics.last
                row |= {"rounds": last.rounds, "drafted": last.drafted_tokens, "draft_s": last.draft_time_s}
            rows.append(row)
        for arm in args.arms:
            rows[-1].setdefault("differs", [])
            if "plain" in outputs and not torch.equal(outputs[arm], outputs["plain"]):
                rows[-1]["differs"].append(arm)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[-len(args.arms) :])
    report(rows, args.arms, sampled=args.temperature > 0)
    print(drafts["ours"].metrics.summary())
    print("by source:", json.dumps(drafts["ours"].metrics.candidates.by_source()))


def report(rows: list[dict[str, Any]], arms: list[str], sampled: bool) -> None:
    requests = 1 + max(row["request"] for row in rows)

    def of(arm: str, start: int = 0, kind: str | None = None) -> list[dict[str, Any]]:
        rest = (row for row in rows if row["arm"] == arm and row["request"] >= start)
        return [row for row in rest if kind is None or row["kind"] == kind]

    def length(found: list[dict[str, Any]]) -> float:
        return float(sum(row["tokens"] for row in found) / max(1, sum(row["rounds"] for row in found)))

    for arm in arms:
        found = of(arm)
        line = f"{arm:10} {sum(row['tokens'] for row in found) / sum(row['seconds'] for row in found):6.1f} tokens/s"
        if "rounds" in found[0]:
            per_round = sum(row["drafted"] for row in found) / sum(row["rounds"] for row in found)
            line += f", acceptance length {length(found):.3f}, second half {length(of(arm, requests // 2)):.3f}, "
            line += f"{per_round:.1f} candidates a round; "
            line += ", ".join(f"{kind} {length(of(arm, 0, kind)):.2f}" for kind in KINDS if of(arm, 0, kind))
        print(line)
    ours = of("ours")
    for arm in arms:
        if arm != "ours":
            pairs = [(b["tokens"], b["seconds"], a["tokens"], a["seconds"]) for a, b in zip(ours, of(arm), strict=True)]
            ratio, low, high = interval(pairs)
            print(f"ours / {arm}: {ratio:.3f} (90 % interval {low:.3f} to {high:.3f}) over {len(pairs)} requests")
    if not sampled:
        differing = [arm for row in rows for arm in row.get("differs", ())]
        print("outputs that differ from plain's:", {arm: differing.count(arm) for arm in arms if arm != "plain"})


if __name__ == "__main__":
    main()
