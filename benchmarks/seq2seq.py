"""An encoder-decoder target with a draft that learns: WikiSQL questions, then advising questions that the draft never saw.

    python benchmarks/seq2seq.py                    # 75 questions of each domain
    python benchmarks/seq2seq.py --arms "frozen k" "learning more k" "ours, more" --seeds 3

Greedy, one thread, processor time; the arms take turns on each request, in an order that rotates. Ratios are given with 90 % intervals
over requests, for both domains and for the last quarter of the stream.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from before_after import interval
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec.embedded import SEQ2SEQ_DOMAINS, EmbeddedPair, load_seq2seq_draft, load_seq2seq_pair, questions
from hf_onlinespec.measure.bench import Arm, ForwardClock, rotated, stock_draft

# Where the time to learn is there: what docs/sequence_to_sequence.md tells to set.
MORE = {"replay_passes": 4, "replay_sampling": "near"}
WARM_UPS = 3  # questions outside the stream that go through arms of their own first
# Of two arms: the speed or the acceptance length of the first over that of the second.
SPEEDS = (
    ("learning", "plain"),
    ("learning k", "plain"),
    ("frozen k", "plain"),
    ("frozen k", "transformers k"),
    ("memory", "plain"),
    ("ours", "plain"),
    ("ours", "memory"),
    ("ours, more", "plain"),
    ("ours, more", "memory"),
)
ACCEPTANCE = (
    ("learning k", "frozen k"),
    ("learning more k", "frozen k"),
    ("frozen k", "transformers k"),
    ("ours", "memory"),
    ("ours, more", "frozen k"),
)


@dataclass(frozen=True)
class Request:
    """What one arm took for one question."""

    tokens: int
    rounds: int  # forwards of the target's decoder
    seconds: float


def arms(pair: EmbeddedPair, lookahead: int, seed: int) -> dict[str, Callable[[], Arm]]:
    """All arms by name; "k": at the same fixed lookahead, learning after every request; nothing but the draft guesses there.

    "more": with the settings `MORE`.
    """

    def draft(**settings: object) -> OnlineDraft:
        return OnlineDraft(load_seq2seq_draft(), OnlineSpecConfig(seed=seed, **settings))

    alone = {"memory_tokens": 0, "recycle": False}

    def memory() -> Arm:
        online_memory(pair.target, anew=True)
        return {"onlinespec": True}

    return {
        "plain": dict,
        "transformers k": lambda: {"assistant_model": stock_draft(lookahead, load_seq2seq_draft())},
        "frozen k": lambda: {"assistant_model": draft(lookahead=lookahead, **alone), "onlinespec": False},
        "learning k": lambda: {"assistant_model": draft(lookahead=lookahead, update_every=1, **alone)},
        "learning more k": lambda: {"assistant_model": draft(lookahead=lookahead, update_every=1, **alone, **MORE)},
        "learning": lambda: {"assistant_model": draft(**alone)},
        "memory": memory,
        "ours": lambda: {"assistant_model": draft()},
        "ours, more": lambda: {"assistant_model": draft(**MORE)},
    }


class Stream:
    """Sends questions to a target in every way."""

    def __init__(self, pair: EmbeddedPair, new_tokens: int) -> None:
        self._pair, self._new_tokens, self._clock = pair, new_tokens, ForwardClock()
        self._clock.watch(pair.target)

    def run(self, texts: list[str], ways: dict[str, Arm]) -> tuple[dict[str, list[Request]], int]:
        """The requests of each arm, and how many of the outputs were not those of the arm "plain"."""
        found: dict[str, list[Request]] = {name: [] for name in ways}
        differ = 0
        for at, text in enumerate(texts):
            inputs = self._pair.tokenizer(text, return_tensors="pt")
            outputs = {}
            for name in rotated(tuple(ways), at):
                self._clock.reset()
                started = time.thread_time()
                outputs[name] = self._pair.target.generate(
                    input_ids=inputs.input_ids,
                    attention_mask=inputs.attention_mask,
                    max_new_tokens=self._new_tokens,
                    do_sample=False,
                    **ways[name],
                )
                seconds = time.thread_time() - started
                found[name].append(Request(outputs[name].shape[1] - 1, self._clock.calls, seconds))
            differ += sum(not torch.equal(outputs["plain"], out) for out in outputs.values())
        return found, differ


def ratios(
    found: dict[str, list[Request]],
    pairs: tuple[tuple[str, str], ...],
    cost: Callable[[Request], float],
    part: slice,
) -> list[str]:
    """Tokens per unit of cost of the first arm over those of the second, for the pairs whose arms were both run."""
    lines = []
    for name, other in pairs:
        if name in found and other in found:
            both = zip(found[other][part], found[name][part], strict=True)
            ratio, low, high = interval([(a.tokens, cost(a), b.tokens, cost(b)) for a, b in both])
            lines.append(f"{name} ÷ {other}: {ratio:.3f} ({low:.3f} to {high:.3f})")
    return lines


def show(found: dict[str, list[Request]], half: int) -> None:
    """Speed and acceptance length of each arm in each part of the stream, and the ratios."""
    last = 2 * half - half // 2
    parts = {SEQ2SEQ_DOMAINS[0]: slice(half), SEQ2SEQ_DOMAINS[1]: slice(half, None), "last quarter": slice(last, None)}
    for part_name, part in parts.items():
        print(part_name)
        for name, requests in found.items():
            tokens = sum(request.tokens for request in requests[part])
            rounds = sum(request.rounds for request in requests[part])
            seconds = sum(request.seconds for request in requests[part])
            print(f"  {name:15} {tokens / seconds:7.1f} tokens/s {tokens / rounds:6.2f} tokens a forward")
        print("  speed:", "; ".join(ratios(found, SPEEDS, lambda request: request.seconds, part)))
        print(
            "  acceptance length:",
            "; ".join(ratios(found, ACCEPTANCE, lambda request: request.rounds, part)),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=150, help="in the whole stream, half of them of each domain")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--lookahead", type=int, default=5)
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs, with adapters of other seeds; their requests are pooled"
    )
    parser.add_argument("--arms", nargs="+", help='"plain" is always there')
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    pair = load_seq2seq_pair()
    half = args.requests // 2
    texts = [text for domain in SEQ2SEQ_DOMAINS for text in questions(domain)[:half]]
    stream = Stream(pair, args.new_tokens)
    pooled: dict[str, list[Request]] = {}
    for seed in range(args.seeds):
        chosen = {
            name: make
            for name, make in arms(pair, args.lookahead, seed).items()
            if args.arms is None or name in (*args.arms, "plain")
        }
        stream.run(questions(SEQ2SEQ_DOMAINS[0])[-WARM_UPS:], {name: make() for name, make in chosen.items()})
        ways = {name: make() for name, make in chosen.items()}
        found, differ = stream.run(texts, ways)
        print(f"seed {seed}: {differ} of {(len(ways) - 1) * len(texts)} outputs are not plain's")
        show(found, half)
        for name, arm in ways.items():
            if isinstance(draft := arm.get("assistant_model"), OnlineDraft):
                m = draft.metrics
                print(f"  {name}: update share {m.update_share:.1%}; {m.decisions.drafting}")
        for name, requests in found.items():
            pooled.setdefault(name, []).extend(requests)
    if args.seeds > 1:
        print("all seeds")
        show(by_place(pooled, len(texts)), half * args.seeds)


def by_place(pooled: dict[str, list[Request]], n: int) -> dict[str, list[Request]]:
    """Requests of several runs of n, all runs' first ones first."""
    return {
        name: [requests[i] for at in range(n) for i in range(at, len(requests), n)] for name, requests in pooled.items()
    }


if __name__ == "__main__":
    main()
