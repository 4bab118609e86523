"""What `attach` costs a call of `generate` that cannot be served and runs plain.

    python benchmarks/attach_overhead.py

The embedded target; the same call in pairs, once attached and once not, in alternating order. Printed: the median of the paired
differences, with its 95 % interval by bootstrap over the pairs, and the same as a share of the call. The clock is this process's
CPU time on one thread: on a quiet machine that is the wall time, and on a busy one it can be compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, attach, detach
from hf_onlinespec.embedded import load_draft, load_pair, prompts

RESAMPLES = 2000


def timed(target: PreTrainedModel, arguments: dict[str, Any]) -> float:
    start = time.process_time()
    target.generate(**arguments)
    return time.process_time() - start


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % interval."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return statistics.median(values), medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This call of generate ran without")
    pair = load_pair()
    one = pair.tokenizer(prompts("shell")[0], return_tensors="pt")
    limits: dict[str, Any] = dict(do_sample=False, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens)
    calls: dict[str, dict[str, Any]] = {
        "4 beams": dict(one, num_beams=4, **limits),
    }
    draft = OnlineDraft(load_draft())
    print("| call | attached | call, ms | more, ms (95 %) | more, % (95 %) |\n|---|---|---|---|---|")
    for name, arguments in calls.items():
        for kind, given in (("memory", None), ("draft", draft)):
            plain_s, more_s = [], []
            for n in range(args.pairs + 1):
                seconds = {}
                for attached in (True, False) if n % 2 else (False, True):
                    if attached:
                        attach(pair.target, given)
                    seconds[attached] = timed(pair.target, arguments)
                    detach(pair.target)
                if n:  # the first pair warms up
                    plain_s.append(seconds[False])
                    more_s.append(seconds[True] - seconds[False])
            call_s = statistics.median(plain_s)
            ms = "{:.3f} ({:.3f} to {:.3f})".format(*(1e3 * value for value in interval(more_s)))
            share = "{:.2f} ({:.2f} to {:.2f})".format(*(100 * value / call_s for value in interval(more_s)))
            print(f"| {name} | {kind} | {1e3 * call_s:.1f} | {ms} | {share} |", flush=True)


if __name__ == "__main__":
    main()
