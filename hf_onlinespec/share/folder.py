"""The files of a saved draft: their names, and where each of them is, also while another process replaces them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..errors import ArtifactError
from .files import is_file, is_folder, read_bytes
from .json_files import MOST_JSON_BYTES, parse_json
from .tensor_files import MOST_TENSOR_BYTES, TensorFile, TensorHeader, read_header

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, STATE = "onlinespec_config.json", "onlinespec_state.safetensors"
CARD, CURVE = "README.md", "curve.png"
MODEL_CONFIG = "config.json"  # of a whole model; a draft has none
FILES = (ADAPTER_CONFIG, ADAPTER, STATE, CARD, CURVE, CONFIG)  # in the order in which they are moved
CHECKED = (ADAPTER_CONFIG, ADAPTER, STATE)  # that resuming depends on; the last may be left out
STAGING = ".onlinespec_next"  # folder in which they are written, before they take their places
MANIFEST_PART = f"{CONFIG}.part"  # the last of them, until it is written
LOCK = ".onlinespec_lock"  # file that a writer holds

Content = TypeVar("Content")


def holds_complete_set(folder: Path) -> bool:
    """Whether a complete set of new files waits to be moved into place. Links are none of ours, and are not followed."""
    return is_folder(folder / STAGING) and is_file(folder / STAGING / CONFIG)


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an evolved draft, or what should be one."""
    return holds_complete_set(folder) or os.path.lexists(folder / CONFIG)


def path_of(folder: Path, name: str) -> Path:
    """Where a file is: in the staging folder, if a complete set there was not moved to the end."""
    staging = folder / STAGING
    return staging / name if holds_complete_set(folder) and is_file(staging / name) else folder / name


def header_of(folder: Path, name: str, most_bytes: int = MOST_TENSOR_BYTES) -> dict[str, TensorHeader]:
    """What a safetensors file says about its tensors. Raises ArtifactError."""
    return _read(folder, name, lambda path: read_header(path, most_bytes))


def read_file(folder: Path, name: str) -> bytes:
    """A small file. Raises ArtifactError."""
    return _read(folder, name, lambda path: read_bytes(path, MOST_JSON_BYTES))


def open_tensors(folder: Path, name: str) -> TensorFile:
    """A file of tensors. Raises ArtifactError."""
    return _read(folder, name, TensorFile)


def _read(folder: Path, name: str, read: Callable[[Path], Content]) -> Content:
    for path in (path_of(folder, name), folder / name):  # it may have been moved into place just now
        try:
            return read(path)
        except FileNotFoundError:
            continue
    raise _missing(folder, name)


def _missing(folder: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{folder}: {name} is missing. Save or download the draft anew.")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises ArtifactError."""
    return parse_json(read_file(path.parent, path.name), path)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, each read when it is asked for. Raises ArtifactError."""
    return open_tensors(path.parent, path.name)
