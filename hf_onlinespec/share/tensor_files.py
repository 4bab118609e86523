"""Safetensors files from elsewhere: header and sizes are checked before anything is allocated."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError, brief
from .files import CHUNK_BYTES, check_holes, regular_file, unreadable
from .json_files import MOST_JSON_BYTES, parse_json

MOST_TENSOR_BYTES = 16 << 30  # of one file; the shapes in it are held against the base besides
MOST_DIMENSIONS = 8  # of a tensor
# By the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = frozenset(DTYPES)
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64}
DTYPES |= {"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
if "float8_e8m0fnu" in vars(torch):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one of its tensors."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path, most_bytes: int = MOST_TENSOR_BYTES) -> dict[str, TensorHeader]:
    """The shapes of a safetensors file's tensors, without the tensors. Raises as `regular_file`."""
    with regular_file(path, most_bytes) as (file, size):
        return _header(file, size, path)[0]


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name: their shapes are known, their numbers are read whenever they are asked for.

    Never unpickled. The file stays open as long as this is used: what is read is what was checked, also where another file has
    taken its place by then. Several threads may read at once, and processes that were forked.

    Args:
        path: of a regular file, or of a link to one.
        most_bytes: of the file.

    Attributes:
        header: what the file says about its tensors.
        about: text by name, which it carries besides.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: it is damaged, of another kind, or too large.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_TENSOR_BYTES) -> None:
        self.path = path
        with regular_file(path, most_bytes) as (file, size):
            self.header, self.about, self._places = _header(file, size, path)
            self._size, self._begin = size, size - sum(tensor.nbytes for tensor in self.header.values())
            descriptor = os.dup(file.fileno())
        self._file = os.fdopen(descriptor, "rb", buffering=0, closefd=False)
        self._seeks = threading.Lock()
        weakref.finalize(self, os.close, descriptor)

    def check_holes(self) -> None:
        """Raises ArtifactError for a large file with large holes, as somebody else may have made it."""
        check_holes(self.path, self._file.fileno(), self._size)

    def checksum(self) -> str:
        """The file's checksum, computed a chunk at a time. Raises ArtifactError where it cannot be read."""
        found = at = 0
        while chunk := self._read(at):
            found = zlib.crc32(chunk, found)
            at += len(chunk)
        return f"{found:08x}"

    def _read(self, at: int, most_bytes: int = CHUNK_BYTES) -> bytes:
        """What stands at a place of the file; empty: it ends there. Raises ArtifactError."""
        try:
            return self._read_at(at, most_bytes)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _read_at(self, at: int, most_bytes: int) -> bytes:
        """The same. Raises OSError."""
        # Not by seeking, where that can be helped: threads and forked processes share the place that a descriptor is at.
        pread = vars(os).get("pread")
        if pread is not None:
            return bytes(pread(self._file.fileno(), most_bytes, at))
        with self._seeks:  # Windows, which does not fork
            self._file.seek(at)
            return self._file.read(most_bytes)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read anew. Raises KeyError, and ArtifactError where it cannot be read."""
        header = self.header[name]
        numbers = torch.empty(header.nbytes, dtype=torch.uint8)
        into = memoryview(numbers.numpy().data)
        at = self._begin + self._places[name][0]
        while into:
            chunk = self._read(at, min(len(into), CHUNK_BYTES))
            if not chunk:
                raise _unsound(self.path, "it was shortened while it was read")
            into[: len(chunk)] = chunk
            into, at = into[len(chunk) :], at + len(chunk)
        return numbers.view(DTYPES[header.dtype]).view(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)

    def __contains__(self, name: object) -> bool:
        return name in self.header

    def write(self, path: Path, about: Mapping[str, str]) -> None:
        """Writes another file with these tensors, a chunk at a time. Raises OSError."""
        header: dict[str, object] = {"__metadata__": dict(about)}
        for name, tensor in self.header.items():
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": self._places[name]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as safetensors aligns it
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            at = self._begin
            while chunk := self._read_at(at, CHUNK_BYTES):
                file.write(chunk)
                at += len(chunk)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name; those of a file are not read."""
    if isinstance(tensors, TensorFile):
        return {name: header.shape for name, header in tensors.header.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


Header = tuple[dict[str, TensorHeader], dict[str, str], dict[str, tuple[int, int]]]


def _header(file: BinaryIO, size: int, path: Path) -> Header:
    """The tensors of a file, the text that it carries besides, and where each tensor's bytes begin and end."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_JSON_BYTES):
        raise _unsound(path, f"{size:,} bytes, of which {length:,} would be its header")
    found = parse_json(file.read(length), path)
    about = found.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise _unsound(path, f"__metadata__={brief(about)}: expected text by name")
    tensors, places = {}, {}
    for name, entry in found.items():
        tensors[name], places[name] = _entry(name, entry, path)
    end = 0
    for begin, after in sorted(places.values()):
        if begin != end:
            raise _unsound(path, "its tensors overlap, or leave gaps")
        end = after
    if 8 + length + end != size:
        raise _unsound(path, f"{size:,} bytes, expected {8 + length + end:,}")
    return tensors, about, places


def _entry(name: str, entry: object, path: Path) -> tuple[TensorHeader, tuple[int, int]]:
    """One tensor of a header, and where its bytes begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _unsound(path, f"{brief(name)} is {brief(entry)}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unsound(path, f"{brief(name)} has dtype {brief(dtype)}: expected one of {sorted(DTYPES)}")
    whole = all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in (shape, place))
    if whole and len(shape) <= MOST_DIMENSIONS and len(place) == 2:
        tensor = TensorHeader(dtype, tuple(shape))
        # An empty tensor has no bytes to hold its other dimensions against, and torch refuses what overflows only when it is made.
        outline = math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize
        if place[1] - place[0] == tensor.nbytes and outline <= MOST_TENSOR_BYTES:
            return tensor, (place[0], place[1])
    raise _unsound(path, f"{brief(name)} has shape {brief(shape)} and bytes {brief(place)}")


def _unsound(path: Path, why: object) -> ArtifactError:
    return ArtifactError(f"{path}: not a sound safetensors file ({why}).")
