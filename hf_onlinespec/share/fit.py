"""Whether the tensors of a saved adapter fit its base: their size, the parts of each layer, the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import OnlineSpecConfig
from ..errors import ArtifactError, brief
from ..models.borrow import borrow
from ..models.layers import adaptable_layers, adapted_layers
from .folder import ADAPTER, ADAPTER_CONFIG
from .tensor_files import FLOATS, TensorHeader

PREFIX = "base_model.model."  # of every name in PEFT's files
# PEFT's names of the parts of an adapter on one layer, and which dimension is the rank.
RANK_DIMENSION = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}
PARTS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
MOST_WIDTH = 1 << 22  # of a layer, or tokens of a vocabulary; chosen: 16 times the largest there is
# Of all tensors of a draft with its base at hand: bytes that are taken in any case, and bytes per byte of the base's weights in
# float32. The first so that loading takes less than 1 GB, measured: 3.9 times as much. The other chosen: an adapter of four times its
# base, with moments and two earlier states.
SMALL_BYTES, MOST_TIMES_BASE = 240 << 20, 16


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
