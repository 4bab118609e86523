"""The adapters with names of a saved draft: in `adapters/NAME` of its folder, each an evolved draft that could stand alone.

They belong to the draft in whose folder they lie: saving it removes those that it does not have, and so does a push.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ..config.adapters import MOST_ADAPTERS, is_name
from ..errors import ArtifactError
from .files import is_folder
from .folder import is_artifact

NAMED = "adapters"


def named_folders(folder: Path) -> dict[str, Path]:
    """By name where the adapters of a saved draft lie. Links are none of ours, and are not followed.

    Raises:
        ArtifactError: there are more than a draft may have.
    """
    place = folder / NAMED
    names = sorted(filter(is_name, os.listdir(place))) if is_folder(place) else []
    found = {name: place / name for name in names if is_folder(place / name) and is_artifact(place / name)}
    if len(found) > MOST_ADAPTERS:
        raise ArtifactError(
            f"{place}: {len(found):,} adapters, expected at most {MOST_ADAPTERS}. Remove some of the folders."
        )
    return found


def place_of(folder: Path, name: str) -> Path:
    """Where an adapter is to be written. Raises ArtifactError."""
    for place in (folder / NAMED, folder / NAMED / name):
        if os.path.lexists(place) and not is_folder(place):
            raise ArtifactError(f"{place}: a link or a file in the place of a folder of ours. Remove it.")
    return folder / NAMED / name


def remove_others(folder: Path, names: Collection[str]) -> None:
    """Removes what an earlier draft has left: a draft that is loaded from there would have it.

    Raises:
        ArtifactError: it cannot be removed.
    """
    for name, place in named_folders(folder).items():
        if name in names:
            continue
        try:
            shutil.rmtree(place)
        except OSError as error:
            raise ArtifactError(
                f"{place}: an adapter of an earlier draft, which cannot be removed ({error})."
            ) from error
