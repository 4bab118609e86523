"""EAGLE's first draft head (arXiv:2401.15077), which EAGLE-2 (arXiv:2406.16858) drafts with, too.

    out = layers(fc([embedding of the token, h]));  logits = the target's vocabulary head(out)

h is the target's last hidden state in a first step and the last output in a later one: the head predicts hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .base import Head, HeadOutput, kept, require_one, started
from .config import Eagle1Config
from .layer import PlainLayer, rotary_embedding


class Eagle1Head(Head):
    """EAGLE-1's head. It says its logits with the target's vocabulary head, see `Head.share`."""

    config: Eagle1Config
    config_class = Eagle1Config

    def __init__(self, config: Eagle1Config) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        # The first layer has no norm in front: what it is given comes from `fc`.
        layers = (PlainLayer(config, i, input_norm=i > 0) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.rotary_emb = rotary_embedding(config)
        self.post_init()

    @property
    def reads(self) -> tuple[int, ...]:
        return (-1,)

    @property
    def most(self) -> int | None:
        return None

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
        cache = started(past_key_values, use_cache)
        given = features if features is not None else hidden
        assert given is not None
        given = given.to(self.dtype)
        hidden = self.fc(torch.cat([self.embedded(tokens).to(given), given], dim=-1))
        assert hidden is not None
        context = self.context(hidden, attention_mask, position_ids, cache)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return HeadOutput(self.said(kept(hidden, logits_to_keep)), hidden, cache)
