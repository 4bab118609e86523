"""How much a domain has to teach: the same adapter trained on other requests of it until that no longer helps.

    python benchmarks/studies/ceiling.py --seeds 5

Two ceilings for a stream of order notes: an adapter that was trained on the requests it is measured on, to convergence (it
knows them by heart), and one that was trained on fresh notes of the same kind and stopped where it does best on a third set
(what can be known before a request comes). Beside them, after how many new tokens a draft that learns from the stream is half-way
from the frozen one to each: over `WINDOW` requests, against the ceiling on the very same ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.measure.regret import WINDOW, expected_rounds
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.resuming import adopt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from learning import COMMON, run
from order_notes import order_note
from recorded import AWAY, Recorded, Source, kept_chances

LOOKAHEAD = COMMON["lookahead"]
BATCH, LR = 4, 1e-3
EPOCHS, PATIENCE = 40, 3  # of training, at most; epochs without an improvement that end it


def rounds_of(draft: OnlineDraft, requests: Sequence[Recorded], temperature: float) -> list[float]:
    """Expected rounds of every request."""
    found = []
    for request in requests:
        with torch.no_grad(), draft.trainable.serving() as model:
            own = model(request.tokens[None, :-1]).logits[0, -len(request.logits) :]
        found.append(expected_rounds(kept_chances(request, own, temperature), LOOKAHEAD))
    return found


def trained(
    source: Source, lessons: Sequence[Recorded], judges: Sequence[Recorded], temperature: float, seed: int
) -> OnlineDraft:
    """The adapter of the default settings at its best on `judges`, trained on `lessons`."""
    config = OnlineSpecConfig(**(COMMON | {"seed": seed, "learner": "ogd", "lr": LR, "gradient_cap": None}))
    draft = OnlineDraft(source.draft(), config)
    feedback = [Feedback(one.tokens, Teacher.from_logits(one.logits, config.temperature, None)) for one in lessons]
    rng = random.Random(seed)
    best, state, waited = float("inf"), draft.learning.adapter_params(), 0
    for _ in range(EPOCHS):
        order = rng.sample(feedback, len(feedback))
        for i in range(0, len(order), BATCH):
            draft.learning.learn(order[i : i + BATCH], Counts())
        now = sum(rounds_of(draft, judges, temperature))
        waited += 1
        if now < best * 0.998:
            best, state, waited = now, draft.learning.adapter_params(), 0
        if waited >= PATIENCE:
            break
    adopt(draft, state)
    return draft


def half_way(
    tokens: Sequence[int], learned: Sequence[float], frozen: Sequence[float], ceiling: Sequence[float]
) -> int | None:
    """New tokens before the first `WINDOW` requests on which the learned draft is half-way; None: never."""
    for start in range(len(tokens) - WINDOW + 1):
        span = slice(start, start + WINDOW)
        n = sum(tokens[span])
        a, low, high = (n / sum(rounds[span]) for rounds in (learned, frozen, ceiling))
        if a >= (low + high) / 2:
            return sum(tokens[: start + WINDOW // 2])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = Source()
    print(
        "| seed | frozen | learning, all | ceiling, fresh notes | half-way after | ceiling, by heart | half-way after |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    lengths: dict[str, list[float]] = {"fresh": [], "heart": []}
    for seed in range(args.seeds):
        stream = source.stream("stationary", args.prompts, args.temperature, seed, args.new_tokens)
        rng = random.Random(f"fresh {seed}")
        notes = [
            source.record(AWAY, order_note(rng)[0], args.temperature, seed, args.new_tokens)
            for _ in range(2 * args.prompts + 40)
        ]
        tokens = [len(one.logits) for one in stream]
        rows = {
            learner: [row.rounds for row in run(learner, source, "stationary", stream, args.temperature, seed)]
            for learner in ("frozen", "default")
        }
        lessons = {"fresh": (notes[40:], notes[:40]), "heart": (stream, stream)}
        cells = []
        for name, (some, judges) in lessons.items():
            ceiling = rounds_of(trained(source, some, judges, args.temperature, seed), stream, args.temperature)
            after = half_way(tokens, rows["default"], rows["frozen"], ceiling)
            lengths[name].append(sum(tokens) / sum(ceiling))
            cells += [f"{lengths[name][-1]:.2f}", "never" if after is None else str(after)]
        frozen, learned = (f"{sum(tokens) / sum(rounds):.2f}" for rounds in rows.values())
        print(f"| {seed} | {frozen} | {learned} | {' | '.join(cells)} |", flush=True)
    print(", ".join(f"{name}: {statistics.mean(some):.2f}" for name, some in lengths.items()))


if __name__ == "__main__":
    main()
