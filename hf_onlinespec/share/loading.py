"""Where a draft comes from: a folder or a repository with an evolved draft, with a plain PEFT adapter, or a base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
)
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .._compat.hub import HUB_FAILURES
from .._compat.models import placed
from ..config import ENSEMBLE, OnlineSpecConfig, one_expert
from ..embedded import FOLDER
from ..errors import ArtifactError, ConfigError, DraftError, HubError, brief
from ..heads.base import Head
from ..models.early_exit import EarlyExit
from ..models.identity import PACKAGED, BaseFingerprint, is_own_name, public_name
from ..models.plain import plain_draft
from .artifact import Artifact, Outline
from .base_models import check_base, is_embedded, load_base, load_model, named_base, why_not_loaded
from .fit import PREFIX, check_layers, check_shapes, check_size, names_of
from .folder import ADAPTER, ADAPTER_CONFIG, CHECKED, CONFIG, header_of, is_artifact, read_json, read_tensors
from .heads import check_learned_for
from .learned_from import loaded_record
from .lineage import Lineage, Parent
from .lora_options import LoraOptions
from .named import NAMED, named_folders

# Of a repository with an evolved draft. A "*" is of one name: deeper folders are none of ours.
WANTED = [*CHECKED, CONFIG, *(f"{NAMED}/*/{name}" for name in (*CHECKED, CONFIG))]


@dataclass(frozen=True)
class Loaded:
    """What a source holds, read and checked: all that a draft is made of."""

    base: PreTrainedModel | EarlyExit
    settings: OnlineSpecConfig | None  # None: the defaults
    artifact: Artifact | None = None  # that is resumed
    adapter: Mapping[str, Tensor] | None = None  # that learning goes on from, with a new state
    lineage: Lineage = field(default_factory=Lineage)  # what is known of it besides, see `Lineage.going_on_from`
    target: PreTrainedModel | None = None  # that a head is for
    named: Mapping[str, Loaded] = field(default_factory=dict)  # adapters with names, of the same base


def load(
    source: str | Path,
    base_model: PreTrainedModel | str | Path | None,
    config: OnlineSpecConfig | None,
    revision: str | None,
    force: bool,
    token: str | None,
    target: PreTrainedModel | None = None,
) -> Loaded:
    """What `OnlineDraft.from_pretrained` makes a draft of. Nothing is made before everything is read and checked."""
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"source={source!r}: expected a folder or a name on the Hub. A loaded model goes into OnlineDraft(model)."
        )
    origin = locate(source, revision, token)
    if origin.folder is None:
        if base_model is not None:
            base = load_base(base_model, token=token, target=target)
        else:
            base = load_model(str(source), revision, token, target)
        return Loaded(base, config, target=target)
    if origin.evolved:
        return _load_evolved(origin, origin.folder, base_model, config, force, token, target)
    options = read_plain_options(origin.folder)
    settings = _as_adapter(config if config is not None else OnlineSpecConfig(), options)
    settings = replace(settings, target_modules=options.target_modules)
    base = draftable(NamedBase.of(origin).load(base_model, token, target))
    adapter = read_plain_adapter(origin.folder, settings, base)
    return Loaded(base, settings, adapter=adapter, lineage=Lineage(parent=origin.parent), target=target)


def draftable(model: PreTrainedModel | EarlyExit) -> PreTrainedModel:
    """The model to adapt. Raises DraftError; ConfigError where a target has fewer layers than its early exit."""
    if isinstance(model, EarlyExit):
        return model.cut()
    return model if isinstance(model, Head) else plain_draft(model)


def _load_evolved(
    origin: Origin,
    folder: Path,
    base_model: PreTrainedModel | str | Path | None,
    config: OnlineSpecConfig | None,
    force: bool,
    token: str | None,
    target: PreTrainedModel | None,
) -> Loaded:
    found = NamedBase.of(origin).load(base_model, token, target)
    base = draftable(found)
    loaded = replace(_load_adapter(folder, base, config, force, target), base=found)
    if origin.revision is not None:  # a folder is where it was kept, not where it came from
        loaded.lineage.parent = origin.parent
    named = {name: _load_adapter(own, base, config, force, target) for name, own in named_folders(folder).items()}
    if origin.revision is not None:
        for own in named.values():
            own.lineage.parent = origin.parent
    return replace(loaded, named=named)


def _load_adapter(
    folder: Path,
    base: PreTrainedModel,
    config: OnlineSpecConfig | None,
    force: bool,
    target: PreTrainedModel | None,
) -> Loaded:
    """An evolved adapter of this base. Raises ArtifactError."""
    outline = Outline.read(folder)
    check_base(outline.manifest.base, BaseFingerprint.of(base), force)
    if target is not None and outline.manifest.target is not None:
        check_learned_for(outline.manifest.target, target, force)
    # Only what fits may be made: the settings come from elsewhere, too.
    shapes = {name: tensor.shape for name, tensor in outline.adapter.items()}
    check_layers(shapes, outline.options.target_modules, outline.settings, base)
    check_size(outline.nbytes, base)
    artifact = Artifact.read(folder)
    settings = config if config is not None else artifact.settings
    if not artifact.has_state:
        settings = one_expert(artifact.settings) if config is None else _as_adapter(config, artifact.options)
        settings = replace(settings, target_modules=names_of(artifact.options.target_modules, base))
    lineage = replace(
        artifact.lineage,
        draft=None,
        privacy=loaded_record(artifact.lineage, artifact.options.scale, settings.alpha / settings.rank),
    )
    if artifact.has_state:
        return Loaded(base, settings, artifact=artifact, lineage=lineage, target=target)
    return Loaded(base, settings, adapter=artifact.adapter, lineage=lineage, target=target)


def load_beside(source: str | Path, target: PreTrainedModel, config: OnlineSpecConfig | None = None) -> Loaded:
    """The same by folder or name alone, on the device of the target that it is to draft for."""
    origin = locate(source)
    if origin.folder is None:
        base = load_model(str(source), None, None, target)
    else:
        found = NamedBase.of(origin).load(target=target)
        if isinstance(found, EarlyExit):
            return load(source, None, config, None, False, None, target)
        base = found
    device = target.device if target.device.type != "meta" else base.device  # "meta": its weights lie elsewhere
    return load(source, placed(base, device), config, None, False, None, target)


def is_evolved(source: str) -> bool:
    """Whether an evolved draft was saved in this folder; asks the Hub about a name that is no folder."""
    if os.path.isdir(source):
        return is_artifact(Path(source))
    try:
        hf_hub_download(source, CONFIG)
    except HUB_FAILURES:  # no such file, no network, or no name either: whoever loads it finds out, and says so
        return False
    return True


def base_of(source: str | Path, base: str | Path | None = None) -> tuple[str, str | None]:
    """Name or folder, and revision, of the model or head that a source holds, or that its adapter was made for.

    Args:
        base: the model that an adapter is used on; None: the one that it was made for.

    Raises:
        DraftError, ArtifactError, HubError: the source is not there, or damaged.
    """
    origin = locate(source)
    if origin.folder is None:
        return str(source), None
    return NamedBase.of(origin).named() if base is None else (str(base), None)


def is_early_exit(source: str | Path) -> bool:
    """Whether a source holds what the first layers of a target have learned. Raises DraftError, ArtifactError, HubError."""
    origin = locate(source)
    return origin.folder is not None and origin.evolved and NamedBase.of(origin).exit_layers is not None


@dataclass(frozen=True)
class Origin:
    """What a source turned out to hold."""

    source: str  # as it was named
    folder: Path | None  # where its files are; None: it is no adapter
    revision: str | None  # commit on the Hub

    @property
    def evolved(self) -> bool:
        return self.folder is not None and is_artifact(self.folder)

    @property
    def parent(self) -> Parent:
        """What a lineage says of it."""
        return Parent(public_name(self.source), self.revision)


@dataclass(frozen=True)
class NamedBase:
    """The model that an adapter was made for, as its folder names it."""

    expected: BaseFingerprint | None  # None: of an ordinary adapter
    name_or_path: str  # a folder of the machine that made the adapter, or a name
    revision: str | None
    exit_layers: int | None = None  # of them, the target's, so many draft; None: it is a model of its own, or a head

    @classmethod
    def of(cls, origin: Origin) -> NamedBase:
        """Of an adapter. Raises ArtifactError."""
        assert origin.folder is not None
        if origin.evolved:
            outline = Outline.read(origin.folder)
            return cls(outline.manifest.base, outline.options.base_name or "", None, outline.manifest.early_exit)
        options = read_plain_options(origin.folder)
        return cls(None, options.base_name or "", options.revision or None)

    def load(
        self,
        base_model: PreTrainedModel | str | Path | None = None,
        token: str | None = None,
        target: PreTrainedModel | None = None,
    ) -> PreTrainedModel | EarlyExit:
        """The model, or the layers of a target; arguments and errors are those of `load_base`."""
        if self.exit_layers is not None and base_model is None:
            base_model = target
        base = load_base(base_model, self.expected, self.name_or_path, token, self.revision, target)
        return base if self.exit_layers is None else EarlyExit(base, self.exit_layers)

    def named(self) -> tuple[str, str | None]:
        """Its name or folder, and its revision. Raises DraftError: it is not known."""
        return named_base(self.expected, self.name_or_path, self.revision)

    def config(self) -> PretrainedConfig | None:
        """Its configuration alone, before weights are read; None: `load` will say why there is none. Raises DraftError."""
        if is_embedded(self.expected, self.name_or_path):
            name, revision = str(FOLDER / "draft"), None
        else:
            name, revision = self.named()
        try:
            found: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):
            return None
        return found


def locate(source: str | Path, revision: str | None = None, token: str | None = None) -> Origin:
    """Finds a folder or what ships with the package, or downloads the adapter of a repository.

    Raises:
        DraftError: neither exists.
        HubError: the Hub cannot be reached, or asks for a token.
    """
    folder = PACKAGED.get(str(source), Path(source))
    if folder.is_dir() or is_own_name(str(source)):
        if revision is not None:
            raise ConfigError(f"revision={revision!r}: {source} is on this machine. Leave it out.")
        return Origin(str(source), folder if _holds_adapter(folder) else None, None)
    if folder.is_absolute() or folder.is_file():
        raise DraftError(f"{source}: no such folder. Expected one that save_pretrained wrote, or a name on the Hub.")
    try:
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=WANTED, token=token))
    except HFValidationError as error:
        raise DraftError(f"{source}: neither a folder nor a name on the Hub ({error}).") from error
    except HUB_FAILURES as error:
        raise HubError(f"{source}: not downloaded: {why_not_loaded(error, str(source))}") from error
    return Origin(str(source), found if _holds_adapter(found) else None, found.name)


def _holds_adapter(folder: Path) -> bool:
    return is_artifact(folder) or os.path.lexists(folder / ADAPTER_CONFIG)


def read_plain_options(folder: Path) -> LoraOptions:
    """The options of an ordinary LoRA adapter.

    Raises:
        ArtifactError: it is no LoRA adapter in safetensors, or has an option under which PEFT would serve another model than we do.
    """
    options = LoraOptions.from_dict(read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    if not os.path.lexists(folder / ADAPTER):
        raise ArtifactError(
            f"{folder}: no {ADAPTER}; adapters in another format are not read. Save it with safetensors."
        )
    return options


def read_plain_adapter(folder: Path, settings: OnlineSpecConfig, base: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of an ordinary LoRA adapter for this base.

    Args:
        settings: with the adapter's rank and layers.

    Raises:
        ArtifactError: they do not fit, or change more than LoRA does.
    """
    header = header_of(folder, ADAPTER)
    # Where embedding and head carry an adapter, PEFT writes their base weights beside it.
    parts = {name: tensor for name, tensor in header.items() if ".base_layer." not in name}
    check_shapes(parts, settings.rank, folder / ADAPTER)
    check_layers({name: tensor.shape for name, tensor in parts.items()}, settings.target_modules or (), settings, base)
    check_size(sum(tensor.nbytes for tensor in parts.values()), base)
    own = {f"{PREFIX}{name}": weight for name, weight in base.state_dict().items()}
    copies = {name: name.replace(".base_layer.", ".") for name in header if name not in parts}
    for name, of in copies.items():
        if of not in own or header[name].shape != own[of].shape:
            raise _not_a_copy(folder, name)
    tensors = read_tensors(folder / ADAPTER)
    for name, of in copies.items():
        if not _is_copy(tensors[name], own[of]):
            raise _not_a_copy(folder, name)
    return {name: tensors[name] for name in parts}


def _not_a_copy(folder: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{folder / ADAPTER}: {brief(name)} is not the weight of this base: the adapter changes more than LoRA does, or belongs to "
        "another base. Merge it into its base with merge_and_unload, and begin a new draft with that."
    )


def _is_copy(saved: Tensor, own: Tensor) -> bool:
    """Whether one weight is the other, perhaps in another precision.

    A copy of 8 bits is no copy, unless the base's own weight has these 8 bits: PEFT would load it over the base's.
    """
    if not (saved.is_floating_point() and own.is_floating_point()):
        return False
    lower = min(saved.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    if saved.dtype.itemsize < 2 and saved.dtype != own.dtype:
        return False
    wide = torch.float32 if lower.itemsize < 2 else lower  # not every version of torch compares numbers of 8 bits
    return torch.equal(saved.to(lower).to(wide), own.to("cpu", lower).to(wide))


def _as_adapter(settings: OnlineSpecConfig, options: LoraOptions) -> OnlineSpecConfig:
    """Settings with the size of an adapter that begins anew. Raises ConfigError."""
    if settings.learner == ENSEMBLE:
        raise ConfigError(
            "learner='ensemble': an ordinary adapter holds one expert. Use another learner to go on with it."
        )
    return replace(settings, rank=options.rank, alpha=options.alpha)
