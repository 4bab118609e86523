"""Where a draft comes from: a folder or a repository with an evolved draft, with a plain PEFT adapter, or a base model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ._compat import HUB_FAILURES
from .artifact import ADAPTER, ADAPTER_CONFIG, CHECKED, CONFIG, Artifact, is_artifact, read_json, read_tensors
from .config import ENSEMBLE, OnlineSpecConfig
from .embedded import load_draft
from .errors import ArtifactError, ConfigError, DraftError, HubError
from .identity import EMBEDDED, Identity, public_name

if TYPE_CHECKING:
    from .draft import OnlineDraft


def load(
    make: type[OnlineDraft],
    source: str | Path,
    base_model: PreTrainedModel | str | Path | None,
    config: OnlineSpecConfig | None,
    revision: str | None,
    force: bool,
    token: str | None,
) -> OnlineDraft:
    """What `OnlineDraft.from_pretrained` does. Nothing is made before everything is read and checked."""
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"source={source!r}: expected a folder or a name on the Hub. A loaded model goes into OnlineDraft(model)."
        )
    origin = locate(source, revision, token)
    if origin.evolved:
        assert origin.folder is not None
        artifact = Artifact.read(origin.folder)
        lies_at = str(artifact.adapter_config.get("base_model_name_or_path", ""))
        draft = make(load_base(base_model, artifact.base, lies_at, token), config or artifact.settings)
        check_base(artifact.base, draft.identity, force)
        draft.resume(artifact)
        draft.lineage = {**artifact.lineage, "draft": draft.lineage["draft"]}
        if origin.revision is None:
            return draft  # a folder is where it was kept, not where it came from
    elif origin.folder is not None:
        adapter, settings = read_plain_adapter(origin.folder, config)
        named = str(read_json(origin.folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        draft = make(load_base(base_model, None, named, token), settings)
        draft.adopt(adapter)
    else:
        base = load_base(base_model) if base_model is not None else load_model(str(source), revision, token)
        return make(base, config)
    draft.lineage |= origin.lineage()
    return draft


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
        holds = is_artifact(folder) or (folder / ADAPTER_CONFIG).is_file()
        return Origin(str(source), folder if holds else None, None)
    if folder.is_absolute() or folder.is_file():
        raise DraftError(f"{source}: no such folder. Expected one that save_pretrained wrote, or a name on the Hub.")
    try:
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=[*CHECKED, CONFIG], token=token))
    except HFValidationError as error:
        raise DraftError(f"{source}: neither a folder nor a name on the Hub ({error}).") from error
    except HUB_FAILURES as error:
        raise HubError(
            f"{source}: not downloaded ({type(error).__name__}: {error}). "
            "For a private repository give a token (hf auth login); without a network name a local folder."
        ) from error
    holds = is_artifact(found) or (found / ADAPTER_CONFIG).is_file()
    return Origin(str(source), found if holds else None, found.name)


def read_plain_adapter(folder: Path, config: OnlineSpecConfig | None) -> tuple[dict[str, Tensor], OnlineSpecConfig]:
    """An ordinary LoRA adapter, and the settings under which it goes on learning.

    Raises:
        ArtifactError: it is no LoRA adapter in safetensors, or of a kind that cannot be split and folded.
    """
    about = read_json(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER).is_file():
        raise ArtifactError(
            f"{folder}: no {ADAPTER}; adapters in another format are not read. Save it with safetensors."
        )
    odd = [
        name
        for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
        if about.get(name)
    ]
    names = about.get("target_modules")
    sized = isinstance(about.get("r"), int) and isinstance(about.get("lora_alpha"), int | float)
    if (
        about.get("peft_type") != "LORA"
        or not sized
        or odd
        or about.get("bias", "none") != "none"
        or not isinstance(names, list)
    ):
        raise ArtifactError(
            f"{folder}: a {about.get('peft_type')} adapter with {odd or 'target_modules=' + repr(names)}: expected plain LoRA "
            "with a list of target_modules. Merge it into the base with merge_and_unload, and begin a new draft with that."
        )
    settings = config if config is not None else OnlineSpecConfig()
    if settings.learner == ENSEMBLE:
        raise ConfigError(
            "learner='ensemble': an ordinary adapter holds one expert. Use another learner to go on with it."
        )
    settings = replace(settings, rank=about["r"], alpha=about["lora_alpha"], target_modules=tuple(names))
    tensors = read_tensors(folder / ADAPTER)
    # Where embedding and head carry an adapter, PEFT writes their base weights beside it: the base has these.
    return {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}, settings


def load_base(
    base_model: PreTrainedModel | str | Path | None,
    expected: Identity | None = None,
    lies_at: str = "",
    token: str | None = None,
) -> PreTrainedModel:
    """The base draft: a model as it is, or loaded by name; None: the one that the adapter was made for.

    Args:
        lies_at: where the adapter says that it is: a folder of the machine that made it, or a name.
    """
    if isinstance(base_model, str | Path):
        return load_model(str(base_model), None, token)
    if base_model is not None:
        return base_model
    if EMBEDDED in (lies_at, "" if expected is None else expected.name):
        return load_draft()
    if expected is not None and not Path(lies_at).is_dir():
        lies_at = expected.name
    if not lies_at:
        raise DraftError("It is not known which base the adapter belongs to: pass base_model=, a model or its name.")
    return load_model(lies_at, None if expected is None else expected.revision, token)


def load_model(name: str, revision: str | None, token: str | None) -> PreTrainedModel:
    """A causal language model from a folder or from the Hub. Raises DraftError."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, token=token).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise DraftError(
            f"{name!r}: no causal language model can be loaded from there ({error}). Expected an evolved draft, an adapter or "
            "a causal language model: a folder or a name on the Hub. The base of an adapter may be given as base_model=."
        ) from error


def check_base(expected: Identity, found: Identity, force: bool) -> None:
    """Raises ArtifactError where an adapter was made for another base, unless `force`."""
    if not force and not expected.is_same(found):
        raise ArtifactError(
            f"The adapter was made for another base.\n  made for: {expected}\n  given:    {found}\n"
            "Give the right one as base_model=, or force=True if you know that they are alike."
        )
