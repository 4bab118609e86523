"""Learns and saves in a process that is killed at a random instant, again and again: `kill_loop.py FOLDER KILLS`."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.folder import STAGING
from tests.drafts import learn_segment
from tests.tiny_models import tiny_llama


def learn(draft: OnlineDraft) -> None:
    n = draft.steps
    tokens = torch.randint(32, (1, 10), generator=torch.Generator().manual_seed(n))
    logits = torch.randn(4, 32, generator=torch.Generator().manual_seed(n))
    learn_segment(draft, tokens, [Teacher.from_logits(logits)], Counts())


def work(draft: OnlineDraft, folder: Path, says: int) -> None:
    """Learns one update and saves, for ever; says how many updates are saved."""
    while True:
        learn(draft)
        draft.save_pretrained(folder)
        os.write(says, f"{draft.steps}\n".encode())


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    rng = random.Random(0)
    config = OnlineSpecConfig(rank=2, alpha=2.0, update_every=1, replay_tokens=0, memory_tokens=0, lookahead=2)
    draft = OnlineDraft(tiny_llama(2), config)
    draft.save_pretrained(folder)
    report = {"kills": 0, "unloadable": 0, "most_updates_lost": 0, "killed_inside_a_save": 0}
    for _ in range(kills):
        hears, says = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hears)
            work(draft, folder, says)  # with what was loaded after the last kill
        os.close(says)
        heard = b""
        while b"\n" not in heard:  # it has saved once: from now on it is learning or saving
            heard += os.read(hears, 4096)
        # The instant of the kill is random; that the pipe may speak meanwhile only shortens the wait.
        for _ in range(rng.randrange(3)):
            select.select([hears], [], [], rng.random() * 0.01)
            heard += os.read(hears, 4096) if select.select([hears], [], [], 0)[0] else b""
        select.select([], [], [], rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(hears, 4096):
            heard += more
        os.close(hears)
        report["kills"] += 1
        report["killed_inside_a_save"] += (folder / STAGING).exists()
        said = int(heard.splitlines()[-1])
        try:
            draft = OnlineDraft.from_pretrained(folder, tiny_llama(2))
        except Exception as error:
            print(type(error).__name__, error)
            report["unloadable"] += 1
            break
        # One update may have been learned and not saved: it is never more than what was said, plus the one in hand.
        if draft.steps not in (said, said + 1):
            report["most_updates_lost"] = max(report["most_updates_lost"], abs(said - draft.steps))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
