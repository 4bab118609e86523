"""`hf-onlinespec run` on the embedded target, killed half-way and started again; `generate_stream` against batches that stay full.

    python benchmarks/stream.py run --prompts 2000 --new-tokens 8
    python benchmarks/stream.py speed --prompts 256 --new-tokens 96

`run`: SIGKILL once half of the prompts are answered, then the same command; says whether each answer is there once, and the resident
memory of both processes over time. The prompts are the 600 held-out ones, again and again with another number in front.
`speed`: processor time of one thread, arms in turns of 16 answers. "stream" takes the prompts as they come. "steady" is `generate` on
batches of prompts whose answers are equally long, known from an earlier run: rows end together, so that these batches stay full. "waves"
is `generate` on the prompts as they come, batch after batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from transformers.utils import logging

from hf_onlinespec import generate_stream, online_memory
from hf_onlinespec.embedded import DOMAINS, FOLDER, EmbeddedPair, load_pair, prompts

TURN = 16  # answers of an arm before the next one takes its turn


def texts(n: int) -> list[str]:
    """Prompts of the three domains in turns; each one another text."""
    held_out = [text for domains in zip(*map(prompts, DOMAINS), strict=True) for text in domains]
    found = []
    for i in range(n):
        text, times = held_out[i % len(held_out)], i // len(held_out)
        found.append(text if not times else text.replace("<|endoftext|>", f"<|endoftext|>{times}. ", 1))
    return found


def killed_and_started_again(n: int, new_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts(n)), encoding="utf-8")
        files = ["--prompts", str(source), "--out", str(out), "--new-tokens", str(new_tokens)]
        command = [sys.executable, "-m", "hf_onlinespec", "run", str(FOLDER / "target"), *files]
        for half in (True, False):
            started, process = time.perf_counter(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            memory: list[tuple[int, int]] = []  # answers, MB
            begun = out.read_bytes().count(b"\n") if out.exists() else 0
            while process.poll() is None:
                done = out.read_bytes().count(b"\n") if out.exists() else 0
                if half and done >= n // 2:
                    process.kill()
                    process.wait()
                    break
                if done > begun and (not memory or done >= memory[-1][0] + n // 16):
                    memory.append((done, psutil.Process(process.pid).memory_info().rss >> 20))
                time.sleep(0.2)
            print(
                f"{'killed' if half else 'ended'} after {time.perf_counter() - started:.0f} s, code {process.returncode}"
            )
            print("  answers: MB resident: " + ", ".join(f"{done}: {mb}" for done, mb in memory), flush=True)
            if not half and process.stdout is not None:
                print("  " + process.stdout.read().strip().replace("\n", "\n  "))
        found = [json.loads(line)["index"] for line in out.read_text(encoding="utf-8").splitlines()]
        print(f"{len(found)} answers, each once: {sorted(found) == list(range(n))}")


def speed(n: int, new_tokens: int, size: int, against: list[str]) -> None:
    asked, arguments = texts(n), {"max_new_tokens": new_tokens, "do_sample": False, "onlinespec": True}

    def stream() -> Iterator[int]:
        pair = load_pair()
        pairs.append(pair)
        for answer in generate_stream(pair.target, asked, size, tokenizer=pair.tokenizer, ordered=False, **arguments):
            lengths[answer.index] = 0 if answer.tokens is None else len(answer.tokens)
            yield 1

    def batches(order: Sequence[int]) -> Iterator[int]:
        pair = load_pair()
        pairs.append(pair)
        for at in range(0, n, size):
            own = [asked[i] for i in order[at : at + size]]
            inputs = pair.tokenizer(own, return_tensors="pt", padding=True, padding_side="left")
            pair.target.generate(**inputs, **arguments)
            yield len(own)

    pairs: list[EmbeddedPair] = []
    lengths = [0] * n
    for _ in stream():  # warms up, and tells the lengths
        pass
    pairs.clear()
    orders = {"steady": sorted(range(n), key=lambda i: lengths[i]), "waves": range(n)}
    arms = {"stream": stream()} | {arm: batches(orders[arm]) for arm in against}
    seconds, left = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, n)
    while any(left.values()):
        for arm, own in arms.items():
            started, turn = time.process_time(), 0
            while turn < TURN and (done := next(own, 0)):
                turn, left[arm] = turn + done, left[arm] - done
            seconds[arm] += time.process_time() - started
    print(f"{n} prompts, {sum(lengths)} new tokens")
    for (arm, took), pair in zip(seconds.items(), pairs, strict=True):
        rounds, over = online_memory(pair.target).metrics.acceptance_length, seconds[against[0]] / took
        print(
            f"{arm:6} {sum(lengths) / took:.1f} tokens/s, {over:.3f} of {against[0]}; {rounds:.2f} tokens a round of a row"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["run", "speed"])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--against", nargs="+", default=["steady", "waves"])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.what == "run":
        killed_and_started_again(arguments.prompts, arguments.new_tokens)
    else:
        speed(arguments.prompts, arguments.new_tokens, arguments.batch_size, arguments.against)


if __name__ == "__main__":
    main()
