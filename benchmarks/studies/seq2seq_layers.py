"""Which layers of an encoder–decoder draft should learn: its decoder's alone, or its encoder's too.

    python benchmarks/studies/seq2seq_layers.py --pair hf_onlinespec/seq2seq_pair --domain advising --requests 60

The folder holds `target`, `draft` and `prompts.jsonl` (domain, prompt, reference). Nothing is generated: the target scores each
reference, the draft is scored on it before it learns it, and a chain of five tokens is counted off to its first difference from the
target's likeliest tokens. Acceptance length frozen and learned, and processor time of learning, per ten requests.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.models.source import Source

LOOKAHEAD = 5
EVERY = 10  # requests, to a line
ENCODER_TOO = ("q", "k", "v", "o", "wi_0", "wi_1", "wo", "lm_head", "decoder.embed_tokens")
ARMS = {"decoder": None, "both": ENCODER_TOO}


def rounds_of(agrees: Sequence[bool]) -> int:
    """Target forwards for tokens of which these are drafted rightly."""
    at = rounds = 0
    while at < len(agrees):
        kept = next((i for i, right in enumerate(agrees[at : at + LOOKAHEAD]) if not right), LOOKAHEAD)
        at, rounds = at + kept + 1, rounds + 1
    return rounds


@torch.no_grad()
def scored(draft: OnlineDraft, text: torch.Tensor, laws: torch.Tensor, source: Source, base: bool) -> int:
    """Rounds that the draft as it is now would take for the last `len(laws)` tokens of text (L,)."""
    said = draft.trainable.logits(text[None, :-1], len(laws), base, sources=[source])[0]
    return rounds_of((said.argmax(-1) == laws.argmax(-1)).tolist())


def run(arm: str, target: PreTrainedModel, base: PreTrainedModel, items: Sequence[tuple[list[int], list[int]]]) -> None:
    draft = OnlineDraft(base, OnlineSpecConfig(lookahead=LOOKAHEAD, update_every=1, target_modules=ARMS[arm]))
    found, learning_s = [], 0.0
    for number, (question, answer) in enumerate(items, 1):
        source = Source(torch.tensor([question]), None, None)
        text = torch.tensor([target.config.decoder_start_token_id, *answer])
        with torch.no_grad():
            laws = target(input_ids=source.tokens, decoder_input_ids=text[None, :-1]).logits[0]
        found.append((len(answer), *(scored(draft, text, laws, source, base) for base in (True, False))))
        started = time.process_time()
        draft.learning.learn_request(Feedback(text, Teacher.from_logits(laws), source=source))
        learning_s += time.process_time() - started
        if number % EVERY == 0:
            tokens, frozen, learned = (sum(column) for column in zip(*found[-EVERY:], strict=True))
            print(
                f"{arm}, {number} requests: frozen {tokens / frozen:.2f}, learned {tokens / learned:.2f} tokens a forward, "
                f"{1000 * learning_s / number:.0f} ms of learning a request",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--domain", default="advising")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "target")
    lines = [json.loads(line) for line in (args.pair / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if line["domain"] == args.domain][: args.requests]
    items = [(tokenizer(one["prompt"]).input_ids, tokenizer(one["reference"]).input_ids) for one in chosen]
    for arm in args.arms:
        target, base = (
            AutoModelForSeq2SeqLM.from_pretrained(args.pair / name, dtype=torch.float32).eval()
            for name in ("target", "draft")
        )
        run(arm, target, base, items)


if __name__ == "__main__":
    main()
