"""What each way of learning is worth: acceptance length and learning time on recorded streams, several seeds.

    python benchmarks/learning.py --stream stationary --seeds 5

The target's texts and laws are recorded once. A draft that learns at the end of each request has constant weights inside it,
so its acceptance length on a recorded text is that of a live run: greedy, the rounds that are needed when every round keeps
the drafted tokens that agree; sampled, their expectation, where a token x of the text was drafted with chance
min(1, q(x) / p(x)). No target forward is needed, and learners can be compared by the dozen, at the same number of gradient
steps, with nothing else beside: no suffix memory, no governor, a lookahead of 5.

Rows are written as they come, and what is there already is not run again: `--report` alone makes the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from streams import LONGEST, shuffled
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.cli import machine
from hf_onlinespec.embedded import DOMAINS, load_draft, load_pair
from hf_onlinespec.feedback import Teacher
from hf_onlinespec.metrics import Counts
from hf_onlinespec.regret import expected_rounds

LOOKAHEAD = 5
CHUNK = 40  # requests between two updates of the released code
HOME, AWAY, HARD = "shell", "orders", "sql"


# Streams: the domain of every request.


def gradual(n: int) -> list[str]:
    """From home to away, ever more often."""
    rng = random.Random(0)
    return [AWAY if rng.random() < i / (n - 1) else HOME for i in range(n)]


STREAMS: dict[str, Callable[[int], list[str]]] = {
    "stationary": lambda n: [AWAY] * n,
    "hard": lambda n: [HARD] * n,
    "home": lambda n: [HOME] * n,  # nothing to be gained: the draft was trained on it
    "drift": lambda n: [HOME] * (n // 2) + [AWAY] * n + [HOME] * (n // 2),
    "return": lambda n: [AWAY] * n + [HARD] * n + [AWAY] * (n // 3),  # back to what had to be learned
    "gradual": gradual,
    "alternating": lambda n: [(HOME, AWAY, HARD)[i % 3] for i in range(n)],
    # Prompts that are meant to lead it astray: random tokens, one token again and again.
    "burst": lambda n: [AWAY] * n + ["random"] * 10 + ["repeated"] * 10 + [AWAY] * (n // 2),
    # Needs HF_ONLINESPEC_DATA: real prompts of four kinds, one after the other; and, for `--pair stories`, beginnings of stories.
    "real": lambda n: [name for name in ("gsm8k", "mbpp", "shell_tldr", "nq_open") for _ in range(n)],
    "stories": lambda n: ["stories"] * n,
    "mix": lambda n: random.Random(1).choices((HOME, AWAY, HARD), k=n),
}

# Learners: settings beside the common ones, and what is done differently from learning after every request.

COMMON = {"lookahead": LOOKAHEAD, "update_every": 1, "memory_tokens": 0}
BARE = {"snapshots": 0}  # without the guard's earlier states
OGD = BARE | {"learner": "ogd"}
ENSEMBLE = BARE | {"learner": "ensemble"}
GRADIENT = BARE | {"preconditioner": "none", "lr": 1.0, "gradient_cap": None}
LR = OnlineSpecConfig().lr
LEARNERS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "default": {},
    "optimistic": BARE,
    "optimistic, lr ÷ 2": BARE | {"lr": LR / 2},
    "optimistic, lr × 2": BARE | {"lr": LR * 2},
    "optimistic, hint 0.8": BARE | {"hint_memory": 0.8},
    "optimistic, batch 2": BARE | {"replay_batch": 2},
    "optimistic, 3 passes": BARE | {"replay_passes": 3},
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


@dataclass(frozen=True)
class Recorded:
    """One request of a domain: `tokens` (L,) with the target's `logits` (n, vocab) for its last n tokens."""

    domain: str
    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Row:
    """One request through one learner."""

    stream: str
    temperature: float
    seed: int
    learner: str
    request: int
    domain: str
    tokens: int
    rounds: float  # expected
    update_time_s: float
    rollbacks: int
    weights: tuple[float, ...] = ()


def data_folder() -> Path:
    folder = os.environ.get("HF_ONLINESPEC_DATA")
    if not folder:
        raise SystemExit("This stream needs HF_ONLINESPEC_DATA: a folder with streams/, corpora/ and models/.")
    return Path(folder)


def load(kind: Any, name: str) -> Any:
    """One of the two real tiny models of the data folder."""
    loaded = kind.from_pretrained(data_folder() / "models" / name, local_files_only=True)
    return loaded.eval() if isinstance(loaded, PreTrainedModel) else loaded


@dataclass
class Models:
    """The pair in use."""

    target: Any
    tokenizer: Any
    draft: Callable[[], Any]  # a fresh one


def pair(name: str) -> Models:
    if name == "stories":
        target, tokenizer = load(AutoModelForCausalLM, "stories260k"), load(AutoTokenizer, "stories260k")
        return Models(target, tokenizer, lambda: load(AutoModelForCausalLM, "salty281k"))
    embedded = load_pair()
    return Models(embedded.target, embedded.tokenizer, load_draft)


def texts_of(domain: str, seed: int) -> list[str]:
    """All prompts of a domain, in the seed's order."""
    if domain in DOMAINS:
        return shuffled(domain, seed)
    if domain == "stories":
        whole = (data_folder() / "corpora" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
        found = [" ".join(text.split()[:8]) for text in whole if len(text.split()) > 20]
    else:
        with open(data_folder() / "streams" / f"{domain}.jsonl", encoding="utf-8") as file:
            found = [json.loads(line)["prompt"] for line in file]
        found = [text for text in found if len(MODELS.tokenizer(text).input_ids) <= LONGEST]
    return random.Random(f"{seed} {domain}").sample(found, len(found))


MODELS: Models  # the pair in use
_recorded: dict[tuple[str, float, int, str], Recorded] = {}


@torch.no_grad()
def record(domain: str, text: str, temperature: float, seed: int, new_tokens: int) -> Recorded:
    """What the target says after a prompt; the same for every learner."""
    key = (domain, temperature, seed if temperature else 0, text)
    if key not in _recorded:
        torch.manual_seed(seed)
        ids = MODELS.tokenizer(text, return_tensors="pt").input_ids
        law = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = MODELS.target.generate(
            ids, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **law
        )
        _recorded[key] = Recorded(domain, out.sequences[0], torch.cat(out.logits))
    return _recorded[key]


def endless(domain: str, seed: int) -> Iterator[str]:
    """A domain's prompts in the seed's order, then in the next one's; the adversarial ones are made up."""
    rng = random.Random(f"{seed} {domain}")
    for again in itertools.count():
        if domain not in ("random", "repeated"):
            yield from texts_of(domain, seed + 1000 * again)
        else:
            size = len(MODELS.tokenizer)
            ids = [rng.randrange(size) for _ in range(24)] if domain == "random" else [rng.randrange(size)] * 24
            yield MODELS.tokenizer.decode(ids)


def make_stream(name: str, n: int, temperature: float, seed: int, new_tokens: int) -> list[Recorded]:
    """The requests, prompts in the seed's order; a domain that has run out of prompts begins anew with the next seed's."""
    domains = STREAMS[name](n)
    texts = {domain: endless(domain, seed) for domain in set(domains)}
    return [record(d, next(texts[d]), temperature, seed, new_tokens) for d in domains]


def kept_chances(request: Recorded, logits: Tensor, temperature: float) -> list[float]:
    """Chance that each token of the text was drafted, given the draft's logits (n, vocab) there."""
    n = len(request.logits)
    text = request.tokens[-n:]
    if not temperature:
        return (logits.argmax(-1) == text).float().tolist()
    p, q = (z.div(temperature).log_softmax(-1).gather(-1, text[:, None])[:, 0] for z in (request.logits, logits))
    return (q - p).exp().clamp_max(1.0).tolist()


def run(learner: str, name: str, stream: list[Recorded], temperature: float, seed: int) -> list[Row]:
    """All requests of a stream through one learner."""
    config = OnlineSpecConfig(**(COMMON | LEARNERS[learner] | {"seed": seed}))
    draft = OnlineDraft(MODELS.draft(), config)
    chunk: list[tuple[Recorded, Teacher]] = []
    momentum: Tensor | None = None
    rows = []
    for i, request in enumerate(stream):
        n = len(request.logits)
        with torch.no_grad(), draft.serving() as model:
            own = model(request.tokens[None, :-1]).logits[0, -n:]
        rounds = expected_rounds(kept_chances(request, own, temperature), LOOKAHEAD)
        started = time.perf_counter()
        counts = Counts()
        teacher = Teacher.from_logits(request.logits, config.temperature, config.top_k)

        def learn(one: Recorded, law: Teacher, counts: Counts = counts) -> None:
            draft.learn_segment(one.tokens[None], [law], None, 0, None, counts, temperature)

        if learner == "released chunks":
            # Every forty requests, two epochs over them; the moments are dropped with every chunk.
            chunk.append((request, teacher))
            if len(chunk) == CHUNK:
                for one in (*chunk, *chunk):
                    learn(*one)
                draft._adaptation.state = draft._adaptation._learner.init(draft._lora.split(draft._lora.params))
                chunk = []
        elif learner == "released momentum":
            # SGD with an unmatched momentum of 0.9, its buffer dropped with every chunk.
            before = draft._lora.params.clone()
            learn(request, teacher)
            step = draft._lora.params - before
            momentum = step if momentum is None or i % CHUNK == 0 else 0.9 * momentum + step
            draft._lora.move(momentum - step)
        elif learner == "every 4 requests":
            chunk.append((request, teacher))
            if len(chunk) == 4:
                for one in chunk:
                    learn(*one)
                    draft.remember(Feedback(one[0].tokens, one[1]))
                draft.rehearse(counts, 4 * config.replay_passes)
                chunk = []
        elif learner == "adapt once":
            if i < CHUNK:
                learn(request, teacher)
                draft.remember(Feedback(request.tokens, teacher))
                draft.rehearse(counts, config.replay_passes)
        elif learner != "frozen":
            learn(request, teacher)
            draft.remember(Feedback(request.tokens, teacher))
            draft.rehearse(counts, config.replay_passes)
        draft.fold()
        spent = time.perf_counter() - started
        weights = tuple(round(w, 4) for w in draft.metrics.expert_weights)
        rolled = draft.metrics.rollbacks
        rows.append(Row(name, temperature, seed, learner, i, request.domain, n, rounds, spent, rolled, weights))
    return rows


# Report


def acceptance_length(rows: Sequence[Row]) -> float:
    return sum(r.tokens for r in rows) / sum(r.rounds for r in rows)


def segments(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of one domain, or the whole where they are short."""
    found: list[list[Row]] = []
    for row in rows:
        if found and found[-1][-1].domain == row.domain:
            found[-1].append(row)
        else:
            found.append([row])
    return found if len(found) <= 5 else [list(rows)]


def back(runs: list[list[list[Row]]]) -> list[str]:
    """How it is back in the first segment's domain, against what was reached there before."""
    tenths, wholes = [], []
    for first, *_, last in runs:
        size = max(1, len(first) // 4)
        quarters = [acceptance_length(first[i : i + size]) for i in range(0, size * 4, size) if first[i : i + size]]
        tenths.append(acceptance_length(last[: max(1, len(last) // 10)]) / max(quarters))
        wholes.append(acceptance_length(last) / acceptance_length(first[-size:]))
    return [interval(tenths), interval(wholes)]


def interval(values: Sequence[float]) -> str:
    """Mean over seeds ± two standard errors."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {2 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def report(rows: list[Row]) -> str:
    lines = []
    for name, temperature in sorted({(r.stream, r.temperature) for r in rows}):
        some = [r for r in rows if (r.stream, r.temperature) == (name, temperature)]
        learners = [k for k in LEARNERS if any(r.learner == k for r in some)]
        runs = {
            k: {
                seed: sorted((r for r in some if r.learner == k and r.seed == seed), key=lambda r: r.request)
                for seed in sorted({r.seed for r in some if r.learner == k})
            }
            for k in learners
        }
        parts = segments(next(iter(runs[learners[0]].values())))
        law = f"temperature {temperature:g}" if temperature else "greedy"
        lines += [f"## {name}, {law}, {sum(map(len, parts))} requests", ""]
        lines += ["Acceptance length, mean over seeds ± two standard errors; ÷ frozen: paired by seed.", ""]
        heads = [f"{' and '.join(sorted({r.domain for r in p}))} ({len(p)}), all | last quarter" for p in parts]
        returns = len(parts) > 1 and parts[0][0].domain == parts[-1][0].domain
        heads += ["back, first tenth ÷ best quarter before", "back, all ÷ last quarter before"] * returns
        lines += [f"| learner | seeds | {' | '.join(heads)} | ÷ frozen, all | ÷ frozen, last quarter | ms per token |"]
        lines += ["|---" * (5 + 2 * len(parts) + 2 * returns) + "|"]
        for k, by_seed in runs.items():
            cells = []
            for at in range(len(parts)):
                own = [segments(run)[at] for run in by_seed.values()]
                cells.append(interval([acceptance_length(s) for s in own]))
                cells.append(interval([acceptance_length(s[-max(1, len(s) // 4) :]) for s in own]))
            if returns:
                cells += back([segments(run) for run in by_seed.values()])
            still = runs.get("frozen", {})
            both = [seed for seed in by_seed if seed in still]
            whole = [acceptance_length(by_seed[s]) / acceptance_length(still[s]) for s in both]
            end = [
                acceptance_length(by_seed[s][-(len(by_seed[s]) // 4) :])
                / acceptance_length(still[s][-(len(still[s]) // 4) :])
                for s in both
            ]
            spent = [1e3 * sum(r.update_time_s for r in run) / sum(r.tokens for r in run) for run in by_seed.values()]
            cells += [interval(whole) if both else "", interval(end) if both else ""]
            lines.append(f"| {k} | {len(by_seed)} | {' | '.join(cells)} | {statistics.median(spent):.2f} |")
        lines.append("")
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Row(**row) for row in rows if "learner" in row]


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
    global MODELS
    MODELS = pair(args.pair)
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
                    stream = stream or make_stream(name, args.prompts, args.temperature, seed, args.new_tokens)
                    rows = run(learner, name, stream, args.temperature, seed)
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"machine": machine()}) + "\n")
                        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
                    quarter = rows[-(len(rows) // 4) :]
                    print(
                        f"{name} seed {seed} {learner}: {acceptance_length(rows):.3f}, "
                        f"last quarter {acceptance_length(quarter):.3f}, "
                        f"{1e3 * sum(r.update_time_s for r in rows) / sum(r.tokens for r in rows):.2f} ms per token",
                        flush=True,
                    )
    text = report(read(args.out))
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
