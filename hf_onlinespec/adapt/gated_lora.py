"""GatedLora: one PEFT LoRA adapter whose rank is split into blocks, and the gate that says which blocks speak.

    y = W x + s · B (g ⊙ (A x)),   A: (blocks · rank, d_in),   B: (d_out, blocks · rank),   g: (batch, blocks · rank)

Gate shut: the base draft. The base weights are borrowed, not copied, and never written: the model that the user
holds is not touched at all.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.adapters import (
    LoraEmbedding,
    LoraLayer,
    base_of,
    delta_weight,
    disable_lora,
    embedding_scale,
    lora_factors,
)
from .._compat.models import weight_of
from ..errors import DraftError
from ..models.borrow import borrow, is_plain
from ..models.layers import adaptable_layers as adaptable_layers
from ..models.layers import adapted_layers, describe
from ..runtime.progress import each
from ..runtime.seeding import seeded

ADAPTER = "default"
# Adapted weights that are worth a second copy; in larger drafts LoRA's share of a forward is small.
FOLD_MOST = 64_000_000


@dataclass(frozen=True)
class Piece:
    """One parameter of the adapter inside the flat vector."""

    name: str  # as PEFT's files call it
    path: str  # as the model calls it
    place: slice
    shape: torch.Size
    columns: bool  # B: blocks are its columns; A: blocks are its rows


class GatedLora:
    """The adapter of a draft: its layers, its gate and its parameters as one flat vector.

    Args:
        model: the draft; its weights are shared, its modules are not.
        rank, alpha: size of one block and LoRA scale, `s = alpha / rank`.
        target_modules: layer names (full, or their last part); None adapts every linear layer, embedding and head.
        blocks: how many adapters of this rank stand side by side.
        seed: of the first values of A (B starts at zero, so a new adapter changes nothing).

    Attributes:
        left_out: layers that carry no adapter although they were asked for, or look as if they could, and why.

    Raises:
        DraftError: no layer can carry an adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: float,
        target_modules: tuple[str, ...] | None = None,
        blocks: int = 1,
        seed: int = 0,
    ) -> None:
        base = borrow(model)
        names, self.left_out = adapted_layers(base, target_modules, blocks)
        if not names and (self.left_out or target_modules is None):
            raise DraftError(
                f"{type(model).__name__} has no linear or embedding layer that LoRA can adapt"
                + (f": {describe(self.left_out)}. " if self.left_out else ". ")
                + "Use a draft with torch.nn.Linear layers, or name its layers with target_modules=."
            )
        if target_modules is not None and not self.left_out:
            names = list(target_modules)  # as they were given; those that are not there are PEFT's to name
        settings = LoraConfig(
            r=blocks * rank,
            lora_alpha=alpha * blocks,  # type: ignore[arg-type]  # need not be whole
            target_modules=names,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with seeded(base, seed), warnings.catch_warnings():
            # Nothing the user could act on: PEFT asks transformers under an old name, and sets the layout per layer.
            warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|fan_in_fan_out).*")
            try:
                self.model: PeftModel = get_peft_model(base, settings)
            except ValueError as error:
                some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise DraftError(
                    f"No adapter fits {type(model).__name__} with the layers {some}: {(str(error).splitlines() or [''])[0][:200]} "
                    "Name layers that the model's text goes through with target_modules=."
                ) from error
        self.tree = base_of(self.model)
        self.tree.eval()
        self.rank, self.blocks = rank, blocks
        self.layers = [module for module in self.tree.modules() if isinstance(module, LoraLayer)]
        self._folded = self._foldable(model)
        self._stale = True  # whether the folded weights lag behind the adapter
        self.changes = 0  # of parameters or weights
        self.weights: Tensor | None = None  # (blocks,) weights of the blocks in what is served; None: all at 1
        self._open = False
        self._gate: Tensor | None = None  # (batch, blocks · rank); None: every block at weight 1
        for layer in self.layers:
            if isinstance(layer, LoraEmbedding):
                layer.register_forward_hook(self._embedding_hook)
            else:
                layer.lora_A[ADAPTER].register_forward_hook(self._linear_hook)
            disable_lora(layer, True)
        self._flatten()

    def _flatten(self) -> None:
        """Moves all adapter parameters, and their gradients, into one vector each: one step is then one operation."""
        named = [(name, p) for name, p in self.tree.named_parameters() if p.requires_grad]
        device, dtype = named[0][1].device, torch.float32
        self.params = torch.empty(sum(p.numel() for _, p in named), device=device, dtype=dtype)
        self.grads = torch.zeros_like(self.params)
        self._pieces: list[Piece] = []
        start = 0
        for name, parameter in named:
            end = start + parameter.numel()
            columns = "lora_B" in name or "lora_embedding_B" in name
            in_file = f"base_model.model.{name}".replace(f".{ADAPTER}", "")
            self._pieces.append(Piece(in_file, name, slice(start, end), parameter.shape, columns))
            self.params[start:end].copy_(parameter.detach().flatten())
            parameter.data = self.params[start:end].view_as(parameter)
            parameter.grad = self.grads[start:end].view_as(parameter)
            start = end

    def _foldable(self, model: PreTrainedModel) -> list[tuple[LoraLayer, nn.Parameter]] | None:
        """A third module tree, `self.folded_tree`, whose adapted layers get weights of their own; None: too large, or not float32."""
        weights = [weight_of(layer.get_base_layer()) for layer in self.layers]
        if not all(is_plain(weight) and weight.dtype == torch.float32 for weight in weights):
            return None
        if sum(weight.numel() for weight in weights) > FOLD_MOST:
            return None
        self.folded_tree = borrow(model)
        modules = dict(self.folded_tree.named_modules())
        folded = []
        for name, layer in self.tree.named_modules():
            if isinstance(layer, LoraLayer):
                weight = nn.Parameter(torch.empty_like(weight_of(layer.get_base_layer())), requires_grad=False)
                modules[name].weight = weight
                folded.append((layer, weight))
        return folded

    @property
    def stale(self) -> bool:
        """Whether the folded weights lag behind the adapter."""
        return self._folded is not None and self._stale

    @property
    def folds(self) -> bool:
        """Whether drafting has weights of its own, with the adapter folded in."""
        return self._folded is not None

    def fold(self) -> None:
        """Brings the folded weights up to date with the adapter: W + s · BA in one matrix, in the tree `self.folded_tree`.

        LoRA beside the weights would make each forward of a small draft up to twice as dear. Costs a copy of the adapted
        weights, refreshed where the adapter has moved. Quantised weights cannot be folded, half-precision ones would round
        small changes away, and a copy of a large draft is not worth its memory: there the adapter speaks beside the weights.
        """
        if self._folded is None or not self._stale:
            return
        with torch.no_grad():
            for layer, weight in self._folded:
                torch.add(weight_of(layer.get_base_layer()), self._change(layer), out=weight)
            # What is not finite is not served: it is folded again the next time, and until then speaks beside the weights.
            sums = torch.stack([weight.sum() for _, weight in self._folded])
            self._stale = not bool(torch.isfinite(sums).all())

    def _change(self, layer: LoraLayer) -> Tensor:
        """s · B (w ⊙ A) of one layer, laid out as its weights are."""
        if self.weights is None:
            return delta_weight(layer, ADAPTER)
        a, b, transposed = lora_factors(layer, ADAPTER)
        change = (b * self.weights.repeat_interleave(self.rank)) @ a * layer.scaling[ADAPTER]
        return change.T if transposed else change

    def merged_weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The base's weights with the adapter in them as it serves, by the base's own names. The sums are made in float32.

        Args:
            dtype: of what is a floating-point number; None: as the base has it.

        Raises:
            DraftError: the base is quantised.
        """
        for name, parameter in self.tree.named_parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise DraftError(
                    f"{type(self.tree).__name__} has quantised weights, {name} for one: no adapter can be merged into them. Load the "
                    "draft with base_model= in full precision, and export that."
                )
        layers = {name: module for name, module in self.tree.named_modules() if isinstance(module, LoraLayer)}
        stored = self.tree.state_dict()
        weights: dict[str, Tensor] = {}
        with torch.no_grad():
            for key in each(stored, "Merging", "tensor"):
                weight = stored[key]
                if ".lora_" in key:
                    continue
                layer, wrapped, last = key.rpartition(".base_layer.")
                own = weight.dtype if dtype is None or not weight.is_floating_point() else dtype
                if wrapped and last == "weight":
                    weight = torch.add(weight.float(), self._change(layers[layer]))  # as `fold` does
                weights[f"{layer}.{last}" if wrapped else key] = weight.to(own)
        return weights

    def split(self, vector: Tensor) -> Tensor:
        """A vector like `params` as (blocks, parameters of one block), each row as an adapter of one block would have it."""
        if self.blocks == 1:
            return vector[None]
        rows = []
        for piece in self._pieces:
            part = vector[piece.place]
            if piece.columns:  # (d_out, blocks · rank)
                part = part.view(-1, self.blocks, self.rank).transpose(0, 1)
            rows.append(part.reshape(self.blocks, -1))
        return torch.cat(rows, dim=1)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.blocks == 1:
            return rows[0]
        vector, start = torch.empty_like(self.params), 0
        for piece in self._pieces:
            end = start + piece.shape.numel() // self.blocks
            part = rows[:, start:end]
            if piece.columns:
                part = part.reshape(self.blocks, -1, self.rank).transpose(0, 1)
            vector[piece.place] = part.reshape(-1)
            start = end
        return vector

    def with_zero_b(self, block: Tensor) -> Tensor:
        """A copy of one block's parameters that changes nothing, as a new adapter's do: B is zero."""
        block, start = block.clone(), 0
        for piece in self._pieces:
            end = start + piece.shape.numel() // self.blocks
            if piece.columns:
                block[start:end] = 0.0
            start = end
        return block

    def move(self, updates: Tensor) -> None:
        """Adds `updates` to the parameters."""
        self.params.add_(updates)
        self._changed()

    def put(self, rows: Tensor) -> None:
        """Sets the parameters (blocks, parameters of one block)."""
        self.params.copy_(self.join(rows))
        self._changed()

    def _changed(self) -> None:
        self._stale = True
        self.changes += 1

    def serve(self, weights: Tensor | None) -> None:
        """Which blocks the folded weights hold: (blocks,) weights, None: all at 1."""
        same = weights is self.weights or (
            weights is not None and self.weights is not None and torch.equal(weights, self.weights)
        )
        self.weights = weights
        if not same:
            self._changed()

    def served_params(self) -> Tensor:
        """A copy of the parameters (parameters,) as one ordinary adapter: the weights of the blocks are in B."""
        params = self.params.clone()
        if self.weights is not None:
            for piece in self._pieces:
                if piece.columns:
                    b = params[piece.place].view(piece.shape)
                    b.mul_(self.weights.repeat_interleave(self.rank))
        return params

    def named(self, params: Tensor) -> dict[str, Tensor]:
        """The parts of a vector like `params` by the names that PEFT gives them in files, as views."""
        return {piece.name: params[piece.place].view(piece.shape) for piece in self._pieces}

    def placed(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts by PEFT's names, by the names that the model gives them, on its device."""
        return {piece.path: parts[piece.name].to(self.params.device) for piece in self._pieces}

    def outputs(self, params: Tensor) -> dict[str, Tensor]:
        """The same, of B alone: what `served_params` changes."""
        return {piece.name: params[piece.place].view(piece.shape) for piece in self._pieces if piece.columns}

    def adapter_config(self, base_name: str) -> LoraConfig:
        """What PEFT has to know to load the adapter, of rank blocks · rank, onto the base of this name."""
        config = copy.copy(self.model.peft_config[ADAPTER])
        assert isinstance(config, LoraConfig)
        config.inference_mode, config.base_model_name_or_path = True, base_name
        config.target_modules = sorted(config.target_modules or ())
        return config

    @contextmanager
    def gated(self, weights: Tensor | None = None) -> Iterator[PreTrainedModel]:
        """The draft with its blocks speaking, for the time of the `with`; outside it the gate is shut.

        Args:
            weights: (batch, blocks) or (1, blocks) weight of every block; None: all at 1.
        """
        self._gate = None if weights is None else weights.repeat_interleave(self.rank, dim=-1)
        self._switch(True)
        try:
            yield self.tree
        finally:
            self._switch(False)
            self._gate = None

    def _switch(self, on: bool) -> None:
        self._open = on
        for layer in self.layers:
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

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter, its gradients and the folded weights."""
        folded = sum(weight.nbytes for _, weight in self._folded or [])
        return self.params.nbytes + self.grads.nbytes + folded
