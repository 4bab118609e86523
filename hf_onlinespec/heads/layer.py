"""The parts of a head's decoder layer: attention over a cache, and the layers of each kind of head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from .config import HeadConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers, as transformers calls them


def rotary_embedding(config: HeadConfig) -> LlamaRotaryEmbedding:
    """Llama's rotary embedding by the configuration of a head."""
    return LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # it reads `rope_parameters` and widths, which we have


@dataclass
class Context:
    """What the rows of one forward attend to, and where they stand."""

    rope: tuple[Tensor, Tensor]  # cosines and sines, each (1 or B, n, head_dim)
    mask: Tensor | None  # (1 or B, 1, n, total), boolean or added to the scores; None: every key, or `causal`
    causal: bool  # the usual triangle, where the cache is empty
    cache: Cache | None


def positions_of(mask: Tensor | None, n: int, past: int, device: torch.device) -> Tensor:
    """Positions (1 or B, n) of the rows behind `past` cached ones; padding on the left counts for none."""
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
    return torch.arange(past, past + n, device=device)[None]


def mask_of(mask: Tensor | None, n: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The mask for the scores (1 or B, 1, n, past + n); None: all keys are seen, or the usual triangle where past is 0.

    Args:
        mask: None, (B, past + n) with zeros for padding, or (B, 1, n, past + n), which is taken as it is.
    """
    if mask is not None and mask.dim() == 4:
        return mask if mask.dtype == torch.bool else mask.to(dtype)
    padded = mask is not None and not bool(mask.all())
    if not padded and (past == 0 or n == 1):
        return None
    return seen_keys(mask if padded else None, n, past, device)


def seen_keys(mask: Tensor | None, n: int, past: int, device: torch.device) -> Tensor:
    """Which keys n rows behind `past` cached ones see: (1 or B, 1, n, past + n), up to their own.

    Args:
        mask: (B, past + n) with zeros for padding; None: there is none.
    """
    seen = torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)[None, None]
    if mask is None:
        return seen
    own = torch.eye(n, past + n, dtype=torch.bool, device=device).roll(past, dims=1)
    return (seen & mask.bool()[:, None, None]) | own  # padding sees itself, as a row without any key has no softmax


def seen_of(mask: Tensor | None, n: int, past: int, device: torch.device) -> Tensor:
    """Which keys n rows behind `past` cached ones see: (1 or B, 1, n, past + n), boolean. Arguments as of `Head.forward`."""
    if mask is None or mask.dim() == 2:
        return seen_keys(mask, n, past, device)
    return mask if mask.dtype == torch.bool else mask >= 0


class Attention(nn.Module):
    """Llama's attention for rows of any width.

    Args:
        width: of a row.
        index: of the layer in the cache.
    """

    def __init__(self, config: HeadConfig, width: int, index: int) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert kv_heads is not None and self.head_dim is not None
        self.index, self.grouped = index, heads != kv_heads
        bias = bool(config.qkv_bias)
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, rows: Tensor, context: Context) -> Tensor:
        """(B, n, width) to (B, n, hidden_size)."""
        shape = (*rows.shape[:2], -1, self.head_dim)
        queries = self.q_norm(self.q_proj(rows).view(shape)).transpose(1, 2)  # (B, heads, n, head_dim)
        keys = self.k_norm(self.k_proj(rows).view(shape)).transpose(1, 2)
        values = self.v_proj(rows).view(shape).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *context.rope)
        if context.cache is not None:
            keys, values = context.cache.update(keys, values, self.index)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=context.mask, is_causal=context.causal, enable_gqa=self.grouped
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class Eagle3Layer(nn.Module):
    """EAGLE-3's first layer: attention over the token's embedding beside the hidden state, each normalised by itself."""

    def __init__(self, config: HeadConfig, norm_before_residual: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = LlamaRMSNorm(width, eps=eps)
        self.hidden_norm = LlamaRMSNorm(width, eps=eps)
        self.self_attn = Attention(config, 2 * width, 0)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=eps)
        self.mlp = LlamaMLP(config)

    def forward(self, embedded: Tensor, hidden: Tensor, context: Context) -> Tensor:
        """Embeddings and hidden states, both (B, n, hidden_size), to (B, n, hidden_size)."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        hidden = residual + self.self_attn(torch.cat([self.input_layernorm(embedded), normed], dim=-1), context)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class PlainLayer(nn.Module):
    """A Llama layer over hidden states alone.

    Args:
        index: of the layer in the cache.
        input_norm: whether it normalises what it is given.
    """

    def __init__(self, config: HeadConfig, index: int, input_norm: bool = True) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(width, eps=eps) if input_norm else nn.Identity()
        self.self_attn = Attention(config, width, index)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """(B, n, hidden_size) to (B, n, hidden_size)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out
