"""read_head: a draft head from a folder, in any form that is served, for one target; check_head: whether it is for that target."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .._compat.models import writing_config
from ..errors import DraftError
from .base import Head
from .config import Eagle1Config, Eagle3Config, HeadConfig, HydraConfig
from .described import described
from .eagle1 import Eagle1Head
from .eagle3 import Eagle3Head
from .hydra import HydraHead
from .layer import rotary_embedding
from .names import D2T, HYDRA, T2D, file_names, is_left_out, our_name
from .recognising import served_form
from .stored import CONFIG, Stored, stored_config, stored_tensors


def read_head(folder: str | Path, target_config: PretrainedConfig, dtype: torch.dtype | None = None) -> Head:
    """Reads a draft head, on the CPU. It uses the target's embedding once `head.share(target)` has been called.

    Args:
        folder: with config.json and weights: EAGLE-3 (original, SGLang or speculators form), EAGLE-1 or -2, Hydra.
        target_config: of the model that it drafts for.
        dtype: of its weights; None: as they are stored.

    Raises:
        DraftError: it is no head that is served, it is damaged, or it was made for another target. The tensor or the field is named,
            before any weight is loaded but those of the vocabulary's map.
    """
    head, tensors = _empty_head(Path(folder), target_config)
    weights = {name: _loaded(some) for name, some in tensors.items()}
    return _filled(head, weights, dtype)


def check_head(folder: str | Path, target_config: PretrainedConfig) -> None:
    """Raises DraftError as `read_head` would, but for what only the numbers of its tensors tell. Arguments as there."""
    _empty_head(Path(folder), target_config)


def _empty_head(folder: Path, target_config: PretrainedConfig) -> tuple[Head, dict[str, list[Stored]]]:
    """The head without its weights, and where these are stored, by the names of its parameters. Raises DraftError."""
    values, stored = stored_config(folder), stored_tensors(folder)
    form = served_form(values, stored, folder)
    prefix = form == HYDRA and values.get("hydra_head_arch") == "prefix-mlp"
    tensors: dict[str, list[Stored]] = {}
    for name in stored:
        if not is_left_out(name):
            tensors.setdefault(our_name(name, form, prefix), []).append(stored[name])
    maps = {name: tensors.pop(name) for name in (D2T, T2D) if name in tensors}
    shapes = {name: some[0].shape for name, some in tensors.items()}
    try:
        config = described(values, form, shapes, writing_config(target_config), folder)
        with torch.device("meta"):
            head = _empty(config)
    except (
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # what transformers and torch raise on fields that cannot be
        raise DraftError(
            f"{folder / CONFIG} describes no head that can be built: {type(error).__name__}: {error}"
        ) from error
    _check(head, tensors, form, folder)
    head.config.name_or_path = str(folder)
    if isinstance(head, Eagle3Head):
        head.form = form
        head.draft_ids = _draft_ids(head.config, maps, folder)
    return head, tensors


def _empty(config: HeadConfig) -> Head:
    if isinstance(config, Eagle3Config):
        return Eagle3Head(config)
    if isinstance(config, Eagle1Config):
        return Eagle1Head(config)
    assert isinstance(config, HydraConfig)
    return HydraHead(config)


def _check(head: Head, tensors: dict[str, list[Stored]], form: str, folder: Path) -> None:
    """Raises DraftError unless the files hold exactly the head's parameters, in their shapes."""
    expected = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    for name in expected:
        wanted = file_names(name, form, head.config)
        if len(tensors.get(name, [])) < len(wanted):
            held = {one.name for one in tensors.get(name, [])}
            missing = next((one for one in wanted if one not in held), wanted[-1])
            raise DraftError(f"The tensor {missing} is missing in {folder}; it would have the shape {expected[name]}.")
    for name, some in tensors.items():
        if name not in expected or len(some) > len(file_names(name, form, head.config)):
            raise DraftError(
                f"The tensor {some[-1].name} of {some[-1].file} belongs to no part of this head, as its configuration describes it: "
                f"{type(head).__name__} would not use it. A field may be missing in its config.json."
            )
        for one in some:
            if one.shape != expected[name]:
                raise DraftError(
                    f"The tensor {one.name} of {one.file} has the shape {one.shape}: {expected[name]} follows from the configuration "
                    "of the head and of its target."
                )


def _draft_ids(config: Eagle3Config, maps: dict[str, list[Stored]], folder: Path) -> Tensor | None:
    """The target ids (draft_vocab_size,) of the logits; None: they are all of the target's. Raises DraftError."""
    size, most = config.draft_vocab_size, config.vocab_size
    assert size is not None
    expected = {D2T: (size,), T2D: (most,)}
    for name, some in maps.items():
        if some[0].shape != expected[name]:
            raise DraftError(
                f"The tensor {some[0].name} of {some[0].file} has the shape {some[0].shape}: expected {expected[name]}."
            )
    if D2T not in maps:
        if size == most:
            return None
        raise DraftError(
            f"The tensor {D2T} is missing in {folder}: the head has {size} of its target's {most} tokens, which of them it says."
        )
    offsets = maps[D2T][0].load()
    if offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise DraftError(f"The tensor {D2T} of {maps[D2T][0].file} holds {offsets.dtype}: expected whole numbers.")
    ids = torch.arange(size) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= most or not bool((ids.diff() > 0).all()):
        raise DraftError(
            f"The tensor {D2T} of {maps[D2T][0].file} gives no ascending ids from 0 to {most - 1}: it holds offsets, id = index + {D2T}[index]."
        )
    if T2D in maps and not torch.equal(maps[T2D][0].load().nonzero().flatten(), ids):
        raise DraftError(f"The tensors {D2T} and {T2D} of {maps[T2D][0].file} name different tokens.")
    return None if size == most else ids


def _loaded(some: list[Stored]) -> Tensor:
    """A parameter; where it is stored several times, it is the same one. Raises DraftError."""
    tensor = some[0].load()
    for one in some[1:]:
        if not torch.equal(one.load(), tensor):
            raise DraftError(
                f"The tensors {some[0].name} and {one.name} of {one.file} differ: in Hydra's code these blocks share their weights."
            )
    return tensor


def _filled(head: Head, weights: dict[str, Tensor], dtype: torch.dtype | None) -> Head:
    """The head with these weights, all of one type: they may be stored in several."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise DraftError(f"The tensor {name} holds {tensor.dtype}: quantised draft heads are not supported.")
    dtype = dtype or next(iter(weights.values())).dtype
    held = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if head.draft_ids is not None:
        held["draft_ids"] = head.draft_ids
    head.load_state_dict(held, assign=True)
    if head.rotary_emb is not None:
        head.rotary_emb = rotary_embedding(head.config)
    return head.eval()
