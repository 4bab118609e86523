"""Transformers' caches: what can be rolled back, and how."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from .alterations import is_foreign
from .versions import imports_of_others

with imports_of_others():
    from transformers import DynamicCache, PretrainedConfig, cache_utils
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        EncoderDecoderCache,
        StaticLayer,
    )
    from transformers.generation import GenerateDecoderOnlyOutput
    from transformers.utils import ModelOutput

# What the KV cache is called in inputs and outputs: from transformers 5.24 on "cache", where `generate` renames what callers say.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"

# The place in a cache of a layer that shares the keys of an earlier one; transformers 5.20 has no such class yet.
KEYLESS = tuple(vars(cache_utils)[name] for name in ("DummyLayer",) if name in vars(cache_utils))


def rolls_back(config: PretrainedConfig) -> bool:
    """Whether a model's cache is made of keys and values alone, which a rejected token leaves without a trace.

    Last layers that share the keys of earlier ones (Gemma 3n) have none of their own.
    """
    layers = [type(layer) for layer in DynamicCache(config=config).layers]
    while layers and layers[-1] in KEYLESS:
        layers.pop()
    return all(layer in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def keeps_all(config: PretrainedConfig, places: int | None = None) -> bool:
    """Whether a model's layers keep keys and values of every token, and nothing else.

    Args:
        places: that a request takes at most: a window that is as wide keeps them all. None: not known.
    """
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return all(type(layer) is DynamicLayer or _is_wide(layer, places) for layer in layers)


def _is_wide(layer: Any, places: int | None) -> bool:
    """Whether a layer has a window that is wider than a request is long, and has dropped nothing yet."""
    if places is None or type(layer) is not DynamicSlidingWindowLayer or layer.sliding_window < places:
        return False
    return layer.keys is None or layer.keys.shape[-2] == layer.get_seq_length()


def narrowest_window(config: PretrainedConfig) -> int | None:
    """Tokens that the layer of a model with the narrowest window attends to; None: none has a window."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return min((layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer), default=None)


def other_state(inputs: Mapping[str, Any]) -> str:
    """The name of an input beside the KV cache, and of its class, that is a cache too, or an object of a model's own: its forwards change
    what it holds (the padding of streamed sound). "": there is none.
    """
    for name, value in inputs.items():
        own = type(value).__module__.startswith("transformers.models.") and not isinstance(value, Tensor | ModelOutput)
        if name != CACHE and (own or isinstance(value, Cache)):
            return f"{name} ({type(value).__name__})"
    return ""


def moves(cache: Cache, places: int | None = None) -> bool:
    """Whether rows of a cache can be moved within it: it keeps every token's, on the device where they are used.

    Args:
        places: as `keeps_all` takes them.
    """
    return all(
        not vars(part).get("offloading")
        and all(type(layer) is DynamicLayer or _is_wide(layer, places) for layer in part.layers)
        for part in cache_parts(cache)
    )


def cache_parts(cache: Cache) -> tuple[Cache, ...]:
    """The cache of the tokens that are written, then that of an encoder's outputs, if there is one."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


# Methods that decide what a layer keeps of a forward, and what a later one sees.
_KEEPING = {"update", "crop", "get_seq_length", "get_mask_sizes"}


def own_way(cache: Any, config: PretrainedConfig) -> str:
    """What a given cache keeps otherwise than the cache that `generate` makes for this model, said of the cache; "": nothing.

    Such a cache may keep something else of several tokens at once than of one after the other, long after the first ones: it may
    drop some, or round them together. Each kept token by itself is as in plain decoding.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    parts = (cache, *cache.layers)
    replicated = vars(cache).get("layer_class_to_replicate")  # of layers that the first forward makes
    classes = dict.fromkeys([*map(type, parts), *([] if replicated is None else [replicated])])
    for owner in (*classes, *(part for part in parts if _KEEPING & vars(part).keys())):
        name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        for method in sorted(_KEEPING):
            kinds = owner.__mro__ if isinstance(owner, type) else (owner,)
            found = next((vars(kind)[method] for kind in kinds if method in vars(kind)), None)
            if found is not None and is_foreign(found):
                return f"{name} has a way of its own to keep what was read ({method})"
    windows = [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers]
    made = DynamicCache(config=config).layers if any(windows) else []
    for window, layer in zip(windows, made, strict=False):
        if window and not (isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window == window):
            return f"{type(cache).__name__} has a layer with a window of {window} tokens, which the model does not have"
    return ""


def held_tokens(cache: Cache) -> int:
    """Tokens that were read into a cache, those included that its windows have dropped; 0 of one that does not count them."""
    return int(cache.get_seq_length()) if counts_tokens(cache) else 0


def counts_tokens(cache: Cache) -> bool:
    """Whether a cache tells how many tokens were read into it: one of recurrent states alone (Mamba) does not."""
    layers = cache_parts(cache)[0].layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def held_rows(cache: Cache) -> int | None:
    """Rows of the batch that a cache was filled with; None: it holds nothing, or none of its layers tells."""
    kinds = DynamicLayer, StaticLayer
    filled = [layer for layer in cache_parts(cache)[0].layers if isinstance(layer, kinds) and layer.is_initialized]
    states = (
        [layer.keys for layer in filled if layer.keys is not None and layer.keys.numel()] if held_tokens(cache) else []
    )
    return states[0].shape[0] if states else None


def fresh_cache(config: PretrainedConfig) -> Cache:
    """An empty cache, as `generate` makes it."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=text), DynamicCache(config=text))
    return DynamicCache(config=text)


def make_ordinary(cache: Cache) -> None:
    """Lets a cache that was made under `torch.inference_mode()` be written to outside of it: tensors of that kind are copied.

    A preallocated layer and a recurrent state are written in place; layers that grow make new tensors with every forward.
    """
    for layer in (layer for part in cache_parts(cache) for layer in part.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            for values in (vars(layer), *(value for value in vars(layer).values() if isinstance(value, dict))):
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.is_inference():
                        values[name] = value.clone()


def returned_cache(outputs: ModelOutput) -> Cache | None:
    """The cache that a forward returned."""
    cache = outputs.get(CACHE)
    return cache if isinstance(cache, Cache) else None


def move(cache: Cache, sources: Tensor, to: int) -> None:
    """Moves the keys and values of some tokens to the places from `to` on; a cache that `moves`.

    Args:
        sources: (batch, n) the places where they are, at `to` or behind it.
    """
    n, at = sources.shape[1], sources[:, None, :, None]
    for layer in _filled(cache):
        at = at.to(layer.keys.device)
        for states in (layer.keys, layer.values):  # (batch, heads, length, head_dim); `update` has just made them
            index = at.expand(-1, states.shape[1], -1, states.shape[3])
            states[..., to : to + n, :] = states.gather(-2, index)


def rearrange(cache: Cache, places: Tensor) -> None:
    """Leaves in each row the keys and values at these places (batch, n), in this order; of a cache that `moves`.

    Row by row: a gather over all of them at once takes several times as long on a CPU.
    """
    for layer in _filled(cache):
        own = places.to(layer.keys.device)
        layer.keys = torch.stack([row.index_select(1, at) for row, at in zip(layer.keys, own, strict=True)])
        layer.values = torch.stack([row.index_select(1, at) for row, at in zip(layer.values, own, strict=True)])


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Leaves these rows of the batch, in this order, also of an encoder's outputs; of a cache that `moves`."""
    for layer in (layer for part in cache_parts(cache) for layer in _filled(part)):
        own = rows.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[own], layer.values[own]


def join_rows(cache: Cache, others: Cache, places: int) -> None:
    """Puts the rows of another cache behind those of the first, both filled up on the left to so many places; of caches that `move`.

    What an encoder has read is equally long in both.
    """

    def filled(states: Tensor, device: torch.device, n: int) -> Tensor:
        return functional.pad(states.to(device), (0, 0, n - states.shape[-2], 0))

    for part, other_part in zip(cache_parts(cache), cache_parts(others), strict=True):
        for layer, other in zip(_filled(part), _filled(other_part), strict=True):
            device, n = layer.keys.device, places if part is cache_parts(cache)[0] else layer.keys.shape[-2]
            layer.keys = torch.cat([filled(layer.keys, device, n), filled(other.keys, device, n)])
            layer.values = torch.cat([filled(layer.values, device, n), filled(other.values, device, n)])


def shallow_copy(cache: Cache) -> Cache:
    """A cache of the same keys and values, whose rows can be chosen without the other's; of one that `moves`."""
    found = copy.copy(cache)
    if isinstance(found, EncoderDecoderCache):
        for name in ("self_attention_cache", "cross_attention_cache"):
            vars(found)[name] = shallow_copy(vars(cache)[name])
        found.is_updated = dict(found.is_updated)
    else:
        found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def without_windows(cache: Cache) -> Cache:
    """A `shallow_copy` whose layers keep every token; of one that `moves`, whose windows nothing has left yet."""
    found = shallow_copy(cache)
    for part in cache_parts(found):
        part.layers = [_whole(layer) if type(layer) is DynamicSlidingWindowLayer else layer for layer in part.layers]
    return found


def _whole(layer: DynamicSlidingWindowLayer) -> DynamicLayer:
    found = DynamicLayer()
    if layer.keys is not None and layer.values is not None:
        found.update(layer.keys, layer.values)
    return found


def _windowed(layer: Any, own: Any) -> Any:
    """A layer with the window that `own` has, if it has one."""
    if type(own) is not DynamicSlidingWindowLayer or type(layer) is not DynamicLayer:
        return layer
    found = DynamicSlidingWindowLayer(own.sliding_window)
    if layer.keys is not None and layer.values is not None:
        found.update(layer.keys, layer.values)
    return found


def take_over(cache: Cache, other: Cache) -> None:
    """Leaves a cache with the keys and values of another one, which is used up; its layers have the windows that they had."""
    for part, other_part in zip(cache_parts(cache), cache_parts(other), strict=True):
        same = len(part.layers) == len(other_part.layers)  # else the first forward makes them
        part.layers = list(map(_windowed, other_part.layers, part.layers)) if same else other_part.layers
    if isinstance(cache, EncoderDecoderCache) and isinstance(other, EncoderDecoderCache):
        cache.is_updated = other.is_updated


def cache_tensors(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every filled layer, each (batch, heads, length, head_dim)."""
    return [(layer.keys, layer.values) for layer in _filled(cache)]


class _KeyedLayer(Protocol):
    """A layer with keys and values of its own, each (batch, heads, length, head_dim) once it is filled."""

    is_initialized: bool
    keys: Tensor
    values: Tensor


def _filled(cache: Cache) -> list[_KeyedLayer]:
    own = cast(list[_KeyedLayer], [layer for layer in cache_parts(cache)[0].layers if type(layer) not in KEYLESS])
    return [layer for layer in own if layer.is_initialized]


def copied_prefix(cache: Cache, length: int, config: PretrainedConfig) -> DynamicCache:
    """The first `length` tokens of a cache as one of its own, which gradients may run through.

    Drafting fills its cache under inference_mode. Tensors of that kind cannot take part in autograd: what is still one of them
    after it was taken over is copied. (`update` has copied it already where it concatenates, as it does in the versions above.)
    """
    taken = DynamicCache(config=config)
    for index, (keys, values) in enumerate(cache_tensors(cache)):
        taken.update(keys[..., :length, :].detach(), values[..., :length, :].detach(), index)
    for layer in _filled(taken):
        if layer.keys.is_inference() or layer.values.is_inference():
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return taken
