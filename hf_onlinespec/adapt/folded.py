"""Weights of their own for drafting, with the adapter folded in: W + s · BA in one matrix.

LoRA beside the weights would make each forward of a small draft up to twice as dear. Costs a copy of the adapted weights,
refreshed where the adapter has moved. Quantised weights cannot be folded, half-precision ones would round small changes away, and
a copy of a large draft is not worth its memory: there the adapter stays beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.adapters import LoraLayer
from .._compat.models import weight_of
from ..models.borrow import borrow, is_plain

# Adapted weights that are worth a second copy; in larger drafts LoRA's share of a forward is small. Chosen.
FOLD_MOST = 64_000_000


def is_foldable(layers: Sequence[LoraLayer]) -> bool:
    """Whether the weights of these layers are few enough, and in float32."""
    weights = [weight_of(layer.get_base_layer()) for layer in layers]
    plain = all(is_plain(weight) and weight.dtype == torch.float32 for weight in weights)
    return plain and sum(weight.numel() for weight in weights) <= FOLD_MOST


class FoldedWeights:
    """A module tree beside the adapter's, whose adapted layers have weights of their own.

    Args:
        model: the draft; everything else is shared with it.
        adapted: the tree with the adapter.
    """

    def __init__(self, model: PreTrainedModel, adapted: nn.Module) -> None:
        self.tree = borrow(model)
        modules = dict(self.tree.named_modules())
        self._pairs: list[tuple[LoraLayer, nn.Parameter]] = []
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer):
                weight = nn.Parameter(torch.empty_like(weight_of(layer.get_base_layer())), requires_grad=False)
                modules[name].weight = weight
                self._pairs.append((layer, weight))

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for _, weight in self._pairs)

    @torch.no_grad()
    def fold(self, change: Callable[[LoraLayer], Tensor]) -> bool:
        """Brings the weights up to date with what the adapter changes in each layer; whether all of them are finite."""
        for layer, weight in self._pairs:
            torch.add(weight_of(layer.get_base_layer()), change(layer), out=weight)
        return bool(torch.isfinite(torch.stack([weight.sum() for _, weight in self._pairs])).all())
