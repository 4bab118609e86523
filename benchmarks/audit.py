"""What settings of learning retain of secrets after a stream of an unseen domain; what the gate says: `memorization.py`.

    python benchmarks/audit.py
    python benchmarks/audit.py --settings default "no replay" --seeds 2

The embedded draft learns from `--prompts` requests of orders, greedy, 48 new tokens; then `audit` plants canaries in copies of it,
with 40 further requests behind them, and compares 60 own texts with 60 that were never seen. Seconds are of one CPU core.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from recorded import Source
from transformers.utils import logging

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.embedded import load_draft
from hf_onlinespec.share.audit_report import times
from hf_onlinespec.share.canaries import learn
from hf_onlinespec.share.privacy import AFTERWARDS, audit

LR = OnlineSpecConfig().lr
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no replay": {"replay_passes": 0},
    "no replay, lr ÷ 10": {"replay_passes": 0, "lr": LR / 10},
    "lr ÷ 10": {"lr": LR / 10},
    "rank 2": {"rank": 2, "alpha": 2.0},
}
APART = 60  # texts that were never seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), help=f"of {list(SETTINGS)}")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    source = Source()
    n = args.prompts
    print(
        "| settings | seed | canaries | afterwards | mean exposure, bits (of 8) | written out |\n|---|---|---|---|---|---|"
    )
    for seed in range(args.seeds):
        stream = source.stream("stationary", n + AFTERWARDS + APART, 0.0, seed, 48)
        requests = [Feedback(r.tokens, Teacher.from_logits(r.logits)) for r in stream]
        seen, afterwards, apart = requests[:n], requests[n : n + AFTERWARDS], requests[n + AFTERWARDS :]
        for name in args.settings:
            config = OnlineSpecConfig(**({"update_every": 1, "memory_tokens": 0, "seed": seed} | SETTINGS[name]))
            draft = OnlineDraft(load_draft(), config)
            draft.serves(source.target)
            learn(draft, seen)
            started = time.process_time()
            report = audit(draft, own=seen, held_out=apart, afterwards=afterwards, seed=seed)
            spent = time.process_time() - started
            for p in report.probed:
                out = f"{p.extracted} of {len(p.exposures)}"
                print(f"| {name} | {seed} | {times(p.repeats)} | {p.afterwards} | {p.bits:.2f} | {out} |")
            gap = report.gap
            assert gap is not None
            gained = gap.held_out[0] - gap.held_out[1]
            print(
                f"{name}, seed {seed}: gap {gap.gap:.3f} ± {gap.error:.3f} nats per token beside {gained:.2f} gained on held-out "
                f"text, AUC {gap.auc:.3f}; {report.seen} of {report.vocabulary} tokens can be read off; "
                f"memorised {report.record.memorised} of {report.record.texts} texts; "
                f"refused for {len(report.refusals())} reasons; {spent:.1f} s of CPU",
                flush=True,
            )


if __name__ == "__main__":
    main()
