"""The base that an adapter names: found, loaded without its own code, compared with its fingerprint; and why it cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .._compat.assistants import is_dflash, lives_in_target
from .._compat.models import auto_class
from ..embedded import load_draft
from ..errors import ArtifactError, DraftError, brief
from ..models.identity import EMBEDDED, OF_TARGETS, PACKAGED, BaseFingerprint
from .heads import head_folder, load_assistant, load_head


def load_base(
    base_model: PreTrainedModel | str | Path | None,
    expected: BaseFingerprint | None = None,
    name_or_path: str = "",
    token: str | None = None,
    revision: str | None = None,
    target: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The base draft: a model as it is, or loaded by name; None: the one that the adapter was made for.

    Args:
        target: that a draft head is for.
        name_or_path: of the base, in PEFT's options: a folder of the machine that made the adapter, or a name.
        revision: of `name_or_path`, where nothing is expected.
    """
    if isinstance(base_model, str | Path):
        return load_model(str(base_model), None, token, target)
    if base_model is not None:
        return base_model
    if is_embedded(expected, name_or_path):
        return load_draft()
    name, revision = named_base(expected, name_or_path, revision)
    return load_model(name, revision, token, target)


def is_embedded(expected: BaseFingerprint | None, name_or_path: str) -> bool:
    return EMBEDDED in (name_or_path, "" if expected is None else expected.name)


def named_base(expected: BaseFingerprint | None, name_or_path: str, revision: str | None) -> tuple[str, str | None]:
    """Name or folder, and revision, of the base that an adapter names. Raises DraftError."""
    if expected is not None:
        revision = expected.revision
        if not os.path.isdir(name_or_path):
            name_or_path = expected.name
    if not name_or_path:
        raise DraftError("It is not known which base the adapter belongs to: pass base_model=, a model or its name.")
    return name_or_path, revision


def load_model(
    name: str, revision: str | None, token: str | None, target: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A language model, or a draft head, from a folder or from the Hub, whose own code is never run. Raises DraftError."""
    folder = head_folder(name, revision, token)
    if folder is not None or name in OF_TARGETS:
        return load_head(name, folder, target)
    try:
        place: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": False}
        folder_or_name = PACKAGED.get(name, name)
        config = AutoConfig.from_pretrained(folder_or_name, **place)
        kind = AutoModel if is_dflash(config) else auto_class(config)
        model: PreTrainedModel = kind.from_pretrained(folder_or_name, **place).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise DraftError(
                f"{brief(name)}: the model brings code of its own, and is loaded with trust_remote_code=False: an adapter names it, "
                "and may not make us run code. If you trust that code, load the model yourself with trust_remote_code=True, and "
                "give it as base_model=."
            ) from error
        raise DraftError(
            f"{brief(name)}: {why_not_loaded(error, name)} Expected an evolved draft, an adapter or "
            "a language model: a folder or a name on the Hub. The base of an adapter may be given as base_model=."
        ) from error
    return model if target is None or not lives_in_target(model) else load_assistant(model, target)


def check_base(expected: BaseFingerprint, found: BaseFingerprint, force: bool) -> None:
    """Raises ArtifactError where an adapter was made for another base, unless `force`."""
    if not force and not expected.is_same(found):
        raise ArtifactError(
            f"The adapter was made for another base.\n  made for: {expected}\n  given:    {found}\n"
            "Give the right one as base_model=, or force=True if you know that they are alike."
        )


def why_not_loaded(error: BaseException, name: str, what: str = "model") -> str:
    """Why a model could not be loaded, in one line: above all whether its name is wrong or the network is missing.

    Args:
        what: of the model, such as its tokenizer.
    """
    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError):
        return (
            "access to this model is restricted. Ask for it on its page of the Hub, then give a token: hf auth login."
        )
    if caused_by(RepositoryNotFoundError):
        return "the Hub has no model of this name, or it is private (then give a token: hf auth login)."
    if caused_by(RevisionNotFoundError):
        return "the Hub has no such revision of it."
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network: the Hub cannot be reached"
        return f"{why}, and no such model is in this machine's cache or folder. Give the folder of a model."
    if caused_by(HFValidationError):
        return "no such folder, and no name that a model on the Hub can have."
    reason = str(error).strip().partition("\n")[0]
    if caused_by(HfHubHTTPError):
        return f"the Hub refused ({reason}). A private repository needs a token: hf auth login."
    if not isinstance(error, OSError | ValueError) or isinstance(error, UnicodeError):  # its text alone may say little
        reason = f"{type(error).__name__}: {reason}"
    if "ignore_mismatched_sizes" in reason:  # a report that is not shown says more
        reason = "its weights have other shapes than its config.json says"
    where = f"the folder holds no {what} that can be loaded" if Path(name).is_dir() else "cannot be loaded"
    return f"{where} ({reason})."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
