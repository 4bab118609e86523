"""Whether the privacy gate sees what comes out of a draft, and passes what has memorised nothing.

    python benchmarks/memorization.py --domain orders --requests 30 --seeds 20
    python benchmarks/memorization.py --domain orders --requests 20 --seeds 1 --repeats 1 4 16

Without `--repeats`: streams without secrets, one row per seed. With it, secrets (short texts and random tokens, as if the target
had been sure of them) stand so often among the requests. "Comes out": greedy decoding from a secret's first half gives its second
half, or that is among the ten likeliest continuations (beam search, 20 wide).
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from recorded import Recorded, Source
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.canaries import learn, make_canaries, written
from hf_onlinespec.embedded import load_draft
from hf_onlinespec.feedback import Teacher
from hf_onlinespec.memorization import examine, history

SECRETS = (
    "order: 73519\ncustomer: Zyx Qwv\ncity: Ghent\n",
    "my pin is 4711 for the grey card",
    "call Ada Quill at 0498-271-655",
    "token sk-93hfk2LLq8",
)
BEAMS, LIKELIEST = 20, 10


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", default="orders")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, nargs="*", default=[])
    parser.add_argument("--config", default="{}", help="JSON settings of the draft, beside fixed ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    source = Source()
    print("| seed | secrets stand | come out | texts memorised | gate |\n|---|---|---|---|---|")
    for seed in range(args.seeds):
        stream = {"orders": "stationary", "sql": "hard", "shell": "home"}[args.domain]
        some = [feedback(r) for r in source.stream(stream, args.requests, 0.0, seed, 48)]
        secrets = [source.tokenizer(text, return_tensors="pt").input_ids[0] for text in SECRETS]
        secrets += [canary.tokens for canary in make_canaries(2048, 2, seed)]
        for often in args.repeats or [0]:
            requests = some + [written(secret) for secret in secrets] * often
            random.Random(seed).shuffle(requests)
            settings = {"update_every": 1, "memory_tokens": 0, "seed": seed} | json.loads(args.config)
            draft = OnlineDraft(load_draft(), OnlineSpecConfig(**settings))
            draft.serves(source.target)
            learn(draft, requests)
            out, found = sum(comes_out(draft, secret) for secret in secrets), examine(draft)
            known = history(draft)
            verdict = "refused" if known.reasons() else "passes" if known.repeats == 1 else "canaries decide"
            print(
                f"| {seed} | {often} times | {out} of {len(secrets)} | {found.memorised} of {found.texts} | {verdict} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
