"""Batches against plain batched decoding: processor time by half of the stream, and whether the answers are the same.

    python benchmarks/batches.py --rows 1 2 4 8
    python benchmarks/batches.py --padded 24 --rows 2 4 8 16                                # cost-padded target, see padded.py
    python benchmarks/batches.py --model SMOLLM --dtype bfloat16 --arms plain memory        # chat prompts of seven kinds

Greedy, one thread; the arms take turns on each batch, in an order that rotates. Ratios are of speed, with 90 % intervals over batches.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from before_after import interval
from padded import padded
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding
from transformers.utils import logging
from trees import prompts as chat_prompts

from hf_onlinespec import OnlineDraft, online_memory
from hf_onlinespec.embedded import DOMAINS, load_draft, load_pair, prompts

ARMS = ("plain", "memory", "draft")


def loaded(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """Target, tokenizer, and prompts in a random order."""
    if args.model is None:
        pair = load_pair()
        texts = [text for domain in DOMAINS for text in prompts(domain)[: args.prompts]]
        target, tokenizer = padded(pair.target, args.padded), pair.tokenizer
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        texts = [text for _, text in chat_prompts(args.prompts, 0)]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    random.Random(1).shuffle(texts)
    return target, tokenizer, texts[: args.prompts]


def batch(tokenizer: Any, texts: list[str], chat: bool) -> BatchEncoding:
    if not chat:
        return tokenizer(texts, return_tensors="pt", padding=True)  # type: ignore[no-any-return]
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )


def written(new: torch.Tensor, end: int) -> int:
    """Tokens of rows (rows, n) without those behind an end."""
    ended = (new == end).long().cumsum(1)
    return int(((ended == 0) | ((ended == 1) & (new == end))).sum())


def run(target: Any, tokenizer: Any, texts: list[str], rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of every arm in batches of so many rows."""
    starts = range(0, len(texts) - rows + 1, rows)
    batches = [batch(tokenizer, texts[i : i + rows], args.model is not None) for i in starts]
    drafts = {"memory": online_memory(target, anew=True)}
    if "draft" in args.arms:
        drafts["draft"] = OnlineDraft(load_draft())
    ways: dict[str, dict[str, Any]] = {"plain": {}, "memory": {"onlinespec": True}}
    ways["draft"] = {"assistant_model": drafts.get("draft")}
    measured: dict[str, list[tuple[int, float]]] = {arm: [] for arm in args.arms}
    same, every = 0, 0
    for at, inputs in enumerate(batches):
        outputs = {}
        turn = at % len(args.arms)
        for arm in [*args.arms[turn:], *args.arms[:turn]]:
            started = time.thread_time()
            out = target.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, **ways[arm])
            seconds = time.thread_time() - started
            outputs[arm] = out
            measured[arm].append((written(out[:, inputs["input_ids"].shape[1] :], tokenizer.eos_token_id), seconds))
        others = [out for arm, out in outputs.items() if arm != "plain"]
        same += sum(torch.equal(outputs["plain"], out) for out in others)
        every += len(others)
    print(f"{rows} rows, {len(batches)} batches, {same} of {every} outputs the same as plain's")
    half = len(batches) // 2
    for arm in args.arms:
        rate = sum(n for n, _ in measured[arm]) / sum(s for _, s in measured[arm])
        line = f"  {arm:6} {rate:7.1f} tokens/s"
        if arm != "plain":
            for start, name in ((0, "all"), (half, "second half")):
                pairs = list(zip(measured["plain"][start:], measured[arm][start:], strict=True))
                ratio, low, high = interval([(*before, *now) for before, now in pairs])
                line += f"; ÷ plain, {name}: {ratio:.3f} ({low:.3f} to {high:.3f})"
            metrics = drafts[arm].metrics
            line += f"; {metrics.acceptance_length:.2f} tokens a round of a row; {metrics.decisions.drafting}"
        print(line, flush=True)
    return {arm: sum(n for n, _ in measured[arm]) / sum(s for _, s in measured[arm]) for arm in args.arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a chat model; None: the embedded pair")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--padded", type=int, default=0, metavar="N", help="layers that the embedded target is padded with"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    target, tokenizer, texts = loaded(args)
    rates = {rows: run(target, tokenizer, texts, rows, args) for rows in args.rows}
    for arm in args.arms:
        over = ", ".join(f"{rows} rows {own[arm] / rates[args.rows[0]][arm]:.2f}" for rows, own in rates.items())
        print(f"{arm}: tokens/s over those of {args.rows[0]} rows: {over}")


if __name__ == "__main__":
    main()
