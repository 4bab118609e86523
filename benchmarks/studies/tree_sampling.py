"""Which candidates of a draft serve sampling best at one place of a tree: drawn ones, its best tokens as point guesses, or both.

    python benchmarks/studies/tree_sampling.py --prompts 12

The frozen embedded draft on what the target says after held-out prompts, at home and on a domain it has not seen. At every position,
from the target's law p and the draft's q (both under temperature and top-p), the chance that one of k candidates is kept:

- drawn: k tokens drawn from q without replacement, by recursive rejection (arXiv:2305.09781);
- drawn + best: one drawn token, and the k − 1 best others of q as point guesses;
- best: the k best tokens of q as point guesses: Σ p there.

The first is a mean over draws, the others are exact.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from hf_onlinespec._compat.generation import generative, processed_scores
from hf_onlinespec.embedded import DOMAINS, HOME_DOMAIN, load_pair, prompts
from hf_onlinespec.verify.rejection import Drawn, speculative_sample

SIZES = (1, 2, 4)


def by_draws(p: Tensor, q: Tensor, k: int) -> Tensor:
    """(rows,) mean chance over one draw per row; laws (rows, vocab)."""
    drawn, left = [], q
    for _ in range(k):
        tokens = torch.multinomial(left + 1e-30, 1)  # a law of fewer than k tokens runs out: any one will do
        drawn.append(Drawn(tokens[:, 0], left))
        left = left.scatter(1, tokens, 0.0)
        left = left / left.sum(1, keepdim=True).clamp_min(1e-30)
    return torch.stack(speculative_sample(p, drawn)[1]).sum(0)


def with_best(p: Tensor, q: Tensor, ranks: Tensor, k: int) -> Tensor:
    """(rows,) exactly: Σ over the drawn x of q(x) times what is kept of x, and of the k − 1 best others where x is rejected."""
    overlap = torch.minimum(p, q).sum(1)
    if k == 1:
        return overlap
    residual = (p - q).clamp_min(0)
    residual = residual / residual.sum(1, keepdim=True).clamp_min(1e-30)
    rejected = (q - p).clamp_min(0)  # (rows, vocab) chance that x is drawn and rejected
    best = ranks[:, :k]
    first, last = best[:, : k - 1], best[:, k - 1 :]
    usual = residual.gather(1, first).sum(1)
    # Where x is one of the first k − 1, the last one takes its place.
    instead = usual[:, None] - residual.gather(1, first) + residual.gather(1, last)
    among = rejected.gather(1, first)
    return overlap + (rejected.sum(1) - among.sum(1)) * usual + (among * instead).sum(1)


def best_alone(p: Tensor, ranks: Tensor, k: int) -> Tensor:
    return p.gather(1, ranks[:, :k]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12, help="per domain")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draws", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    pair = load_pair()
    away = next(domain for domain in DOMAINS if domain != HOME_DOMAIN)
    print(
        "| domain | temperature | top-p | k | drawn | drawn + best | best | positions |\n|---|---|---|---|---|---|---|---|"
    )
    for domain in (HOME_DOMAIN, away):
        for temperature in (0.8, 1.0):
            for top_p in (0.95, 1.0):
                warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
                found: dict[tuple[int, str], list[float]] = defaultdict(list)
                for text in prompts(domain)[: args.prompts]:
                    inputs = pair.tokenizer(text, return_tensors="pt")
                    law: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
                    out = generative(pair.target).generate(**inputs, max_new_tokens=args.new_tokens, **law)
                    n = out.shape[1] - inputs["input_ids"].shape[1]
                    with torch.no_grad():
                        said, guessed = (model(out[:, :-1]).logits[0, -n:] for model in (pair.target, pair.draft))
                    p, q = (processed_scores(warpers, out, scores).softmax(-1) for scores in (said, guessed))
                    ranks = guessed.topk(max(SIZES), 1).indices  # a guess need not be in the draft's own nucleus
                    for k in SIZES:
                        drawn = torch.stack([by_draws(p, q, k) for _ in range(args.draws if k > 1 else 1)]).mean(0)
                        found[k, "drawn"] += drawn.tolist()
                        found[k, "drawn + best"] += with_best(p, q, ranks, k).tolist()
                        found[k, "best"] += best_alone(p, ranks, k).tolist()
                for k in SIZES:
                    cells = (f"{mean(found[k, name]):.3f}" for name in ("drawn", "drawn + best", "best"))
                    print(
                        f"| {domain} | {temperature} | {top_p} | {k} | {' | '.join(cells)} | {len(found[k, 'best'])} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
