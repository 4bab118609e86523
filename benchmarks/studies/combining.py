"""What it costs to make one draft of two: one that learned orders and one that learned sql, combined, and at lower rank.

    python benchmarks/studies/combining.py --seeds 2

Both learn on recorded streams (`recorded.py`) after every request, with the default settings and nothing else beside. Beside
them, one draft that learned from the requests of both, in turns; and what a few more requests of both make of a combined draft
and of a new one. Then nothing learns any more, and every draft reads the same held-out requests of each domain: greedy, a
lookahead of 5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.metrics import Counts
from hf_onlinespec.training.combining import combine, distil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from ceiling import rounds_of
from learning import COMMON
from recorded import AWAY, HARD, HOME, Recorded, Source

JUDGED = (AWAY, HARD, HOME)
WEIGHTS = {"1/2": 0.5, "3/4": 0.75, "1": 1.0}
RANKS = (32, 16)  # of the mean, distilled
MORE = 5  # requests of each domain, to learn on from


def learned(draft: OnlineDraft, lessons: Sequence[Recorded]) -> OnlineDraft:
    """The draft, when it has learned from these requests, one after the other."""
    settings = draft.settings
    for one in lessons:
        counts, law = Counts(), Teacher.from_logits(one.logits, settings.temperature, settings.top_k)
        draft.learning.learn_segment(Segment(one.tokens[None], [law], None, 0.0), counts)
        draft.learning.remember(Feedback(one.tokens, law))
        draft.learning.replay_steps(counts, settings.replay_passes)
    return draft


def acceptance_length(draft: OnlineDraft, requests: Sequence[Recorded]) -> float:
    return sum(len(one.logits) for one in requests) / sum(rounds_of(draft, requests, 0.0))


def drafts(source: Source, lessons: dict[str, list[Recorded]], n: int, seed: int) -> dict[str, OnlineDraft]:
    """All that are compared; lessons are n of each domain, and `MORE`."""

    def new() -> OnlineDraft:
        return OnlineDraft(source.draft(), OnlineSpecConfig(**(COMMON | {"seed": seed})))

    turns = [one for pair in zip(lessons[AWAY], lessons[HARD], strict=True) for one in pair]
    parents = [learned(new(), lessons[domain][:n]) for domain in (AWAY, HARD)]
    found = {"frozen": new(), f"{AWAY} alone": parents[0], f"{HARD} alone": parents[1]}
    found["one that learned from both"] = learned(new(), turns[: 2 * n])
    artifacts = [parent.artifact() for parent in parents]
    for name, weight in WEIGHTS.items():
        found[f"combined, {name} each"] = combine(artifacts, source.draft(), [weight, weight])
    mean = found["combined, 1/2 each"].artifact()
    for rank in RANKS:
        found[f"combined, 1/2 each, distilled to rank {rank}"], report = distil(mean, rank, source.draft())
        print(f"seed {seed}, rank {rank} of {mean.settings.rank}: relative error {report.error:.3f}", flush=True)
    found[f"combined, 1/2 each, and {MORE} more of both"] = learned(combine(artifacts, source.draft()), turns[2 * n :])
    found[f"new, and the same {MORE} of both"] = learned(new(), turns[2 * n :])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60, help="to learn from, per domain")
    parser.add_argument("--held-out", type=int, default=24, help="to be judged on, per domain")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = Source()
    lengths: dict[str, list[list[float]]] = {}  # by draft: of every seed, of every domain
    for seed in range(args.seeds):
        n = args.prompts
        streams = {}
        for domain in JUDGED:
            texts = source.texts(domain, seed)[: n + MORE + args.held_out]
            texts = texts[-args.held_out :] if domain == HOME else texts
            streams[domain] = [source.record(domain, text, 0.0, seed, args.new_tokens) for text in texts]
        lessons = {domain: streams[domain][: n + MORE] for domain in (AWAY, HARD)}
        judges = {domain: streams[domain][-args.held_out :] for domain in JUDGED}
        for name, draft in drafts(source, lessons, n, seed).items():
            lengths.setdefault(name, []).append([acceptance_length(draft, judges[domain]) for domain in JUDGED])
            print(f"seed {seed}, {name}: {lengths[name][-1]}", flush=True)
    print(f"\nAcceptance length on {args.held_out} held-out requests of each domain, {args.seeds} seeds.\n")
    print(f"| draft | {' | '.join(JUDGED)} |")
    print("|---" * (1 + len(JUDGED)) + "|")
    for name, runs in lengths.items():
        cells = [
            f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"
            for values in zip(*runs, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
