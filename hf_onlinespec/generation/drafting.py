"""What drafts in calls of `generate` with certain arguments, as far as it is ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from .._compat.generation import asks_mtp, early_exit_of
from ..commit.base import Draft
from ..config import OnlineSpecConfig, as_config
from .call import ATTACHED
from .hooks import draft_for
from .setting import wanted, wanted_adapter


@dataclass(frozen=True)
class Drafting:
    """What drafts, and whether it learns."""

    draft: Draft
    learns: bool
    adapter: str | None  # by name; None: the one without a name
    tokenizers: tuple[object, object] = (None, None)  # of target and draft; None: not given


def drafting_of(target: PreTrainedModel, arguments: Mapping[str, Any]) -> Drafting | None:
    """What drafts for a target where `generate` is called with these arguments; None: nothing of ours does.

    An argument goes before what a configuration says, and both before what is attached.
    """
    assistant, setting = arguments.get("assistant_model"), arguments.get("onlinespec")
    config, attachment = arguments.get("generation_config"), ATTACHED.get(target)
    adapter, exit_layers = arguments.get("adapter"), arguments.get("assistant_early_exit")
    tokenizers = arguments.get("tokenizer"), arguments.get("assistant_tokenizer")
    mtp = arguments.get("use_mtp")
    if isinstance(config, GenerationConfig):
        setting = wanted(config) if setting is None else setting
        adapter = wanted_adapter(config) if adapter is None else adapter
        exit_layers = early_exit_of(config) if exit_layers is None else exit_layers
        mtp = asks_mtp(config) if mtp is None else mtp
    if assistant is None and setting is None and attachment is not None:
        return Drafting(attachment.drafts_for(target), True, adapter, tokenizers)
    if setting is None:
        setting = wanted(target.generation_config)
    if not isinstance(assistant, Draft) and not setting:
        return None
    if assistant is None and attachment is not None:
        assistant = attachment.draft
    settings = as_config(setting) if isinstance(setting, OnlineSpecConfig | dict) else None
    draft = draft_for(target, assistant, settings, exit_layers, bool(mtp))
    return Drafting(draft, setting is not False, adapter, tokenizers)
