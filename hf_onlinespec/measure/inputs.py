"""What a target makes of a prompt: the beginning of its text, or the source that its encoder reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel


def begins(target: PreTrainedModel, inputs: BatchEncoding) -> int:
    """Tokens of an output that stand before the answer: the prompt's, or the one that a decoder starts with."""
    return 1 if target.config.is_encoder_decoder else int(inputs["input_ids"].shape[1])


def logits_of(target: PreTrainedModel, inputs: BatchEncoding, tokens: Tensor, **how: Any) -> Tensor:
    """Logits (L, vocab) of one forward over an output (1, L) of this prompt, or its beginning."""
    given = {**inputs, "decoder_input_ids": tokens} if target.config.is_encoder_decoder else {"input_ids": tokens}
    logits: Tensor = target(**given, **how).logits[0]
    return logits
