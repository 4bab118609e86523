"""What a draft head learns by each learner and step size, on the same recorded answers of a real model: acceptance length by quarter.

    python benchmarks/studies/head_learners.py SMOLLM HEAD --requests 150 --out rows.jsonl
    python benchmarks/studies/head_learners.py SMOLLM HEAD --arms static ogd-2 ensemble     # some of the arms

The target answers every prompt once, greedily and in batches; its hidden states are kept, and its forwards are looked up afterwards.
That is exact for chains without recycled tokens: a candidate is kept if it is the recorded token, and what the target would say behind
a rejected one is never used. Chains of `--lookahead` tokens, one update after each request and two on remembered ones, no memory; each
request through all arms before the next one. Times say nothing about serving.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec._compat.caches import CACHE
from hf_onlinespec.heads.reading import read_head

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from heads import unseen

# The grid of an ensemble (experts=3, expert_ratio=4) and the single step sizes that it is held against: lr, in the middle, is the default.
LR, RATIO = OnlineSpecConfig().lr, OnlineSpecConfig().expert_ratio
ARMS: dict[str, dict[str, Any]] = {
    "static": {},
    "ogd-1": {"learner": "ogd", "lr": LR / RATIO},
    "ogd-2": {"learner": "ogd"},
    "ogd-3": {"learner": "ogd", "lr": LR * RATIO},
    "ensemble": {"learner": "ensemble"},
    "optimistic": {"learner": "optimistic"},
    "optimistic, 1 step": {"learner": "optimistic", "head_steps": 1},
    "optimistic, 3 steps": {"learner": "optimistic", "head_steps": 3},
}
BATCH = 15  # prompts that are answered together


@dataclass(frozen=True)
class Said:
    """What the target said along one prompt and its answer."""

    kind: str
    tokens: Tensor  # (L,)
    prompt: int  # of them
    features: tuple[Tensor, ...]  # of each hidden state that the head reads, (L - 1, width)
    last: Tensor  # (L - 1, width) what its vocabulary head reads


@torch.no_grad()
def answers(target: PreTrainedModel, tokenizer: Any, reads: tuple[int, ...], args: argparse.Namespace) -> list[Said]:
    """The target's greedy answers, with hidden states."""
    found: list[Said] = []
    stream = unseen(args.requests, args.seed)
    for at in range(0, len(stream), BATCH):
        batch = stream[at : at + BATCH]
        chats = [[{"role": "user", "content": prompt}] for _, prompt in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        how = {"max_new_tokens": args.new_tokens, "do_sample": False, "output_hidden_states": True}
        out = target.generate(**inputs, **how, return_dict_in_generate=True)
        states = [torch.cat([step[i] for step in out.hidden_states], dim=1) for i in (*reads, -1)]
        width = inputs["input_ids"].shape[1]
        ends = set(torch.tensor(target.generation_config.eos_token_id).view(-1).tolist())
        for row, (kind, _) in enumerate(batch):
            answer = out.sequences[row, width:].tolist()
            n = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
            start = int((inputs["attention_mask"][row] == 0).sum())
            tokens = out.sequences[row, start : width + n].clone()
            features = [state[row, start : width + n - 1].clone() for state in states]
            found.append(Said(kind, tokens, width - start, tuple(features[:-1]), features[-1]))
    return found


class LookedUp:
    """Takes the place of a target's forward while one recorded answer is generated.

    Args:
        reads: indices of the hidden states that were recorded.
    """

    def __init__(self, target: PreTrainedModel, reads: tuple[int, ...]) -> None:
        self._lm_head, self._reads = target.get_output_embeddings(), reads
        self._layers = int(target.config.num_hidden_layers)
        self.said: Said | None = None  # None: the target's own forward is called
        self._forward = target.forward
        self.bent = 0  # positions at which a batch of another shape had another likeliest token
        target.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        if self.said is None:
            return self._forward(*args, **inputs)
        said, tokens, cache = self.said, inputs["input_ids"], inputs[CACHE]
        start, fed = cache.get_seq_length(), tokens.shape[1]
        nothing = torch.zeros(1, 1, fed, 1)
        cache.update(nothing, nothing, 0)
        places = torch.arange(start, start + fed).clamp_max(len(said.last) - 1)
        logits = self._lm_head(said.last[places])[None]
        best, true = logits.argmax(-1)[0], said.tokens[(places + 1)]
        answered = (places + 1 >= said.prompt) & (best != true)
        if bool(answered.any()):
            self.bent += int(answered.sum())
            for row in answered.nonzero()[:, 0].tolist():
                logits[0, row, true[row]] = logits[0, row].max() * 1.01 + 0.01
        states = [None] * (self._layers + 1)
        for index, state in zip(self._reads, said.features, strict=True):
            states[index] = state[places][None]  # type: ignore[call-overload]
        return CausalLMOutputWithPast(logits=logits, hidden_states=tuple(states), **{CACHE: cache})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("head", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--head-steps", type=int, default=2, help="of arms that do not say")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    common: dict[str, Any] = dict(lookahead=args.lookahead, update_every=1, memory_tokens=0, recycle=False)
    drafts = {}
    for arm in args.arms:
        head = read_head(args.head, target.config, target.dtype).eval()
        head.share(target)
        settings = common | {"head_steps": args.head_steps, "seed": args.seed} | ARMS[arm]
        drafts[arm] = OnlineDraft(head, OnlineSpecConfig(**settings))
    reads = next(iter(drafts.values())).reads
    stream = answers(target, tokenizer, reads, args)
    looked_up = LookedUp(target, reads)
    how = dict(max_new_tokens=args.new_tokens, do_sample=False)
    rows: list[dict[str, Any]] = []
    for draft in drafts.values():  # a new target is tried with its own forward
        target.generate(
            stream[0].tokens[None, :8], max_new_tokens=2, do_sample=False, assistant_model=draft, onlinespec=False
        )
    for at, said in enumerate(stream):
        looked_up.said = said
        for arm, draft in drafts.items():
            out = target.generate(
                said.tokens[None, : said.prompt], **how, assistant_model=draft, onlinespec=arm != "static"
            )
            assert torch.equal(out[0], said.tokens), f"request {at}, {arm}"
            last = draft.metrics.last
            assert last.failed_drafts == last.failed_updates == 0
            rows.append(
                {"request": at, "kind": said.kind, "arm": arm, "tokens": last.new_tokens, "rounds": last.rounds}
            )
            rows[-1] |= {"updates": last.updates, "update_s": last.update_time_s}
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[-len(drafts) :])
    print(f"{looked_up.bent} positions at which a batch of another shape had another likeliest token")
    report(rows, list(drafts))


def report(rows: list[dict[str, Any]], arms: list[str]) -> None:
    requests = 1 + max(row["request"] for row in rows)

    def length(arm: str, start: float, end: float, kind: str | None = None) -> float:
        some = [r for r in rows if r["arm"] == arm and start * requests <= r["request"] < end * requests]
        some = [r for r in some if kind in (None, r["kind"])]
        return float(sum(r["tokens"] for r in some) / max(1, sum(r["rounds"] for r in some)))

    kinds = sorted({row["kind"] for row in rows})
    print(
        f"| arm | all | first quarter | second | third | last | {' | '.join(f'{kind}, last half' for kind in kinds)} |"
    )
    print("|---" * (6 + len(kinds)) + "|")
    for arm in arms:
        parts = [(0.0, 1.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
        cells = [length(arm, *part) for part in parts] + [length(arm, 0.5, 1.0, kind) for kind in kinds]
        print(f"| {arm} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
