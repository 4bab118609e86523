"""What the commands share: exit codes, errors as one line, checks of what the options name."""

from __future__ import annotations

import math
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from ..errors import ConfigError, MissingExtraError, OnlineSpecError, brief
from ..runtime.failures import is_out_of_memory
from ..share.folder import is_artifact

FOUND, FAILED, INTERRUPTED = 1, 2, 130  # exit codes beside 0; the help of hf-onlinespec says when
AUTO = "auto"  # of --dtype
MOST_SEED = 2**32 - 1
PACKAGES = {  # by extra: what a command may need
    "demo": ("matplotlib", "rich"),
    "serve": ("fastapi", "starlette", "uvicorn", "openai", "pydantic", "prometheus_client"),
}


def explain(error: Exception) -> str | None:
    """An error in one line for the user; None: it is a fault of ours, and its traceback is wanted."""
    if isinstance(error, OnlineSpecError):
        return str(error)
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0] or "the machine has no memory left"
        return f"out of memory ({reason}). Use a smaller --dtype or model, or shorter prompts and answers."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def check_extra(command: str, extra: str) -> None:
    """Raises MissingExtraError where a package is missing that the command needs."""
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'The {command} needs {", ".join(missing)}: run pip install "hf_onlinespec[{extra}]" and try again.'
        )


def check_folder(folder: Path, option: str) -> None:
    """Makes a folder, and raises ConfigError where that or writing into it is impossible: before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: the folder cannot be made ({error.strerror}). Name another one.") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: the folder cannot be written ({error.strerror}). Name another one.") from error


def check_saving(save: Path | None, draft: str | None, resumes: bool = False) -> None:
    """Raises ConfigError where `--save` would save nothing, cannot write, or would write over another draft.

    Args:
        draft: of `--draft`.
        resumes: whether a draft that was saved there goes on if `--draft` names a model.
    """
    if save is None:
        return
    if draft is None:
        raise ConfigError(
            "--save without --draft: there is nothing to save. The suffix memory holds prompts and answers word for word, and is "
            "never written down."
        )
    check_folder(save, f"--save {save}")
    check_own(save, f"--save {save}")
    named = Path(draft)
    if not is_artifact(save) or (named.is_dir() and save.samefile(named)) or (resumes and not is_artifact(named)):
        return
    raise ConfigError(
        f"--save {save}: another draft was saved there. Go on with it by --draft {save}, or name a new folder."
    )


def check_own(folder: Path, option: str) -> None:
    """Raises ConfigError where a draft would be saved among other files: some of them have the names of its own."""
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and not is_artifact(folder):
        raise ConfigError(
            f"{option}: {brief(others[0])} lies there, and no saved draft. A draft is not saved among other files: name a new folder."
        )


def check_files(**paths: Path | None) -> None:
    """Raises ConfigError where two options name one file: the one would be written over the other.

    Args:
        paths: by option, without its dashes.
    """
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        first = seen.setdefault(path.resolve(), name)
        if first != name:
            raise ConfigError(f"--{first} and --{name} are one file, {path}. Name another one.")


def check_least(option: str, value: float | None, least: int) -> None:
    """Raises ConfigError where a number is too small, or infinite; None: the option was not given."""
    if value is not None and not least <= value < float("inf"):
        raise ConfigError(f"{option} {value}: expected a value of at least {least}.")


def check_seed(seed: int) -> None:
    """Raises ConfigError where torch would not take a seed."""
    if not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"--seed {seed}: expected a value from 0 to {MOST_SEED}.")


def check_writable(path: Path, option: str) -> None:
    """Raises ConfigError where a folder cannot be written, or made; makes none."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: nothing can be written there ({error.strerror}). Name another one.") from error


def quiet_libraries(bars: bool = False) -> None:
    """Switches off what transformers and the Hub's client remark on: the commands say themselves what matters.

    Args:
        bars: keep progress bars, where somebody sees them. That of a download stays in any case.
    """
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    is_seen, downloads = sys.stderr.isatty(), not are_progress_bars_disabled()
    if not (bars and is_seen):
        logging.disable_progress_bar()
    if is_seen and downloads:
        enable_progress_bars()


def finite(value: Any) -> Any:
    """The same with null where JSON has no number: infinity."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
