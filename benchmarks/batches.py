"""Batches of the embedded pair against plain batched decoding: processor time by half of the stream, and whether the answers are the same.

    python benchmarks/batches.py --rows 2 4 8

Prompts of the three domains in a random order, 48 new tokens, greedy, float32, one thread; the arms take turns on each batch.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from typing import Any

import torch
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, online_memory
from hf_onlinespec.embedded import DOMAINS, EmbeddedPair, load_draft, load_pair, prompts

NEW_TOKENS = 48


def run(pair: EmbeddedPair, rows: int, texts: list[str]) -> None:
    batches = [
        pair.tokenizer(texts[i : i + rows], return_tensors="pt", padding=True)
        for i in range(0, len(texts) - rows + 1, rows)
    ]
    memory, draft = online_memory(pair.target, anew=True), OnlineDraft(load_draft())
    arms: dict[str, dict[str, Any]] = {
        "plain": {},
        "memory": {"onlinespec": True},
        "draft": {"assistant_model": draft},
    }
    seconds = {name: [0.0, 0.0] for name in arms}
    same = 0
    for at, batch in enumerate(batches):
        plain = None
        for name, arm in arms.items():
            started = time.process_time()
            out = pair.target.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, **arm)
            seconds[name][at >= len(batches) // 2] += time.process_time() - started
            plain = out if plain is None else plain
            same += name != "plain" and torch.equal(plain, out)
    print(f"{rows} rows, {len(batches)} batches, {same} of {2 * len(batches)} answers the same")
    for name, halves in seconds.items():
        over = ", ".join(f"{own:.2f} s ({own / all_:.2f})" for own, all_ in zip(halves, seconds["plain"], strict=True))
        print(f"  {name:6} {over}")
    for name, used in (("memory", memory), ("draft", draft)):
        print(
            f"  {name:6} {used.metrics.acceptance_length:.2f} tokens a round of a row; {used.metrics.decisions.drafting}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompts", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    pair = load_pair()
    pair.tokenizer.padding_side = "left"
    pair.tokenizer.pad_token = pair.tokenizer.pad_token or pair.tokenizer.eos_token
    texts = [text for domain in DOMAINS for text in prompts(domain)[: arguments.prompts]]
    random.Random(1).shuffle(texts)
    for rows in arguments.rows:
        run(pair, rows, texts[: arguments.prompts])


if __name__ == "__main__":
    main()
