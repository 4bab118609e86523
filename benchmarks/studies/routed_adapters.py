"""What `adapter="auto"` loses against the best adapter of each prompt in hindsight: three domains in turn, one adapter each.

    python benchmarks/studies/routed_adapters.py --prompts 18 --out routed.json

Each adapter first learns a few prompts of its domain by name. Then prompts of all domains come in turn with `adapter="auto"`, and the one
that is chosen goes on learning. From the 101st prompt on, before each, every adapter, and the one without a name, answers the same prompt without learning: the
longest acceptance length is the best in hindsight, that of the adapter of the prompt's domain the one by name. The draft model by itself, at
a fixed lookahead, so that nothing looks at the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_onlinespec import OnlineDraft
from hf_onlinespec.config.adapters import AUTO
from hf_onlinespec.embedded import DOMAINS, load_pair

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from streams import shuffled

FIXED: dict[str, Any] = {"lookahead": 4, "update_every": 1, "memory_tokens": 0, "recycle": False}


def report(rows: list[dict[str, Any]]) -> None:
    n = len(rows)
    routed = sum(row["routed"] for row in rows)
    best = sum(max(row["hindsight"].values()) for row in rows)
    own = sum(row["hindsight"][row["domain"]] for row in rows)
    unnamed = sum(row["hindsight"][""] for row in rows)
    print(
        f"{n} prompts: {routed / n:.3f} tokens per target forward; ÷ best of each prompt {routed / best:.3f}, ÷ the domain's own by "
        f"name {routed / own:.3f}, ÷ without a name {routed / unnamed:.3f}; regret {(best - routed) / n:.3f} per prompt",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=18, help="that are measured")
    parser.add_argument("--before", type=int, default=100, help="prompts before them, those by name included")
    parser.add_argument("--first", type=int, default=6, help="prompts that each adapter learns by name")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, more settings of the draft")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair = load_pair()
    draft = OnlineDraft(pair.draft, **(FIXED | {"seed": args.seed} | args.settings))

    def lengths(text: str, adapter: str | None, learns: bool) -> float:
        inputs = pair.tokenizer(text, return_tensors="pt")
        torch.manual_seed(args.seed)
        pair.target.generate(
            **inputs,
            assistant_model=draft,
            adapter=adapter,
            onlinespec=learns,
            do_sample=False,
            max_new_tokens=args.new_tokens,
        )
        return draft.metrics.last.acceptance_length

    texts = {domain: shuffled(domain, args.seed) for domain in DOMAINS}
    for domain in DOMAINS:
        for text in texts[domain][: args.first]:
            lengths(text, domain, learns=True)
    named = len(DOMAINS) * args.first
    chosen_own = 0
    rows: list[dict[str, Any]] = []
    for i in range(args.before - named + args.prompts):
        domain = DOMAINS[i % len(DOMAINS)]
        text = texts[domain][(args.first + i // len(DOMAINS)) % len(texts[domain])]
        measured = i >= args.before - named
        hindsight = {name or "": lengths(text, name, learns=False) for name in (None, *DOMAINS)} if measured else {}
        before = draft.adapters[domain].metrics.requests
        routed = lengths(text, AUTO, learns=True)
        own = draft.adapters[domain].metrics.requests > before
        chosen_own += own
        if measured:
            rows.append({"domain": domain, "own": own, "routed": routed, "hindsight": hindsight})
            report(rows)
    print(f"The domain's own adapter was chosen for {chosen_own} of {i + 1} prompts.")
    print(draft.adapters)
    if args.out is not None:
        args.out.write_text(
            json.dumps({"settings": vars(args) | {"out": str(args.out)}, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
