"""`hf-onlinespec serve` beside `transformers serve`: the same model, the same clients, in turns.

    python benchmarks/serving.py path/to/a/chat/model --pairs 6 --threads 2

Both servers run in this process, each with a model of its own; only one is asked at a time. In a pair of turns every client asks
both for the same prompts at once, and who is asked first alternates. Speed is new tokens over the wall time of a turn; the interval
of the ratio is over pairs. In float32 every answer has to be the one that the other server, which decodes plainly, gave; and the
one that `--alone` of the prompts get from our server with nobody else there.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import uvicorn
from openai import OpenAI
from transformers import AutoTokenizer
from transformers.cli.serve import Serve
from transformers.utils import logging

from hf_onlinespec import attach
from hf_onlinespec.cli.loading import best_device, load_model
from hf_onlinespec.measure.shipped import shipped_prompts
from hf_onlinespec.serve.app import Served, build_app
from hf_onlinespec.share.provenance import provenance

DRAWS = 2000  # of the bootstrap
TIMEOUT_S = 1800.0


@dataclass
class Turn:
    """All clients at once, on one server."""

    tokens: int
    seconds: float
    answers: list[str]


@dataclass
class Pair:
    """The same prompts on both servers."""

    ours: Turn
    theirs: Turn

    @property
    def different(self) -> int:
        return sum(a != b for a, b in zip(self.ours.answers, self.theirs.answers, strict=True))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_ours(name: str, draft: str | None, dtype: str) -> str:
    target = load_model("model", name, dtype)
    drafts = attach(target, None if draft is None else load_model("--draft", draft, dtype))
    served = Served(name, target, AutoTokenizer.from_pretrained(name), drafts, draft)
    port = free_port()
    config = uvicorn.Config(build_app(served), port=port, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{port}"


def start_theirs(name: str, dtype: str) -> tuple[str, Serve]:
    port = free_port()
    server = Serve(
        name, port=port, host="127.0.0.1", dtype=dtype, device=str(best_device()), non_blocking=True, log_level="error"
    )
    while not server.server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{port}", server


def ask(client: OpenAI, name: str, prompt: str, most: int) -> tuple[str, int]:
    answer = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": prompt}], max_tokens=most, temperature=0
    )
    assert answer.usage is not None
    return answer.choices[0].message.content or "", answer.usage.completion_tokens


def turn(url: str, name: str, prompts: list[str], most: int) -> Turn:
    """Every prompt by a client of its own, all at once."""
    clients = [
        OpenAI(base_url=f"{url}/v1", api_key=str(n), max_retries=0, timeout=TIMEOUT_S) for n in range(len(prompts))
    ]
    with ThreadPoolExecutor(len(prompts)) as pool:
        started = time.perf_counter()
        found = list(pool.map(lambda client, prompt: ask(client, name, prompt, most), clients, prompts))
        seconds = time.perf_counter() - started
    for client in clients:
        client.close()
    return Turn(sum(tokens for _, tokens in found), seconds, [text for text, _ in found])


def ratio(pairs: list[Pair], seed: int = 0) -> tuple[float, float, float]:
    """Our speed over theirs, with the ends of its 95 % interval over pairs."""
    rows = [(p.ours.tokens, p.ours.seconds, p.theirs.tokens, p.theirs.seconds) for p in pairs]
    numbers = torch.tensor(rows, dtype=torch.float64)
    drawn = torch.randint(len(rows), (DRAWS, len(rows)), generator=torch.Generator().manual_seed(seed))
    sums = torch.cat([numbers.sum(0)[None], numbers[drawn].sum(1)])  # (1 + draws, 4)
    ratios = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    low, high = torch.quantile(ratios[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(ratios[0]), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="with a chat template: a folder or a name on the Hub")
    parser.add_argument("--draft", help="default: the suffix memory drafts")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--pairs", type=int, default=6, help="of turns; the prompts that ship last for seven of eight clients"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4, help="prompts that are asked once more, by one client alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the numbers, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompts = [prompt.text for prompt in shipped_prompts(args.new_tokens)]
    if len(prompts) < (args.pairs + 1) * args.clients:
        sys.exit(f"{len(prompts)} prompts are too few for a warm-up and {args.pairs} pairs of {args.clients} clients.")

    ours = start_ours(args.model, args.draft, args.dtype)
    theirs, server = start_theirs(args.model, args.dtype)
    groups = [prompts[i : i + args.clients] for i in range(0, (args.pairs + 1) * args.clients, args.clients)]
    for url in (ours, theirs):  # the last group warms up: its prompts are of all kinds, and in no pair
        turn(url, args.model, groups[-1], 8)
    pairs = []
    for number, group in enumerate(groups[:-1]):
        found = {
            url: turn(url, args.model, group, args.new_tokens) for url in ((ours, theirs), (theirs, ours))[number % 2]
        }
        pairs.append(Pair(found[ours], found[theirs]))
        last, so_far = pairs[-1], ratio(pairs)
        speeds = " and ".join(f"{one.tokens / one.seconds:.1f}" for one in (last.ours, last.theirs))
        print(
            f"pair {number + 1}: {speeds} tokens/s, {last.different} answers differ; ratio so far {so_far[0]:.2f}",
            flush=True,
        )

    together = [answer for pair in pairs for answer in pair.ours.answers][: args.alone]
    with OpenAI(base_url=f"{ours}/v1", api_key="alone", timeout=TIMEOUT_S) as client:
        alone = [ask(client, args.model, prompt, args.new_tokens)[0] for prompt in prompts[: len(together)]]
    value, low, high = ratio(pairs)
    result = {
        "model": args.model,
        "draft": args.draft,
        "dtype": args.dtype,
        "machine": provenance().to_dict(),
        "clients": args.clients,
        "pairs": [asdict(pair) for pair in pairs],
        "ratio": [value, low, high],
        "different": sum(pair.different for pair in pairs),
        "different_alone": sum(a != b for a, b in zip(alone, together, strict=True)),
    }
    print(
        f"ours ÷ transformers serve: {value:.2f} ({low:.2f}–{high:.2f}) over {len(pairs)} pairs of turns of {args.clients} clients; of "
        f"{len(pairs) * args.clients} answers {result['different']} differ; of {len(alone)} asked again alone {result['different_alone']}"
    )
    if args.out is not None:
        for pair in result["pairs"]:
            for side in pair.values():
                del side["answers"]
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    server.kill_server()


if __name__ == "__main__":
    main()
