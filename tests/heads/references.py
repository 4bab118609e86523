"""Draft heads, written a second time from their papers' formulas: plain functions on dictionaries of tensors.

Nothing of hf_onlinespec is imported. A past is a list of (keys, values), one pair per layer, each (B, heads, length, head_dim); to
crop it is to slice them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Past = list[tuple[Tensor, Tensor]]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turns the pairs (x_i, x_{i + d/2}) of (B, heads, n, d) by the angle position · theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() / theta ** (torch.arange(half).double() / half)  # (n, half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(w: Weights, name: str, x: Tensor, past: tuple[Tensor, Tensor] | None, s: dict[str, Any]) -> Any:
    """(B, n, width) to the same rows attended to, and the keys and values now cached."""
    d, eps = s["head_dim"], s["eps"]
    q, k, v = (linear(x, w, f"{name}.{part}_proj").unflatten(-1, (-1, d)).transpose(1, 2) for part in "qkv")
    if f"{name}.q_norm.weight" in w:
        q, k = rms(q, w[f"{name}.q_norm.weight"], eps), rms(k, w[f"{name}.k_norm.weight"], eps)
    before, n = (0 if past is None else past[0].shape[2]), x.shape[1]
    positions = torch.arange(before, before + n)
    q, k = rotated(q, positions, s["theta"]), rotated(k, positions, s["theta"])
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    share = q.shape[1] // k.shape[1]  # query heads of one key head stand side by side
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for row in range(n):
            seen = slice(0, before + row + 1)
            scores = torch.einsum("bd,btd->bt", q[:, head, row], k[:, head // share, seen]) / math.sqrt(d)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            weights = weights / weights.sum(-1, keepdim=True)
            out[:, head, row] = torch.einsum("bt,btd->bd", weights, v[:, head // share, seen])
    return linear(out.transpose(1, 2).flatten(2), w, f"{name}.o_proj"), (k, v)


def behind_attention(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """The second half of a Llama layer."""
    y = rms(x, w[f"{name}.post_attention_layernorm.weight"], eps)
    gated = silu(linear(y, w, f"{name}.mlp.gate_proj")) * linear(y, w, f"{name}.mlp.up_proj")
    return x + linear(gated, w, f"{name}.mlp.down_proj")


def plain_layer(w: Weights, name: str, x: Tensor, past: Any, s: dict[str, Any]) -> Any:
    norm = f"{name}.input_layernorm.weight"
    attended, kept = attention(w, f"{name}.self_attn", rms(x, w[norm], s["eps"]) if norm in w else x, past, s)
    return behind_attention(w, name, x + attended, s["eps"]), kept


def eagle3(w: Weights, s: dict[str, Any], tokens: Tensor, features: Any, hidden: Any, past: Past | None) -> Any:
    """Logits, hidden and past of EAGLE-3; weights by speculators' names, `embed_tokens.weight` included."""
    eps, h = s["eps"], hidden
    if features is not None:
        if "input_norm.weight" in w:
            features = rms(features, w["input_norm.weight"], eps)
        if "fc_norm.0.weight" in w:
            size = len(w["fc_norm.0.weight"])
            parts = [features[..., i * size : (i + 1) * size] for i in range(features.shape[-1] // size)]
            features = torch.cat([rms(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)], -1)
        h = linear(features, w, "fc")
    a = rms(w["embed_tokens.weight"][tokens], w["layers.0.input_layernorm.weight"], eps)
    b = rms(h, w["layers.0.hidden_norm.weight"], eps)
    attended, first = attention(w, "layers.0.self_attn", torch.cat([a, b], -1), past and past[0], s)
    out = behind_attention(w, "layers.0", (b if s["norm_before_residual"] else h) + attended, eps)
    kept = [first]
    while f"layers.{len(kept)}.mlp.up_proj.weight" in w:
        i = len(kept)
        out, pair = plain_layer(w, f"layers.{i}", out, past and past[i], s)
        kept.append(pair)
    normed = rms(out, w["norm.weight"], eps)
    return linear(normed, w, "lm_head"), normed if s["norm_output"] else out, kept


def eagle1(w: Weights, s: dict[str, Any], tokens: Tensor, features: Any, hidden: Any, past: Past | None) -> Any:
    """EAGLE-1; `embed_tokens.weight` and `target_lm_head.weight` are its target's."""
    given = features if features is not None else hidden
    out, kept = linear(torch.cat([w["embed_tokens.weight"][tokens], given], -1), w, "fc"), []
    while f"layers.{len(kept)}.mlp.up_proj.weight" in w:
        out, pair = plain_layer(w, f"layers.{len(kept)}", out, past and past[len(kept)], s)
        kept.append(pair)
    return linear(out, w, "target_lm_head"), out, kept


def hydra(w: Weights, s: dict[str, Any], tokens: Tensor, features: Any, hidden: Any, past: Past | None) -> Any:
    """Hydra, by the names of its files: a module stands at every place of its Sequentials, or at every second one."""
    prefix = "prefix_embeding_layer.norm.weight" in w
    if features is not None and prefix:
        out, pair = plain_layer(w, "prefix_embeding_layer.layers.0", features, past and past[0], s)
        hidden, past = rms(out, w["prefix_embeding_layer.norm.weight"], s["eps"]), [pair]
    elif features is not None:
        hidden = features
    hidden = torch.cat([hidden, w["embed_tokens.weight"][tokens]], -1)
    i, first, step = hidden.shape[-1] // s["hidden_size"] - 2, *((1, 2) if prefix else (0, 1))
    place = f"hydra_mlp.{i}.{first}"
    x = linear(hidden, w, f"{place}.res_connection") + silu(linear(hidden, w, f"{place}.linear"))
    for j in range(1, s["hydra_num_layers"]):
        x = x + silu(linear(x, w, f"hydra_mlp.{i}.{first + step * j}.linear"))
    return linear(x, w, f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"), hidden, past
