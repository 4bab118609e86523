"""What two processes that learn one adapter reach, against one that learns from as many tokens alone.

    python benchmarks/studies/replicas.py --requests 64 --seeds 2

Requests of one domain are recorded (`recorded.py`), and shared out among two gloo processes on one machine, which learn after every
request with the default settings; their adapters are averaged every n gradient steps. Beside them: one process that learns from all
of them, and one that learns from half of them. All then read the same held-out requests: greedy, a lookahead of 5. With `--killed`
the second process ends without a word in the middle of its share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from combining import acceptance_length, learned
from learning import COMMON
from recorded import AWAY, HARD, Recorded, Source

WAIT = timedelta(minutes=10)
Marks = Sequence[int]  # requests, of all processes together, after which all are judged


def new(source: Source, seed: int, every: int | None) -> OnlineDraft:
    return OnlineDraft(source.draft(), OnlineSpecConfig(**(COMMON | {"seed": seed, "average_every": every})))


def alone(draft: OnlineDraft, lessons: Sequence[Recorded], judges: Sequence[Recorded], marks: Marks) -> list[float]:
    """Acceptance length after so many lessons."""
    found = []
    for i, one in enumerate(lessons, 1):
        learned(draft, [one])
        if i in marks:
            found.append(acceptance_length(draft, judges))
    return found


def share(
    source: Source,
    lessons: Sequence[Recorded],
    judges: Sequence[Recorded],
    marks: Marks,
    seed: int,
    every: int,
    dies: bool,
) -> list[float]:
    """The same of two processes, each of which learns from every other lesson; judged in the first one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        second = os.fork()
        if not second:
            try:
                replica(1, folder, new(source, seed, every), lessons, judges, marks, dies)
            finally:
                os._exit(0)
        first = os.fork()
        if not first:
            try:
                replica(0, folder, new(source, seed, every), lessons, judges, marks, dies)
            finally:
                os._exit(0)
        os.waitpid(second, 0)
        os.waitpid(first, 0)
        return list(json.loads((folder / "found").read_text()))


def replica(
    rank: int,
    folder: Path,
    draft: OnlineDraft,
    lessons: Sequence[Recorded],
    judges: Sequence[Recorded],
    marks: Marks,
    dies: bool,
) -> None:
    port = folder / "port"
    while rank and not port.exists():
        time.sleep(0.05)
    store = dist.TCPStore("127.0.0.1", int(port.read_text()) if rank else 0, 2, not rank, WAIT, wait_for_workers=False)
    if not rank:
        (folder / "part").write_text(str(store.port))
        (folder / "part").rename(port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=WAIT)
    found, own = [], list(lessons[rank::2])
    for i, one in enumerate(own, 1):
        with draft.generating():
            learned(draft, [one])
        if dies and rank and i == len(own) // 2:
            os._exit(1)
        if 2 * i in marks:
            draft.catch_up()
            if not dies:
                dist.barrier()
                draft.catch_up()
            if not rank:
                found.append(acceptance_length(draft, judges))
    if not rank:
        (folder / "found").write_text(json.dumps(found))
        if not dies:
            dist.barrier()
    else:
        dist.barrier()  # the store lives as long as the first one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="of both processes together")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--every", type=int, nargs="+", default=[32], help="gradient steps between two averages")
    parser.add_argument("--domains", nargs="+", default=[AWAY, HARD])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--killed", action="store_true", help="the second process, half-way")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, marks = Source(), (args.requests // 2, args.requests)
    for domain in args.domains:
        found: dict[str, list[list[float]]] = {}
        for seed in range(args.seeds):
            texts = source.texts(domain, seed)[: args.requests + args.held_out]
            stream = [source.record(domain, text, 0.0, seed, args.new_tokens) for text in texts]
            lessons, judges = stream[: args.requests], stream[args.requests :]
            frozen = acceptance_length(new(source, seed, None), judges)
            found.setdefault("frozen", []).append([frozen, frozen])
            found.setdefault("one, of all", []).append(alone(new(source, seed, None), lessons, judges, marks))
            half = [n // 2 for n in marks]
            found.setdefault("one, of half", []).append(alone(new(source, seed, None), lessons[::2], judges, half))
            for every in args.every:
                name = f"two, averaged every {every} steps{', one killed half-way' if args.killed else ''}"
                got = share(source, lessons, judges, marks, seed, every, args.killed)
                found.setdefault(name, []).append(got)
            for name, runs in found.items():
                print(f"{domain}, seed {seed}, {name}: {[f'{value:.3f}' for value in runs[-1]]}", flush=True)
        print(f"\n| {domain} | after {marks[0]} requests | after {marks[1]} | two ÷ one |\n|---|---|---|---|")
        one = [statistics.mean(values) for values in zip(*found["one, of all"], strict=True)]
        for name, runs in found.items():
            means = [statistics.mean(values) for values in zip(*runs, strict=True)]
            ratios = ", ".join(f"{a / b:.3f}" for a, b in zip(means, one, strict=True))
            print(f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
