"""Hydra's draft heads (arXiv:2402.05109): a small network for each token, which sees the tokens drafted before it.

    hidden_0 = features, or the prefix layer over them;  hidden_{i+1} = [hidden_i, embedding of the token]
    logits_i = lm_heads[i](mlps[i](hidden_{i+1}))

How wide the hidden state is says which network comes next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..errors import DraftError
from .base import Head, HeadOutput, kept, require_one, started
from .config import HydraConfig
from .layer import PlainLayer, rotary_embedding


class ResBlock(nn.Module):
    """res(x) + SiLU(linear(x)); where width does not change, res(x) is x.

    Args:
        wide, width: numbers in and out.
    """

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, width)
        self.res_connection = nn.Linear(wide, width) if wide != width else nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.res_connection(rows) + F.silu(self.linear(rows))
        return out


class HydraMLP(nn.Module):
    """The network of one drafted token: a block that narrows, then one block several times.

    Args:
        wide, width: numbers in and out.
        num_blocks: all blocks, the first one included.
    """

    def __init__(self, wide: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.repeats = num_blocks - 1
        self.first = ResBlock(wide, width)
        self.further = ResBlock(width, width) if self.repeats else None

    def forward(self, rows: Tensor) -> Tensor:
        """(B, n, wide) to (B, n, width)."""
        rows = self.first(rows)
        for _ in range(self.repeats):
            assert self.further is not None
            rows = self.further(rows)
        return rows


class HydraHead(Head):
    """Hydra's heads, "mlp" and "prefix-mlp". Only the prefix layer has a cache, and only first steps write to it."""

    config: HydraConfig
    config_class = HydraConfig

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        width, count = config.hidden_size, config.num_heads
        self.prefix = PlainLayer(config, 0) if config.prefix else None
        self.prefix_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps) if config.prefix else None
        self.rotary_emb = rotary_embedding(config) if config.prefix else None
        self.mlps = nn.ModuleList(HydraMLP(width * (i + 2), width, config.num_blocks) for i in range(count))
        self.lm_heads = nn.ModuleList(nn.Linear(width, config.vocab_size) for _ in range(count))
        self.post_init()

    @property
    def reads(self) -> tuple[int, ...]:
        return (-1,)

    @property
    def most(self) -> int | None:
        return self.config.num_heads

    def forward(
        self,
        tokens: Tensor,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> HeadOutput:
        require_one(features, hidden)
        cache = started(past_key_values, use_cache) if self.prefix is not None else past_key_values
        if features is not None:
            hidden = features.to(self.dtype)
            if self.prefix is not None:
                assert self.prefix_norm is not None
                context = self.context(hidden, attention_mask, position_ids, cache)
                hidden = self.prefix_norm(self.prefix(hidden, context))
        assert hidden is not None
        index = hidden.shape[-1] // self.config.hidden_size - 1  # tokens read since the features
        if index >= self.config.num_heads:
            raise DraftError(
                f"This Hydra head drafts {self.config.num_heads} tokens behind a row of features, no more."
            )
        hidden = torch.cat([hidden, self.embedded(tokens).to(hidden)], dim=-1)
        logits = self.lm_heads[index](self.mlps[index](kept(hidden, logits_to_keep)))
        return HeadOutput(logits, hidden, cache)
