"""What guesses make of recorded answers, chains beside trees, by a cost curve: the same numbers on any machine, however busy.

    python benchmarks/studies/recorded_trees.py record SMOLLM answers.jsonl --prompts 30        # once: plain, greedy
    python benchmarks/studies/recorded_trees.py replay answers.jsonl

The table of recycled tokens is filled from the kept path alone: what the target would have said behind a rejected candidate was not
recorded. The governor is told the cost of verifying; a round takes as long as the curve says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).parents[1]))
from trees import prompts

from hf_onlinespec.commit.guessing import Guesser
from hf_onlinespec.commit.proposal import ProposalBuilder
from hf_onlinespec.commit.recycling import KEPT, RecyclingTable
from hf_onlinespec.commit.request_memory import RequestMemory
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.commit.tree import grow
from hf_onlinespec.govern.acceptance import RequestStats, TokenSource
from hf_onlinespec.govern.governor import Governor

# Positions and the time of a forward over them, in plain steps: SmolLM2-135M in bfloat16 on one core of a machine with matrix
# instructions for bfloat16, as the issue of trees states it; beyond 24 positions as between 16 and 24.
POSITIONS, TIMES = (1, 4, 8, 12, 16, 24, 32, 72), (1.0, 1.01, 1.11, 1.28, 1.40, 1.60, 1.80, 2.80)


def stated(k: int) -> float:
    for (few, less), (many, more) in zip(
        zip(POSITIONS, TIMES, strict=True), zip(POSITIONS[1:], TIMES[1:], strict=True), strict=False
    ):
        if k + 1 <= many:
            return less + (more - less) * (k + 1 - few) / (many - few)
    return TIMES[-1]


COSTS: dict[str, Callable[[int], float]] = {
    "stated": stated,
    "flat": lambda k: 1 + 0.01 * k,  # an accelerator
    "steep": lambda k: 1 + 0.1 * (1 - 2 ** (-k / 2)) + 0.07 * k,  # the machine that we measure on, see LOG.md
}


class Kept(LogitsProcessor):
    """The best next tokens of every step."""

    def __init__(self) -> None:
        self.best: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.best.append(scores.topk(KEPT, -1).indices.tolist())
        return scores


def record(folder: str, path: Path, n: int, new_tokens: int, batch: int = 10) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
    asked = prompts(n, seed=0)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"]
        for _, prompt in asked
    ]
    rows: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        some, kept = order[start : start + batch], Kept()
        inputs = tokenizer.pad({"input_ids": [texts[i] for i in some]}, return_tensors="pt")
        output = target.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, logits_processor=LogitsProcessorList([kept])
        )
        for at, i in enumerate(some):
            tokens = output[at, inputs["input_ids"].shape[1] :].tolist()
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            best = [step[at] for step in kept.best[:end]]
            rows[i] = {"kind": asked[i][0], "prompt": texts[i], "tokens": tokens[:end], "best": best}
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in range(len(rows))), encoding="utf-8")


def replay(
    answers: list[dict[str, Any]], cost: Callable[[int], float], branches: bool, table: bool
) -> tuple[float, float, float, float]:
    """Tokens a round, the same in the second half, tokens per plain step, candidates a round."""
    governor, memory, recycled = Governor(0.1, 2), SuffixMemory(65_536), RecyclingTable() if table else None
    governor.costs.verify.at = cost  # type: ignore[method-assign]
    governor.costs.verify.step = lambda k: cost(k + 1) - cost(k)  # type: ignore[method-assign]
    governor.observe([], [], 0.0, 1.0)  # a plain step
    no_text = torch.zeros(1, 1, dtype=torch.long)
    rounds: list[tuple[int, int, int, float]] = []  # request, tokens, candidates, time
    for at, answer in enumerate(answers):
        stats, room, place = RequestStats(), len(answer["tokens"]), 0
        own = RequestMemory(memory, contextlib.nullcontext(), 4096, 0, stats, governor.acceptances)
        text = list(answer["prompt"])
        own.read(torch.tensor([text]))
        while place < room:
            plan = governor.plan(False, stats, room - place)
            calibration = governor.acceptances.memory_calibration(stats)
            guesser = Guesser(own, recycled, governor.guesses, own.context, calibration, None)
            builder = ProposalBuilder(no_text, own.context, set())
            grow(builder, guesser, lambda n, chance, p=plan: governor.guess_pays(p, n, chance), room, set(), branches)
            proposal = builder.proposal(0)
            parents, tokens = proposal.parents_of(0), proposal.tokens[0].tolist()
            kept, new = -1, []
            outcomes: list[tuple[TokenSource, float]] = []
            read, best = [text[-1]], [answer["best"][place]]
            while place < room:
                token = answer["tokens"][place]
                if kept in builder.places:
                    governor.guesses.observe(builder.places[kept], token, stats)
                new.append(token)
                place += 1
                followers = [i for i, parent in enumerate(parents) if parent == kept]
                right = next((i for i in followers if tokens[i] == token), None)
                outcomes += [(proposal.sources[0][i], float(i == right)) for i in followers]
                if right is None:
                    break
                kept = right
                if place < room:
                    read.append(token)
                    best.append(answer["best"][place])
            text += new
            own.read(torch.tensor([text]))
            if recycled is not None:
                recycled.update(read, best, 1 << 17)
            rounds.append((at, len(new), len(tokens), cost(len(tokens))))
            governor.observe(proposal.sources[0], outcomes, 0.0, cost(len(tokens)), stats)
        own.commit(torch.tensor([text]))
        governor.request_ended(room, stats)
    late = [one for one in rounds if one[0] >= len(answers) // 2]
    tokens_late = sum(one[1] for one in late)
    n_tokens, n_rounds = sum(one[1] for one in rounds), len(rounds)
    return (
        n_tokens / n_rounds,
        tokens_late / len(late),
        n_tokens / sum(one[3] for one in rounds),
        sum(one[2] for one in rounds) / n_rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("model")
    recording.add_argument("answers", type=Path)
    recording.add_argument("--prompts", type=int, default=30, help="of each kind")
    recording.add_argument("--new-tokens", type=int, default=96)
    replaying = actions.add_parser("replay")
    replaying.add_argument("answers", type=Path)
    args = parser.parse_args()
    if args.action == "record":
        record(args.model, args.answers, args.prompts, args.new_tokens)
        return
    answers = [json.loads(line) for line in args.answers.read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(answers)
    print(
        "| costs | proposals | acceptance length | second half | tokens per plain step | candidates |\n|---|---|---|---|---|---|"
    )
    for name, cost in COSTS.items():
        for label, branches, table in (
            ("chains, memory", False, False),
            ("chains, memory and recycled", False, True),
            ("trees, memory", True, False),
            ("trees, memory and recycled", True, True),
        ):
            length, late, speed, candidates = replay(answers, cost, branches, table)
            print(f"| {name} | {label} | {length:.2f} | {late:.2f} | {speed:.3f} | {candidates:.1f} |", flush=True)


if __name__ == "__main__":
    main()
