"""What an evolved draft is on disk: an ordinary PEFT adapter, and beside it what learning needs to go on.

    adapter_config.json, adapter_model.safetensors    what serves; `PeftModel.from_pretrained` loads it
    onlinespec_config.json                            settings, base, lineage, what was measured, checksums
    onlinespec_state.safetensors                      moments, weights of experts, earlier states, counters, random state
    README.md, curve.png                              the model card and its figure

A folder is replaced as a whole: everything is written aside, the file with the checksums last, and then moved into place. A
process that is killed leaves the previous state or the new one, and at every instant an adapter that PEFT loads (unless its rank or
layers change with it). Writers wait for each other where the system has file locks; whoever reads meanwhile gets one state or the
other. Nothing is unpickled, and no file is opened whose name came from a file. A folder may hold no state: its adapter serves, and
learning begins anew.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import OnlineSpecConfig
from .errors import ArtifactError, ConfigError, OnlineSpecError, brief
from .files import (
    FLOATS,
    MOST_JSON_BYTES,
    MOST_TENSOR_BYTES,
    TensorHeader,
    exclusive,
    is_file,
    is_folder,
    parse_json,
    parse_tensors,
    read_bytes,
    read_header,
    read_tensor_file,
)
from .identity import Identity
from .lineage import check_lineage, check_run
from .lora_options import check_options
from .state import Saved

FORMAT = 1
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, STATE = "onlinespec_config.json", "onlinespec_state.safetensors"
CARD, CURVE = "README.md", "curve.png"
FILES = (ADAPTER_CONFIG, ADAPTER, STATE, CARD, CURVE, CONFIG)  # in the order in which they are moved
CHECKED = (ADAPTER_CONFIG, ADAPTER, STATE)  # that resuming depends on; the last may be left out
NEXT = ".onlinespec_next"  # folder in which they are written aside
LOCK = ".onlinespec_lock"  # file that a writer holds
KEYS = {"format", "settings", "base", "versions", "lineage", "run", "files", "checksum"}
READS = 50  # attempts, while somebody else writes
PREFIX = "base_model.model."  # of every name in PEFT's files
# PEFT's names of the parts of an adapter on one layer, and which dimension is the rank.
RANK_DIMENSION = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}
PARTS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
# Numbers of a state per number of its adapter, each of at most 4 bytes: moments, hints, centres, weights of experts; and snapshots.
STATE_PARTS = 8
STATE_REST_BYTES = 1 << 20  # what does not grow with the adapter


@dataclass(frozen=True)
class Artifact:
    """One evolved draft."""

    settings: OnlineSpecConfig
    base: Identity
    adapter_config: dict[str, Any]  # PEFT's
    adapter: dict[str, Tensor]  # by PEFT's names
    state: Saved  # empty: none is kept, and learning begins anew from the adapter
    run: dict[str, Any]  # what was measured, see `card.py`
    lineage: dict[str, Any] = field(default_factory=dict)  # where it came from
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that made it

    def write(self, folder: str | Path, card: str = "", curve: bytes | None = None) -> None:
        """Writes the folder, or replaces what an earlier `write` left there.

        Raises:
            ArtifactError: the folder cannot be written, for a full disk or missing rights; what it held is still there, and
                nothing of the new state is left behind.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_places(folder)
            with exclusive(folder / LOCK):
                self._write(folder, card, curve)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the draft could not be saved ({error}). Name another folder.") from error

    def _write(self, folder: Path, card: str, curve: bytes | None) -> None:
        settle(folder)
        aside = folder / NEXT
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            self._write_aside(aside, card, curve)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # half a state would only keep a full disk full
            raise
        settle(folder)

    def _write_aside(self, aside: Path, card: str, curve: bytes | None) -> None:
        (aside / ADAPTER_CONFIG).write_text(_json(self.adapter_config), encoding="utf-8")
        save_file(self.adapter, aside / ADAPTER, metadata={"format": "pt"})
        if self.has_state:
            save_file(self.state.tensors, aside / STATE, metadata={"values": json.dumps(self.state.values)})
        if card:
            (aside / CARD).write_text(card, encoding="utf-8")
        if curve is not None:
            (aside / CURVE).write_bytes(curve)
        # Complete from here on: see `settle`.
        manifest = aside / (CONFIG + ".part")
        text = _json(self._manifest(aside))
        parse_json(text.encode(), manifest)  # what could not be read again is not written
        if len(text.encode()) > MOST_JSON_BYTES:
            raise ArtifactError(
                f"The draft's lineage and run take {len(text.encode()):,} bytes, and {MOST_JSON_BYTES:,} can be read again. It was "
                "merged too often: begin a new draft with merge_and_export."
            )
        manifest.write_text(text, encoding="utf-8")
        manifest.replace(aside / CONFIG)

    @property
    def has_state(self) -> bool:
        """Whether learning goes on where it stopped; else it begins anew."""
        return bool(self.state.values or self.state.tensors)

    def _manifest(self, aside: Path) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "settings": self.settings.to_saved(),
            "base": asdict(self.base),
            "versions": self.versions or versions(),
            "lineage": self.lineage,
            "run": self.run,
            "files": {name: checksum((aside / name).read_bytes()) for name in CHECKED if (aside / name).exists()},
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
        raise _always_written(folder)

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Artifact:
        outline = _outline(folder, manifest, _read_checked(folder, ADAPTER_CONFIG, manifest))
        adapter, _ = parse_tensors(_read_checked(folder, ADAPTER, manifest), folder / ADAPTER)
        state = Saved()
        if STATE in manifest["files"]:
            tensors, about = parse_tensors(_read_checked(folder, STATE, manifest), folder / STATE)
            state = Saved(tensors, parse_json(about.get("values", "").encode(), folder / STATE))
        rest = (manifest[name] for name in ("run", "lineage", "versions"))
        return cls(outline.settings, outline.base, outline.adapter_config, adapter, state, *rest)


@dataclass(frozen=True)
class Outline:
    """What an evolved draft says about itself, checked in form: known before any tensor is read."""

    settings: OnlineSpecConfig
    base: Identity
    adapter_config: dict[str, Any]  # PEFT's
    adapter: dict[str, TensorHeader]  # by PEFT's names

    @classmethod
    def read(cls, folder: str | Path) -> Outline:
        """Reads everything but the tensors. Raises ArtifactError."""
        folder = Path(folder)
        for _ in range(READS):
            manifest = _manifest_of(folder)
            try:
                return _outline(folder, manifest, _read_checked(folder, ADAPTER_CONFIG, manifest))
            except ArtifactError:
                if _manifest_of(folder) == manifest:
                    raise
        raise _always_written(folder)


def _outline(folder: Path, manifest: dict[str, Any], about_adapter: bytes) -> Outline:
    path = folder / ADAPTER_CONFIG
    adapter_config = parse_json(about_adapter, path)
    try:
        settings = OnlineSpecConfig.from_saved(manifest["settings"])
    except ConfigError as error:
        raise ArtifactError(f"{folder / CONFIG}: its settings are none ({error})") from error
    check_options(adapter_config, path)
    blocks = settings.blocks
    rank, alpha = adapter_config["r"], adapter_config["lora_alpha"]
    if rank != blocks * settings.rank or not math.isclose(alpha, blocks * settings.alpha, rel_tol=1e-9):
        raise ArtifactError(
            f"{path}: r={rank}, lora_alpha={alpha}; by the settings of the draft they are {blocks * settings.rank} and "
            f"{blocks * settings.alpha}: PEFT would serve another model than we do. Take an earlier copy, or save the draft anew."
        )
    adapter = header_of(folder, ADAPTER)
    check_shapes(adapter, rank, folder / ADAPTER)
    if STATE in manifest["files"]:
        allowed = (STATE_PARTS + settings.snapshots) * sum(4 * math.prod(t.shape) for t in adapter.values())
        header_of(folder, STATE, allowed + STATE_REST_BYTES)
    return Outline(settings, Identity.from_dict(manifest["base"]), adapter_config, adapter)


def check_shapes(adapter: Mapping[str, TensorHeader], rank: int, path: Path) -> None:
    """Raises ArtifactError where these are not the floating-point parts of a LoRA of this rank, two for every layer."""
    for name, tensor in adapter.items():
        at = next((d for part, d in RANK_DIMENSION.items() if name.endswith(part)), None)
        if at is None or len(tensor.shape) != 2 or tensor.shape[at] != rank or tensor.dtype not in FLOATS:
            raise ArtifactError(
                f"{path}: {brief(name)} is {tensor.dtype} {brief(tensor.shape)}: expected a part of a LoRA of rank {rank}."
            )
    for a, b in PARTS.items():
        lone = {n.removesuffix(a) for n in adapter if n.endswith(a)} ^ {
            n.removesuffix(b) for n in adapter if n.endswith(b)
        }
        if lone:
            raise ArtifactError(f"{path}: {brief(sorted(lone)[0])} has one part of a LoRA without the other.")


def _always_written(folder: Path) -> ArtifactError:
    return ArtifactError(f"{folder}: it is written all the time. Stop the writer, or read a copy.")


def _check_places(folder: Path) -> None:
    """Refuses a folder in which something else lies in the place of a draft's files. Raises ArtifactError."""
    if not is_folder(folder / NEXT) and os.path.lexists(folder / NEXT):
        raise ArtifactError(f"{folder / NEXT}: a link or a file in the place of a folder of ours. Remove it.")
    for name in FILES:
        if is_folder(folder / name):
            raise ArtifactError(f"{folder / name}: a folder in the place of a file. Remove it, or name another folder.")


def settle(folder: Path) -> None:
    """Finishes what a process that was killed had begun: a complete set that lies aside is moved into place."""
    if not _is_complete(folder):
        return
    aside = folder / NEXT
    keeps_state = STATE in _manifest_of(folder)["files"]
    for name in FILES:
        if name == CONFIG and not keeps_state:
            (folder / STATE).unlink(missing_ok=True)  # of an earlier draft
        if is_file(aside / name):
            os.replace(aside / name, folder / name)
    shutil.rmtree(aside, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether a complete set of files lies aside. Links are none of ours, and are not followed."""
    return is_folder(folder / NEXT) and is_file(folder / NEXT / CONFIG)


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an evolved draft, or what should be one."""
    return _is_complete(folder) or os.path.lexists(folder / CONFIG)


def inspect(folder: str | Path) -> dict[str, Any]:
    """The readable part of an artifact, checked in form: settings, base, lineage, what was measured."""
    return _manifest_of(Path(folder))


def _path(folder: Path, name: str) -> Path:
    """Where a file is: aside, if a complete set lies there that was not moved to the end."""
    aside = folder / NEXT
    return aside / name if _is_complete(folder) and is_file(aside / name) else folder / name


def header_of(folder: Path, name: str, most_bytes: int = MOST_TENSOR_BYTES) -> dict[str, TensorHeader]:
    """What a safetensors file says about its tensors. Raises ArtifactError."""
    for path in (_path(folder, name), folder / name):  # it may have been moved into place just now
        try:
            return read_header(path, most_bytes)
        except FileNotFoundError:
            continue
    raise ArtifactError(f"{folder}: {name} is missing. Save or download the draft anew.")


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = _path(folder, CONFIG)
    if not is_artifact(folder):
        raise ArtifactError(f"{folder}: no {CONFIG} there. Expected a folder that save_pretrained wrote.")
    found = parse_json(_bytes(folder, CONFIG), path)
    if type(found.get("format")) is not int or found["format"] != FORMAT:
        raise ArtifactError(
            f"{path}: format {brief(found.get('format'))}; this version of hf_onlinespec reads format {FORMAT}. "
            "Install the version that wrote it (see its 'versions')."
        )
    if set(found) != KEYS:
        raise ArtifactError(
            f"{path}: missing keys {sorted(KEYS - set(found))}, unknown keys {brief(sorted(set(found) - KEYS))}."
        )
    if found["checksum"] != own_checksum(found):
        raise ArtifactError(
            f"{path}: damaged or changed since it was saved. Take an earlier copy; settings are changed by from_pretrained(config=...)."
        )
    for name in KEYS - {"format", "checksum"}:
        if not isinstance(found[name], dict):
            raise ArtifactError(f"{path}: {name} is {brief(found[name])}: expected a JSON object.")
    odd = sorted(set(found["files"]) - set(CHECKED))
    if odd:
        raise ArtifactError(f"{path}: lists files that do not belong to it: {brief(odd)}.")
    for name in CHECKED:
        if name not in found["files"] and (name != STATE or os.path.lexists(path.parent / name)):
            raise ArtifactError(
                f"{path}: {name} is not among the files that it lists. Save or download the draft anew."
            )
    for name in ("files", "versions"):
        if not all(isinstance(text, str) for text in found[name].values()):
            raise ArtifactError(f"{path}: {name} is {brief(found[name])}: expected text by name.")
    check_run(found["run"], path)
    check_lineage(found["lineage"], path)
    return found


def _bytes(folder: Path, name: str, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    for path in (_path(folder, name), folder / name):  # it may have been moved into place just now
        try:
            return read_bytes(path, most_bytes) if name.endswith(".json") else read_tensor_file(path)
        except FileNotFoundError:
            continue
    raise ArtifactError(f"{folder}: {name} is missing. Save or download the draft anew.")


def _read_checked(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A file's bytes as they were saved. Raises ArtifactError."""
    data, expected = _bytes(folder, name), manifest["files"][name]
    if checksum(data) != expected:
        raise ArtifactError(
            f"{folder / name}: damaged or changed since it was saved: checksum {checksum(data)}, expected {brief(expected)}. "
            f"Take an earlier copy; to start from a changed adapter with a new state, remove {CONFIG}."
        )
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ArtifactError."""
    return parse_json(_bytes(path.parent, path.name), path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ArtifactError."""
    return parse_tensors(_bytes(path.parent, path.name), path)[0]


def checksum(data: bytes) -> str:
    """CRC-32 in hexadecimal digits: tells damage, not forgery."""
    return f"{zlib.crc32(data):08x}"


def own_checksum(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, however it is laid out, without its own checksum."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(said, sort_keys=True, default=_plain).encode())


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
