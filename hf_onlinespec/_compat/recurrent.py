"""Recurrent states in transformers' caches: copied before a forward, and put back where some of its tokens were rejected."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from .caches import cache_parts
from .generation import generative
from .versions import imports_of_others

with imports_of_others():
    from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class RecurrentStates:
    """What the recurrent layers of a cache held behind so many tokens, their convolutions included."""

    tokens: int
    states: tuple[Tensor, ...]  # in the order of `_states`


def is_recurrent(target: PreTrainedModel) -> bool:
    """Whether a model is marked as one that keeps a recurrent state."""
    return bool(target._is_stateful)


def keeps_state_in_cache(target: PreTrainedModel) -> bool:
    """Whether a recurrent model keeps its state in a transformers `Cache`, and nowhere else.

    RWKV and xLSTM hand on an object of their own, RecurrentGemma keeps its states in its modules (5.24).
    """
    in_modules = target.config.get_text_config(decoder=True).model_type == "recurrent_gemma"
    return generative(target)._supports_default_dynamic_cache() and not in_modules


def has_recurrent_state(cache: Cache) -> bool:
    """Whether a cache holds a recurrent state now."""
    return any(any(layer.is_recurrent_states_initialized.values()) for layer in _layers(cache))


def saved_states(cache: Cache, tokens: int) -> RecurrentStates:
    """A copy of what the recurrent layers of a cache hold.

    Args:
        tokens: in the cache.
    """
    return RecurrentStates(tokens, tuple(state.clone() for _, _, state in _states(cache)))


def restore(cache: Cache, saved: RecurrentStates) -> None:
    """Puts saved states back."""
    for (kept, i, state), earlier in zip(_states(cache), saved.states, strict=True):
        if state.shape == earlier.shape:
            state.copy_(earlier)
        else:  # convolutions that were recorded, see `record_past`
            kept[i] = earlier.clone()


def _layers(cache: Cache) -> list[LinearAttentionCacheLayerMixin]:
    return [layer for layer in cache_parts(cache)[0].layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


def _states(cache: Cache) -> list[tuple[dict[int, Tensor | None], int, Tensor]]:
    """Each state that there is yet, and where it is kept."""
    kinds = [kind for layer in _layers(cache) for kind in (layer.conv_states, layer.recurrent_states)]
    return [(kind, i, state) for kind in kinds for i, state in kind.items() if state is not None]
