"""`hf-onlinespec serve` with several requests decoded together beside one after the other: the same model, the same clients, in turns.

    python benchmarks/serving_together.py                                                   # embedded pair, with its draft
    python benchmarks/serving_together.py --no-draft
    python benchmarks/serving_together.py --model SMOLLM --dtype bfloat16 --clients 1 4 8   # the suffix memory drafts

Both servers run in this process, each with a model and a draft of its own; only one is asked at a time. In a pair of turns each
client asks both for the same prompts, one after the other, and who is asked first alternates. Speed is new tokens over the processor time of
a turn, clients included, which other jobs of a busy machine do not change as they change the wall time that latency is told in. The
ratio is of speed, with a 90 % interval over pairs. Greedy: in float32 answers are the same.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import uvicorn
from before_after import interval
from openai import OpenAI
from serving import TIMEOUT_S, free_port
from transformers import AutoTokenizer
from transformers.utils import logging
from trees import prompts as chat_prompts

from hf_onlinespec import OnlineDraft, attach
from hf_onlinespec.cli.loading import load_model
from hf_onlinespec.embedded import DOMAINS, load_pair, prompts
from hf_onlinespec.serve.app import Served, build_app

NAME = "model"


@dataclass
class Turn:
    """All clients on one server, each with its prompts one after the other."""

    tokens: int = 0
    seconds: float = 0.0  # of the processor
    latencies_s: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def start(args: argparse.Namespace, batch: int) -> str:
    if args.model is None:
        pair = load_pair()
        target, tokenizer, draft = pair.target, pair.tokenizer, None if args.no_draft else OnlineDraft(pair.draft)
    else:
        target, tokenizer = load_model("model", args.model, args.dtype), AutoTokenizer.from_pretrained(args.model)
        draft = None
    served = Served(NAME, target, tokenizer, attach(target, draft), batch=batch)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(build_app(served), port=port, log_level="warning", access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{port}"


def turn(url: str, texts: list[list[str]], most: int, chat: bool) -> Turn:
    """Per client its prompts."""
    found = Turn()
    clients = [
        OpenAI(base_url=f"{url}/v1", api_key=str(n), max_retries=0, timeout=TIMEOUT_S) for n in range(len(texts))
    ]

    def ask(client: OpenAI, own: list[str]) -> list[tuple[str, int, float]]:
        answers = []
        for text in own:
            started = time.perf_counter()
            if chat:
                message = [{"role": "user", "content": text}]
                said = client.chat.completions.create(model=NAME, messages=message, max_tokens=most, temperature=0)
                words = said.choices[0].message.content or ""
            else:
                said = client.completions.create(model=NAME, prompt=text, max_tokens=most, temperature=0)
                words = said.choices[0].text
            answers.append((words, said.usage.completion_tokens, time.perf_counter() - started))
        return answers

    with ThreadPoolExecutor(len(texts)) as pool:
        started = time.process_time()
        answers = [answer for own in pool.map(ask, clients, texts) for answer in own]
        found.seconds = time.process_time() - started
    for client in clients:
        client.close()
    found.tokens = sum(tokens for _, tokens, _ in answers)
    found.latencies_s = [seconds for _, _, seconds in answers]
    found.answers = [words for words, _, _ in answers]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="with a chat template; default: the embedded pair")
    parser.add_argument(
        "--no-draft", action="store_true", help="of the embedded pair the target alone, with the suffix memory"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2, help="of each client in a turn")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chat = args.model is not None
    needed = sum((args.pairs + 1) * clients * args.prompts for clients in args.clients)
    texts = (
        [text for _, text in chat_prompts(needed, 0)] if chat else [t for domain in DOMAINS for t in prompts(domain)]
    )
    random.Random(1).shuffle(texts)
    texts = (texts * (1 + needed // len(texts)))[:needed]
    urls = {"alone": start(args, 1), "together": start(args, args.batch)}
    for clients in args.clients:
        pairs = []
        for number in range(args.pairs + 1):  # the first one warms up
            own = [[texts.pop() for _ in range(args.prompts)] for _ in range(clients)]
            order = list(urls) if number % 2 else list(urls)[::-1]
            found = {name: turn(urls[name], own, args.new_tokens, chat) for name in order}
            pairs.append(found)
        del pairs[0]
        before, now = ([pair[name] for pair in pairs] for name in urls)
        rows = [(one.tokens, one.seconds, two.tokens, two.seconds) for one, two in zip(before, now, strict=True)]
        ratio, low, high = interval(rows)
        words = []
        for name, turns in zip(urls, (before, now), strict=True):
            speed = sum(one.tokens for one in turns) / sum(one.seconds for one in turns)
            latency = statistics.median(seconds for one in turns for seconds in one.latencies_s)
            words.append(f"{name} {speed:.1f} tokens/s, median latency {latency:.2f} s")
        answers = [
            (a, b) for one, two in zip(before, now, strict=True) for a, b in zip(one.answers, two.answers, strict=True)
        ]
        different = sum(a != b for a, b in answers)
        print(
            f"{clients} clients: {'; '.join(words)}; ratio {ratio:.2f} ({low:.2f}–{high:.2f}); {different} of "
            f"{len(answers)} answers differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
