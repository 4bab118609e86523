"""A draft head on a real chat model: static and evolving, with and without memory and recycled tokens, on a stream it was not trained on.

    python ../shared/tools/real_model.py SMOLLM
    python benchmarks/heads.py SMOLLM HEAD --out heads.jsonl
    python benchmarks/heads.py SMOLLM HEAD --stream held_out --prompts 10 --arms "static alone"      # of the kinds that it was trained on
    python benchmarks/heads.py SMOLLM --arms memory grown                                            # grow_head: from nothing
    python benchmarks/heads.py SMOLLM HEAD --stream held_out --prompts 43 --arms evolving --dtype float32 --check    # equal to plain
    python benchmarks/heads.py SMOLLM --arms memory "evolving exit-4" "static exit-4 alone"          # the target's own first 4 layers

Arms in turns, each request through all of them before the next one, in an order that rotates; learning time is inside. `alone`:
without memory and recycled tokens. The stream that training did not contain: SQL questions, shell commands and order notes, mixed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from before_after import interval
from order_notes import order_note
from recorded import data_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trees import prompts, told

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.share.heads import grown_head
from hf_onlinespec.verify.custom_generate import GenerateFn

ALONE = {"memory_tokens": 0, "recycle": False}
ARMS = ("plain", "memory", "static", "evolving", "static alone", "evolving alone", "grown")
EXITS = (2, 4, 8)  # layers of early exits
ARMS += tuple(f"{how} exit-{n}{alone}" for n in EXITS for how in ("static", "evolving") for alone in ("", " alone"))
KINDS = ("spider", "shell_tldr", "orders")


def unseen(n: int, seed: int) -> list[tuple[str, str]]:
    """(kind, prompt): n of three kinds together."""
    rng = random.Random(seed)
    found = [("orders", f"Write the clerk's note about this order.\n\n{order_note(rng)[0]}") for _ in range(n // 3)]
    for kind in KINDS[:2]:
        lines = (data_folder() / "streams" / f"{kind}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        found += [(kind, json.loads(line)["prompt"]) for line in lines[: n // 3]]
    rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("head", nargs="?", type=Path)
    parser.add_argument("--stream", choices=("unseen", "held_out"), default="unseen")
    parser.add_argument("--prompts", type=int, default=150, help="in all; of held_out: of each kind")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["memory", "static alone", "evolving alone", "evolving"]
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--lookahead", type=int, help="chains of so many; None: the governor decides")
    parser.add_argument(
        "--slope",
        type=float,
        help="of one more verified position, in plain steps, as the governor is told; then times say nothing",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the learning arms")
    parser.add_argument("--check", action="store_true", help="whether outputs are those of plain generate; greedy only")
    parser.add_argument("--cpu", action="store_true", help="processor time, on a machine that does other work too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    now = time.thread_time if args.cpu else time.perf_counter
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    drafts = {arm: made(arm, target, args) for arm in args.arms if arm != "plain"}
    if args.slope is not None:
        for draft in drafts.values():
            told(draft, args.slope)
    stream = unseen(args.prompts, args.seed) if args.stream == "unseen" else prompts(args.prompts, args.seed)
    rows: list[dict[str, Any]] = []
    for at, (kind, prompt) in enumerate(stream):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(args.device)
        turn, outputs = at % len(args.arms), {}
        for arm in [*args.arms[turn:], *args.arms[:turn]]:
            torch.manual_seed(at)
            options: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": args.new_tokens}
            if args.temperature > 0:
                options |= {"temperature": args.temperature, "top_k": 0}
            if arm == "memory":
                options["custom_generate"] = GenerateFn(drafts[arm], None, None)
            elif arm != "plain":
                options |= {"assistant_model": drafts[arm], "onlinespec": not arm.startswith("static")}
            started = now()
            outputs[arm] = target.generate(**inputs, **options)
            row = {"request": at, "kind": kind, "arm": arm, "seconds": now() - started}
            row["tokens"] = outputs[arm].shape[1] - inputs["input_ids"].shape[1]
            if arm != "plain":
                last = drafts[arm].metrics.last
                row |= {"rounds": last.rounds, "drafted": last.drafted_tokens, "update_s": last.update_time_s}
            if args.check:
                row["differs"] = differs(target, inputs, options, outputs[arm])
            rows.append(row)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[-len(args.arms) :])
    report(rows, args.arms)
    for arm, draft in drafts.items():
        print(
            arm,
            json.dumps(draft.metrics.candidates.by_source()),
            draft.metrics.decisions.drafting,
            "|",
            draft.metrics.decisions.learning,
        )


@torch.no_grad()
def differs(target: Any, inputs: Any, options: dict[str, Any], output: Tensor) -> bool:
    """Whether plain `generate` writes something else: asked where the target's likeliest tokens along the output, read at once, are not it."""
    prompt = inputs["input_ids"].shape[1]
    if torch.equal(target(output).logits[0, prompt - 1 : -1].argmax(-1), output[0, prompt:]):
        return False
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=options["max_new_tokens"])
    return not torch.equal(plain, output)


def made(arm: str, target: Any, args: argparse.Namespace) -> Any:
    settings: dict[str, Any] = dict(ALONE) if arm.endswith("alone") else {}
    if arm == "memory":
        return MemoryDraft()
    if args.lookahead is not None:
        settings["lookahead"] = args.lookahead
    for pair in args.set:
        name, _, value = pair.partition("=")
        settings[name] = json.loads(value) if value[:1] in "0123456789[tf" else value
    if arm == "grown":
        return OnlineDraft(grown_head(target), OnlineSpecConfig(**settings))
    if "exit" in arm:
        return OnlineDraft.early_exit(target, int(arm.split()[1].partition("-")[2]), OnlineSpecConfig(**settings))
    head = read_head(args.head, target.config, target.dtype).eval()
    head.share(target)
    return OnlineDraft(head.to(target.device), OnlineSpecConfig(**settings))


def report(rows: list[dict[str, Any]], arms: list[str]) -> None:
    requests = 1 + max(row["request"] for row in rows)
    last = requests * 3 // 4

    def of(arm: str, start: int = 0, kind: str | None = None) -> list[dict[str, Any]]:
        return [r for r in rows if r["arm"] == arm and r["request"] >= start and kind in (None, r["kind"])]

    def length(found: list[dict[str, Any]]) -> float:
        return float(sum(row["tokens"] for row in found) / max(1, sum(row["rounds"] for row in found)))

    kinds = sorted({row["kind"] for row in rows})
    for arm in arms:
        line = f"{arm:15} {sum(r['tokens'] for r in of(arm)) / sum(r['seconds'] for r in of(arm)):6.1f} tokens/s"
        if arm != "plain":
            quarters = [length([r for r in of(arm) if r["request"] * 4 // requests == quarter]) for quarter in range(4)]
            line += f", acceptance length {length(of(arm)):.3f}, by quarter {[round(q, 2) for q in quarters]}, "
            line += ", ".join(f"{kind} {length(of(arm, 0, kind)):.2f}" for kind in kinds)
            if "differs" in rows[0]:
                line += f"; {sum(r['differs'] for r in of(arm))} of {len(of(arm))} outputs are not plain generate's"
            line += (
                f"; learning {sum(r['update_s'] for r in of(arm)) / sum(r['seconds'] for r in of(arm)):.1%} of the time"
            )
        print(line)
    for arm in arms:
        for other in arms[: arms.index(arm)]:
            for start, words in ((0, "all"), (last, "last quarter")):
                pairs = zip(of(other, start), of(arm, start), strict=True)
                ratio, low, high = interval([(a["tokens"], a["seconds"], b["tokens"], b["seconds"]) for a, b in pairs])
                lengths = (
                    ""
                    if "plain" in (arm, other)
                    else f"; acceptance length {length(of(arm, start)) / length(of(other, start)):.3f}"
                )
                print(f"{arm} ÷ {other}, {words}: {ratio:.3f} (90 % interval {low:.3f} to {high:.3f}){lengths}")


if __name__ == "__main__":
    main()
