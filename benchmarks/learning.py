"""What each way of learning is worth: acceptance length and learning time on recorded streams, several seeds.

    python benchmarks/learning.py --stream stationary --seeds 5

Streams and what the target says to them are recorded once (`recorded.py`), and learners compared on them by the dozen, at the
same number of gradient steps, with nothing else beside: no suffix memory, no governor, a lookahead of 5.

Rows are written as they come, and what is there already is not run again: `--report` alone makes the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from learning_report import Row, acceptance_length, read, report
from recorded import STREAMS, Recorded, Source, kept_chances
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.commit.suffix_memory import REACH, SuffixMemory
from hf_onlinespec.govern.routing import AdapterRouter
from hf_onlinespec.measure.regret import expected_rounds
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.provenance import provenance

LOOKAHEAD = 5
CHUNK = 40  # requests between two updates of the released code


# Learners: settings beside the common ones, and what is done differently from learning after every request.

COMMON = {"lookahead": LOOKAHEAD, "update_every": 1, "memory_tokens": 0}
BARE = {"snapshots": 0}  # without the guard's earlier states
OGD = BARE | {"learner": "ogd"}
ENSEMBLE = BARE | {"learner": "ensemble"}
GRADIENT = BARE | {"preconditioner": "none", "lr": 1.0, "gradient_cap": None}
LR = OnlineSpecConfig().lr
LEARNERS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "memory alone": {},  # the suffix memory, and no draft model
    "default": {},
    "default, prompt asked": {},  # the learned or the base draft serves, as the governor chooses by the prompt
    "optimistic": BARE,
    "optimistic, lr ÷ 2": BARE | {"lr": LR / 2},
    "optimistic, lr × 2": BARE | {"lr": LR * 2},
    "optimistic, hint 0.8": BARE | {"hint_memory": 0.8},
    "optimistic, batch 2": BARE | {"replay_batch": 2},
    "optimistic, 3 passes": BARE | {"replay_passes": 3},
    "optimistic, 8 passes": BARE | {"replay_passes": 8},
    "optimistic, rank 64": BARE | {"rank": 64, "alpha": 64.0},
    "ogd": OGD,
    "ogd, lr ÷ 4": OGD | {"lr": LR / 4},
    "ogd, lr × 4": OGD | {"lr": LR * 4},
    "heavy ball": BARE | {"learner": "heavy_ball"},
    "gradient": GRADIENT | {"learner": "ogd"},
    "gradient, optimistic": GRADIENT,
    "gradient, heavy ball": GRADIENT | {"learner": "heavy_ball"},
    "ensemble": ENSEMBLE,
    "ensemble, rate 4": ENSEMBLE | {"hedge_rate": 4.0},
    "ensemble, rate 16": ENSEMBLE | {"hedge_rate": 16.0},
    "ensemble, cumulative": ENSEMBLE | {"hedge": "cumulative"},
    "ensemble, discounted": ENSEMBLE | {"hedge": "discounted"},
    "ensemble, last chunk": ENSEMBLE | {"hedge": "last_chunk"},
    "ensemble of optimistic": ENSEMBLE | {"expert_learner": "optimistic"},
    "ensemble, guarded": {"learner": "ensemble"},
    "no replay": BARE | {"replay_passes": 0},
    "replay recent": BARE | {"replay_sampling": "recent"},
    "replay mixed": BARE | {"replay_sampling": "mixed"},
    "replay loss": BARE | {"replay_sampling": "loss"},
    "replay near": BARE | {"replay_sampling": "near"},
    "js": BARE | {"loss": "js"},
    "tv": BARE | {"loss": "tv"},
    "cross entropy": BARE | {"loss": "cross_entropy"},
    "every 4 requests": BARE,  # the same number of steps, all of them together
    "adapt once": OGD,
    "released chunks": OGD | {"replay_passes": 0, "lr": 4e-4, "gradient_cap": None},
    "released momentum": OGD | {"replay_passes": 0, "preconditioner": "none", "lr": 0.1, "gradient_cap": None},
}
SHOWN = ("frozen", "default", "optimistic", "ogd", "heavy ball", "ensemble")


def recall(name: str, stream: list[Recorded], temperature: float, seed: int) -> list[Row]:
    """All requests of a stream, drafted by what was read and written before them."""
    memory = SuffixMemory(OnlineSpecConfig().memory_tokens)
    rows = []
    for i, request in enumerate(stream):
        tokens, n = request.tokens.tolist(), len(request.logits)
        memory.extend(tokens[:-n])
        chances = []
        for at, logits in zip(range(len(tokens) - n, len(tokens)), request.logits, strict=True):
            found = memory.continuation(tokens[max(0, at - REACH) : at])
            shares = {} if found is None else dict(zip(found.tokens, found.probs, strict=True))
            if not temperature:
                chances.append(float(found is not None and found.tokens[0] == tokens[at]))
            else:
                p = logits.div(temperature).softmax(-1)[tokens[at]]
                chances.append(min(1.0, shares.get(tokens[at], 0.0) / max(float(p), 1e-30)))
            memory.extend(tokens[at : at + 1])
        memory.close()
        rounds = expected_rounds(chances, LOOKAHEAD)
        rows.append(Row(name, temperature, seed, "memory alone", i, request.domain, n, rounds, 0.0, 0))
    return rows


def run(learner: str, source: Source, name: str, stream: list[Recorded], temperature: float, seed: int) -> list[Row]:
    """All requests of a stream through one learner."""
    if learner == "memory alone":
        return recall(name, stream, temperature, seed)
    config = OnlineSpecConfig(**(COMMON | LEARNERS[learner] | {"seed": seed}))
    draft = OnlineDraft(source.draft(), config)
    router = AdapterRouter()
    chunk: list[tuple[Recorded, Teacher]] = []
    momentum: Tensor | None = None
    rows = []
    for i, request in enumerate(stream):
        n = len(request.logits)
        chances = {}
        for base in (False, True) if learner == "default, prompt asked" else (False,):
            with torch.no_grad(), draft.trainable.serving(base) as model:
                chances[base] = kept_chances(request, model(request.tokens[None, :-1]).logits[0, -n:], temperature)
        base = False
        if len(chances) == 2:
            said, _ = draft.trainable.prompt_log_ratio(request.tokens[None, :-n], None, 128)
            base = router.use_base(said)
            router.observe_difference(said, sum(chances[False]) / n - sum(chances[True]) / n, n)
        rounds = expected_rounds(chances[base], LOOKAHEAD)
        started = time.perf_counter()
        counts = Counts()
        teacher = Teacher.from_logits(request.logits, config.temperature, config.top_k)

        def learn(one: Recorded, law: Teacher, counts: Counts = counts) -> None:
            draft.learning.learn_segment(Segment(one.tokens[None], [law], None, temperature), counts)

        if learner == "released chunks":
            # Every forty requests, two epochs over them; the moments are dropped with every chunk.
            chunk.append((request, teacher))
            if len(chunk) == CHUNK:
                for one in (*chunk, *chunk):
                    learn(*one)
                draft.learning.learner.experts.rule_state = draft.learning.learner.experts._learner.init(
                    draft.trainable.adapter.split(draft.trainable.adapter.params)
                )
                chunk = []
        elif learner == "released momentum":
            # SGD with an unmatched momentum of 0.9, its buffer dropped with every chunk.
            before = draft.trainable.adapter.params.clone()
            learn(request, teacher)
            step = draft.trainable.adapter.params - before
            momentum = step if momentum is None or i % CHUNK == 0 else 0.9 * momentum + step
            draft.trainable.adapter.move(momentum - step)
        elif learner == "every 4 requests":
            chunk.append((request, teacher))
            if len(chunk) == 4:
                for one in chunk:
                    learn(*one)
                    draft.learning.remember(Feedback(one[0].tokens, one[1]))
                draft.learning.replay_steps(counts, 4 * config.replay_passes)
                chunk = []
        elif learner == "adapt once":
            if i < CHUNK:
                learn(request, teacher)
                draft.learning.remember(Feedback(request.tokens, teacher))
                draft.learning.replay_steps(counts, config.replay_passes)
        elif learner != "frozen":
            learn(request, teacher)
            draft.learning.remember(Feedback(request.tokens, teacher))
            draft.learning.replay_steps(counts, config.replay_passes)
        draft.learning.fold()
        spent = time.perf_counter() - started
        weights = tuple(round(w, 4) for w in draft.metrics.expert_weights)
        rolled = draft.metrics.rollbacks
        rows.append(Row(name, temperature, seed, learner, i, request.domain, n, rounds, spent, rolled, weights))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stream", choices=STREAMS, nargs="*", default=["stationary"])
    parser.add_argument("--pair", choices=("embedded", "stories"), default="embedded")
    parser.add_argument("--learners", nargs="*", default=list(SHOWN), help=f"of {list(LEARNERS)}")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=150, help="per segment")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.jsonl"))
    parser.add_argument("--report", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args()
    source = Source(args.pair)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if not args.report:
        done = {(r.stream, r.temperature, r.seed, r.learner) for r in read(args.out)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in args.stream:
                stream: list[Recorded] = []
                for learner in args.learners:
                    if (name, args.temperature, seed, learner) in done:
                        continue
                    stream = stream or source.stream(name, args.prompts, args.temperature, seed, args.new_tokens)
                    rows = run(learner, source, name, stream, args.temperature, seed)
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"machine": provenance().to_dict()}) + "\n")
                        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
                    quarter = rows[-(len(rows) // 4) :]
                    print(
                        f"{name} seed {seed} {learner}: {acceptance_length(rows):.3f}, "
                        f"last quarter {acceptance_length(quarter):.3f}, "
                        f"{1e3 * sum(r.update_time_s for r in rows) / sum(r.tokens for r in rows):.2f} ms per token",
                        flush=True,
                    )
    text = report(read(args.out), list(LEARNERS))
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
