"""EarlyExit: the first layers of a target with its final norm and its head, as a draft over the same weights.

LayerSkip (arXiv:2404.16710, section 4.3) drafts so with targets that were trained to exit early. Others say little behind their
first layers, until an adapter has learned what the rest of them would have made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ConfigError, DraftError, brief
from .borrow import borrow
from .plain import plain_draft

OWN_INPUTS = (
    "hidden_size_per_layer_input"  # inputs that each layer has of its own, made for all layers at once (Gemma 3n and 4)
)
SHARED_LAYERS = "num_kv_shared_layers"  # last layers that read keys and values of earlier ones (Gemma 3n and 4)


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """The first layers of a target."""

    target: PreTrainedModel | PeftModel  # the latter is refused by `cut`
    layers: int

    def cut(self) -> PreTrainedModel:
        """A causal language model of these layers over the target's weights: modules of its own, the target is not touched.

        Raises:
            ConfigError: the target has no such number of layers before its last one.
            DraftError: it cannot draft, or its layers are not found.
        """
        if isinstance(self.target, PeftModel):
            raise DraftError(
                "An early exit of a PeftModel: its adapter would have to be merged, and no weights be shared with the target. Merge the "
                "adapter into the target, or draft with another model."
            )
        if self.target.config.is_encoder_decoder:
            raise DraftError(
                f"The target {type(self.target).__name__} is an encoder–decoder, of which no early exit is cut. Draft with a smaller one, or "
                "without one (onlinespec=True)."
            )
        tree = borrow(plain_draft(self.target))
        config = tree.config.get_text_config(decoder=True)
        total = config.num_hidden_layers
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or not 1 <= self.layers < total:
            raise ConfigError(
                f"assistant_early_exit={brief(self.layers)}: the target {type(self.target).__name__} has {total} layers. Expected a "
                f"whole number from 1 to {total - 1}."
            )
        if vars(config).get(OWN_INPUTS):
            raise DraftError(
                f"The target {type(self.target).__name__} gives each layer inputs of its own ({OWN_INPUTS}), made for all layers at once: no "
                "early exit is cut out of it. Draft with a small model, or without one (onlinespec=True)."
            )
        stacks = [
            (parent, key)
            for parent in tree.modules()
            for key, child in parent.named_children()
            if _is_stack(child, total)
        ]
        if len(stacks) != 1:
            raise DraftError(
                f"The target {type(self.target).__name__} has {len(stacks)} lists of {total} layers, and an early exit needs to know which "
                "one its text goes through. Draft with a small model, a head, or without one (onlinespec=True)."
            )
        [(parent, key)] = stacks
        parent.register_module(key, nn.ModuleList(list(parent.get_submodule(key).children())[: self.layers]))
        _cut_config(config, self.layers)
        return tree


def _is_stack(module: nn.Module, layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == layers


def _cut_config(config: PretrainedConfig, layers: int) -> None:
    """Lets a configuration describe the first layers alone: caches and masks are made by it, and so is an exported model."""
    total = config.num_hidden_layers
    shared = vars(config).get(SHARED_LAYERS)
    config.num_hidden_layers = layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:layers])
    if shared:
        setattr(config, SHARED_LAYERS, max(0, shared - (total - layers)))
