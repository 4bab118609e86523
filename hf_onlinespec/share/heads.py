"""Draft heads by name: found in a folder or on the Hub, read for their target, and whether they were learned for this one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .._compat.assistants import is_dflash, is_gemma_assistant
from .._compat.hub import HUB_FAILURES
from .._compat.models import model_name, placed
from ..errors import ArtifactError, DraftError, brief
from ..heads.assistants import assistant_head
from ..heads.base import Head
from ..heads.eagle3 import Eagle3Head
from ..heads.mtp import mtp_head
from ..heads.reading import check_head, read_head
from ..heads.recognising import is_head, is_head_config
from ..heads.starting import new_config, special_tokens, start_from_target
from ..heads.stored import CONFIG
from ..models.identity import GROWN, MTP, OF_TARGETS, PACKAGED, SMOLLM2_HEAD, BaseFingerprint
from ..runtime.seeding import seeded

logger = logging.getLogger(__name__)

# Tokens that a grown head can propose: nothing is known of the target's own frequent ones yet, and tokenizers give the lowest ids to
# frequent tokens. 89 % of SmolLM2's answer tokens are among its first 8,192 ids: LOG 2026-11-26 "Draft heads".
DRAFT_VOCABULARY = 8192
SHIPPED_FOR = "SmolLM2-135M-Instruct"  # target of the head that ships with the package, in whatever folder or account
FILES = [CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "hydra_lm_head.pt"]


def names_head(name: str, revision: str | None = None, token: str | None = None) -> bool:
    """Whether a name is a draft head's; False too where that is not known: whoever loads it as a model says why.

    Args:
        name: of a folder, of what ships with the package, or on the Hub.
    """
    if name in OF_TARGETS:
        return True
    folder = PACKAGED.get(name, Path(name))
    if folder.is_dir():
        return is_head(folder)
    try:
        stated = json.loads(Path(hf_hub_download(name, CONFIG, revision=revision, token=token)).read_text("utf-8"))
        return isinstance(stated, dict) and is_head_config(stated)
    except (*HUB_FAILURES, OSError, ValueError):
        return False


def names_assistant(name: str, revision: str | None = None) -> bool:
    """Whether a name is a Gemma-4 assistant's or a DFlash draft's; False too where that is not known."""
    try:
        config = AutoConfig.from_pretrained(PACKAGED.get(name, name), revision=revision, trust_remote_code=False)
    except (*HUB_FAILURES, OSError, ValueError, KeyError, ImportError):
        return False
    return is_gemma_assistant(config) or is_dflash(config)


def head_folder(name: str, revision: str | None = None, token: str | None = None) -> Path | None:
    """Where the files of a draft head are, downloaded if need be; None: it is no head, it is not known, or it has none (`OF_TARGETS`)."""
    if name in OF_TARGETS or not names_head(name, revision, token):
        return None
    folder = PACKAGED.get(name, Path(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, token=token))
    except (*HUB_FAILURES, OSError, ValueError):
        return None


def grown_head(target: PreTrainedModel) -> Head:
    """The untrained EAGLE-3 head that a target begins with, in its precision and on its device: the same one each time.

    Raises:
        DraftError: it has no embedding, or none that a head could use.
    """
    config = new_config(target, DRAFT_VOCABULARY)
    size, first = config.draft_vocab_size or config.vocab_size, special_tokens(target)
    rest = (token for token in range(config.vocab_size) if token not in first)
    ids = [*(token for token in dict.fromkeys(first) if token < config.vocab_size), *rest][:size]
    with seeded(target, 0):
        head = Eagle3Head(config, torch.tensor(sorted(ids)))
    start_from_target(head, target)
    head.config.name_or_path = GROWN
    head.share(target)
    return placed(head, target.device).to(target.dtype).eval()  # type: ignore[arg-type]


def load_head(name: str, folder: Path | None, target: PreTrainedModel | None) -> Head:
    """The head of a folder, for its target, in the target's precision and on its device; None: one of `OF_TARGETS`. Raises DraftError."""
    if target is None:
        raise DraftError(
            f"{brief(name)} is a draft head, which reads its target's hidden states and embedding: give the target it is for, as in "
            "OnlineDraft.from_pretrained(HEAD, target=target), or attach(target, HEAD)."
        )
    if folder is None:
        return mtp_head(target) if name == MTP else grown_head(target)
    dtype = target.dtype if target.dtype.is_floating_point else None
    head = read_head(folder, target.config, dtype).eval()
    head.config.name_or_path = name
    head.share(target)
    return head if target.device.type == "meta" else head.to(target.device)


def load_assistant(model: PreTrainedModel, target: PreTrainedModel) -> Head:
    """The head that a Gemma-4 assistant or a DFlash draft of transformers is, in the target's precision and on its device.

    Raises:
        DraftError: it is not one for this target.
    """
    if target.dtype.is_floating_point:
        model = model.to(target.dtype)  # type: ignore[arg-type]  # as in `placed`
    return assistant_head(model if target.device.type == "meta" else placed(model, target.device), target)


def shipped_head_for(target: PretrainedConfig) -> str | None:
    """The name of the head that ships with the package and is for this target, by its name and its shape; None: there is none."""
    if Path(model_name(target)).name != SHIPPED_FOR:
        return None
    try:
        check_head(PACKAGED[SMOLLM2_HEAD], target)
    except DraftError:
        return None
    return SMOLLM2_HEAD


def check_learned_for(expected: BaseFingerprint, target: PreTrainedModel, force: bool) -> None:
    """Whether what a head has learned was learned for this target; weights alone may differ, as a quantised copy's do.

    Raises:
        ArtifactError: the target has another configuration or tokenizer, unless `force`.
    """
    found = BaseFingerprint.of(target)
    known = expected.tokenizer is not None and found.tokenizer is not None
    if expected.config != found.config or (known and expected.tokenizer != found.tokenizer):
        if not force:
            raise ArtifactError(
                f"The head was trained for another target.\n  trained for: {expected}\n  given:       {found}\n"
                "Give the right one as target=, or force=True if you know that they are alike."
            )
    elif expected.weights != found.weights:
        logger.warning(
            "The head has learned for %s, and this target has other weights: a copy in another precision, or a fine-tuned one. "
            "It stays lossless, and learns what is different.",
            expected.name or "another target",
        )
