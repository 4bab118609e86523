"""The pairs that ship with the package: small trained targets, drafts that know one of their domains, prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

FOLDER = Path(__file__).with_name("embedded_pair")
DOMAINS = ("shell", "orders", "sql")
HOME_DOMAIN = "shell"  # the one that the draft was trained on
SEQ2SEQ_FOLDER = Path(__file__).with_name("seq2seq_pair")
SEQ2SEQ_DOMAINS = ("wikisql", "advising")  # the draft was trained on the first


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
    return ["<|endoftext|>" + prompt for prompt in _held_out(FOLDER, DOMAINS, domain)]


def load_seq2seq_pair() -> EmbeddedPair:
    """Loads the encoder–decoder pair (question to SQL) from the package; no network. Every call gives models of their own."""
    target = AutoModelForSeq2SeqLM.from_pretrained(
        SEQ2SEQ_FOLDER / "target", dtype=torch.float32, local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(SEQ2SEQ_FOLDER / "target", local_files_only=True)
    return EmbeddedPair(target, load_seq2seq_draft(), tokenizer)


def load_seq2seq_draft() -> PreTrainedModel:
    """One more copy of the encoder–decoder pair's draft."""
    return AutoModelForSeq2SeqLM.from_pretrained(
        SEQ2SEQ_FOLDER / "draft", dtype=torch.float32, local_files_only=True
    ).eval()


def questions(domain: str) -> list[str]:
    """The held-out questions for the encoder–decoder pair of "wikisql" or "advising", in a fixed order."""
    return _held_out(SEQ2SEQ_FOLDER, SEQ2SEQ_DOMAINS, domain)


def _held_out(folder: Path, domains: tuple[str, ...], domain: str) -> list[str]:
    if domain not in domains:
        raise ValueError(f"domain={domain!r}: expected one of {domains}.")
    with open(folder / "prompts.jsonl", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    return [item["prompt"] for item in items if item["domain"] == domain]
