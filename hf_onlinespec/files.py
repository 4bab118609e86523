"""Files that somebody else may have made: read and locked without following, blocking or truncating, and bounded in size.

A draft's folder may come from anywhere. Reading follows links, because the cache of the Hub is made of them, but takes regular
files alone: no pipe that blocks, no device that never ends. Writing and locking follow none.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .errors import ArtifactError, brief

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# All chosen: far above what any draft needs, far below what hurts.
MOST_JSON_BYTES = 8 << 20  # a model of 10,000 adapted layers needs 1 MB
MOST_TENSOR_BYTES = 16 << 30  # of one file; the shapes in it are held against the base besides
MOST_DEPTH = 100  # of JSON: a merge of merges of merges takes two levels each
MOST_INTEGER = 2**63 - 1

# Not everywhere: Windows has neither links to special files nor pipes in folders.
NO_FOLLOW, NO_BLOCK = (int(vars(os).get(name, 0)) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
FLAGS = int(vars(os).get("O_CLOEXEC", 0)) | int(vars(os).get("O_BINARY", 0)) | NO_BLOCK

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = frozenset(DTYPE_BYTES)
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}
DTYPE_BYTES |= {"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one of its tensors."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


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


def read_tensor_file(path: Path, most_bytes: int = MOST_TENSOR_BYTES) -> bytes:
    """The bytes of a safetensors file whose header is sound. Raises as `plain_file`."""
    with plain_file(path, most_bytes) as (file, size):
        _header(file, size, path)
        file.seek(0)
        return file.read(size)


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text from a safetensors file's bytes; a file of another kind is never unpickled.

    Raises:
        ArtifactError: it is damaged.
    """
    _, about = _header(io.BytesIO(data), len(data), path)
    try:
        return load(data), about
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch does not know
        raise _unsound(path, error) from error


def _header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_JSON_BYTES):
        raise _unsound(path, f"{size:,} bytes, of which {length:,} would be its header")
    found = parse_json(file.read(length), path)
    about = found.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise _unsound(path, f"__metadata__={brief(about)}: expected text by name")
    tensors, places = {}, []
    for name, entry in found.items():
        tensor, place = _entry(name, entry, path)
        tensors[name] = tensor
        places.append(place)
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise _unsound(path, "its tensors overlap, or leave gaps")
        end = after
    if 8 + length + end != size:
        raise _unsound(path, f"{size:,} bytes, expected {8 + length + end:,}")
    return tensors, about


def _entry(name: str, entry: Any, path: Path) -> tuple[TensorHeader, tuple[int, int]]:
    """One tensor of a header, and where its bytes begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _unsound(path, f"{brief(name)} is {brief(entry)}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _unsound(path, f"{brief(name)} has dtype {brief(dtype)}: expected one of {sorted(DTYPE_BYTES)}")
    whole = all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in (shape, place))
    if not whole or len(place) != 2 or place[1] - place[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _unsound(path, f"{brief(name)} has shape {brief(shape)} and bytes {brief(place)}")
    return TensorHeader(dtype, tuple(shape)), (place[0], place[1])


def _unsound(path: Path, why: object) -> ArtifactError:
    return ArtifactError(f"{path}: not a sound safetensors file ({why}).")
