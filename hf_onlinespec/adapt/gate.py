"""The gate over an adapter's rank: which of its blocks speak, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from .._compat.adapters import LoraEmbedding, LoraLayer, disable_lora, embedding_scale
from .flat_layout import ADAPTER


class Gate:
    """Shut: no layer's adapter speaks. Open: each is weighed behind A, y = W x + s · B (g ⊙ (A x)).

    Args:
        rank: of one block.
    """

    def __init__(self, layers: Sequence[LoraLayer], rank: int) -> None:
        self._layers, self._rank = layers, rank
        self._open = False
        self._gate: Tensor | None = None  # (batch, blocks · rank); None: every block at weight 1
        for layer in layers:
            if isinstance(layer, LoraEmbedding):
                layer.register_forward_hook(self._embedding_hook)
            else:
                layer.lora_A[ADAPTER].register_forward_hook(self._linear_hook)
            disable_lora(layer, True)

    @contextmanager
    def opened(self, weights: Tensor | None) -> Iterator[None]:
        """Open for the time of the `with`.

        Args:
            weights: (batch, blocks) or (1, blocks) weight of every block; None: all at 1.
        """
        self._gate = None if weights is None else weights.repeat_interleave(self._rank, dim=-1)
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)
            self._gate = None

    def _switch(self, on: bool) -> None:
        self._open = on
        for layer in self._layers:
            # The embedding's adapter is spoken by our hook: PEFT keeps it as parameters that no gate could reach.
            disable_lora(layer, not on or isinstance(layer, LoraEmbedding))

    def _linear_hook(self, module: nn.Module, args: tuple[Tensor], after_a: Tensor) -> Tensor:
        return after_a if self._gate is None else after_a * self._gate_of(after_a)

    def _gate_of(self, after_a: Tensor) -> Tensor:
        """The gate for (batch, …, blocks · rank), or for (batch · length, …, blocks · rank): each sequence's own."""
        assert self._gate is not None
        gate = self._gate.to(after_a.dtype)
        if len(gate) > 1 and len(after_a) > 1:  # else one side is the same for all
            gate = gate.repeat_interleave(len(after_a) // len(gate), dim=0)
        return gate.view(len(gate), *[1] * (after_a.dim() - 2), -1)

    def _embedding_hook(self, layer: LoraEmbedding, args: tuple[Tensor], output: Tensor) -> Tensor:
        if not self._open:
            return output
        after_a = F.embedding(args[0], layer.lora_embedding_A[ADAPTER].T)  # (batch, length, blocks · rank)
        if self._gate is not None:
            after_a = after_a * self._gate_of(after_a)
        change = after_a @ layer.lora_embedding_B[ADAPTER].T * layer.scaling[ADAPTER]
        scale = embedding_scale(layer)
        return output + (change if scale is None else change * scale.to(change.dtype)).to(output.dtype)
