"""Whisper's own `generate`, which calls transformers' for every segment of speech, beside a draft of ours.

Where it sees an assistant, it leaves `begin_suppress_tokens` out and refuses `decoder_input_ids`. A draft of ours changes nothing of what is
said, so it is withheld from that method and given to transformers' `generate` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from ..commit.base import Draft
from .setting import first_said

# The target whose own `generate` runs in this thread, and what drafts for it; None: there is none.
_withheld: ContextVar[tuple[PreTrainedModel, Any] | None] = ContextVar("hf_onlinespec_withheld", default=None)


def wrap_whisper(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Whisper's `generate`, from which a draft of ours is withheld."""

    @functools.wraps(generate)
    def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assistant, config = (
            kwargs.get("assistant_model"),
            kwargs.get("generation_config", args[1] if args[1:] else None),
        )
        setting = first_said(kwargs.get("onlinespec"), config, self.generation_config)
        if assistant is None or not (setting or isinstance(assistant, Draft)):
            return generate(self, *args, **kwargs)
        token = _withheld.set((self, kwargs.pop("assistant_model")))
        try:
            return generate(self, *args, **kwargs)
        finally:
            _withheld.reset(token)

    return _generate


def give_back(target: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Puts what was withheld from a target's own `generate` among the arguments of transformers'."""
    withheld = _withheld.get()
    if withheld is not None and withheld[0] is target:
        arguments["assistant_model"] = withheld[1]
