"""Which versions of transformers and PEFT we were run on, and what is said where another one is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from ..errors import VersionError

SUPPORTED = "transformers >= 5.18, < 5.25 with peft >= 0.20, < 0.22"
# With 5.17.0, drafted answers of GIT (with a picture) and of PaliGemma (without one) differ from plain ones, without an error.
OLDEST = (5, 18)


def moved(error: Exception) -> VersionError:
    """The error to raise where a name of another library is not where it was."""
    return VersionError(f"{error}. hf_onlinespec was run on {SUPPORTED}: install one of these.")


@contextmanager
def imports_of_others() -> Iterator[None]:
    """A `with` block of imports: a name that is not there raises VersionError, which says what to install."""
    try:
        yield
    except ImportError as error:
        raise moved(error) from error


def refuse_older(installed: str) -> None:
    """Raises VersionError where a version of transformers is one that would answer otherwise than plain."""
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise moved(ImportError(f"transformers {installed} is too old"))


refuse_older(transformers.__version__)
