"""The folder of a Gemma-4 assistant or a DFlash draft, as transformers reads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .dflash import DFlashHead
from .gemma_assistant import GemmaAssistantHead

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def write_assistant(head: GemmaAssistantHead | DFlashHead, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors, of an assistant generation_config.json too.

    Args:
        weights: by the names of the head's own.
    """
    part = "assistant" if isinstance(head, GemmaAssistantHead) else "model"
    model: Any = head.get_submodule(part)
    tensors = {
        name.removeprefix(f"{part}."): weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if name.startswith(f"{part}.")
    }
    if isinstance(
        head, GemmaAssistantHead
    ):  # transformers looks for the vocabulary head in the table that it is tied to
        tensors[TABLE] = tensors.pop(HEAD) if model.config.tie_word_embeddings else tensors[HEAD].clone()
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if isinstance(head, GemmaAssistantHead):  # it says how many tokens are drafted
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
