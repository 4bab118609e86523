"""The tensors of a head's folder: names and shapes at once, numbers when they are asked for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DraftError, brief

CONFIG = "config.json"
HYDRA_WEIGHTS = "hydra_lm_head.pt"
# The first of these that are there are read.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", HYDRA_WEIGHTS)
# What torch.load raises on what is no file of its own, or holds more than tensors.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    name: str
    shape: tuple[int, ...]
    file: Path
    tensor: Tensor | None  # where the file had to be opened as a whole; mapped into memory, if its layout allows

    def load(self) -> Tensor:
        """The tensor itself, on the CPU."""
        if self.tensor is not None:
            return self.tensor
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
            return tensor


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by its name. Nothing but tensors is unpickled.

    Raises:
        DraftError: there is no file with weights, or one cannot be read.
    """
    found = (sorted(folder.glob(pattern)) for pattern in WEIGHTS)
    files = next((some for some in found if some), [])
    if not files:
        raise DraftError(
            f"{folder} has no weights of a draft head: expected model.safetensors, pytorch_model.bin or {HYDRA_WEIGHTS}."
        )
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            stored |= {one.name: one for one in (_safetensors if file.suffix == ".safetensors" else _pickled)(file)}
        except (SafetensorError, *UNREADABLE) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise DraftError(f"{file} cannot be read as tensors: {type(error).__name__}: {reason}") from error
    return stored


def _safetensors(file: Path) -> Iterator[Stored]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # it is no dictionary
            yield Stored(name, tuple(opened.get_slice(name).get_shape()), file, None)


def _pickled(file: Path) -> Iterator[Stored]:
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the layout of before PyTorch 1.6
        held = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ValueError("it is no dictionary of tensors")
    for name, tensor in held.items():
        yield Stored(str(name), tuple(tensor.shape), file, tensor)


def stored_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises DraftError: there is none, or it is no JSON object."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DraftError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DraftError(f"{file} holds {brief(values)}: expected an object.")
    return values
