"""What a draft must reach here before drafting, and learning, pay: from this machine's own costs.

    python benchmarks/studies/break_even.py --extra-layers 0

A round drafts k tokens and verifies k + 1 positions; it costs C = k·d + T(k + 1), and plain decoding spends T(1) per token.
With an acceptance length of τ a request of N tokens takes N/τ · C + U seconds, U being its learning. So drafting pays from
τ = C / T(1) on, and drafting and learning from τ = C / (T(1) − U/N) on. The acceptance rate α is the one at which
independent acceptance gives that τ: τ = (1 − α^(k+1)) / (1 − α).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec._compat.caches import CACHE
from hf_onlinespec.embedded import load_draft, load_pair
from hf_onlinespec.share.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from padded import padded
from streams import spare

POSITIONS = tuple(range(1, 10))
LOOKAHEADS = tuple(range(1, 9))


@torch.inference_mode()
def forward_times_s(model: PreTrainedModel, context: int, repeats: int) -> dict[int, float]:
    """Median seconds of a forward over 1 to 9 positions behind `context` cached tokens; the numbers take turns."""
    tokens = torch.randint(1, model.config.vocab_size, (1, context + POSITIONS[-1]))
    cache = DynamicCache(config=model.config)
    model(tokens[:, :context], **{CACHE: cache}, use_cache=True)
    times: dict[int, list[float]] = {n: [] for n in POSITIONS}
    for _ in range(repeats):
        for n in POSITIONS:
            started = time.perf_counter()
            model(tokens[:, context : context + n], **{CACHE: cache}, use_cache=True, logits_to_keep=n)
            times[n].append(time.perf_counter() - started)
            cache.crop(-n)
    return {n: statistics.median(some) for n, some in times.items()}


def learning_time_s(target: PreTrainedModel, prompts: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of learning per request, and new tokens per request, of a draft that learns from every one of them."""
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(lookahead=5, update_every=1))
    tokenizer = load_pair().tokenizer
    for prompt in spare(new_tokens)[:prompts]:
        inputs = tokenizer(prompt.text, return_tensors="pt")
        target.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft)
    metrics = draft.metrics
    return metrics.update_time_s / metrics.requests, metrics.new_tokens / metrics.requests


def expected_tokens(alpha: float, k: int) -> float:
    """τ_k(α): tokens per round when every drafted token is accepted with probability α, independently."""
    return sum(alpha**i for i in range(k + 1))


def acceptance_rate(tau: float, k: int) -> float | None:
    """The α at which τ_k(α) = tau; None: out of reach, even when all k tokens are kept."""
    if tau > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, k) < tau else (low, middle)
    return high


def table(target_s: dict[int, float], draft_s: float, update_s: float, new_tokens: float) -> str:
    """Markdown: what is needed per lookahead."""
    lines = [
        "| lookahead k | c·k | verification ÷ T(1) | drafting pays: τ | α | learning pays: τ | α |",
        "|---|---|---|---|---|---|---|",
    ]
    left_s = target_s[1] - update_s / new_tokens  # of a plainly decoded token, when its learning is paid
    for k in LOOKAHEADS:
        cost_s = k * draft_s + target_s[k + 1]
        cells = [f"{k * draft_s / target_s[1]:.2f}", f"{target_s[k + 1] / target_s[1]:.2f}"]
        for tau in (cost_s / target_s[1], cost_s / left_s if left_s > 0 else float("inf")):
            alpha = acceptance_rate(tau, k)
            cells += [f"{tau:.2f}", "never" if alpha is None else f"{alpha:.2f}"]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--extra-layers", type=int, default=0, metavar="N", help="cost-pads the target, see padded.py")
    parser.add_argument("--context", type=int, default=96, metavar="N", help="cached tokens in front of a forward")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="forwards that a median is taken of")
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="requests that learning is timed on")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    pair = load_pair()
    target = padded(pair.target, args.extra_layers) if args.extra_layers else pair.target
    for model in (target, pair.draft):
        forward_times_s(model, args.context, 5)  # warm-up
    target_s = forward_times_s(target, args.context, args.repeats)
    draft_s = forward_times_s(pair.draft, args.context, args.repeats)[1]
    update_s, new_tokens = learning_time_s(target, args.prompts, args.new_tokens)

    padding = f", cost-padded with {args.extra_layers} layers that add exactly zero" if args.extra_layers else ""
    print(f"## Break-even: the embedded target{padding}, {args.context} tokens of context\n")
    print(json.dumps(provenance().to_dict()), "\n")
    print("| positions | " + " | ".join(map(str, POSITIONS)) + " |\n" + "|---" * (len(POSITIONS) + 1) + "|")
    print("| target forward, ms | " + " | ".join(f"{1e3 * s:.2f}" for s in target_s.values()) + " |\n")
    print(f"Draft step: {1e3 * draft_s:.2f} ms, c = {draft_s / target_s[1]:.3f}.")
    print(f"Learning: {1e3 * update_s:.1f} ms per request of {new_tokens:.0f} tokens.\n")
    print(table(target_s, draft_s, update_s, new_tokens))


if __name__ == "__main__":
    main()
