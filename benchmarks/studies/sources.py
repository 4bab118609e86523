"""What each source of drafted tokens is worth, and what tells which one to take: offline, on the target's own outputs.

    python benchmarks/studies/sources.py --prompts 60 --temperature 0.8

Plain outputs of a drifting stream (home, unseen, home). At every generated position the target's law p is compared with the
laws q of the base draft, of the learned draft (which learns from every request once it is scored), of the memory, and of
mixtures of the last two: Σ min(p, q), greedy whether the argmax agrees. The memory's answer also as a guess, as it is verified: the
chance that the target's token is the likeliest one, or among the likeliest four. And per request: whether the draft that predicts the
prompt better is the one that does better on the output.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.commit.request_memory import RequestMemory
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.embedded import load_pair
from hf_onlinespec.govern.acceptance import Acceptances, Continuation, RequestStats, TokenSource
from hf_onlinespec.metrics import Counts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the instruments, which are scripts too
from streams import drift

MIXTURES = (1, 2, 4)  # the memory's weight is m^k / (m^k + n^k), m and n the estimated acceptance of the two
CLEAR = 0.02  # difference of acceptance from which on it matters who serves


def law_of(found: Continuation | None, vocab: int) -> Tensor:
    law = torch.zeros(vocab)
    if found is not None:
        law[list(found.tokens)] = torch.tensor(found.probs)
    return law


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60, help="per segment")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pair = load_pair()
    draft = OnlineDraft(pair.draft, OnlineSpecConfig(memory_tokens=0, recycle=False))
    memory, acceptances = SuffixMemory(65_536), Acceptances()
    greedy = args.temperature == 0
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    scored: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(3)]
    gains: list[list[tuple[float, float]]] = [[] for _ in range(3)]

    def laws(logits: Tensor) -> Tensor:
        return (logits / (args.temperature or 1.0)).softmax(-1)

    def kept(p: Tensor, q: Tensor) -> float:
        return float(p.argmax() == q.argmax()) if greedy else torch.minimum(p, q).sum().item()

    for number, prompt in enumerate(drift(0, args.prompts, args.new_tokens)):
        part = number // args.prompts
        torch.manual_seed(number)
        inputs = pair.tokenizer(prompt.text, return_tensors="pt")
        output = pair.target.generate(**inputs, max_new_tokens=args.new_tokens, **options)
        start, n = inputs["input_ids"].shape[1], output.shape[1] - inputs["input_ids"].shape[1]
        with torch.no_grad():
            said = pair.target(output[:, :-1]).logits[0, -n:]
            prompt_log_ratio, _ = draft.trainable.prompt_log_ratio(output[:, :start], None, 128)
            with draft.trainable.serving(base=False) as model:
                learned = laws(model(output[:, :-1]).logits[0, -n:])
            with draft.trainable.serving(base=True) as model:
                base = laws(model(output[:, :-1]).logits[0, -n:])
        target = laws(said)
        recall = RequestMemory(memory, threading.RLock(), output.shape[1], 0, RequestStats(), acceptances)
        cells = scored[part]
        for i in range(n):
            recall.read(output[:, : start + i])
            found = recall.lookup(recall.context)
            p, q, m = target[i], learned[i], law_of(found, target.shape[-1])
            a_q, a_m = kept(p, q), kept(p, m) if found is not None else 0.0
            key, expected_q = acceptances.rate_by_confidence(float(q.max()))
            expected_m = 0.0 if found is None else acceptances.memory(found)[1]
            cells["frozen draft"].append(kept(p, base[i]))
            cells["learned draft"].append(a_q)
            cells["memory"].append(a_m)
            for n_guesses in (1, 4):
                guessed = [] if found is None else list(found.tokens[:n_guesses])
                among = float(int(p.argmax()) in guessed) if greedy else float(p[guessed].sum())
                cells[f"memory, {n_guesses} guessed"].append(among)
            cells["the likelier of memory and learned draft"].append(a_m if expected_m > expected_q else a_q)
            for k in MIXTURES:
                weight = expected_m**k / (expected_m**k + expected_q**k)
                cells[f"mixture, k = {k}"].append(kept(p, weight * m + (1 - weight) * q))
            agree = found is not None and found.tokens[0] == int(q.argmax())
            cells["learned draft where both agree" if agree else "learned draft where they differ"].append(a_q)
            acceptances.observe_round([(TokenSource("model", 0, key), a_q)], RequestStats())
            if found is not None:
                acceptances.observe_answer(acceptances.memory_key(found), a_m, RequestStats())
        recall.commit(output)
        gains[part].append((prompt_log_ratio, mean(cells["learned draft"][-n:]) - mean(cells["frozen draft"][-n:])))
        teacher, counts = Teacher.from_logits(said), Counts()
        draft.learning.learn_segment(Segment(output, [teacher], None, args.temperature), counts)
        draft.learning.remember(Feedback(output[0], teacher.top(64)))
        draft.learning.replay_steps(counts, 2)

    print("| acceptance per position | 1 home | 2 unseen | 3 home |\n|---|---|---|---|")
    for name in scored[0]:
        print(f"| {name} | " + " | ".join(f"{mean(cells[name]):.3f}" for cells in scored) + " |")
    right = []
    for some in gains:
        clear = [(prompt_log_ratio > 0) == (gain > 0) for prompt_log_ratio, gain in some if abs(gain) > CLEAR]
        right.append(f"{sum(clear)} of {len(clear)}")
    print(
        f"| requests in which the prompt tells the better draft (differences above {CLEAR}) | "
        + " | ".join(right)
        + " |"
    )


if __name__ == "__main__":
    main()
