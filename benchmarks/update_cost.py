"""What a gradient step costs: the prompt read from the draft's own KV cache or anew; requests in one batch or one by one.

    python benchmarks/update_cost.py

The embedded draft, the two ways in turns, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft
from hf_onlinespec.feedback import Teacher
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(update_every=1, snapshots=0))
    vocab = draft.config.vocab_size
    print("| prompt | new tokens | from the cache, ms | anew, ms | cache ÷ anew |\n|---|---|---|---|---|")
    for prompt, new in ((16, 64), (64, 64), (128, 64), (192, 64), (128, 8), (32, 8)):
        tokens = torch.randint(vocab, (1, prompt + new))
        teacher = [Teacher.from_logits(torch.randn(new, vocab))]
        cache = DynamicCache(config=draft.config)
        with draft.serving() as model:
            model(tokens[:, :prompt], past_key_values=cache)

        def step(
            prefix: int,
            tokens: torch.Tensor = tokens,
            teacher: list[Teacher] = teacher,
            cache: DynamicCache = cache,
        ) -> None:
            draft.learn_segment(tokens, teacher, cache, prefix, None, Counts())

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
                draft._learning.learn_from([request], Counts())

        found = medians_ms(
            {"batch": lambda r=requests: draft._learning.learn_from(r, Counts()), "apart": apart}, args.repeats
        )
        print(f"| {n} | {found['batch']:.1f} | {found['apart']:.1f} | {found['batch'] / found['apart']:.2f} |")


if __name__ == "__main__":
    main()
