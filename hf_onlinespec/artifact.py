"""What an evolved draft is on disk: an ordinary PEFT adapter, and beside it what learning needs to go on.

    adapter_config.json, adapter_model.safetensors    what serves; `PeftModel.from_pretrained` loads it
    onlinespec_config.json                            settings, base, lineage, what was measured, checksums
    onlinespec_state.safetensors                      moments, weights of experts, earlier states, counters, random state
    README.md, curve.png                              the model card and its figure

A folder is replaced as a whole: everything is written aside, the file with the checksums last, and then moved into place. A
process that is killed leaves the previous state or the new one, and at every instant an adapter that PEFT loads (unless its rank or
layers change with it). Writers wait for each other where the system has file locks; whoever reads meanwhile gets one state or the
other. Nothing is unpickled, and no file is opened whose name came from a file.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .config import OnlineSpecConfig
from .errors import ArtifactError, OnlineSpecError
from .identity import Identity
from .state import Saved

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, STATE = "onlinespec_config.json", "onlinespec_state.safetensors"
CARD, CURVE = "README.md", "curve.png"
FILES = (ADAPTER_CONFIG, ADAPTER, STATE, CARD, CURVE, CONFIG)  # in the order in which they are moved
CHECKED = (ADAPTER_CONFIG, ADAPTER, STATE)  # that resuming depends on
NEXT = ".onlinespec_next"  # folder in which they are written aside
LOCK = ".onlinespec_lock"  # file that a writer holds
KEYS = {"format", "settings", "base", "versions", "lineage", "run", "files", "checksum"}
READS = 50  # attempts, while somebody else writes


@dataclass(frozen=True)
class Artifact:
    """One evolved draft."""

    settings: OnlineSpecConfig
    base: Identity
    adapter_config: dict[str, Any]  # PEFT's
    adapter: dict[str, Tensor]  # by PEFT's names
    state: Saved
    run: dict[str, Any]  # what was measured, see `card.py`
    lineage: dict[str, Any] = field(default_factory=dict)  # where it came from
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that made it

    def write(self, folder: str | Path, card: str = "", curve: bytes | None = None) -> None:
        """Writes the folder, or replaces what an earlier `write` left there.

        Raises:
            ArtifactError: the folder cannot be written, for a full disk or missing rights; what it held is still there.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / LOCK):
                self._write(folder, card, curve)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the draft could not be saved ({error}). Name another folder.") from error

    def _write(self, folder: Path, card: str, curve: bytes | None) -> None:
        settle(folder)
        aside = folder / NEXT
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        (aside / ADAPTER_CONFIG).write_text(_json(self.adapter_config), encoding="utf-8")
        save_file(self.adapter, aside / ADAPTER, metadata={"format": "pt"})
        save_file(self.state.tensors, aside / STATE, metadata={"values": json.dumps(self.state.values)})
        if card:
            (aside / CARD).write_text(card, encoding="utf-8")
        if curve is not None:
            (aside / CURVE).write_bytes(curve)
        # Complete from here on: see `settle`.
        manifest = aside / (CONFIG + ".part")
        manifest.write_text(_json(self._manifest(aside)), encoding="utf-8")
        manifest.replace(aside / CONFIG)
        settle(folder)

    def _manifest(self, aside: Path) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "base": asdict(self.base),
            "versions": self.versions or versions(),
            "lineage": self.lineage,
            "run": self.run,
            "files": {name: checksum((aside / name).read_bytes()) for name in CHECKED},
        }
        return manifest | {"checksum": own_checksum(manifest)}

    @classmethod
    def read(cls, folder: str | Path) -> Artifact:
        """Reads a folder, checks everything, and changes nothing.

        Raises:
            ArtifactError: a file is missing, damaged, or of a format that this version does not read.
        """
        folder = Path(folder)
        for _ in range(READS):
            manifest = _manifest_of(folder)
            try:
                return cls._read(folder, manifest)
            except ArtifactError:
                if _manifest_of(folder) == manifest:
                    raise
                # Somebody has saved meanwhile: what was read belongs to two states.
        raise ArtifactError(f"{folder}: it is written all the time. Stop the writer, or read a copy.")

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Artifact:
        odd = sorted(set(manifest["files"]) - set(CHECKED))
        if odd:
            raise ArtifactError(f"{folder / CONFIG}: lists files that do not belong to it: {odd}.")
        data = {}
        for name in CHECKED:
            data[name] = _bytes(folder, name)
            if checksum(data[name]) != manifest["files"].get(name):
                raise ArtifactError(
                    f"{folder / name}: damaged or changed since it was saved: checksum {checksum(data[name])}, expected "
                    f"{manifest['files'].get(name)}. Take an earlier copy; to start from a changed adapter with a new state, "
                    f"remove {CONFIG}."
                )
        adapter_config = parse_json(data[ADAPTER_CONFIG], folder / ADAPTER_CONFIG)
        rank, alpha = adapter_config.get("r"), adapter_config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ArtifactError(
                f"{folder / ADAPTER_CONFIG}: r={rank!r}, lora_alpha={alpha!r}: expected the size of a LoRA."
            )
        adapter, _ = parse_tensors(data[ADAPTER], folder / ADAPTER)
        tensors, about = parse_tensors(data[STATE], folder / STATE)
        try:
            values = json.loads(about["values"])
            settings = OnlineSpecConfig.from_dict(manifest["settings"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{folder}: its state or its settings cannot be read ({error}).") from error
        if not isinstance(values, dict):
            raise ArtifactError(f"{folder}: its state holds {values!r}: expected a JSON object.")
        base = Identity.from_dict(manifest["base"])
        state = Saved(tensors, values)
        rest = (manifest[name] for name in ("run", "lineage", "versions"))
        return cls(settings, base, adapter_config, adapter, state, *rest)


def settle(folder: Path) -> None:
    """Finishes what a process that was killed had begun: a complete set that lies aside is moved into place."""
    aside = folder / NEXT
    if not (aside / CONFIG).is_file():
        return
    for name in FILES:
        if (aside / name).is_file():
            os.replace(aside / name, folder / name)
    shutil.rmtree(aside, ignore_errors=True)


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an evolved draft."""
    return (folder / NEXT / CONFIG).is_file() or (folder / CONFIG).is_file()


def inspect(folder: str | Path) -> dict[str, Any]:
    """The readable part of an artifact, checked in form: settings, base, lineage, what was measured."""
    return _manifest_of(Path(folder))


def _path(folder: Path, name: str) -> Path:
    """Where a file is: aside, if a complete set lies there that was not moved to the end."""
    aside = folder / NEXT
    return aside / name if (aside / CONFIG).is_file() and (aside / name).is_file() else folder / name


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = _path(folder, CONFIG)
    if not is_artifact(folder):
        raise ArtifactError(f"{folder}: no {CONFIG} there. Expected a folder that save_pretrained wrote.")
    found = parse_json(_bytes(folder, CONFIG), path)
    if found.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: format {found.get('format')!r}; this version of hf_onlinespec reads format {FORMAT}. "
            "Install the version that wrote it (see its 'versions')."
        )
    if set(found) != KEYS:
        raise ArtifactError(
            f"{path}: missing keys {sorted(KEYS - set(found))}, unknown keys {sorted(set(found) - KEYS)}."
        )
    if found["checksum"] != own_checksum(found):
        raise ArtifactError(
            f"{path}: damaged or changed since it was saved. Take an earlier copy; settings are changed by from_pretrained(config=...)."
        )
    for name in KEYS - {"format", "checksum"}:
        if not isinstance(found[name], dict):
            raise ArtifactError(f"{path}: {name} is {found[name]!r}: expected a JSON object.")
    return found


def _bytes(folder: Path, name: str) -> bytes:
    for path in (_path(folder, name), folder / name):  # it may have been moved into place just now
        try:
            return path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error}).") from error
    raise ArtifactError(f"{folder}: {name} is missing. Save or download the draft anew.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ArtifactError."""
    return parse_json(_bytes(path.parent, path.name), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from a file's bytes. Raises ArtifactError."""
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: expected a JSON object.")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ArtifactError."""
    return parse_tensors(_bytes(path.parent, path.name), path)[0]


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text from a safetensors file's bytes. Raises ArtifactError; a file of another kind is never unpickled."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except (SafetensorError, ValueError, RuntimeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a sound safetensors file ({error}).") from error


def checksum(data: bytes) -> str:
    """CRC-32 in hexadecimal digits: tells damage, not forgery."""
    return f"{zlib.crc32(data):08x}"


def own_checksum(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, however it is laid out, without its own checksum."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(said, sort_keys=True, default=_plain).encode())


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a file's lock, where the system has such locks; it ends with the process."""
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def versions() -> dict[str, str]:
    from . import __version__

    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    return {"hf_onlinespec": __version__} | {name: str(module.__version__) for name, module in packages.items()}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise OnlineSpecError(f"Not a JSON value in what is to be saved: {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, set | tuple):
        return sorted(value) if isinstance(value, set) else list(value)
    return str(value)
