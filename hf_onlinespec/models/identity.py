"""Which base draft an adapter belongs to: its name, and fingerprints of its configuration, weights and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel

from .._compat.models import commit_hash, model_name
from ..embedded import FOLDER, SEQ2SEQ_FOLDER
from ..errors import ArtifactError, brief

# What ships with the package, by its names on any machine.
EMBEDDED = "hf_onlinespec:embedded_pair/draft"
EMBEDDED_TARGET = "hf_onlinespec:embedded_pair/target"
SMOLLM2_HEAD = "hf_onlinespec:smollm2_head"
PACKAGED = {
    EMBEDDED: FOLDER / "draft",
    EMBEDDED_TARGET: FOLDER / "target",
    "hf_onlinespec:seq2seq_pair/draft": SEQ2SEQ_FOLDER / "draft",
    "hf_onlinespec:seq2seq_pair/target": SEQ2SEQ_FOLDER / "target",
    SMOLLM2_HEAD: FOLDER.with_name("smollm2_head"),
}
GROWN = "hf_onlinespec:grown_head"  # the head that every target begins with: made anew from the target's weights, it has no files
MTP = "hf_onlinespec:mtp_layers"  # those of the target's own checkpoint
OF_TARGETS = (GROWN, MTP)  # heads that have no files of their own: their target makes them
LONGEST_NAME = 1_000  # characters; chosen
SAMPLED = 256  # numbers of every weight that make its fingerprint
# What the same model may carry under several values.
IGNORED_KEYS = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class BaseFingerprint:
    """A base draft; hashes are SHA-256, shortened to 16 digits."""

    name: str  # on the Hub, or of a folder
    revision: str | None  # commit on the Hub
    config: str
    weights: str  # of numbers here and there in every weight, rounded to bfloat16, so that float32 and bfloat16 are alike; float16 is not
    tokenizer: str | None  # of its file; None: there is none beside the model

    @classmethod
    def of(cls, model: PreTrainedModel) -> BaseFingerprint:
        name, revision = model_name(model.config), commit_hash(model.config)
        config = {k: v for k, v in model.config.to_diff_dict().items() if k not in IGNORED_KEYS}
        weights = hashlib.sha256()
        for key, weight in sorted(model.named_parameters()):
            weights.update(f"{key} {tuple(weight.shape)}".encode())
            # Of quantised and of offloaded weights the shape has to do.
            if type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta:
                flat = weight.detach().reshape(-1)
                some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16).float().cpu()
                weights.update(some.numpy().tobytes())
        tokenizer = tokenizer_file(name, revision)
        return cls(
            name=public_name(name),
            revision=revision,
            config=_short(json.dumps(config, sort_keys=True, default=str).encode()),
            weights=weights.hexdigest()[:16],
            tokenizer=None if tokenizer is None else _short(tokenizer.read_bytes()),
        )

    @classmethod
    def from_dict(cls, values: object) -> BaseFingerprint:
        """The inverse of `dataclasses.asdict`. Raises ArtifactError."""
        names = {"name", "revision", "config", "weights", "tokenizer"}
        if not isinstance(values, dict) or set(values) != names:
            raise ArtifactError(f"The identity of the base is {brief(values)}: expected {sorted(names)}.")
        for key, value in values.items():
            if not (isinstance(value, str) or (value is None and key in ("revision", "tokenizer"))):
                raise ArtifactError(f"The identity of the base has {key}={brief(value)}: expected text.")
            if len(value or "") > LONGEST_NAME:
                raise ArtifactError(f"The identity of the base has {key}={brief(value)}: expected a name.")
        return cls(**values)

    def is_same(self, other: BaseFingerprint) -> bool:
        """Whether both are one model; where it lies, and a tokenizer that is not at hand, do not matter."""
        known = self.tokenizer is not None and other.tokenizer is not None
        return (self.config, self.weights) == (other.config, other.weights) and (
            not known or self.tokenizer == other.tokenizer
        )

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value is not None)


def public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    if name and (os.path.exists(name) or os.path.isabs(name)):
        folder = Path(name).resolve()
        packaged = {place.resolve(): own for own, place in PACKAGED.items()}
        return packaged.get(folder, folder.name)
    return name


def is_own_name(name: str | None) -> bool:
    """Whether a name means the same model wherever the package is installed."""
    return name in OF_TARGETS or name in PACKAGED


def tokenizer_file(name: str, revision: str | None) -> Path | None:
    """The tokenizer that lies beside a model: in its folder, or in the cache of the Hub."""
    for file in TOKENIZER:
        if name and Path(name).is_dir():
            if (Path(name) / file).is_file():
                return Path(name) / file
        elif name and revision:
            found = try_to_load_from_cache(name, file, revision=revision)
            if isinstance(found, str):
                return Path(found)
    return None


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
