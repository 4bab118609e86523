"""EAGLE-3's draft head (arXiv:2503.01840), with the variants that are served: 3.1's norms, several layers, reduced vocabularies.

first step: h = fc(features);  later step: h = the last output (before `norm`; behind it with norm_output)
out = layers(embedding of the token, h);  logits = lm_head(norm(out))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..errors import DraftError, brief
from .base import Head, HeadOutput, kept, require_one, started
from .config import Eagle3Config
from .layer import Eagle3Layer, PlainLayer, rotary_embedding
from .names import EAGLE3


class Eagle3Head(Head):
    """EAGLE-3's head.

    Attributes:
        form: the one that its folder has, "eagle3" or "speculators".

    Args:
        draft_ids: (draft_vocab_size,) target ids of its logits, ascending; None: the first ones.

    Raises:
        DraftError: `draft_ids` are not such ids.
    """

    config: Eagle3Config
    config_class = Eagle3Config
    lm_head: nn.Module

    def __init__(self, config: Eagle3Config, draft_ids: Tensor | None = None) -> None:
        super().__init__(config)
        self.form = EAGLE3
        width, eps, target_width = config.hidden_size, config.rms_norm_eps, config.target_hidden_size
        assert target_width is not None and config.draft_vocab_size is not None
        size = len(config.reads) * target_width
        self.input_norm = LlamaRMSNorm(size, eps=eps) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(target_width, eps=eps) for _ in config.reads] if config.fc_norm else None
        self.fc_norm = None if norms is None else nn.ModuleList(norms)
        self.fc = nn.Linear(size, width, bias=config.bias)
        first = Eagle3Layer(config, config.norm_before_residual)
        further = (PlainLayer(config, i) for i in range(1, config.num_hidden_layers))
        self.layers = nn.ModuleList([first, *further])
        self.norm = LlamaRMSNorm(width, eps=eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary_emb = rotary_embedding(config)
        if config.draft_vocab_size < config.vocab_size:
            self.draft_ids = torch.arange(config.draft_vocab_size)
        if draft_ids is not None:
            self.set_draft_ids(draft_ids)
        self.post_init()

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(self.config.reads)

    @property
    def most(self) -> int | None:
        return None

    def set_draft_ids(self, draft_ids: Tensor) -> None:
        """Sets which target ids (draft_vocab_size,) the logits stand for. Raises DraftError."""
        size, most = self.config.draft_vocab_size, self.config.vocab_size
        if draft_ids.shape != (size,):
            raise DraftError(
                f"draft_ids has shape {brief(tuple(draft_ids.shape))}: expected ({size},), draft_vocab_size."
            )
        ids = draft_ids.long()
        if int(ids[0]) < 0 or int(ids[-1]) >= most or not bool((ids.diff() > 0).all()):
            raise DraftError(f"draft_ids are not {size} ascending ids from 0 to {most - 1}, vocab_size - 1.")
        if self.draft_ids is not None:
            self.draft_ids = ids.to(self.draft_ids.device)

    def projected(self, features: Tensor) -> Tensor:
        """Features (B, n, features) as the hidden states (B, n, hidden_size) of a first step."""
        features = features.to(self.norm.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = zip(self.fc_norm, features.chunk(len(self.fc_norm), dim=-1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], dim=-1)
        hidden: Tensor = self.fc(features)
        return hidden

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
        hidden = self.projected(features) if features is not None else hidden
        assert hidden is not None
        context = self.context(hidden, attention_mask, position_ids, cache)
        hidden = self.layers[0](self.embedded(tokens).to(hidden), hidden, context)
        for layer in self.layers[1:]:
            hidden = layer(hidden, context)
        if self.config.norm_output:
            hidden = self.norm(hidden)
            logits = self.lm_head(kept(hidden, logits_to_keep))
        else:
            logits = self.lm_head(self.norm(kept(hidden, logits_to_keep)))
        return HeadOutput(logits, hidden, cache)
