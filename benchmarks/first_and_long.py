"""Without a draft on a real chat model: the first requests of a new process, long prompts and long answers, beside plain generation.

    python ../shared/tools/real_model.py SMOLLM
    python benchmarks/first_and_long.py first SMOLLM             # ten requests, ten seeded orders, a new memory for each
    python benchmarks/first_and_long.py prompts SMOLLM           # prompts of 8,000 tokens
    python benchmarks/first_and_long.py answers SMOLLM           # answers of 2,000 tokens, and the time along them

Arms in turns. What it prints of an answer's time is seconds per token in each quarter of it, plain and ours.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field

import torch
from before_after import interval
from recorded import data_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging
from trees import prompts

from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.verify.custom_generate import GenerateFn


@dataclass
class Clock(BaseStreamer):
    """When each token came."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times += [time.perf_counter()] * (value.numel() if value.dim() < 2 else 0)  # the prompt has two dimensions

    def end(self) -> None: ...


@dataclass
class Run:
    tokens: int
    seconds: float
    times: list[float]

    def quarters(self) -> list[float]:
        """Milliseconds per token in each quarter of the answer; the first token has the prompt's time, and is left out."""
        edges = [len(self.times) * i // 4 for i in range(5)]
        parts = [self.times[max(1, a) - 1 : b] for a, b in itertools.pairwise(edges)]
        return [1e3 * (part[-1] - part[0]) / (len(part) - 1) for part in parts]


def generate(target: PreTrainedModel, ids: Tensor, draft: MemoryDraft | None, new: int, least: int = 0) -> Run:
    clock = Clock()
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": least or None, "pad_token_id": 2}
    started = time.perf_counter()
    if draft is None:
        found = target.generate(ids, streamer=clock, **options)
    else:
        found = target.generate(ids, custom_generate=GenerateFn(draft, clock, None), **options)
    return Run(found.shape[1] - ids.shape[1], time.perf_counter() - started, clock.times)


def both(
    target: PreTrainedModel, ids: Tensor, draft: MemoryDraft, turn: int, new: int, least: int = 0
) -> tuple[Run, Run]:
    """Plain and ours, in an order that alternates."""
    runs = {arm: generate(target, ids, arm, new, least) for arm in ([None, draft] if turn % 2 else [draft, None])}
    return runs[None], runs[draft]


def ratio(pairs: list[tuple[Run, Run]]) -> str:
    rows = [(plain.tokens, plain.seconds, ours.tokens, ours.seconds) for plain, ours in pairs]
    return "{:.3f} (90 % interval {:.3f} to {:.3f})".format(*interval(rows))


def first(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, orders: int, requests: int, new: int) -> None:
    generate(target, torch.arange(20)[None], None, 4)  # the process is warm; the memory is not
    found: list[float] = []
    pairs: list[tuple[Run, Run]] = []
    for seed in range(orders):
        draft, own = MemoryDraft(), []
        for turn, (_, prompt) in enumerate(prompts(30, seed)[:requests]):
            ids = chat(tokenizer, prompt)
            own.append(both(target, ids, draft, turn + seed, new))
        seconds = [sum(run.seconds for run in arm) for arm in zip(*own, strict=True)]
        found.append(seconds[0] / seconds[1])
        pairs += own
        print(f"order {seed}: {found[-1]:.3f}, acceptance length {draft.metrics.acceptance_length:.2f}", flush=True)
    print(
        f"the first {requests} requests ÷ plain, mean over {orders} orders: {statistics.mean(found):.3f}; of all {ratio(pairs)}"
    )


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    message = [{"role": "user", "content": prompt}]
    found: Tensor = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return found


def long_prompts(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, n: int, new: int) -> None:
    """A part of a corpus and a question about it; each request another part."""
    draft, pairs = MemoryDraft(), []
    for turn in range(n):
        name = ("novel_war_and_peace", "dialogue_sgd", "sql_text2sql")[turn % 3]
        text = (data_folder() / "corpora" / f"{name}.txt").read_text(encoding="utf-8")[60_000 * turn :][:60_000]
        part = tokenizer.decode(tokenizer(text)["input_ids"][: length - 60])
        pairs.append(
            both(
                target,
                chat(tokenizer, f"{part}\n\nRepeat what matters in the text above, in its own words."),
                draft,
                turn,
                new,
            )
        )
        plain, ours = pairs[-1]
        print(f"{name}: plain {plain.seconds:.1f} s, ours {ours.seconds:.1f} s", flush=True)
    print(f"prompts of {length} tokens ÷ plain: {ratio(pairs)}; {told(draft)}")


def long_answers(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, new: int) -> None:
    draft, pairs = MemoryDraft(), []
    for turn, (_, prompt) in enumerate(prompts(30, 0)[:n]):
        pairs.append(both(target, chat(tokenizer, prompt), draft, turn, new, new))
        for name, run in zip(("plain", "ours"), pairs[-1], strict=True):
            print(
                f"{turn} {name}: ms per token by quarter",
                [round(ms, 1) for ms in run.quarters()],
                told(draft),
                flush=True,
            )
    print(f"answers of {new} tokens ÷ plain: {ratio(pairs)}")


def told(draft: MemoryDraft) -> str:
    assert draft.recycled is not None
    metrics = draft.metrics
    return f"acceptance length {metrics.acceptance_length:.2f}, memory {metrics.memory_bytes:,} bytes, table {draft.recycled.nbytes:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("first", "prompts", "answers"))
    parser.add_argument("model")
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--requests", type=int, help="of each order, or in all")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--length", type=int, default=8000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    target = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    if args.what == "first":
        first(target, tokenizer, args.orders, args.requests or 10, args.new_tokens or 96)
    elif args.what == "prompts":
        long_prompts(target, tokenizer, args.length, args.requests or 6, args.new_tokens or 96)
    else:
        long_answers(target, tokenizer, args.requests or 3, args.new_tokens or 2000)


if __name__ == "__main__":
    main()
