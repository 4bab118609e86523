"""A draft's folder is replaced as a whole: neither a process that is killed nor a full disk leaves it half written."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArtifactError, brief
from .files import exclusive, is_file, is_folder
from .folder import CONFIG, FILES, LOCK, MANIFEST_PART, MODEL_CONFIG, STAGING, STATE, holds_complete_set, is_artifact
from .manifest import Manifest

_log = logging.getLogger(__name__)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write a draft's files into; they take the place of what `folder` held when the block ends without an error.

    Writers wait for each other, where the system has file locks. The manifest is written last: a set that has one is complete.

    Raises:
        OSError: the folder cannot be written.
        ArtifactError: something else lies in the place of a draft's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK):
        _check_places(folder)  # while no other writer makes and removes them
        finish_interrupted_write(folder)
        staging = folder / STAGING
        _empty(staging)
        staging.mkdir()
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # half a state would only keep a full disk full
            raise
        finish_interrupted_write(folder)


def finish_interrupted_write(folder: Path) -> None:
    """Moves a complete set of new files into place, as a process that was killed may have left one.

    What lies in the staging folder and is no such set is not ours: the folder is renamed, with a warning.
    """
    if not holds_complete_set(folder):
        return
    staging = folder / STAGING
    try:
        keeps_state = STATE in Manifest.read(folder).files
    except ArtifactError as error:
        _set_apart(staging, str(error))
        return
    for name in FILES:
        if name == CONFIG and not keeps_state:
            (folder / STATE).unlink(missing_ok=True)  # of an earlier draft
        if is_file(staging / name):
            os.replace(staging / name, folder / name)
    shutil.rmtree(staging, ignore_errors=True)


def _empty(staging: Path) -> None:
    """Removes what a process that was killed had not finished; what is not ours is renamed. Raises OSError."""
    if not is_folder(staging):
        return
    try:
        odd = sorted(set(os.listdir(staging)) - {*FILES, MANIFEST_PART})
        if not odd:
            shutil.rmtree(staging)
            return
        why = f"it holds {brief(odd[0])}"
    except OSError as error:  # it may not be read, or hold folders that may not be emptied
        why = str(error)
    _set_apart(staging, why)


def _set_apart(staging: Path, why: str) -> None:
    """Renames a folder that lies in the place of ours. Raises OSError."""
    number = 1
    while os.path.lexists(away := staging.with_name(f"{STAGING}-{number}")):
        number += 1
    staging.rename(away)
    _log.warning(
        "%s is not a draft that was being saved (%s). It is kept as %s, and saving goes on.", staging, why, away.name
    )


def _check_places(folder: Path) -> None:
    """Refuses a folder in which something else lies in the place of a draft's files. Raises ArtifactError."""
    if os.path.lexists(folder / MODEL_CONFIG) and not is_artifact(folder):
        raise ArtifactError(
            f"{folder}: a model lies there ({MODEL_CONFIG}), which transformers would load with this adapter from now on. Name another "
            "folder."
        )
    if not is_folder(folder / STAGING) and os.path.lexists(folder / STAGING):
        raise ArtifactError(f"{folder / STAGING}: a link or a file in the place of a folder of ours. Remove it.")
    for name in FILES:
        if is_folder(folder / name):
            raise ArtifactError(f"{folder / name}: a folder in the place of a file. Remove it, or name another folder.")
