"""What a gradient step costs: the prompt read from the draft's own KV cache or anew; requests in one batch or one by one.

    python benchmarks/update_cost.py
    python benchmarks/update_cost.py --schedule --prompts 150 --seeds 3

The embedded draft, the two ways in turns, medians. `--schedule`: a stream of an unseen domain, learned as it comes, against the
same schedule with every remembered request in a step of its own and no budget; lookahead 5, no memory, requests in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from streams import shuffled
from transformers import DynamicCache
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec._compat.caches import CACHE
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.embedded import load_draft, load_pair
from hf_onlinespec.metrics import Counts


def medians_ms(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Each way's median time, taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(repeats + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if at >= 2:
                spent[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in spent.items()}


def schedule(prompts: int, seeds: int, temperature: float, new_tokens: int) -> None:
    """Update seconds per generated token and acceptance length, budgeted and batched, and neither."""
    pair = load_pair()
    common = {"lookahead": 5, "memory_tokens": 0}
    settings = OnlineSpecConfig()
    ways = {
        "as it comes": OnlineSpecConfig(**common),
        "batched, no budget": OnlineSpecConfig(**common, update_every=1, update_when="request"),
        "one by one, no budget": OnlineSpecConfig(
            **common,
            update_every=1,
            update_when="request",
            replay_batch=1,
            replay_passes=settings.replay_passes * settings.replay_batch,
        ),
    }
    print("| seed | way | ms of learning per token | ÷ one by one | acceptance length | last quarter |")
    print("|---|---|---|---|---|---|")
    law = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for seed in range(seeds):
        drafts = {name: OnlineDraft(load_draft(), config) for name, config in ways.items()}
        last: dict[str, list[int]] = {name: [0, 0] for name in ways}  # tokens, rounds
        for at, text in enumerate(shuffled("orders", seed)[:prompts]):
            inputs = pair.tokenizer(text, return_tensors="pt")
            for name, draft in drafts.items():
                torch.manual_seed(seed)
                pair.target.generate(**inputs, max_new_tokens=new_tokens, assistant_model=draft, **law)
                if at >= prompts - prompts // 4:
                    last[name][0] += draft.metrics.last.new_tokens
                    last[name][1] += draft.metrics.last.rounds
        cost = {name: 1e3 * d.metrics.update_time_s / d.metrics.new_tokens for name, d in drafts.items()}
        for name, draft in drafts.items():
            print(
                f"| {seed} | {name} | {cost[name]:.2f} | {cost[name] / cost['one by one, no budget']:.2f} "
                f"| {draft.metrics.acceptance_length:.2f} | {last[name][0] / last[name][1]:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--schedule", action="store_true")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.schedule:
        schedule(args.prompts, args.seeds, args.temperature, args.new_tokens)
        return
    torch.manual_seed(0)
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(update_every=1, snapshots=0))
    vocab = draft.config.vocab_size
    print("| prompt | new tokens | from the cache, ms | anew, ms | cache ÷ anew |\n|---|---|---|---|---|")
    for prompt, new in ((16, 64), (64, 64), (128, 64), (192, 64), (128, 8), (32, 8)):
        tokens = torch.randint(vocab, (1, prompt + new))
        teacher = [Teacher.from_logits(torch.randn(new, vocab))]
        cache = DynamicCache(config=draft.config)
        with draft.trainable.serving() as model:
            model(tokens[:, :prompt], **{CACHE: cache})

        def step(
            prefix: int,
            tokens: torch.Tensor = tokens,
            teacher: list[Teacher] = teacher,
            cache: DynamicCache = cache,
        ) -> None:
            draft.learning.learn_segment(
                Segment(tokens, teacher, None, 1.0), Counts(), prefix=Prefix(cache, prefix) if prefix else None
            )

        found = medians_ms({"cache": lambda p=prompt: step(p - 1), "anew": lambda: step(0)}, args.repeats)
        print(
            f"| {prompt} | {new} | {found['cache']:.1f} | {found['anew']:.1f} | {found['cache'] / found['anew']:.2f} |"
        )
    print(
        "\n| requests of 32 + 64 tokens | in one batch, ms | one by one, ms | batch ÷ one by one |\n|---|---|---|---|"
    )
    for n in (2, 4, 8):
        requests = [
            Feedback(torch.randint(vocab, (96 - 2 * i,)), Teacher.from_logits(torch.randn(64, vocab)).top(64))
            for i in range(n)
        ]

        def apart(requests: list[Feedback] = requests) -> None:
            for request in requests:
                draft.learning.learn([request], Counts())

        found = medians_ms(
            {"batch": lambda r=requests: draft.learning.learn(r, Counts()), "apart": apart}, args.repeats
        )
        print(f"| {n} | {found['batch']:.1f} | {found['apart']:.1f} | {found['batch'] / found['apart']:.2f} |")


if __name__ == "__main__":
    main()
