"""What an evolved draft is on disk: an ordinary PEFT adapter, and beside it what learning needs to go on.

    adapter_config.json, adapter_model.safetensors    what serves; `PeftModel.from_pretrained` loads it
    onlinespec_config.json                            settings, base, lineage, what was measured, checksums
    onlinespec_state.safetensors                      moments, weights of experts, earlier states, counters, random state
    README.md, curve.png                              the model card and its figure

A folder is replaced as a whole (`replacing.py`): a process that is killed leaves the previous state or the new one, and at every
instant an adapter that PEFT loads (unless its rank or layers change with it). Writers wait for each other where the system has
file locks; whoever reads meanwhile gets one state or the other. Nothing is unpickled, and no file is opened whose name came from a
file. A folder may hold no state: its adapter serves, and learning begins anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import OnlineSpecConfig
from ..errors import ArtifactError, ConfigError, brief
from ..models.identity import BaseFingerprint
from ..state import State
from .files import checksum
from .fit import check_shapes
from .folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    CARD,
    CHECKED,
    CONFIG,
    CURVE,
    MANIFEST_PART,
    STATE,
    header_of,
    open_tensors,
    read_file,
)
from .head_facts import HeadFacts
from .history import ServingHistory
from .json_files import parse_json
from .lineage import Lineage
from .lora_options import LoraOptions
from .manifest import Manifest, to_json
from .provenance import versions
from .replacing import replacing
from .tensor_files import TensorFile, TensorHeader

Read = TypeVar("Read")
READ_ATTEMPTS = 50  # while somebody else writes
# Numbers of a state per number of its adapter, each of at most 4 bytes: moments, hints, centres, weights of experts; and snapshots.
STATE_PARTS = 8
STATE_REST_BYTES = 1 << 20  # what does not grow with the adapter


@dataclass(frozen=True)
class Artifact:
    """One evolved draft."""

    settings: OnlineSpecConfig
    base: BaseFingerprint
    options: LoraOptions  # PEFT's
    adapter: Mapping[str, Tensor]  # by PEFT's names; of one that was read, each is read when it is asked for
    state: State  # empty: none is kept, and learning begins anew from the adapter
    serving: ServingHistory  # what was measured
    lineage: Lineage = field(default_factory=Lineage)  # where it came from
    versions: dict[str, str] = field(default_factory=versions)  # of the packages that made it
    target: BaseFingerprint | None = None  # that a head has learned for; None: it is no head, or has served none yet
    head: HeadFacts | None = None  # None: it is no head
    early_exit: int | None = None  # first layers of the base, the target itself, that draft; None: all of them

    def write(self, folder: str | Path, card: str = "", curve: bytes | None = None) -> None:
        """Writes the folder, or replaces what an earlier `write` left there.

        Raises:
            ArtifactError: the folder cannot be written, for a full disk or missing rights; what it held is still there, and
                nothing of the new state is left behind.
        """
        folder = Path(folder)
        try:
            with replacing(folder) as staging:
                self._write_files(staging, card, curve)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the draft could not be saved ({error}). Name another folder.") from error

    def _write_files(self, folder: Path, card: str, curve: bytes | None) -> None:
        (folder / ADAPTER_CONFIG).write_text(to_json(self.options.to_dict()), encoding="utf-8")
        _save_tensors(self.adapter, folder / ADAPTER, {"format": "pt"})
        if self.has_state:
            _save_tensors(self.state.tensors, folder / STATE, {"values": json.dumps(self.state.values)})
        if card:
            (folder / CARD).write_text(card, encoding="utf-8")
        if curve is not None:
            (folder / CURVE).write_bytes(curve)
        files = {name: _checksum_of(folder / name) for name in CHECKED if (folder / name).exists()}
        manifest = Manifest(
            self.settings.to_saved(),
            self.base,
            self.versions,
            self.lineage,
            self.serving,
            files,
            self.target,
            self.head,
            self.early_exit,
        )
        # The set is complete from here on, see `finish_interrupted_write`.
        part = folder / MANIFEST_PART
        part.write_bytes(manifest.dump(part))
        part.replace(folder / CONFIG)

    @property
    def has_state(self) -> bool:
        """Whether learning goes on where it stopped; else it begins anew."""
        return bool(self.state.values or self.state.tensors)

    @classmethod
    def read(cls, folder: str | Path) -> Artifact:
        """Reads a folder, checks everything, and changes nothing. The numbers of its tensors are not read before they are asked for.

        Raises:
            ArtifactError: a file is missing, damaged, or of a format that this version does not read.
        """
        return _undisturbed(Path(folder), cls._of)

    @classmethod
    def _of(cls, folder: Path, manifest: Manifest) -> Artifact:
        outline = Outline.of(folder, manifest)
        adapter = _checked_tensors(folder, ADAPTER, manifest)
        state = State()
        if STATE in manifest.files:
            tensors = _checked_tensors(folder, STATE, manifest)
            state = State(tensors, parse_json(tensors.about.get("values", "").encode(), folder / STATE))
        return cls(
            outline.settings,
            manifest.base,
            outline.options,
            adapter,
            state,
            manifest.serving,
            manifest.lineage,
            manifest.versions,
            manifest.target,
            manifest.head,
            manifest.early_exit,
        )


@dataclass(frozen=True)
class Outline:
    """What an evolved draft says about itself, checked in form: known before any tensor is read."""

    manifest: Manifest
    settings: OnlineSpecConfig
    options: LoraOptions  # PEFT's
    adapter: dict[str, TensorHeader]  # by PEFT's names
    state: dict[str, TensorHeader]  # empty: there is none

    @classmethod
    def read(cls, folder: str | Path) -> Outline:
        """Reads everything but the tensors. Raises ArtifactError."""
        return _undisturbed(Path(folder), cls.of)

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> Outline:
        """The same, from a manifest that was read before. Raises ArtifactError."""
        path = folder / ADAPTER_CONFIG
        data = read_file(folder, ADAPTER_CONFIG)
        _check_checksum(path, checksum(data), manifest.files[ADAPTER_CONFIG])
        try:
            settings = OnlineSpecConfig.from_saved(manifest.settings)
        except ConfigError as error:
            raise ArtifactError(f"{folder / CONFIG}: its settings are none ({error})") from error
        options = LoraOptions.from_dict(parse_json(data, path), path)
        blocks = settings.blocks
        if options.rank != blocks * settings.rank or not math.isclose(
            options.alpha, blocks * settings.alpha, rel_tol=1e-9
        ):
            raise ArtifactError(
                f"{path}: r={options.rank}, lora_alpha={options.alpha}; by the settings of the draft they are {blocks * settings.rank} and "
                f"{blocks * settings.alpha}: PEFT would serve another model than we do. Take an earlier copy, or save the draft anew."
            )
        adapter, state = header_of(folder, ADAPTER), {}
        check_shapes(adapter, options.rank, folder / ADAPTER)
        if STATE in manifest.files:
            allowed = (STATE_PARTS + settings.snapshots) * sum(4 * math.prod(t.shape) for t in adapter.values())
            state = header_of(folder, STATE, allowed + STATE_REST_BYTES)
        return cls(manifest, settings, options, adapter, state)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in (self.adapter, self.state) for tensor in part.values())


def _undisturbed(folder: Path, read: Callable[[Path, Manifest], Read]) -> Read:
    """What `read` makes of a folder's files, all of one state: again where somebody has saved meanwhile. Raises ArtifactError."""
    for _ in range(READ_ATTEMPTS):
        manifest = Manifest.read(folder)
        try:
            return read(folder, manifest)
        except ArtifactError:
            if Manifest.read(folder) == manifest:
                raise
            # What was read belongs to two states.
    raise ArtifactError(f"{folder}: it is written all the time. Stop the writer, or read a copy.")


def _checked_tensors(folder: Path, name: str, manifest: Manifest) -> TensorFile:
    """A file of tensors as it was saved. Raises ArtifactError."""
    found = open_tensors(folder, name)
    found.check_holes()
    _check_checksum(folder / name, found.checksum(), manifest.files[name])
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


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    if isinstance(tensors, TensorFile):
        tensors.write(path, about)
    else:
        save_file(dict(tensors), path, metadata=dict(about))
