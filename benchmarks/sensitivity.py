"""What each constant of the deciding modules is worth: doubled and halved, one at a time, and what changes by it.

    python benchmarks/sensitivity.py --out benchmarks/results/sensitivity.md

Three streams tell:

- simulated: `tests/govern/world.py`, seven streams on a simulated clock; tokens per simulated second, learning included;
- memory: recorded answers of the embedded target, drafted for by the suffix memory and the governor; forwards take what a curve
  says (`studies/virtual_clock.py`); tokens per plain step;
- learning: a recorded stream that goes from home to an unseen domain and back, learned from after every request, with a clock
  that ticks once a reading; acceptance length at a lookahead of 5, learning included (greedy).

Rates of forgetting and upper limits just below 1 are doubled and halved in their distance from 1. Nothing depends on the speed of the
machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from recorded import Recorded, Source, kept_chances, walk
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.experts import Experts, ExpertsConstants
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.learner import Learner, LearnerConstants
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.commit.guessing import Guesser
from hf_onlinespec.commit.proposal import ProposalBuilder
from hf_onlinespec.commit.request_memory import RequestMemory
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.commit.tree import grow
from hf_onlinespec.govern.acceptance import RequestStats
from hf_onlinespec.govern.governor import Governor, GovernorConstants
from hf_onlinespec.govern.planner import Plan
from hf_onlinespec.measure.regret import expected_rounds
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.govern.world import STREAMS, World

LOOKAHEAD = 5
SIMULATED = dict(STREAMS) | {
    "learning pays": lambda request, steps: (min(0.7, 0.1 + 0.01 * steps), 0.1),
    "the stream changes": lambda request, steps: (
        (0.7, 0.7) if request % 40 < 20 else (min(0.5, 0.1 + 0.01 * steps), 0.1)
    ),
}
NOISE = 0.05  # standard deviation of the logarithm of a time, as the governor is told it
Values = dict[str, float]  # by stream


def leaves(constants: Any, prefix: str = "") -> Iterator[str]:
    """The names of all constants, those of nested ones with a dot."""
    for one in fields(constants):
        value, name = getattr(constants, one.name), f"{prefix}{one.name}"
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name


def value_of(constants: Any, name: str) -> Any:
    for part in name.split("."):
        constants = getattr(constants, part)
    return constants


def scaled(name: str, value: Any, factor: float) -> Any:
    """A constant times a factor, where that can be; see the docstring of the module."""
    if isinstance(value, tuple):
        found = [scaled(name, one, factor) for one in value]
        return tuple(min(one, 0.99) for one in found) if all(one <= 1 for one in value) else tuple(found)
    if isinstance(value, int):
        return max(1, round(value * factor))
    if "decay" in name or (name.rpartition(".")[2].startswith("most") and value < 1):
        return 1 - (1 - value) / factor if "decay" in name else 1 - (1 - value) * factor
    limited = value < 1 and not name.endswith(("slope", "bend"))
    return min(value * factor, 1.0 if limited else math.inf)


def with_value(constants: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    return replace(constants, **{head: with_value(getattr(constants, head), rest, value) if rest else value})


def simulated(constants: GovernorConstants, seeds: range, requests: int) -> Values:
    """Tokens per simulated second."""
    return {
        name: statistics.mean(World(alpha, seed=seed, constants=constants).run(requests) for seed in seeds)
        for name, alpha in SIMULATED.items()
    }


def remembered(constants: GovernorConstants, stream: list[Recorded], seed: int) -> Values:
    """Tokens per plain step of the memory alone, as the loop drafts with it, greedily."""
    governor, memory, rng = Governor(0.1, 2, constants=constants), SuffixMemory(65_536), random.Random(seed)
    lock, total, time = threading.RLock(), 0, 0.0
    for request in stream:
        tokens, n = request.tokens.tolist(), len(request.logits)
        seen, at, end = RequestStats(), len(tokens) - n, len(tokens)
        recall = RequestMemory(memory, lock, end, 0, seen, governor.acceptances)
        while at < end:
            recall.read(request.tokens[None, :at])
            plan = governor.plan(drafts=False, seen=seen, room=end - at)
            builder = ProposalBuilder(request.tokens[None, :at], recall.context, set())
            guesser = Guesser(recall, None, governor.guesses, recall.context, plan.memory_calibration, None)

            def pays(candidates: int, chance: float, plan: Plan = plan) -> bool:
                return governor.guess_pays(plan, candidates, chance)

            grow(builder, guesser, pays, end - at - 1, set(), True)
            proposal = builder.proposal(0)
            path, verified = walk(proposal, tokens[at:])
            k, sources = proposal.lengths[0], proposal.sources[0]
            took = 1 + 0.2 * (1 - 2 ** (-k / 2)) + 0.056 * k
            time += took
            for place, token in zip((-1, *path), tokens[at:], strict=False):
                if place in builder.places:
                    governor.guesses.observe(builder.places[place], token, seen)
            outcomes = [(sources[candidate], chance) for candidate, chance in verified]
            governor.observe(sources, outcomes, 0.0, took * math.exp(rng.gauss(0, NOISE)), seen)
            at += 1 + len(path)
        total += n
        recall.commit(request.tokens[None])
        governor.request_ended(n, seen)
    return {"memory": total / time}


@dataclass(frozen=True)
class LearningConstants:
    """Of one learner and its experts."""

    learner: LearnerConstants = field(default_factory=LearnerConstants)
    experts: ExpertsConstants = field(default_factory=ExpertsConstants)


def learned(constants: LearningConstants, stream: list[Recorded], source: Source, seed: int, **other: Any) -> Values:
    """Acceptance length of a draft that learns after every request, as it serves the request before it learns from it."""
    settings = OnlineSpecConfig(seed=seed, **other)
    trainable = OnlineDraft(source.draft(), settings).trainable
    experts = Experts(trainable.adapter, settings, constants.experts)
    learner, counts = Learner(trainable, experts, settings, constants=constants.learner), Counts()
    total, rounds, ticks = 0, 0.0, itertools.count()
    with mock.patch("time.perf_counter", lambda: float(next(ticks))):
        for request in stream:
            n, gates = len(request.logits), experts.served
            with torch.no_grad():
                gates = None if gates is None else gates[None]
                logits = trainable.training_logits(request.tokens[None], n, gates=gates)[0, 0]
            rounds += expected_rounds(kept_chances(request, logits, 0.0), LOOKAHEAD)
            total += n
            teacher = Teacher.from_logits(request.logits, settings.temperature, settings.top_k)
            learner.segment(Segment(request.tokens[None], [teacher], None, 0.0), None, counts, compare=True)
            learner.end_request()
            learner.remember(Feedback(request.tokens, teacher))
            for _ in range(learner.passes.now):
                learner.replay_step(counts)
    return {"learning": total / rounds}


def changes(default: Values, changed: Values) -> tuple[float, str]:
    """The largest relative change of a stream, and all of it in words."""
    ratios = {name: changed[name] / default[name] - 1 for name in default}
    if not any(ratios.values()):
        return 0.0, "="
    name = max(ratios, key=lambda name: abs(ratios[name]))
    mean = statistics.mean(ratios.values())
    return ratios[name], f"{mean:+.1%}" + ("" if len(ratios) == 1 else f" ({name} {ratios[name]:+.1%})")


class Table:
    """Rows of one stream, printed as they come."""

    def __init__(self, title: str, measure: Callable[[Any], Values], constants: Any, noise: str, names: list[str]):
        default = measure(constants)
        self.lines = [f"## {title}", "", "Default: " + ", ".join(f"{k} {v:.3f}" for k, v in default.items()) + "."]
        self.lines += [f"Largest change by other seeds alone: {noise}.", ""]
        self.lines += ["| constant | default | halved | doubled |", "|---|---|---|---|"]
        print("\n".join(self.lines), flush=True)
        for name in names:
            value, cells = value_of(constants, name), []
            for factor in (0.5, 2.0):
                other = scaled(name, value, factor)
                found = "not possible" if other == value else ""
                try:
                    found = found or changes(default, measure(with_value(constants, name, other)))[1]
                except (ValueError, IndexError, ZeroDivisionError, statistics.StatisticsError) as error:
                    found = f"fails: {type(error).__name__}"
                cells.append(found)
            shown = ", ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"
            self.lines.append(f"| `{name}` | {shown} | {cells[0]} | {cells[1]} |")
            print(self.lines[-1], flush=True)


def noise_of(measure: Callable[[int], Values], seeds: range) -> str:
    """The largest relative change between the first seed and others, of all streams together and of one."""
    first, *others = [measure(seed) for seed in seeds]
    mean = max(abs(statistics.mean(other[name] / first[name] - 1 for name in first)) for other in others)
    most = max(abs(changes(first, other)[0]) for other in others)
    return f"{mean:.1%}" + ("" if len(first) == 1 else f" of the mean, {most:.1%} of a stream")


def simulation(args: argparse.Namespace) -> Iterator[Table]:
    constants, seeds = GovernorConstants(), args.seeds
    noise = noise_of(lambda i: simulated(constants, range(i * seeds, (i + 1) * seeds), args.requests), range(4))
    yield Table(
        "Simulated: tokens per second, mean over seven streams (and the one that changes most)",
        lambda changed: simulated(changed, range(seeds), args.requests),
        constants,
        noise,
        list(leaves(constants)),
    )


def memory(args: argparse.Namespace) -> Iterator[Table]:
    answers, constants = Source().stream("mix", 3 * args.segment, 0.0, 0, 64), GovernorConstants()
    parts = ("acceptance.", "costs.", "planner.", "guesses.")
    yield Table(
        "Memory: tokens per plain step",
        lambda changed: remembered(changed, answers, 0),
        constants,
        noise_of(lambda seed: remembered(constants, answers, seed), range(4)),
        [name for name in leaves(constants) if name.startswith(parts)],
    )


def learning(args: argparse.Namespace) -> Iterator[Table]:
    source, constants = Source(), LearningConstants()
    stream = source.stream("drift", args.segment, 0.0, 0, 48)
    noise = noise_of(lambda seed: learned(constants, stream, source, seed), range(3))
    kinds: list[tuple[str, dict[str, Any], list[str]]] = [
        ("guard", {}, ["learner.guard."]),
        ("replay, with room for a quarter of the stream", {"replay_tokens": 12 * 70}, ["learner.replay."]),
        ("gradient cap and divergence", {}, ["experts.cap.", "experts.diverged", "experts.stuck"]),
        ("an ensemble of three", {"learner": "ensemble"}, ["experts.compared"]),
    ]
    for title, other, names in kinds:
        yield Table(
            f"Learning, {title}: acceptance length",
            lambda changed, other=other: learned(changed, stream, source, 0, **other),
            constants,
            noise,
            [name for name in leaves(constants) if name.startswith(tuple(names))],
        )


TABLES = {"simulated": simulation, "memory": memory, "learning": learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40, help="of a simulated stream")
    parser.add_argument("--seeds", type=int, default=1, help="of the simulation")
    parser.add_argument("--segment", type=int, default=20, help="requests of the recorded streams' unseen domain")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = provenance()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = (
        f"{about.cpu}, {about.cores} cores, {about.threads} thread of torch; Python {about.python}, torch {about.torch}"
    )
    lines = [
        "# Sensitivity of the constants",
        "",
        "`python benchmarks/sensitivity.py " + " ".join(sys.argv[1:]) + "`",
        "",
    ]
    lines += [
        f"Commit {commit}. {machine}.",
        "",
        "“=”: the same to the last bit. A change below that of other seeds is noise.",
        "",
    ]
    for table in itertools.chain.from_iterable(TABLES[name](args) for name in args.tables):
        lines += [*table.lines, ""]
        args.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
