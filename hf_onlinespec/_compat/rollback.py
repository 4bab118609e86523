"""Taking tokens back out of transformers' caches: which layers allow it, how many tokens, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from .caches import cache_parts
from .recurrent import has_recurrent_state
from .versions import imports_of_others

with imports_of_others():
    from transformers import cache_utils
    from transformers.cache_utils import (
        Cache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionCacheLayerMixin,
        QuantizedLayer,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

# Layers that quantise each token by itself, with the scale of the first ones; transformers 5.20 has none.
APPENDING = tuple(vars(cache_utils)[name] for name in ("Fp8QuantizedLayer",) if name in vars(cache_utils))
QUANTIZED = (QuantizedLayer, *APPENDING)
NO_LIMIT = 2**31


def rollback_obstacle(cache: Any) -> str:
    """What keeps a cache from being rolled back, said of the model that it belongs to; "": nothing.

    Judged by its layers. Up to which token a layer can be rolled back: see `feed_limit`. A recurrent state is put back from a copy,
    see recurrent.py.
    """
    if not isinstance(cache, Cache):
        return f"keeps a {type(cache).__name__} instead of a transformers Cache, which cannot be rolled back"
    cache = cache_parts(cache)[0]
    for part in (cache, *cache.layers):
        name = type(part).__name__
        if isinstance(part, StaticLayer) and type(part) not in (StaticLayer, StaticSlidingWindowLayer):
            return f"has a preallocated cache ({type(cache).__name__} of {name}s), which cannot be rolled back"
        if isinstance(part, (StaticLayer, *QUANTIZED)):
            continue
        stated = next((vars(c)["is_croppable"] for c in type(part).__mro__ if "is_croppable" in vars(c)), None)
        if stated is False or not any("crop" in vars(c) for c in type(part).__mro__):
            return f"has a cache ({name}) that cannot be rolled back"
    return ""


@dataclass(frozen=True)
class FeedLimit:
    """How many tokens the next forward may read so that they can be taken back, and are kept as one by one."""

    tokens: int
    reason: str  # why there are no more, where that lasts; "": a later forward may read more again


def feed_limit(cache: Cache, held: int) -> FeedLimit:
    """The least of all layers. A forward over more tokens does what plain decoding does with these tokens, and is final.

    A preallocated layer is rolled back by its length, and a window of one until it is full: what it then drops is lost. A quantised
    layer keeps its last tokens as they are, until there are so many that it quantises all of them together.

    Args:
        held: tokens in the cache.
    """
    limit = FeedLimit(NO_LIMIT, "")
    for layer in cache_parts(cache)[0].layers:
        if isinstance(layer, StaticLayer) and layer.max_cache_len - held < limit.tokens:
            window = isinstance(layer, StaticSlidingWindowLayer)  # where any other layer is full, the request ends
            reason = (
                f"the target's window of {layer.max_cache_len} tokens is full, and cannot be rolled back"
                if window
                else ""
            )
            limit = FeedLimit(layer.max_cache_len - held, reason)
        elif isinstance(layer, QuantizedLayer) and layer.residual_length - _exact(layer) <= limit.tokens:
            limit = FeedLimit(layer.residual_length - _exact(layer) - 1, "")
    return limit


def quantizes(cache: Cache) -> bool:
    """Whether a cache quantises what it keeps: the tokens of a first forward together, as plain decoding's."""
    return any(isinstance(layer, QUANTIZED) for layer in cache_parts(cache)[0].layers)


def _exact(layer: QuantizedLayer) -> int:
    """Last tokens of a layer that are not quantised yet."""
    keys = layer.keys
    return keys.shape[-2] if layer.is_initialized and keys is not None and keys.dim() == 4 else 0


def forgets(cache: Cache, n: int) -> str:
    """Why the last n tokens cannot be taken back; "": they can."""
    if has_recurrent_state(cache):
        return "its recurrent state has taken them in"
    for layer in cache_parts(cache)[0].layers:
        if isinstance(layer, QuantizedLayer) and _exact(layer) < n:
            return "they were quantised together with what came before"
        if isinstance(layer, StaticSlidingWindowLayer) and layer.get_seq_length() > layer.max_cache_len:
            return "its sliding window has dropped what came before"
        if not isinstance(layer, DynamicSlidingWindowLayer) or not layer.is_initialized or layer.keys is None:
            continue
        if layer.cumulative_length >= layer.sliding_window and layer.keys.shape[-2] < layer.sliding_window - 1 + n:
            return "its sliding window has dropped what came before"
    return ""


def record_past(cache: Cache, recurrent: bool = False) -> None:
    """Sliding-window layers and convolutions keep what a later `crop` may need.

    Args:
        recurrent: whether convolutions are put back from a copy, as recurrent states are: some classes cannot record them (Zaya).
    """
    if not recurrent:
        cache.activate_past_recording()
        return
    for layer in cache_parts(cache)[0].layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()


def crop(cache: Cache, n: int) -> None:
    """Removes the last n tokens, but from what is put back from a copy, see recurrent.py. Called with 0 too: that trims
    sliding-window layers back to their window.

    Transformers 5.18 cannot crop a layer that was never filled, as Mllama's for pictures is in a conversation without one; and no
    release crops a quantised layer, or a preallocated one of an encoder–decoder.
    """
    layers = cache_parts(cache)[0].layers
    own = [layer for layer in layers if isinstance(layer, (StaticLayer, *QUANTIZED)) or _is_copied(layer)]
    filled = [layer for layer in layers if type(layer) is not DynamicLayer or layer.is_initialized]
    if len(filled) == len(layers) and not own:
        cache.crop(-n)
        return
    for layer in filled:
        if isinstance(layer, StaticLayer):
            _crop_preallocated(layer, n)
        elif isinstance(layer, QUANTIZED):
            _crop_quantized(layer, n)
        elif _is_copied(layer):
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                DynamicLayer.crop(layer, -n)
        else:  # what cannot be cropped was refused, see rollback_obstacle
            cast(DynamicLayer, layer).crop(-n)


def compact(cache: Cache) -> None:
    """Lays out anew what a crop has left as a part of something larger: compiled programs are made for one layout of their inputs."""
    for layer in cache_parts(cache)[0].layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()


def _is_copied(layer: object) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not layer.record_past


def _crop_preallocated(layer: StaticLayer, n: int) -> None:
    """Its length alone: the next forward writes over what is behind it. In place, as a compiled forward reads it there."""
    if isinstance(layer, StaticSlidingWindowLayer):
        if n == 0:
            return
        layer.cumulative_length_int -= n
    layer.cumulative_length.sub_(n)


def _crop_quantized(layer: Any, n: int) -> None:
    """The last tokens, of which each is kept by itself."""
    if n == 0:
        return
    layer.cumulative_length -= n
    if isinstance(layer, APPENDING):
        for name in ("_quantized_keys", "_quantized_values"):
            states, scale = vars(layer)[name]
            vars(layer)[name] = (states[..., :-n, :], scale)
    else:
        layer.keys, layer.values = layer.keys[..., :-n, :], layer.values[..., :-n, :]
