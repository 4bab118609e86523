"""The pair that ships with the package: a small trained target, a draft that knows one of its three domains, prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).with_name("embedded_pair")
DOMAINS = ("shell", "orders", "sql")
HOME_DOMAIN = "shell"  # the one that the draft was trained on


@dataclass(frozen=True)
class EmbeddedPair:
    """Target and draft in float32, and the tokenizer they share."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_pair() -> EmbeddedPair:
    """Loads the embedded pair from the package; no network. Every call gives models of their own."""
    target, draft = (
        AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, local_files_only=True).eval()
        for name in ("target", "draft")
    )
    return EmbeddedPair(target, draft, AutoTokenizer.from_pretrained(FOLDER / "target", local_files_only=True))


def load_draft() -> PreTrainedModel:
    """One more copy of the embedded draft: every arm of a comparison loads its own."""
    return AutoModelForCausalLM.from_pretrained(FOLDER / "draft", dtype=torch.float32, local_files_only=True).eval()


def prompts(domain: str) -> list[str]:
    """The held-out prompts of a domain, never trained on, in a fixed order; each opens with the end-of-text token."""
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: expected one of {DOMAINS}.")
    with open(FOLDER / "prompts.jsonl", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    return ["<|endoftext|>" + item["prompt"] for item in items if item["domain"] == domain]
