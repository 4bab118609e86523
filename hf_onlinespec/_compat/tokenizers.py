"""Tokenizers, whose calls are annotated with all that they may return."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .versions import imports_of_others

with imports_of_others():
    from tokenizers import Tokenizer
    from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def chat_inputs(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> BatchEncoding:
    """A conversation, by the tokenizer's template, as the inputs of a model that is to answer it: (1, L) each."""
    rendered = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(rendered, BatchEncoding)
    return rendered


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the tokenizers library inside of a fast one; None: it is a slow one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    return tokenizer.backend_tokenizer


def component(part: Any) -> dict[str, Any] | None:
    """What a component of such a tokenizer is made of, as it stands in tokenizer.json; None: there is none."""
    if part is None:
        return None
    state: dict[str, Any] = json.loads(part.__getstate__())  # how it is pickled
    return state
