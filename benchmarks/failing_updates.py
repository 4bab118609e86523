"""What a draft costs whose every learning step runs out of memory: beside the suffix memory alone, and beside plain `generate`.

    python benchmarks/failing_updates.py --prompts 10 --seeds 2      # of each domain of the stream

The backward pass of every step raises torch.OutOfMemoryError. Each request goes to all arms, in another order every time; answers
have to be those of plain `generate`, and the speed of the draft that cannot learn is held against the memory alone.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from before_after import interval
from streams import STREAMS, spare
from transformers.utils import logging as transformers_logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.memory_draft import online_memory
from hf_onlinespec.embedded import load_draft, load_pair


@contextmanager
def out_of_memory() -> Iterator[None]:
    """No gradient step succeeds."""
    backward = torch.Tensor.backward

    def raises(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    torch.Tensor.backward = raises  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stream", choices=sorted(STREAMS), default="drift")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--update-every", default="auto", help="'auto', or a number: then every request tries to learn")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_onlinespec.runtime.failures").setLevel(logging.ERROR)
    every = args.update_every if args.update_every == "auto" else int(args.update_every)
    config = OnlineSpecConfig(update_when="request", update_every=every)
    pair = load_pair()

    def ask(text: str, new_tokens: int, **arm: Any) -> tuple[torch.Tensor, int, float]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        started = time.perf_counter()
        output = pair.target.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **arm)
        return output, output.shape[1] - inputs.input_ids.shape[1], time.perf_counter() - started

    against: dict[str, list[tuple[int, float, int, float]]] = {"memory alone": [], "plain generate": []}
    differ = 0
    for seed in range(args.seeds):
        draft = OnlineDraft(load_draft(), config)
        for prompt in spare(args.new_tokens)[:6]:  # warm-up
            ask(prompt.text, args.new_tokens, assistant_model=OnlineDraft(load_draft()))
        online_memory(pair.target, config, anew=True)
        for at, prompt in enumerate(STREAMS[args.stream](seed, args.prompts, args.new_tokens)):
            arms: dict[str, dict[str, Any]] = {
                "plain generate": {},
                "memory alone": {"onlinespec": config},
                "failing": {"assistant_model": draft},
            }
            found = {}
            for name in sorted(arms, reverse=at % 2 == 0):
                with out_of_memory():
                    found[name] = ask(prompt.text, prompt.new_tokens, **arms[name])
            for name, rows in against.items():
                rows.append((*found[name][1:], *found["failing"][1:]))
            differ += any(not torch.equal(output, found["plain generate"][0]) for output, _, _ in found.values())
        m = draft.metrics
        print(f"seed {seed}: {m.failed_updates} steps failed, {m.updates} succeeded; {m.decisions.learning}")
        print(f"  rounds {m.decisions.rounds}, drafting: {m.decisions.drafting}")
    requests = len(against["memory alone"])
    print(f"answers equal to plain generate: {requests - differ} of {requests}")
    for name, rows in against.items():
        ratio, low, high = interval(rows)
        print(f"speed of the draft that cannot learn / {name}: {ratio:.3f} (90 % interval {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
