"""Whether the privacy gate sees what comes out of a draft, and passes what has memorised nothing.

    python benchmarks/memorization.py --domain orders --requests 30 --seeds 20
    python benchmarks/memorization.py --requests 20 --seeds 1 --repeats 1 4 16
    python benchmarks/memorization.py --requests 20 --seeds 1 --repeats 1 2 4 8 16 --again 2
    python benchmarks/memorization.py --gain

Without `--repeats`: streams without secrets, one row per seed. With it, secrets (short texts and random tokens, as if the target
had been sure of them) stand so often among the requests; with `--again N`, no secrets, but the first N of the requests. "Come
out": greedy decoding from a secret's first half gives its second half, or that is among the ten likeliest continuations (beam
search, 20 wide). `--gain`: what settings that retain less keep of what learning gains, in acceptance length over the last third of
60 live requests of orders, one seed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from recorded import Recorded, Source
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.embedded import load_draft, prompts
from hf_onlinespec.share.canaries import as_feedback, learn, make_canaries
from hf_onlinespec.share.memorization import examine
from hf_onlinespec.share.privacy import check_privacy

SECRETS = (
    "order: 73519\ncustomer: Zyx Qwv\ncity: Ghent\n",
    "my pin is 4711 for the grey card",
    "call Ada Quill at 0498-271-655",
    "token sk-93hfk2LLq8",
)
BEAMS, LIKELIEST = 20, 10
GAINS: dict[str, dict[str, Any]] = {
    "default": {},
    "no replay": {"replay_passes": 0},
    "no replay, lr / 4": {"replay_passes": 0, "lr": 5e-4},
    "no replay, lr / 10": {"replay_passes": 0, "lr": 2e-4},
}


@torch.no_grad()
def comes_out(draft: OnlineDraft, tokens: Tensor) -> bool:
    half = len(tokens) // 2
    rows, score = tokens[None, :half], torch.zeros(1)
    for _ in range(len(tokens) - half):
        law = draft(rows).logits[:, -1].float().log_softmax(-1)
        score, best = (score[:, None] + law).flatten().topk(BEAMS)
        rows = torch.cat([rows[best // law.shape[1]], (best % law.shape[1])[:, None]], dim=1)
    return any(torch.equal(row, tokens) for row in rows[:LIKELIEST])


def feedback(recorded: Recorded) -> Feedback:
    return Feedback(recorded.tokens, Teacher.from_logits(recorded.logits))


def verdict(draft: OnlineDraft) -> str:
    """What a public push would be told, in short."""
    try:
        check_privacy(draft)
    except PrivacyError as error:
        return "refused" if "It has memorised" in str(error) else "refused, by canaries"
    return "passes"


def judge(source: Source, args: argparse.Namespace) -> None:
    print("| seed | stand | secrets that come out | texts memorised | gate |\n|---|---|---|---|---|")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        stream = {"orders": "stationary", "sql": "hard", "shell": "home"}[args.domain]
        some = [feedback(r) for r in source.stream(stream, args.requests, 0.0, seed, 48)]
        secrets = [source.tokenizer(text, return_tensors="pt").input_ids[0] for text in SECRETS]
        secrets += [canary.tokens for canary in make_canaries(2048, 2, seed)]
        secrets = [] if args.again or not args.repeats else secrets
        for often in args.repeats or [1]:
            requests = some + some[: args.again] * (often - 1) + [as_feedback(secret) for secret in secrets] * often
            random.Random(seed).shuffle(requests)
            draft = make(seed, json.loads(args.config))
            draft.serves(source.target)
            learn(draft, requests)
            out, found = sum(comes_out(draft, secret) for secret in secrets), examine(draft)
            print(
                f"| {seed} | {often} times | {out} of {len(secrets)} | {found.memorised} of {found.texts} | {verdict(draft)} |",
                flush=True,
            )


def make(seed: int, settings: dict[str, Any], **fixed: Any) -> OnlineDraft:
    always = {"update_every": 1, "memory_tokens": 0, "seed": seed} | fixed
    return OnlineDraft(load_draft(), OnlineSpecConfig(**always | settings))


def acceptance_length(source: Source, draft: OnlineDraft, texts: Sequence[str], learns: bool = True) -> float:
    """New tokens per round over the last third of live greedy requests."""
    new_tokens, rounds = 0, 0
    for at, text in enumerate(texts):
        ids = source.tokenizer(text, return_tensors="pt").input_ids
        source.target.generate(ids, max_new_tokens=64, do_sample=False, assistant_model=draft, onlinespec=learns)
        if at >= len(texts) - len(texts) // 3:
            new_tokens += draft.metrics.last.new_tokens
            rounds += draft.metrics.last.rounds
    return new_tokens / rounds


def gain(source: Source, args: argparse.Namespace) -> None:
    """Not learned at all, and learned in every round with each setting; a part of the default's gain."""
    texts = prompts("orders")[: args.requests]
    print("| settings | seed | acceptance length | part of the gain |\n|---|---|---|---|")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        never = make(seed, {}, lookahead=5, audit_tokens=0)
        base = acceptance_length(source, never, texts, learns=False)
        print(f"| frozen | {seed} | {base:.2f} | 0 |", flush=True)
        whole = None
        for name, settings in GAINS.items():
            draft = make(seed, settings, lookahead=5, audit_tokens=0)
            length = acceptance_length(source, draft, texts)
            whole = length - base if whole is None else whole
            print(f"| {name} | {seed} | {length:.2f} | {(length - base) / whole:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", default="orders")
    parser.add_argument("--requests", type=int, default=None, help="in a stream (default: 30, of --gain 60)")
    parser.add_argument("--seeds", type=int, default=None, help="default: 20, of --gain 1")
    parser.add_argument("--first-seed", type=int, default=0, help="of the streams")
    parser.add_argument("--repeats", type=int, nargs="*", default=[], help="how often secrets stand, one row each")
    parser.add_argument(
        "--again", type=int, default=0, metavar="N", help="of the requests stand so often, and no secrets"
    )
    parser.add_argument("--config", default="{}", help="JSON settings of the draft, beside fixed ones")
    parser.add_argument("--gain", action="store_true", help="measure what settings keep of the gain instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    source = Source()
    args.requests = args.requests or (60 if args.gain else 30)
    args.seeds = args.seeds or (1 if args.gain else 20)
    (gain if args.gain else judge)(source, args)


if __name__ == "__main__":
    main()
