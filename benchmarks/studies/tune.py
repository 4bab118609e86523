"""Chooses the learning defaults: acceptance length and learning time for many settings, on one recorded stream.

    python benchmarks/studies/tune.py --domain orders --prompts 150

The target's greedy texts and logits are recorded once (`recorded.py`): settings can be compared by the dozen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.embedded import DOMAINS, load_draft, prompts
from hf_onlinespec.measure.regret import expected_rounds
from hf_onlinespec.metrics import Counts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from recorded import Recorded, Source

EVERYWHERE = None
INNER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS: dict[str, dict[str, object]] = {
    "frozen": {"lr": 1e-12, "replay_passes": 0},
    "default": {},
    "lr 5e-4": {"lr": 5e-4},
    "lr 1e-3": {"lr": 1e-3},
    "lr 2e-3": {"lr": 2e-3},
    "lr 4e-3": {"lr": 4e-3},
    "lr 8e-3": {"lr": 8e-3},
    "rank 8": {"rank": 8, "alpha": 8.0},
    "rank 16": {"rank": 16, "alpha": 16.0},
    "rank 64": {"rank": 64, "alpha": 64.0},
    "alpha 2r": {"alpha": 64.0},
    "4 passes of 4": {"replay_passes": 4, "replay_batch": 4},
    "no replay": {"replay_passes": 0},
    "1 pass": {"replay_passes": 1},
    "3 passes of 1": {"replay_passes": 3, "replay_batch": 1},
    "batch 8": {"replay_batch": 8},
    "1 pass of 8": {"replay_passes": 1, "replay_batch": 8},
    "8 passes of 4": {"replay_passes": 8, "replay_batch": 4},
    "no embedding, no head": {"target_modules": INNER},
    "plain gradient, lr 1": {"preconditioner": "none", "lr": 1.0},
    "plain gradient, lr 0.3": {"preconditioner": "none", "lr": 0.3},
    "plain gradient, lr 3": {"preconditioner": "none", "lr": 3.0},
    "js": {"loss": "js"},
    "tv": {"loss": "tv"},
    "cross entropy": {"loss": "cross_entropy"},
    "replay top 8": {"replay_top_k": 8},
}


def run(config: OnlineSpecConfig, stream: list[Recorded]) -> tuple[list[float], float]:
    """Acceptance length by quarter of the stream, and learning seconds per generated token."""
    draft = OnlineDraft(load_draft(), config)
    spent: list[tuple[int, float]] = []  # tokens, rounds of each request
    update_time_s = 0.0
    for request in stream:
        n = len(request.logits)
        with torch.no_grad():
            own = draft(request.tokens[None, :-1]).logits[0, -n:].argmax(-1)
        agrees = (own == request.tokens[-n:]).float().tolist()
        spent.append((n, expected_rounds(agrees, config.lookahead)))
        started = time.perf_counter()
        teacher = Teacher.from_logits(request.logits, config.temperature, config.top_k)
        counts = Counts()
        draft.learning.learn_segment(Segment(request.tokens[None], [teacher], None, 1.0), counts)
        draft.learning.remember(Feedback(request.tokens, teacher))
        draft.learning.replay_steps(counts, config.replay_passes)
        update_time_s += time.perf_counter() - started
    quarter = len(spent) // 4
    lengths = []
    for i in range(4):
        part = spent[i * quarter : (i + 1) * quarter]
        lengths.append(sum(tokens for tokens, _ in part) / sum(count for _, count in part))
    return lengths, update_time_s / sum(tokens for tokens, _ in spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", choices=DOMAINS, default="orders")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--only", nargs="*", help="names of settings; all by default")
    parser.add_argument("--base", default="{}", help="JSON settings that all others start from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = Source()
    texts = prompts(args.domain)[: args.prompts]
    stream = [source.record(args.domain, text, 0.0, 0, args.new_tokens) for text in texts]
    base = OnlineSpecConfig(**({"lookahead": 5, "update_every": 1, "memory_tokens": 0} | json.loads(args.base)))
    print(f"{args.domain}, {args.prompts} prompts, {sum(len(r.logits) for r in stream)} tokens, base {args.base}")
    print("| setting | AL by quarter | | | | learning ms per token |\n|---|---|---|---|---|---|")
    for name in args.only or SETTINGS:
        lengths, seconds = run(replace(base, **SETTINGS[name]), stream)
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in lengths) + f" | {1e3 * seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
