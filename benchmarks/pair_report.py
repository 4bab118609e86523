"""Is the embedded pair worth measuring on? Held-out loss, agreement, repetition and samples, as Markdown.

python benchmarks/pair_report.py --prompts 40
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec.embedded import DOMAINS, FOLDER, load_pair


def repeated_4_grams(tokens: list[int]) -> float:
    """Share of the 4-grams of a continuation that occurred in it before."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40, help="prompts per domain for the generated figures")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pair = load_pair()
    with open(FOLDER / "prompts.jsonl", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    print(
        "| domain | target loss | draft loss | top-1 agreement | target top-1 on text | repeated 4-grams T=0.8 | greedy | text itself |"
    )
    print("|---|---|---|---|---|---|---|---|")
    samples = []
    for domain in DOMAINS:
        own = [item for item in items if item["domain"] == domain]
        nats: dict[str, list[Tensor]] = {"target": [], "draft": []}
        agree, right, text_repeats = [], [], []
        for item in own:
            prompt = pair.tokenizer("<|endoftext|>" + item["prompt"], return_tensors="pt").input_ids
            rest = pair.tokenizer(item["reference"] + "<|endoftext|>", return_tensors="pt").input_ids
            tokens = torch.cat([prompt, rest], dim=-1)[:, :256]
            n = tokens.shape[1] - prompt.shape[1]
            best = {}
            for name, model in (("target", pair.target), ("draft", pair.draft)):
                logits = model(tokens[:, :-1]).logits[0, -n:]
                nats[name].append(F.cross_entropy(logits, tokens[0, -n:], reduction="none"))
                best[name] = logits.argmax(-1)
            agree.append(best["target"] == best["draft"])
            right.append(best["target"] == tokens[0, -n:])
            text_repeats.append(repeated_4_grams(rest[0, : args.new_tokens].tolist()))
        repeats: dict[bool, list[float]] = {True: [], False: []}
        for i, item in enumerate(own[: args.prompts]):
            inputs = pair.tokenizer("<|endoftext|>" + item["prompt"], return_tensors="pt")
            for sample in (True, False):
                torch.manual_seed(i)
                how = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sample else {"do_sample": False}
                out = pair.target.generate(**inputs, max_new_tokens=args.new_tokens, **how)[
                    0, inputs["input_ids"].shape[1] :
                ]
                repeats[sample].append(repeated_4_grams(out.tolist()))
                if sample and i < args.samples:
                    samples.append((domain, item["prompt"], pair.tokenizer.decode(out, skip_special_tokens=True)))
        figures = [torch.cat(nats["target"]).mean(), torch.cat(nats["draft"]).mean()]
        shares = [torch.cat(agree).float().mean(), torch.cat(right).float().mean()]
        mean = [sum(r) / len(r) for r in (repeats[True], repeats[False], text_repeats)]
        print(f"| {domain} | " + " | ".join(f"{x:.3f}" for x in [*figures, *shares, *mean]) + " |", flush=True)
    for domain, prompt, text in samples:
        print(f"\n{domain}, temperature 0.8:\n```\n{prompt}«{text}»\n```")


if __name__ == "__main__":
    main()
