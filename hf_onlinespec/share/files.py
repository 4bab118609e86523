"""Files that somebody else may have made: read and locked without following, blocking or truncating, and bounded in size.

A draft's folder may come from anywhere. Reading follows links, because the cache of the Hub is made of them, but takes regular
files alone: no pipe that blocks, no device that never ends. Writing and locking follow none.

A file may claim to be far larger than what it takes on its disk: it has holes. So nothing is allocated for what a header claims,
before the caller has asked for it (`TensorFile`), and checksums are computed a chunk at a time.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import ArtifactError
from .json_files import MOST_INTEGER

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
if sys.platform == "win32":
    import msvcrt

LOCKED_BYTE = 1 << 40  # of a file, behind whatever it holds: Windows keeps others from reading what is locked
MOST_HOLES = (
    128 << 20
)  # in one file; what save_file writes has none, but a file system that compresses may make some of zeros
MOST_EXTENTS = 1_000  # looked at in the search for holes
CHUNK_BYTES = 1 << 20

# Not everywhere: Windows has neither links to special files nor pipes in folders.
NO_FOLLOW, NO_BLOCK = (int(vars(os).get(name, 0)) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
FLAGS = int(vars(os).get("O_CLOEXEC", 0)) | int(vars(os).get("O_BINARY", 0)) | NO_BLOCK


# Regular files


@contextmanager
def regular_file(path: Path, most_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
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
        raise unreadable(path, error) from error
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


def unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: cannot be read ({error}).")


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A regular file's bytes. Raises as `regular_file`."""
    with regular_file(path, most_bytes) as (file, size):
        try:
            return file.read(size)
        except OSError as error:
            raise unreadable(path, error) from error


def checksum(data: bytes) -> str:
    """CRC-32 in hexadecimal digits: tells damage, not forgery."""
    return f"{zlib.crc32(data):08x}"


def check_holes(path: Path, descriptor: int, size: int) -> None:
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


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def hold(file: BinaryIO) -> bool:
    """Takes an open file's lock without waiting, until it is closed or the process ends; False: another process holds it.

    Where the file system has no locks, nobody is kept out. On Windows the place in the file is moved.
    """
    try:
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        elif fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


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
