"""What the memory and the governor make of recorded answers, by a virtual clock: the same numbers on any machine, however busy.

    python benchmarks/studies/virtual_clock.py record FOLDER answers.jsonl --dtype bfloat16      # once: plain, greedy
    python benchmarks/studies/virtual_clock.py replay answers.jsonl --prompts 25 --new-tokens 44

A target that says what was recorded is asked by transformers' prompt lookup and by ours, each as in `hf-onlinespec try` without a
draft. A forward takes as long as a curve says: nothing depends on the machine. The governor is told these times with noise.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hf_onlinespec.commit.base import Call
from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.commit.request import Request
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.measure.shipped import encoder, shipped_prompts
from hf_onlinespec.measure.trial import LOOKUP_TOKENS
from hf_onlinespec.rounds import Proposal, Rows, Verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from recorded import walk

# Time of a forward over k drafted tokens and one more, in forwards over one.
COSTS: dict[str, Callable[[int], float]] = {
    "cpu": lambda k: (
        1 + 0.2 * (1 - 2 ** (-k / 2)) + 0.056 * k
    ),  # SmolLM2-135M in bfloat16, one thread, medians of 12 forwards
    "linear": lambda k: 1 + 3 / 35 * k,
    "steep": lambda k: 1 + 0.15 * k,
    "flat": lambda k: 1 + 0.01 * k,  # an accelerator
}
READ = 0.05  # of a forward, for one token of a prompt: of the same measurement
PLAIN_ROUND, DRAFTED_ROUND = 0.017, 0.034  # of a forward, beside it: 0.6 and 1.2 ms of 35, as `try` measured
STEP_S = 0.035  # of a forward over one token, as the governor is told it
NOISE = 0.05  # standard deviation of the logarithm of a told time


@dataclass(frozen=True)
class Answer:
    """A recorded request."""

    kind: str
    prompt: list[int]
    tokens: list[int]
    end: int  # the id that ends an answer


@dataclass(frozen=True)
class Cost:
    """What an answer took."""

    tokens: int
    forwards: int
    time: float  # in forwards over one token


def record(folder: str, path: Path, dtype: str, new_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    encode = encoder(tokenizer)
    with path.open("w", encoding="utf-8") as file:
        for prompt in shipped_prompts(new_tokens):
            inputs = encode(prompt.text)
            output = target.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)[0].tolist()
            start = inputs["input_ids"].shape[1]
            row = [prompt.domain, output[:start], output[start:], tokenizer.eos_token_id]
            file.write(json.dumps(row) + "\n")
            file.flush()


def first(answer: Answer, cost: Callable[[int], float], k: int) -> float:
    return READ * (len(answer.prompt) - 1) + cost(k)


def plain(answer: Answer, cost: Callable[[int], float]) -> Cost:
    n = len(answer.tokens)
    return Cost(n, n, first(answer, cost, 0) + (n - 1) * cost(0) + n * PLAIN_ROUND)


def lookup(answer: Answer, cost: Callable[[int], float], number: int, new_tokens: int) -> Cost:
    ids, start, n = torch.tensor([answer.prompt + answer.tokens]), len(answer.prompt), len(answer.tokens)
    generator = PromptLookupCandidateGenerator(torch.tensor([answer.end]), number, max_length=start + new_tokens)
    at = forwards = 0
    time = 0.0
    while at < n:
        candidates, _ = generator.get_candidates(ids[:, : start + at])
        drafted = candidates[:, start + at :]
        k = drafted.shape[1]
        path, _ = walk(Proposal(drafted, None, ((TokenSource("memory", 0),) * k,)), answer.tokens[at:])
        time += DRAFTED_ROUND + (cost(k) if forwards else first(answer, cost, k))
        forwards += 1
        at += 1 + len(path)
    return Cost(n, forwards, time)


def ours(answers: list[Answer], cost: Callable[[int], float], new_tokens: int, seed: int) -> Iterator[Cost]:
    # What the target thought of other tokens was not recorded: nothing is recycled.
    draft, rng = MemoryDraft(recycle=False), random.Random(seed)
    for answer in answers:
        ids, start, n = torch.tensor([answer.prompt + answer.tokens]), len(answer.prompt), len(answer.tokens)
        config = GenerationConfig(max_length=start + new_tokens, eos_token_id=answer.end, do_sample=False)
        request = Request(draft, Call(config, LogitsProcessorList()))
        at = forwards = 0
        time = 0.0
        with torch.no_grad():
            while at < n:
                proposal = request.propose(Rows.of(ids[:, : start + at]), max(0, new_tokens - at - 1), trees=True)
                path, verified = walk(proposal, answer.tokens[at:])
                k = proposal.lengths[0]
                took = cost(k) if forwards else first(answer, cost, k)
                time += DRAFTED_ROUND + took
                forwards += 1
                new, at = min(1 + len(path), n - at), min(at + 1 + len(path), n)
                rows, told_s = Rows.of(ids[:, : start + at]), STEP_S * took * math.exp(rng.gauss(0, NOISE))
                kept, overlaps = (tuple(path),), ((1.0,) * len(path) + (0.0,) * (len(path) < new and k > 0),)
                verdict = Verdict(
                    proposal, rows, (new,), kept, overlaps, (tuple(verified),), (at == n,), None, target_s=told_s
                )
                request.observe(verdict)
            request.finish()
        yield Cost(n, forwards, time)


def speed(costs: list[Cost]) -> float:
    return sum(cost.tokens for cost in costs) / sum(cost.time for cost in costs)


def length(costs: list[Cost]) -> float:
    return sum(cost.tokens for cost in costs) / sum(cost.forwards for cost in costs)


def replay(path: Path, prompts: int | None, new_tokens: int, seeds: int) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:prompts]
    answers = [Answer(kind, prompt, tokens[:new_tokens], end) for kind, prompt, tokens, end in rows]
    groups = {"all": range(len(answers))}
    for kind in dict.fromkeys(answer.kind for answer in answers):
        groups[kind] = [i for i, answer in enumerate(answers) if answer.kind == kind]
    names = [*(f"prompt lookup {number}" for number in LOOKUP_TOKENS), "ours"]
    print("Speed ÷ plain (tokens per forward).\n")
    print(f"| cost | prompts | {' | '.join(names)} | ours ÷ best |\n" + "|---" * (len(names) + 3) + "|")
    for name, cost in COSTS.items():
        arms = {"plain": [[plain(answer, cost) for answer in answers]]}
        for number in LOOKUP_TOKENS:
            arms[f"prompt lookup {number}"] = [[lookup(answer, cost, number, new_tokens) for answer in answers]]
        arms["ours"] = [list(ours(answers, cost, new_tokens, seed)) for seed in range(seeds)]
        for group, members in groups.items():
            picked = {arm: [[run[i] for i in members] for run in runs] for arm, runs in arms.items()}
            speeds = {arm: statistics.mean(map(speed, runs)) for arm, runs in picked.items()}
            cells = [
                f"{speeds[arm] / speeds['plain']:.2f} ({statistics.mean(map(length, picked[arm])):.2f})"
                for arm in names
            ]
            best = max(value for arm, value in speeds.items() if arm != "ours")
            print(
                f"| {name} | {len(members)} {group} | {' | '.join(cells)} | {speeds['ours'] / best:.3f} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    recorder, replayer = parts.add_parser("record"), parts.add_parser("replay")
    recorder.add_argument("folder")
    recorder.add_argument("answers", type=Path)
    recorder.add_argument("--dtype", default="bfloat16")
    recorder.add_argument("--new-tokens", type=int, default=96)
    replayer.add_argument("answers", type=Path)
    replayer.add_argument("--prompts", type=int)
    replayer.add_argument("--new-tokens", type=int, default=44)
    replayer.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "record":
        record(args.folder, args.answers, args.dtype, args.new_tokens)
    else:
        replay(args.answers, args.prompts, args.new_tokens, args.seeds)


if __name__ == "__main__":
    main()
