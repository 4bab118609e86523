"""Files that somebody else may have made: read and locked without following, blocking or truncating, and bounded in size.

A draft's folder may come from anywhere. Reading follows links, because the cache of the Hub is made of them, but takes regular
files alone: no pipe that blocks, no device that never ends. Writing and locking follow none.

A file may claim to be far larger than what it takes on its disk: it has holes. So nothing is allocated for what a header claims,
before the caller has asked for it (`TensorFile`), and checksums are computed a chunk at a time.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError, brief

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# All chosen: far above what any draft needs, far below what hurts.
MOST_JSON_BYTES = 8 << 20  # a model of 10,000 adapted layers needs 1 MB
MOST_JSON_VALUES = 500_000  # the same model's tensors take 160,000; parsed in 0.5 s, where 8 MB of numbers take 3 s
MOST_TENSOR_BYTES = 16 << 30  # of one file; the shapes in it are held against the base besides
MOST_HOLES = (
    128 << 20
)  # in one file; what save_file writes has none, but a file system that compresses may make some of zeros
MOST_EXTENTS = 1_000  # looked at in the search for holes
MOST_DIMENSIONS = 8  # of a tensor
CHUNK_BYTES = 1 << 20
MOST_DEPTH = 100  # of JSON
MOST_INTEGER = 2**63 - 1

# Not everywhere: Windows has neither links to special files nor pipes in folders.
NO_FOLLOW, NO_BLOCK = (int(vars(os).get(name, 0)) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
FLAGS = int(vars(os).get("O_CLOEXEC", 0)) | int(vars(os).get("O_BINARY", 0)) | NO_BLOCK

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


# Regular files


@contextmanager
def plain_file(path: Path, most_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file, or a link to one, for reading; with its size in bytes.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: it is something else, too large, or cannot be opened.
    """
    try:
        # Looked at before it is opened: opening a device may do something.
        _check_regular(path, path.stat(), most_bytes)
        file = os.fdopen(os.open(path, os.O_RDONLY | FLAGS), "rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(path, error) from error
    with file:
        found = os.fstat(file.fileno())
        _check_regular(path, found, most_bytes)  # it may have been exchanged
        yield file, found.st_size


def _check_regular(path: Path, found: os.stat_result, most_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path}: not a regular file. Remove it, and save or download the draft anew.")
    if found.st_size > most_bytes:
        raise ArtifactError(
            f"{path}: {found.st_size:,} bytes, expected at most {most_bytes:,}. It is not the file of a draft: save or download "
            "the draft anew."
        )


def check_regular(path: Path) -> None:
    """Raises ArtifactError, or OSError, for what is no regular file, nor a link to one: opening it may block for ever."""
    _check_regular(path, path.stat(), MOST_INTEGER)


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: cannot be read ({error}).")


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A regular file's bytes. Raises as `plain_file`."""
    with plain_file(path, most_bytes) as (file, size):
        try:
            return file.read(size)
        except OSError as error:
            raise _unreadable(path, error) from error


def checksum(data: bytes) -> str:
    """CRC-32 in hexadecimal digits: tells damage, not forgery."""
    return f"{zlib.crc32(data):08x}"


def _check_holes(path: Path, descriptor: int, size: int) -> None:
    """Raises ArtifactError for a large file that is mostly holes, where the system can tell: reading it would take long.

    A file that a header of ours describes may be a hundred times as large as what it takes on the disk.
    """
    seek_data, seek_hole = (vars(os).get(name) for name in ("SEEK_DATA", "SEEK_HOLE"))
    if size <= MOST_HOLES or seek_data is None or seek_hole is None:
        return
    holes, at = 0, 0
    for _ in range(MOST_EXTENTS):
        try:
            begin = os.lseek(descriptor, at, seek_data)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a file system that cannot tell
                break
            begin = size  # nothing but a hole is left
        holes += begin - at
        if holes > MOST_HOLES:
            raise ArtifactError(
                f"{path}: {size:,} bytes, of which at least {holes:,} are holes that no draft was written to. Download or save "
                "the draft anew; a copy that your file system has compressed: copy it to another one."
            )
        if begin >= size:
            break
        at = os.lseek(descriptor, begin, seek_hole)


def is_folder(path: Path) -> bool:
    """Whether this is a folder itself, not a link to one."""
    return _is(path, stat.S_ISDIR)


def is_file(path: Path) -> bool:
    """Whether this is a regular file itself, not a link to one."""
    return _is(path, stat.S_ISREG)


def _is(path: Path, kind: Any) -> bool:
    try:
        return bool(kind(path.lstat().st_mode))
    except (OSError, ValueError):
        return False


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a file's lock, where the system has such locks; it ends with the process. The file is made, never emptied.

    Raises:
        OSError: it cannot be opened, or is a link.
        ArtifactError: it is no regular file.
    """
    if fcntl is None:
        yield
        return
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW | FLAGS, 0o666), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()), MOST_INTEGER)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# JSON


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from a file's bytes: bounded in depth, with finite numbers, whole ones of 64 bits, and no key twice.

    Raises:
        ArtifactError: it is not one.
    """
    try:
        if (n := data.count(b",") + data.count(b"[") + data.count(b"{")) > MOST_JSON_VALUES:
            raise ValueError(f"{n:,} values, expected at most {MOST_JSON_VALUES:,}")
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        _check_values(found)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({brief(str(error))}).") from error
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {brief([key for key, _ in pairs])}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MOST_INTEGER:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{brief(digits)} is no finite number")
    return value


def _check_values(found: Any) -> None:
    """Raises ValueError for what is nested too deep to be copied, and for text that cannot be written."""
    level = [found]
    for _ in range(MOST_DEPTH):
        for value in level:
            for text in value if isinstance(value, dict) else [value]:
                if isinstance(text, str):
                    text.encode()  # a lone half of a character cannot be written
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEPTH} levels deep")


# Tensors


def read_header(path: Path, most_bytes: int = MOST_TENSOR_BYTES) -> dict[str, TensorHeader]:
    """The shapes of a safetensors file's tensors, without the tensors. Raises as `plain_file`."""
    with plain_file(path, most_bytes) as (file, size):
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
        with plain_file(path, most_bytes) as (file, size):
            self.header, self.about, self._places = _header(file, size, path)
            self._size, self._begin = size, size - sum(tensor.nbytes for tensor in self.header.values())
            descriptor = os.dup(file.fileno())
        self._file = os.fdopen(descriptor, "rb", buffering=0, closefd=False)
        self._seeks = threading.Lock()
        weakref.finalize(self, os.close, descriptor)

    def check_holes(self) -> None:
        """Raises ArtifactError for a large file with large holes, as somebody else may have made it."""
        _check_holes(self.path, self._file.fileno(), self._size)

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
            raise _unreadable(self.path, error) from error

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
        header: dict[str, Any] = {"__metadata__": dict(about)}
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


def _entry(name: str, entry: Any, path: Path) -> tuple[TensorHeader, tuple[int, int]]:
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
