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

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.adapters import (
    LoraLayer,
    base_of,
    delta_weight,
    lora_factors,
)
from ..errors import DraftError
from ..models.borrow import borrow, copy_modules
from ..models.layers import adaptable_layers as adaptable_layers
from ..models.layers import adapted_layers, describe
from ..runtime.progress import each
from ..runtime.seeding import seeded
from .flat_layout import ADAPTER, FlatLayout, flattened
from .folded import FoldedWeights, is_foldable
from .gate import Gate


def _with_adapter(base: PreTrainedModel, names: list[str], rank: int, alpha: float, seed: int) -> PeftModel:
    """A LoRA adapter of this rank around the layers, with its first values by the seed. Raises DraftError."""
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # need not be whole
        target_modules=names,
        lora_dropout=0.0,
        task_type=_task(base),
    )
    with seeded(base, seed), warnings.catch_warnings():
        # Nothing the user could act on: PEFT asks transformers under an old name, and sets the layout per layer.
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|fan_in_fan_out).*")
        try:
            return get_peft_model(base, settings)
        except ValueError as error:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DraftError(
                f"No adapter fits {type(base).__name__} with the layers {some}: {(str(error).splitlines() or [''])[0][:200]} "
                "Name layers that the model's text goes through with target_modules=."
            ) from error


def _task(base: PreTrainedModel) -> str | None:
    """By which of its wrappers PEFT calls a model; None: by none, as its main input is neither a text nor an encoder's."""
    if base.main_input_name != "input_ids":  # a draft head, or one that reads speech
        return None
    return "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"


class GatedLora:
    """The adapter of a draft: its layers, its gate and its parameters as one flat vector.

    Args:
        model: the draft; its weights are shared, its modules are not.
        rank, alpha: size of one block and LoRA scale, `s = alpha / rank`.
        target_modules: layer names (full, or their last part); None: see `adaptable_layers`.
        blocks: how many adapters of this rank stand side by side.
        seed: of the first values of A (B starts at zero, so a new adapter changes nothing).
        folds: whether drafting may have a copy of the adapted weights, see `folded.py`. A copy does not follow weights that are written.

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
        folds: bool = True,
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
        self.model = _with_adapter(base, names, blocks * rank, alpha * blocks, seed)
        self.tree = base_of(self.model).eval()
        self.rank, self.blocks = rank, blocks
        self.layers = [module for module in self.tree.modules() if isinstance(module, LoraLayer)]
        self._folded = FoldedWeights(model, self.tree) if folds and is_foldable(self.layers) else None
        self._stale = True  # whether the folded weights lag behind the adapter
        self.changes = 0  # of parameters or weights
        self.weights: Tensor | None = None  # (blocks,) weights of the blocks in what is served; None: all at 1
        self._gate = Gate(self.layers, rank)
        self._layout = FlatLayout(self.tree, blocks, rank)
        self.params, self.grads = flattened(self.tree, self._layout)  # (parameters,) each

    @property
    def stale(self) -> bool:
        """Whether the folded weights lag behind the adapter."""
        return self._folded is not None and self._stale

    @property
    def folds(self) -> bool:
        """Whether drafting has weights of its own, with the adapter folded in."""
        return self._folded is not None

    @property
    def folded_tree(self) -> PreTrainedModel:
        """The module tree with these weights, where there is one."""
        assert self._folded is not None
        return self._folded.tree

    def fold(self) -> None:
        """Brings the folded weights up to date with the adapter.

        What is not finite is not served: it is folded again the next time, and until then the adapter stays beside the weights.
        """
        if self._folded is not None and self._stale:
            self._stale = not self._folded.fold(self._change)

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
        return self._layout.split(vector)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of `split`."""
        return self._layout.join(rows)

    def with_zero_b(self, block: Tensor) -> Tensor:
        """A copy of one block's parameters that changes nothing, as a new adapter's do: B is zero."""
        return self._layout.with_zero_b(block)

    def named(self, params: Tensor) -> dict[str, Tensor]:
        """The parts of a vector like `params` by the names that PEFT gives them in files, as views."""
        return self._layout.named(params)

    def outputs(self, params: Tensor) -> dict[str, Tensor]:
        """The same, of B alone: what `served_params` changes."""
        return self._layout.outputs(params)

    def placed(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts by PEFT's names, by the names that the model gives them, on its device."""
        return self._layout.placed(parts, self.params.device)

    def move(self, updates: Tensor) -> None:
        """Adds `updates` to the parameters."""
        self.params.add_(updates)
        self._changed()

    def put(self, rows: Tensor) -> None:
        """Sets the parameters (blocks, parameters of one block)."""
        self.params.copy_(self._layout.join(rows))
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
        return self._layout.weighted(self.params, self.weights)

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
        with self._gate.opened(weights):
            yield self.tree

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter, its gradients and the folded weights."""
        folded = 0 if self._folded is None else self._folded.nbytes
        return self.params.nbytes + self.grads.nbytes + folded


def without_adapter(lora: GatedLora) -> PreTrainedModel:
    """The model as it was before it got an adapter: its weights are shared, and in place of every LoRA layer stands what it wraps."""
    instead: dict[int, Tensor | nn.Module] = {id(parameter): parameter for parameter in lora.tree.parameters()}
    instead |= {id(layer): layer.get_base_layer() for layer in lora.layers}
    plain = copy_modules(lora.tree, instead)
    vars(plain).pop("peft_config", None)
    return plain
