"""What `generate_stream` hands back for every prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What a target said to one prompt of `generate_stream`, or why it said nothing.

    Attributes:
        index: the prompt's place among all prompts, from 0.
        prompt: as it was given.
        tokens: (new tokens,) on the CPU, without the prompt, the token that ended it included; None: it failed.
        text: the same without special tokens; None: it failed, or no tokenizer was given.
        error: why this prompt has no answer; None: it has one.
    """

    index: int
    prompt: Any
    tokens: Tensor | None = None
    text: str | None = None
    error: Exception | None = None
