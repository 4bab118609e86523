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
import logging
import math
import os
import shutil
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
from transformers import PreTrainedModel

from ..config import OnlineSpecConfig
from ..errors import ArtifactError, ConfigError, OnlineSpecError, brief
from ..models.identity import BaseFingerprint
from ..runtime.version import __version__
from ..state import State
from .files import checksum, exclusive, is_file, is_folder, read_bytes
from .json_files import MOST_JSON_BYTES, parse_json
from .lineage import check_lineage, check_run
from .lora_options import check_options
from .tensor_files import FLOATS, MOST_TENSOR_BYTES, TensorFile, TensorHeader, read_header

FORMAT = 1
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, STATE = "onlinespec_config.json", "onlinespec_state.safetensors"
CARD, CURVE = "README.md", "curve.png"
MODEL_CONFIG = "config.json"  # of a whole model; a draft has none
FILES = (ADAPTER_CONFIG, ADAPTER, STATE, CARD, CURVE, CONFIG)  # in the order in which they are moved
CHECKED = (ADAPTER_CONFIG, ADAPTER, STATE)  # that resuming depends on; the last may be left out
NEXT = ".onlinespec_next"  # folder in which they are written aside
MANIFEST_PART = f"{CONFIG}.part"  # the last of them, until it is written
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
MOST_WIDTH = 1 << 22  # of a layer, or tokens of a vocabulary; chosen: 16 times the largest there is
# Of all tensors of a draft with its base at hand: bytes that are taken in any case, and bytes per byte of the base's weights in
# float32. The first so that loading takes less than 1 GB, measured: 3.9 times as much. The other chosen: an adapter of four times its
# base, with moments and two earlier states.
SMALL_BYTES, MOST_TIMES_BASE = 240 << 20, 16


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """One evolved draft."""

    settings: OnlineSpecConfig
    base: BaseFingerprint
    adapter_config: dict[str, Any]  # PEFT's
    adapter: Mapping[str, Tensor]  # by PEFT's names; of one that was read, each is read when it is asked for
    state: State  # empty: none is kept, and learning begins anew from the adapter
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
            with exclusive(folder / LOCK):
                _check_places(folder)  # while no other writer makes and removes them
                self._write(folder, card, curve)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the draft could not be saved ({error}). Name another folder.") from error

    def _write(self, folder: Path, card: str, curve: bytes | None) -> None:
        settle(folder)
        aside = folder / NEXT
        _clear(aside)
        aside.mkdir()
        try:
            self._write_aside(aside, card, curve)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # half a state would only keep a full disk full
            raise
        settle(folder)

    def _write_aside(self, aside: Path, card: str, curve: bytes | None) -> None:
        (aside / ADAPTER_CONFIG).write_text(_json(self.adapter_config), encoding="utf-8")
        _save_tensors(self.adapter, aside / ADAPTER, {"format": "pt"})
        if self.has_state:
            _save_tensors(self.state.tensors, aside / STATE, {"values": json.dumps(self.state.values)})
        if card:
            (aside / CARD).write_text(card, encoding="utf-8")
        if curve is not None:
            (aside / CURVE).write_bytes(curve)
        # Complete from here on: see `settle`.
        manifest = aside / MANIFEST_PART
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
            "files": {name: _checksum_of(aside / name) for name in CHECKED if (aside / name).exists()},
        }
        return manifest | {"checksum": own_checksum(manifest)}

    @classmethod
    def read(cls, folder: str | Path) -> Artifact:
        """Reads a folder, checks everything, and changes nothing. The numbers of its tensors are not read before they are asked for.

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
        outline = Outline.of(folder, manifest)
        adapter = _checked_tensors(folder, ADAPTER, manifest)
        state = State()
        if STATE in manifest["files"]:
            tensors = _checked_tensors(folder, STATE, manifest)
            state = State(tensors, parse_json(tensors.about.get("values", "").encode(), folder / STATE))
        rest = (manifest[name] for name in ("run", "lineage", "versions"))
        return cls(outline.settings, outline.base, outline.adapter_config, adapter, state, *rest)


@dataclass(frozen=True)
class Outline:
    """What an evolved draft says about itself, checked in form: known before any tensor is read."""

    settings: OnlineSpecConfig
    base: BaseFingerprint
    adapter_config: dict[str, Any]  # PEFT's
    adapter: dict[str, TensorHeader]  # by PEFT's names
    state: dict[str, TensorHeader]  # empty: there is none
    manifest: dict[str, Any]  # what the file with the checksums holds

    @classmethod
    def read(cls, folder: str | Path) -> Outline:
        """Reads everything but the tensors. Raises ArtifactError."""
        folder = Path(folder)
        for _ in range(READS):
            manifest = _manifest_of(folder)
            try:
                return cls.of(folder, manifest)
            except ArtifactError:
                if _manifest_of(folder) == manifest:
                    raise
        raise _always_written(folder)

    @classmethod
    def of(cls, folder: Path, manifest: dict[str, Any]) -> Outline:
        """The same, from a manifest that was read before. Raises ArtifactError."""
        path = folder / ADAPTER_CONFIG
        adapter_config = parse_json(_read_checked(folder, ADAPTER_CONFIG, manifest), path)
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
        adapter, state = header_of(folder, ADAPTER), {}
        check_shapes(adapter, rank, folder / ADAPTER)
        if STATE in manifest["files"]:
            allowed = (STATE_PARTS + settings.snapshots) * sum(4 * math.prod(t.shape) for t in adapter.values())
            state = header_of(folder, STATE, allowed + STATE_REST_BYTES)
        return cls(settings, BaseFingerprint.from_dict(manifest["base"]), adapter_config, adapter, state, manifest)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in (self.adapter, self.state) for tensor in part.values())


def check_size(nbytes: int, base: PreTrainedModel) -> None:
    """Raises ArtifactError where tensors for a base take many times as much as the base itself."""
    numbers = sum(weight.numel() for weight in base.parameters())
    most = max(SMALL_BYTES, MOST_TIMES_BASE * 4 * numbers)
    if nbytes > most:
        raise ArtifactError(
            f"The tensors of the draft would take {nbytes:,} bytes, and its base has {numbers:,} numbers: expected at most {most:,} "
            "bytes. Take an earlier copy, or a draft of a lower rank."
        )


def check_shapes(adapter: Mapping[str, TensorHeader], rank: int, path: Path) -> None:
    """Raises ArtifactError where these are not the floating-point parts of a LoRA of this rank, two for every layer."""
    for name, tensor in adapter.items():
        at = next((d for part, d in RANK_DIMENSION.items() if name.endswith(part)), None)
        fits = (
            at is not None and len(tensor.shape) == 2 and tensor.shape[at] == rank and max(tensor.shape) <= MOST_WIDTH
        )
        if not fits or tensor.dtype not in FLOATS:
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
    if os.path.lexists(folder / MODEL_CONFIG) and not is_artifact(folder):
        raise ArtifactError(
            f"{folder}: a model lies there ({MODEL_CONFIG}), which transformers would load with this adapter from now on. Name another "
            "folder."
        )
    if not is_folder(folder / NEXT) and os.path.lexists(folder / NEXT):
        raise ArtifactError(f"{folder / NEXT}: a link or a file in the place of a folder of ours. Remove it.")
    for name in FILES:
        if is_folder(folder / name):
            raise ArtifactError(f"{folder / name}: a folder in the place of a file. Remove it, or name another folder.")


def settle(folder: Path) -> None:
    """Finishes what a process that was killed had begun: a complete set that lies aside is moved into place.

    What lies there and is no such set is not ours: it is put away under another name, with a warning.
    """
    if not _is_complete(folder):
        return
    aside = folder / NEXT
    try:
        keeps_state = STATE in _manifest_of(folder)["files"]
    except ArtifactError as error:
        _put_away(aside, str(error))
        return
    for name in FILES:
        if name == CONFIG and not keeps_state:
            (folder / STATE).unlink(missing_ok=True)  # of an earlier draft
        if is_file(aside / name):
            os.replace(aside / name, folder / name)
    shutil.rmtree(aside, ignore_errors=True)


def _clear(aside: Path) -> None:
    """Removes what a process that was killed had not finished; what is not ours is put away. Raises OSError."""
    if not is_folder(aside):
        return
    try:
        odd = sorted(set(os.listdir(aside)) - {*FILES, MANIFEST_PART})
        if not odd:
            shutil.rmtree(aside)
            return
        why = f"it holds {brief(odd[0])}"
    except OSError as error:  # it may not be read, or hold folders that may not be emptied
        why = str(error)
    _put_away(aside, why)


def _put_away(aside: Path, why: str) -> None:
    """Renames a folder that lies in the place of ours. Raises OSError."""
    number = 1
    while os.path.lexists(away := aside.with_name(f"{NEXT}-{number}")):
        number += 1
    aside.rename(away)
    _log.warning(
        "%s is not a draft that was being saved (%s). It is kept as %s, and saving goes on.", aside, why, away.name
    )


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
    raise _missing(folder, name)


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


def _bytes(folder: Path, name: str) -> bytes:
    for path in (_path(folder, name), folder / name):  # it may have been moved into place just now
        try:
            return read_bytes(path, MOST_JSON_BYTES)
        except FileNotFoundError:
            continue
    raise _missing(folder, name)


def _tensors(folder: Path, name: str) -> TensorFile:
    for path in (_path(folder, name), folder / name):
        try:
            return TensorFile(path)
        except FileNotFoundError:
            continue
    raise _missing(folder, name)


def _missing(folder: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{folder}: {name} is missing. Save or download the draft anew.")


def _read_checked(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A file's bytes as they were saved. Raises ArtifactError."""
    data = _bytes(folder, name)
    _check_checksum(folder / name, checksum(data), manifest["files"][name])
    return data


def _checked_tensors(folder: Path, name: str, manifest: dict[str, Any]) -> TensorFile:
    """A file of tensors as it was saved. Raises ArtifactError."""
    found = _tensors(folder, name)
    found.check_holes()
    _check_checksum(folder / name, found.checksum(), manifest["files"][name])
    return found


def _check_checksum(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(
            f"{path}: damaged or changed since it was saved: checksum {found}, expected {brief(expected)}. "
            f"Take an earlier copy; to start from a changed adapter with a new state, remove {CONFIG}."
        )


def _checksum_of(path: Path) -> str:
    """Of a file that was just written: its holes are zeros of ours, which the file system has compressed."""
    return checksum(path.read_bytes()) if path.suffix == ".json" else TensorFile(path).checksum()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ArtifactError."""
    return parse_json(_bytes(path.parent, path.name), path)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, each read when it is asked for. Raises ArtifactError."""
    return _tensors(path.parent, path.name)


def own_checksum(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, however it is laid out, without its own checksum."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(said, sort_keys=True, default=_plain).encode())


def versions() -> dict[str, str]:
    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    return {"hf_onlinespec": __version__} | {name: str(module.__version__) for name, module in packages.items()}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    if isinstance(tensors, TensorFile):
        tensors.write(path, about)
    else:
        save_file(dict(tensors), path, metadata=dict(about))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise OnlineSpecError(f"Not a JSON value in what is to be saved: {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, set | tuple):
        return sorted(value) if isinstance(value, set) else list(value)
    return str(value)
