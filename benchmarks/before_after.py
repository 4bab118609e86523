"""How fast this checkout is beside an earlier one: the same requests through both, in one process, in turns.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before --stream drift --prompts 30 --seeds 2

The earlier package is imported under a second name. Every request goes to a draft of either package before the next one starts,
each first in every other request; the ratio is of sums of time per token, with its interval over requests.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from streams import STREAMS, spare
from transformers.utils import logging

import hf_onlinespec
from hf_onlinespec.embedded import load_draft, load_pair

BEFORE = "hf_onlinespec_before"
DRAWS = 2000  # of the bootstrap


def import_before(checkout: Path) -> Any:
    """The package of another checkout, as a module of another name."""
    folder = tempfile.mkdtemp()
    Path(folder, BEFORE).symlink_to((checkout / "hf_onlinespec").resolve(), target_is_directory=True)
    sys.path.insert(0, folder)
    return importlib.import_module(BEFORE)


def interval(rows: list[tuple[int, float, int, float]], seed: int = 0) -> tuple[float, float, float]:
    """Speed now ÷ speed before with the ends of its 90 % interval; rows of tokens and seconds before, and now."""
    numbers = torch.tensor(rows, dtype=torch.float64)
    drawn = torch.randint(len(rows), (DRAWS, len(rows)), generator=torch.Generator().manual_seed(seed))
    sums = torch.cat([numbers.sum(0)[None], numbers[drawn].sum(1)])  # (1 + draws, 4)
    ratios = sums[:, 2] / sums[:, 3] / (sums[:, 0] / sums[:, 1])
    low, high = torch.quantile(ratios[1:], torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return float(ratios[0]), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--stream", choices=sorted(STREAMS), default="drift")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="processor time, on a machine that does other work too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    now = time.thread_time if args.cpu else time.perf_counter
    packages = {"before": import_before(args.before), "now": hf_onlinespec}
    pair = load_pair()
    options: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_k": 0}

    def ask(text: str, draft: Any, new_tokens: int, seed: int) -> tuple[torch.Tensor, int, float]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        torch.manual_seed(seed)
        started = now()
        output = pair.target.generate(**inputs, max_new_tokens=new_tokens, assistant_model=draft, **options)
        return output, output.shape[1] - inputs.input_ids.shape[1], now() - started

    rows, differ = [], 0
    for seed in range(args.seeds):
        drafts = {name: package.OnlineDraft(load_draft()) for name, package in packages.items()}
        for prompt in spare(args.new_tokens)[:6]:  # warm-up
            for package in packages.values():
                ask(prompt.text, package.OnlineDraft(load_draft()), args.new_tokens, seed)
        for at, prompt in enumerate(STREAMS[args.stream](seed, args.prompts, args.new_tokens)):
            found = {}
            for name in ("before", "now") if at % 2 else ("now", "before"):
                found[name] = ask(prompt.text, drafts[name], prompt.new_tokens, at)
            rows.append((*found["before"][1:], *found["now"][1:]))
            differ += not torch.equal(found["before"][0], found["now"][0])
        for name, draft in drafts.items():
            m = draft.metrics
            print(f"seed {seed} {name}: acceptance length {m.acceptance_length:.2f}, update share {m.update_share:.1%}")
    ratio, low, high = interval(rows)
    print(f"{len(rows)} requests, speed now / before: {ratio:.3f} (90 % interval {low:.3f} to {high:.3f})")
    if not args.temperature:
        print(f"outputs that differ: {differ}")


if __name__ == "__main__":
    main()
