"""Drafts with another tokenizer than the target's: what learning brings, and whether sampling is exact.

    python benchmarks/other_tokenizer.py pair --target DIR --draft DIR --prompts FILE [--domain sql] [--requests 60]
    python benchmarks/other_tokenizer.py law [--seeds 20] [--draws 400]

`pair` answers the same prompts with a frozen and with a learning draft, in turn, and prints acceptance lengths per quarter of the
stream. `law` samples from two tiny models whose tokenizers share four of six strings, and prints a χ² p-value per seed against all
sequences of two tokens, and how the p-values are spread (Kolmogorov and Smirnov). Memory and recycling are left out of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_onlinespec import OnlineDraft

ROWS = 20  # draws of one call
FIXED: dict[str, Any] = dict(update_when="request", update_every=1, memory_tokens=0, recycle=False)


def pair(args: argparse.Namespace) -> None:
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    drafts = {}
    for arm in ("frozen", "learning"):
        model = AutoModelForCausalLM.from_pretrained(args.draft, dtype=torch.float32).eval()
        drafts[arm] = OnlineDraft(model, lookahead=args.lookahead, **FIXED)
    both = {"tokenizer": tokenizer, "assistant_tokenizer": AutoTokenizer.from_pretrained(args.draft)}
    lines = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    texts = [line["prompt"] for line in lines if args.domain in (None, line.get("domain"))]
    texts = random.Random(args.seed).sample(texts, args.requests)
    sampled = (
        {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {"do_sample": False}
    )
    rounds: dict[str, list[tuple[int, int]]] = {arm: [] for arm in drafts}
    seconds, differing = dict.fromkeys(drafts, 0.0), 0
    for number, text in enumerate(texts):
        if args.chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.longest)
        inputs.pop("token_type_ids", None)
        outputs = []
        for arm, draft in drafts.items():
            torch.manual_seed(number)
            learns = arm == "learning"
            outputs.append(
                target.generate(
                    **inputs,
                    assistant_model=draft,
                    onlinespec=learns,
                    max_new_tokens=args.new_tokens,
                    **sampled,
                    **both,
                )
            )
            last = draft.metrics.last
            rounds[arm].append((last.new_tokens, last.rounds))
            seconds[arm] += last.wall_time_s
        lengths = {arm: round(counted[-1][0] / counted[-1][1], 2) for arm, counted in rounds.items()}
        print(f"request {number + 1}: {lengths}", flush=True)
        differing += not args.temperature and not torch.equal(*outputs)
    parts = [slice(n * len(texts) // 4, (n + 1) * len(texts) // 4) for n in range(4)]
    for arm, counted in rounds.items():
        lengths = [sum(n for n, _ in counted[part]) / sum(r for _, r in counted[part]) for part in parts]
        print(
            f"{arm:>9}: acceptance length by quarter {[round(length, 2) for length in lengths]}, {seconds[arm]:.1f} s"
        )
    new, base = rounds["learning"][parts[3]], rounds["frozen"][parts[3]]
    print(f"learning / frozen in the last quarter: {ratio(new, base):.2f} {interval(new, base)}")
    print(f"answers that differ between the arms: {differing} of {len(texts)}")
    print(drafts["learning"].metrics.decisions)


def ratio(new: list[tuple[int, int]], base: list[tuple[int, int]]) -> float:
    """Of the acceptance lengths of requests (new tokens, rounds)."""
    (a, b), (c, d) = (tuple(map(sum, zip(*some, strict=True))) for some in (new, base))
    return (a / b) / (c / d)


def interval(new: list[tuple[int, int]], base: list[tuple[int, int]]) -> tuple[float, float]:
    """90 % of the ratios of requests that are drawn again, in pairs."""
    rng, both = random.Random(0), list(zip(new, base, strict=True))
    found = sorted(
        ratio(*map(list, zip(*rng.choices(both, k=len(both)), strict=True)))  # type: ignore[arg-type]
        for _ in range(2000)
    )
    return round(found[100], 2), round(found[1899], 2)


def strings(*tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these tokens, which spell what they are."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def law(args: argparse.Namespace) -> None:
    both = {
        "tokenizer": strings("a", "b", "c", "ab", "ca", "bb"),
        "assistant_tokenizer": strings("c", "a", "b", "cc", "ab", "ba"),
    }
    found = []
    for seed in range(args.seeds):
        target, draft = (
            tiny(1000 + seed, 2),
            OnlineDraft(tiny(2000 + seed, 1), lookahead=2, lr=3e-3, replay_passes=0, **FIXED),
        )
        prompt = torch.tensor([[3, 1, 5, 3]])
        sequences = torch.tensor(list(itertools.product(range(6), repeat=2)))
        with torch.no_grad():
            logits = target(torch.cat([prompt.expand(36, -1), sequences], dim=-1)).logits[:, 3:5]
        law = logits.double().softmax(-1).gather(-1, sequences[..., None]).squeeze(-1).prod(-1)
        torch.manual_seed(seed)
        counts = torch.zeros(36, dtype=torch.long)
        for _ in range(args.draws // ROWS):
            sampled = {"do_sample": True, "max_new_tokens": 2, "top_k": 0, "num_return_sequences": ROWS}
            out = target.generate(prompt, assistant_model=draft, onlinespec=True, **sampled, **both)
            counts += (out[:, 4] * 6 + out[:, 5]).bincount(minlength=36)
        found.append(p_value(counts, law))
        metrics = draft.metrics
        print(
            f"seed {seed}: p {found[-1]:.3f}, {metrics.updates} updates, {metrics.accepted_tokens} accepted", flush=True
        )
    ordered = sorted(found)
    n = len(ordered)
    distance = max(max((i + 1) / n - p, p - i / n) for i, p in enumerate(ordered))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance  # Stephens 1970
    p = min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101)))
    print(f"KS against uniform: D {distance:.3f}, p {p:.3f}")


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Of Pearson's χ²; cells with an expectation below 5 are pooled."""
    expected = law * counts.sum()
    large = expected >= 5
    observed, wanted = counts[large].double(), expected[large]
    if bool((~large).any()):
        observed = torch.cat([observed, counts[~large].sum().double().view(1)])
        wanted = torch.cat([wanted, expected[~large].sum().view(1)])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("pair")
    one.add_argument("--target", required=True)
    one.add_argument("--draft", required=True)
    one.add_argument("--prompts", type=Path, required=True, help="lines of JSON with a prompt, and a domain")
    one.add_argument("--domain")
    one.add_argument("--requests", type=int, default=60)
    one.add_argument("--new-tokens", type=int, default=48)
    one.add_argument("--longest", type=int, default=128, help="tokens of a prompt")
    one.add_argument("--lookahead", type=int, default=5)
    one.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    one.add_argument("--chat", action="store_true", help="prompts are messages")
    one.add_argument("--seed", type=int, default=0)
    other = kinds.add_parser("law")
    other.add_argument("--seeds", type=int, default=20)
    other.add_argument("--draws", type=int, default=400)
    args = parser.parse_args()
    pair(args) if args.kind == "pair" else law(args)


if __name__ == "__main__":
    main()
