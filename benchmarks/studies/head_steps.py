"""How many drafted steps a head should learn from while it serves: acceptance length and learning time at equal numbers of gradient steps.

    python benchmarks/studies/head_steps.py embedded --lr 0.01    # the embedded pair's target, a head begun from its weights
    python benchmarks/studies/head_steps.py embedded HEAD         # a trained head
    python benchmarks/studies/head_steps.py SMOLLM HEAD --requests 150 --new-tokens 64

Chains of `--lookahead` tokens, greedy, one gradient step on each request and two on remembered ones; no memory, no recycled tokens.
Arms in turns, each request through all of them before the next one, in an order that rotates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.share.heads import grown_head

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from heads import unseen
from recorded import AWAY, HARD, Source


def chat_stream(args: argparse.Namespace, target: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Inputs of SQL questions, shell commands and order notes, mixed."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(target.device)
        for _, prompt in unseen(args.requests, args.seed)
    ]


def embedded_stream(args: argparse.Namespace, source: Source) -> list[dict[str, Tensor]]:
    """Inputs of order notes and SQL questions, in turns."""
    texts = [source.texts(domain, args.seed) for domain in (AWAY, HARD)]
    turns = [text for pair in zip(*texts, strict=False) for text in pair][: args.requests]
    return [source.tokenizer(text, return_tensors="pt") for text in turns]


def head_of(target: PreTrainedModel, folder: Path | None) -> Head:
    if folder is None:
        return grown_head(target)
    head = read_head(folder, target.config, target.dtype).eval()
    head.share(target)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, or 'embedded'")
    parser.add_argument("head", nargs="?", type=Path, help="None: one from the target's weights")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 1, 2, 3], help="arms; 0: nothing is learned")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--lr", type=float, default=OnlineSpecConfig().lr)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if args.model == "embedded":
        source = Source()
        target, stream = source.target, embedded_stream(args, source)
    else:
        target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        stream = chat_stream(args, target)
    common: dict[str, Any] = dict(lookahead=args.lookahead, update_every=1, memory_tokens=0, recycle=False)
    common |= dict(lr=args.lr, seed=args.seed)
    arms = {}
    for steps in args.steps:
        settings = OnlineSpecConfig(head_steps=max(1, steps), **common)
        arms[steps] = OnlineDraft(head_of(target, args.head), settings)
    counts: dict[int, list[tuple[int, int]]] = {steps: [] for steps in arms}  # tokens and rounds of each request
    for at, inputs in enumerate(stream):
        turn = at % len(args.steps)
        for steps in [*args.steps[turn:], *args.steps[:turn]]:
            how = dict(max_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0)
            target.generate(**inputs, **how, assistant_model=arms[steps], onlinespec=steps > 0)
            last = arms[steps].metrics.last
            counts[steps].append((last.new_tokens, last.rounds))
    report(arms, counts)


def report(arms: dict[int, OnlineDraft], counts: dict[int, list[tuple[int, int]]]) -> None:
    def length(some: list[tuple[int, int]]) -> float:
        return sum(tokens for tokens, _ in some) / sum(rounds for _, rounds in some)

    one = None  # seconds of a gradient step of the first arm that learns
    print("| head_steps | acceptance length | first quarter | last half | gradient steps | s per step | ÷ the first |")
    print("|---" * 7 + "|")
    for steps, draft in arms.items():
        metrics, own = draft.metrics, counts[steps]
        assert metrics.failed_updates == 0
        parts = (own, own[: max(1, len(own) // 4)], own[len(own) // 2 :])
        cells = [f"{steps or 'static'}", *(f"{length(part):.3f}" for part in parts), str(draft.steps)]
        if draft.steps:
            step_s = metrics.update_time_s / draft.steps
            one = one or step_s
            cells += [f"{step_s:.3f}", f"{step_s / one:.2f}"]
        print(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")


if __name__ == "__main__":
    main()
