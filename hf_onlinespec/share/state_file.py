"""A state in one file: safetensors, with the values as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from ..state import State
from .json_files import parse_json
from .tensor_files import TensorFile


def write_state(state: State, path: Path) -> None:
    """Writes a state; the inverse of `read_state`."""
    save_file(dict(state.tensors), path, metadata={"values": json.dumps(state.values)})


def read_state(path: Path) -> State:
    """Reads a state, each tensor when it is asked for. Raises ArtifactError."""
    tensors = TensorFile(path)
    return State(tensors, parse_json(tensors.about.get("values", "").encode(), path))
