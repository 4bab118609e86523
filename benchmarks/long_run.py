"""Whether cost and memory stay flat over thousands of requests.

    python benchmarks/long_run.py --requests 2000

Short requests of all domains at temperature 1, ours whole; every tenth goes through plain `generate` too, so that the machine's own
drift can be told apart. Per block of the stream: seconds per token (ours, plain, their ratio), resident memory, and what
the draft says it holds. At the end, the slope of the ratio over the blocks with its standard error.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import DOMAINS, load_pair, prompts
from hf_onlinespec.share.provenance import provenance

PLAIN_EVERY = 10


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def slope(values: list[float]) -> tuple[float, float]:
    """Least-squares slope per block, and its standard error."""
    n = len(values)
    xs = [i - (n - 1) / 2 for i in range(n)]
    spread = sum(x * x for x in xs)
    mean = statistics.mean(values)
    rise = sum(x * (v - mean) for x, v in zip(xs, values, strict=True)) / spread
    left = sum((v - mean - rise * x) ** 2 for x, v in zip(xs, values, strict=True))
    return rise, (left / max(1, n - 2) / spread) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", default="{}", help="JSON settings of the draft, instead of the defaults")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pair = load_pair()
    draft = OnlineDraft(pair.draft, OnlineSpecConfig(**json.loads(args.config)))
    rng = random.Random(0)
    texts = [text for domain in DOMAINS for text in prompts(domain)]
    options = {"max_new_tokens": args.new_tokens, "do_sample": True, "temperature": 1.0, "top_k": 0}

    def timed(text: str, **arm: object) -> tuple[float, int]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        started = time.perf_counter()
        out = pair.target.generate(**inputs, **options, **arm)
        return time.perf_counter() - started, out.shape[1] - inputs["input_ids"].shape[1]

    torch.manual_seed(0)
    lines = [
        "| block | ours ms per token | plain | ours ÷ plain | resident MB | learning MB | memory MB |",
        "|---" * 7 + "|",
    ]
    ratios: list[float] = []
    resident: list[float] = []
    for block in range(args.blocks):
        ours_s, ours_n, plain_s, plain_n = 0.0, 0, 0.0, 0
        for i in range(args.requests // args.blocks):
            text = rng.choice(texts)
            seconds, n = timed(text, assistant_model=draft)
            ours_s, ours_n = ours_s + seconds, ours_n + n
            if i % PLAIN_EVERY == 0:
                seconds, n = timed(text)
                plain_s, plain_n = plain_s + seconds, plain_n + n
        ours, plain = ours_s / ours_n, plain_s / plain_n
        ratios.append(ours / plain)
        resident.append(resident_bytes() / 1e6)
        lines.append(
            f"| {block + 1} | {1e3 * ours:.2f} | {1e3 * plain:.2f} | {ratios[-1]:.3f} | {resident[-1]:.0f} | "
            f"{draft.learning_bytes / 1e6:.1f} | {draft.metrics.memory_bytes / 1e6:.1f} |"
        )
        print(lines[-1], flush=True)
    rise, error = slope(ratios)
    grows, grows_error = slope(resident)
    lines.append(
        f"\nSlope over {args.blocks} blocks: ours ÷ plain {rise:+.4f} ± {error:.4f} per block; "
        f"resident memory {grows:+.2f} ± {grows_error:.2f} MB per block.\n"
    )
    print(lines[-1])
    command = f"python benchmarks/long_run.py --requests {args.requests} --blocks {args.blocks} --new-tokens {args.new_tokens} --threads {args.threads} --config '{args.config}'"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "long_run.md").write_text(f"`{command}`\n\n{json.dumps(provenance().to_dict())}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
