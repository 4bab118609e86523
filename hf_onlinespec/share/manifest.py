"""The manifest of a saved draft, onlinespec_config.json: what it is and what it measured, and the checksums of its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ArtifactError, OnlineSpecError, brief
from ..models.identity import BaseFingerprint
from .files import checksum
from .folder import ADAPTER, ADAPTER_CONFIG, CHECKED, CONFIG, STATE, is_artifact, path_of, read_file
from .head_facts import HeadFacts
from .history import ServingHistory
from .json_files import MOST_JSON_BYTES, parse_json
from .lineage import Lineage

FORMAT = 1
KEYS = {"format", "settings", "base", "versions", "lineage", "run", "files", "checksum"}
OPTIONAL = {"target", "head", "early_exit"}  # the first two in the manifest of a head alone


@dataclass(frozen=True)
class Manifest:
    """What the file says, checked in form."""

    settings: dict[str, object]  # of the draft, see `OnlineSpecConfig.to_saved`; checked by whoever makes them
    base: BaseFingerprint
    versions: dict[str, str]  # of the packages that saved it
    lineage: Lineage
    serving: ServingHistory
    files: dict[str, str]  # their checksums
    target: BaseFingerprint | None = None  # that a head has learned for; None: it is no head, or has served none yet
    head: HeadFacts | None = None  # None: it is no head
    early_exit: int | None = None  # first layers of the base, the target itself, that draft; None: all of them

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Of a saved draft. Raises ArtifactError."""
        folder = Path(folder)
        path = path_of(folder, CONFIG)
        if not is_artifact(folder):
            raise ArtifactError(f"{folder}: no {CONFIG} there. Expected a folder that save_pretrained wrote.")
        found = cls.parse(read_file(folder, CONFIG), path)
        missing = [name for name in (ADAPTER_CONFIG, ADAPTER) if name not in found.files]
        if STATE not in found.files and os.path.lexists(path.parent / STATE):
            missing.append(STATE)
        if missing:
            raise ArtifactError(
                f"{path}: {missing[0]} is not among the files that it lists. Save or download the draft anew."
            )
        return found

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Manifest:
        """From the file's bytes. Raises ArtifactError."""
        found = parse_json(data, path)
        if type(found.get("format")) is not int or found["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: format {brief(found.get('format'))}; this version of hf_onlinespec reads format {FORMAT}. "
                "Install the version that wrote it (see its 'versions')."
            )
        if set(found) - OPTIONAL != KEYS:
            unknown = sorted(set(found) - KEYS - OPTIONAL)
            raise ArtifactError(f"{path}: missing keys {sorted(KEYS - set(found))}, unknown keys {brief(unknown)}.")
        if found["checksum"] != own_checksum(found):
            raise ArtifactError(
                f"{path}: damaged or changed since it was saved. Take an earlier copy; settings are changed by from_pretrained(config=...)."
            )
        files = _texts(found, "files", path)
        odd = sorted(set(files) - set(CHECKED))
        if odd:
            raise ArtifactError(f"{path}: lists files that do not belong to it: {brief(odd)}.")
        exit_layers = found.get("early_exit")
        if exit_layers is not None and (type(exit_layers) is not int or exit_layers < 1):
            raise ArtifactError(f"{path}: early_exit is {brief(exit_layers)}: expected a number of layers.")
        settings = found["settings"]
        if not isinstance(settings, dict):
            raise ArtifactError(f"{path}: settings is {brief(settings)}: expected a JSON object.")
        return cls(
            settings=settings,
            base=BaseFingerprint.from_dict(found["base"]),
            versions=_texts(found, "versions", path),
            lineage=Lineage.from_dict(found["lineage"], f"{path}: lineage"),
            serving=ServingHistory.from_dict(found["run"], f"{path}: run"),
            files=files,
            target=BaseFingerprint.from_dict(found["target"]) if "target" in found else None,
            head=HeadFacts.from_dict(found["head"]) if "head" in found else None,
            early_exit=exit_layers,
        )

    def dump(self, path: Path) -> bytes:
        """The file's bytes, which `parse` is sure to read; `path` for the error. Raises ArtifactError."""
        manifest = {
            "format": FORMAT,
            "settings": self.settings,
            "base": asdict(self.base),
            "versions": self.versions,
            "lineage": self.lineage.to_dict(),
            "run": self.serving.to_dict(),
            "files": self.files,
        }
        if self.target is not None:
            manifest["target"] = asdict(self.target)
        if self.head is not None:
            manifest["head"] = self.head.to_dict()
        if self.early_exit is not None:
            manifest["early_exit"] = self.early_exit
        data = to_json(manifest | {"checksum": own_checksum(manifest)}).encode()
        self.parse(data, path)  # what could not be read again is not written
        if len(data) > MOST_JSON_BYTES:
            raise ArtifactError(
                f"The draft's lineage and run take {len(data):,} bytes, and {MOST_JSON_BYTES:,} can be read again. It was "
                "merged too often: begin a new draft with merge_and_export."
            )
        return data


def _texts(manifest: Mapping[str, object], name: str, path: Path) -> dict[str, str]:
    found = manifest[name]
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ArtifactError(f"{path}: {name} is {brief(found)}: expected text by name.")
    return found


def own_checksum(manifest: Mapping[str, object]) -> str:
    """Of what a manifest says, however it is laid out, without its own checksum."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, default=_json_value).encode())


def to_json(value: object) -> str:
    """As it is written to a file. Raises OnlineSpecError for what JSON has no value for."""
    try:
        return json.dumps(value, indent=2, allow_nan=False, default=_json_value) + "\n"
    except ValueError as error:
        raise OnlineSpecError(f"Not a JSON value in what is to be saved: {error}.") from error


def _json_value(value: object) -> object:
    """Of what PEFT's options hold, beside JSON's own values."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else str(value)
