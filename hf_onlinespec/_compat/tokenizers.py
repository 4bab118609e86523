"""Tokenizers, whose calls are annotated with all that they may return."""

from __future__ import annotations

from collections.abc import Sequence

from .versions import imports_of_others

with imports_of_others():
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def chat_inputs(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> BatchEncoding:
    """A conversation, by the tokenizer's template, as the inputs of a model that is to answer it: (1, L) each."""
    rendered = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(rendered, BatchEncoding)
    return rendered
