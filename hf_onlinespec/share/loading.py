"""Where a draft comes from: a folder or a repository with an evolved draft, with a plain PEFT adapter, or a base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
)
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat.hub import HUB_FAILURES
from .._compat.models import placed
from ..config import ENSEMBLE, OnlineSpecConfig, one_expert
from ..embedded import FOLDER
from ..errors import ArtifactError, ConfigError, DraftError, HubError, brief
from ..models.borrow import borrow
from ..models.identity import BaseFingerprint, public_name
from ..models.layers import adaptable_layers, adapted_layers
from ..models.plain import plain_draft
from .artifact import (
    ADAPTER,
    ADAPTER_CONFIG,
    CHECKED,
    CONFIG,
    PREFIX,
    Artifact,
    Outline,
    check_shapes,
    check_size,
    header_of,
    is_artifact,
    read_json,
    read_tensors,
)
from .base_models import check_base, is_embedded, load_base, load_model, named_base, why_not_loaded
from .learned_from import KEY, loaded_history
from .lora_options import check_options
from .tensor_files import TensorHeader

BASE = "base_model_name_or_path"  # in PEFT's options


@dataclass(frozen=True)
class Loaded:
    """What a source holds, read and checked: all that a draft is made of."""

    base: PreTrainedModel
    settings: OnlineSpecConfig | None  # None: the defaults
    artifact: Artifact | None = None  # that is resumed
    adapter: Mapping[str, Tensor] | None = None  # that learning goes on from, with a new state
    lineage: dict[str, Any] = field(default_factory=dict)


def load(
    source: str | Path,
    base_model: PreTrainedModel | str | Path | None,
    config: OnlineSpecConfig | None,
    revision: str | None,
    force: bool,
    token: str | None,
) -> Loaded:
    """What `OnlineDraft.from_pretrained` makes a draft of. Nothing is made before everything is read and checked."""
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"source={source!r}: expected a folder or a name on the Hub. A loaded model goes into OnlineDraft(model)."
        )
    origin = locate(source, revision, token)
    if origin.evolved:
        assert origin.folder is not None
        outline = Outline.read(origin.folder)
        base = plain_draft(NamedBase.of(origin).load(base_model, token))
        check_base(outline.base, BaseFingerprint.of(base), force)
        # Only what fits may be made: the settings come from elsewhere, too.
        check_layers(_shapes(outline.adapter), outline.adapter_config["target_modules"], outline.settings, base)
        check_size(outline.nbytes, base)
        artifact = Artifact.read(origin.folder)
        settings = config if config is not None else artifact.settings
        if not artifact.has_state:
            settings = one_expert(artifact.settings) if config is None else _as_adapter(config, artifact.adapter_config)
            settings = replace(settings, target_modules=names_of(artifact.adapter_config["target_modules"], base))
        about = artifact.adapter_config
        scales = about["lora_alpha"] / about["r"], settings.alpha / settings.rank
        lineage = {name: value for name, value in artifact.lineage.items() if name != "draft"}
        lineage[KEY] = loaded_history(artifact.lineage, *scales)
        if origin.revision is not None:  # a folder is where it was kept, not where it came from
            lineage |= origin.lineage()
        if artifact.has_state:
            return Loaded(base, settings, artifact=artifact, lineage=lineage)
        return Loaded(base, settings, adapter=artifact.adapter, lineage=lineage)
    if origin.folder is not None:
        about = read_plain_options(origin.folder)
        settings = _as_adapter(config if config is not None else OnlineSpecConfig(), about)
        settings = replace(settings, target_modules=tuple(about["target_modules"]))
        base = plain_draft(NamedBase.of(origin).load(base_model, token))
        adapter = read_plain_adapter(origin.folder, settings, base)
        return Loaded(base, settings, adapter=adapter, lineage=origin.lineage())
    base = load_base(base_model) if base_model is not None else load_model(str(source), revision, token)
    return Loaded(base, config)


def load_beside(source: str | Path, target: PreTrainedModel, config: OnlineSpecConfig | None = None) -> Loaded:
    """The same by folder or name alone, on the device of the target that it is to draft for."""
    origin = locate(source)
    base = load_model(str(source), None, None) if origin.folder is None else NamedBase.of(origin).load()
    device = target.device if target.device.type != "meta" else base.device  # "meta": its weights lie elsewhere
    return load(source, placed(base, device), config, None, False, None)


def is_evolved(source: str) -> bool:
    """Whether an evolved draft was saved in this folder; asks the Hub about a name that is no folder."""
    if os.path.isdir(source):
        return is_artifact(Path(source))
    try:
        hf_hub_download(source, CONFIG)
    except HUB_FAILURES:  # no such file, no network, or no name either: whoever loads it finds out, and says so
        return False
    return True


@dataclass(frozen=True)
class Origin:
    """What a source turned out to hold."""

    source: str  # as it was named
    folder: Path | None  # where its files are; None: it is no adapter
    revision: str | None  # commit on the Hub

    @property
    def evolved(self) -> bool:
        return self.folder is not None and is_artifact(self.folder)

    def lineage(self) -> dict[str, Any]:
        """What the card says about where a draft came from."""
        return {"parent": {"source": public_name(self.source), "revision": self.revision}}


@dataclass(frozen=True)
class NamedBase:
    """The model that an adapter was made for, as its folder names it."""

    expected: BaseFingerprint | None  # None: of an ordinary adapter
    lies_at: str  # a folder of the machine that made it, or a name
    revision: str | None

    @classmethod
    def of(cls, origin: Origin) -> NamedBase:
        """Of an adapter. Raises ArtifactError."""
        assert origin.folder is not None
        if origin.evolved:
            outline = Outline.read(origin.folder)
            return cls(outline.base, str(outline.adapter_config.get(BASE) or ""), None)
        about = read_plain_options(origin.folder)
        return cls(None, str(about.get(BASE) or ""), str(about.get("revision") or "") or None)

    def load(self, base_model: PreTrainedModel | str | Path | None = None, token: str | None = None) -> PreTrainedModel:
        """The model; arguments and errors are those of `load_base`."""
        return load_base(base_model, self.expected, self.lies_at, token, self.revision)

    def config(self) -> PretrainedConfig | None:
        """Its configuration alone, before weights are read; None: `load` will say why there is none. Raises DraftError."""
        if is_embedded(self.expected, self.lies_at):
            name, revision = str(FOLDER / "draft"), None
        else:
            name, revision = named_base(self.expected, self.lies_at, self.revision)
        try:
            found: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):
            return None
        return found


def locate(source: str | Path, revision: str | None = None, token: str | None = None) -> Origin:
    """Finds a folder, or downloads the adapter of a repository.

    Raises:
        DraftError: neither exists.
        HubError: the Hub cannot be reached, or asks for a token.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r}: {source} is a folder of this machine. Leave it out.")
        return Origin(str(source), folder if _holds_adapter(folder) else None, None)
    if folder.is_absolute() or folder.is_file():
        raise DraftError(f"{source}: no such folder. Expected one that save_pretrained wrote, or a name on the Hub.")
    try:
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=[*CHECKED, CONFIG], token=token))
    except HFValidationError as error:
        raise DraftError(f"{source}: neither a folder nor a name on the Hub ({error}).") from error
    except HUB_FAILURES as error:
        raise HubError(f"{source}: not downloaded: {why_not_loaded(error, str(source))}") from error
    return Origin(str(source), found if _holds_adapter(found) else None, found.name)


def _holds_adapter(folder: Path) -> bool:
    return is_artifact(folder) or os.path.lexists(folder / ADAPTER_CONFIG)


def read_plain_options(folder: Path) -> dict[str, Any]:
    """The options of an ordinary LoRA adapter.

    Raises:
        ArtifactError: it is no LoRA adapter in safetensors, or has an option under which PEFT would serve another model than we do.
    """
    about = read_json(folder / ADAPTER_CONFIG)
    check_options(about, folder / ADAPTER_CONFIG)
    if not os.path.lexists(folder / ADAPTER):
        raise ArtifactError(
            f"{folder}: no {ADAPTER}; adapters in another format are not read. Save it with safetensors."
        )
    return about


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
    check_layers(_shapes(parts), settings.target_modules or (), settings, base)
    check_size(sum(tensor.nbytes for tensor in parts.values()), base)
    own = {f"{PREFIX}{name}": weight for name, weight in base.state_dict().items()}
    beside = {name: name.replace(".base_layer.", ".") for name in header if name not in parts}
    for name, of in beside.items():
        if of not in own or header[name].shape != own[of].shape:
            raise _other_weights(folder, name)
    tensors = read_tensors(folder / ADAPTER)
    for name, of in beside.items():
        if not _are_alike(tensors[name], own[of]):
            raise _other_weights(folder, name)
    return {name: tensors[name] for name in parts}


def _other_weights(folder: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{folder / ADAPTER}: {brief(name)} is not the weight of this base: the adapter changes more than LoRA does, or belongs to "
        "another base. Merge it into its base with merge_and_unload, and begin a new draft with that."
    )


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether a copy of a weight, and the base's own, are one, perhaps in two precisions.

    A copy of 8 bits is another weight, which PEFT would load over the base's, unless the base's own has just these 8 bits.
    """
    if not (one.is_floating_point() and other.is_floating_point()):
        return False
    lower = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    if one.dtype.itemsize < 2 and one.dtype != other.dtype:
        return False
    wide = torch.float32 if lower.itemsize < 2 else lower  # not every version of torch compares numbers of 8 bits
    return torch.equal(one.to(lower).to(wide), other.to("cpu", lower).to(wide))


def check_layers(
    shapes: Mapping[str, Sequence[int]],
    target_modules: Sequence[str],
    settings: OnlineSpecConfig,
    base: PreTrainedModel,
) -> None:
    """Raises ArtifactError unless an adapter has its two parts, of the right width, on just the layers that PEFT and we adapt.

    Args:
        shapes: of the adapter's parts, by PEFT's names.
        target_modules: the layers by PEFT's options; those of `settings` are ours.
    """
    modules = dict(base.named_modules())
    ours, _ = adapted_layers(borrow(base), settings.target_modules, settings.blocks)
    wanted: dict[str, tuple[str, int, int | None]] = {}  # part: layer, dimension, width
    for layer in ours:
        widths = _widths(modules[layer])
        kind = "lora_embedding_{}" if isinstance(modules[layer], nn.Embedding) else "lora_{}.weight"
        for part, dimension, width in zip("AB", (1, 0), widths, strict=True):
            wanted[f"{PREFIX}{layer}.{kind.format(part)}"] = (layer, dimension, width)
    odd = sorted(set(wanted) ^ set(shapes))
    if odd:
        raise ArtifactError(
            f"The adapter and this base with these settings do not fit: {len(odd)} tensors differ, {brief(odd[0])} for one."
        )
    if sorted(matching(modules, target_modules)) != sorted(ours):
        raise ArtifactError(
            f"{ADAPTER_CONFIG} has target_modules={brief(list(target_modules))}: PEFT would adapt other layers of this base than "
            f"{ADAPTER} holds, and serve another model than we do. Take an earlier copy, or save the draft anew."
        )
    for name, (layer, dimension, width) in wanted.items():
        if width is not None and shapes[name][dimension] != width:
            raise ArtifactError(
                f"The adapter has for {brief(name)}: {tuple(shapes[name])}, expected {width} in dimension {dimension}, as {layer} of "
                "this base. It belongs to another base."
            )


def names_of(layers: Sequence[str], base: PreTrainedModel) -> tuple[str, ...] | None:
    """The layers of a base as the setting `target_modules` names them: None where they are those that it adapts by default."""
    return None if set(layers) == set(adaptable_layers(base)) else tuple(sorted(layers))


def matching(modules: Mapping[str, nn.Module], names: Sequence[str]) -> list[str]:
    """The modules that PEFT adapts for a list of target_modules: by their whole names, or the last parts of them."""
    wanted = set(names)

    def ends(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in wanted for i in range(len(parts)))

    return [name for name in modules if name and ends(name)]


def _widths(layer: nn.Module) -> tuple[int | None, int | None]:
    """How many numbers go into a layer, and come out; None: PEFT knows this kind of layer, and we do not."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return None, None


def _shapes(adapter: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in adapter.items()}


def _as_adapter(settings: OnlineSpecConfig, about: Mapping[str, Any]) -> OnlineSpecConfig:
    """Settings with the size of an adapter that begins anew. Raises ConfigError."""
    if settings.learner == ENSEMBLE:
        raise ConfigError(
            "learner='ensemble': an ordinary adapter holds one expert. Use another learner to go on with it."
        )
    return replace(settings, rank=about["r"], alpha=about["lora_alpha"])
