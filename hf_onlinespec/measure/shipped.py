"""The prompts that ship with the package, their kinds in turns, and how a prompt becomes the inputs of a chat model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from .._compat.tokenizers import chat_inputs
from .records import Prompt

FOLDER = Path(__file__).with_name("prompts")  # SOURCES.md in it: whose they are, under which licence


def shipped_prompts(new_tokens: int) -> list[Prompt]:
    """About sixty real prompts; any beginning of the list covers the kinds evenly."""
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prompt(item["prompt"], item["kind"], new_tokens) for item in map(json.loads, lines)]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], BatchEncoding]:
    """Text to the inputs of a model, (1, L): by the chat template where the tokenizer has one, as the user's only message."""
    if tokenizer.chat_template is None:
        return lambda text: tokenizer(text, return_tensors="pt")
    return lambda text: chat_inputs(tokenizer, [{"role": "user", "content": text}])
