"""A DFlash draft of transformers as a draft head: it says a whole block of tokens in one forward.

    block = layers([embedding of the token, of the mask, of the mask, ...]);  logits = the target's vocabulary head(block)

Keys and values come from the target's hidden states at the tokens before, and from the block itself, which sees all of it. What it says
behind its first place is the first step's, what it says behind the second the next one's, whatever is drafted meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .._compat.assistants import embedding_norm
from .._compat.caches import CACHE
from ..errors import DraftError
from .base import Head, HeadOutput, kept, require_one, started
from .config import DFlashConfig
from .layer import FULL, SLIDING, positions_of, seen_of


class _Context:
    """The cache as the layers of a draft write to it: what comes from the target stays, and the blocks do not.

    Args:
        cache: None: nothing stays.
        context: how many of the new places come from the target; blocks follow.
    """

    def __init__(self, cache: Cache | None, context: int) -> None:
        self._cache, self._context = cache, context

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """As of a Cache of transformers."""
        if self._cache is None:
            return keys, values
        m = self._context
        held = self._cache.update(keys[:, :, :m], values[:, :, :m], layer_idx)
        return torch.cat([held[0], keys[:, :, m:]], dim=2), torch.cat([held[1], values[:, :, m:]], dim=2)


class DFlashHead(Head):
    """The draft. It reads with the target's embedding and says its logits with the target's vocabulary head.

    Args:
        model: modules of its own over the draft's weights.
    """

    config: DFlashConfig
    config_class = DFlashConfig
    at_once = True

    def __init__(self, config: DFlashConfig, model: nn.Module) -> None:
        super().__init__(config)
        self.model = model

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(self.config.reads)

    @property
    def most(self) -> int | None:
        return self.config.block_size - 1

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
        """See `Head.forward`. A later step takes the next part of `hidden`, and neither reads its token nor adds to the cache."""
        require_one(features, hidden)
        cache, width = started(past_key_values, use_cache), self.config.hidden_size
        if hidden is None:
            assert features is not None
            hidden = self._blocks(tokens, features.to(self.dtype), attention_mask, position_ids, cache, logits_to_keep)
            said = hidden[..., :width]
        else:
            said = kept(hidden, logits_to_keep)[..., :width]
        if not hidden.shape[-1]:
            raise DraftError(f"This DFlash draft says {self.most} tokens behind a row of features, no more.")
        return HeadOutput(self.said(said), hidden[..., width:], cache)

    def _blocks(
        self,
        tokens: Tensor,
        features: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """What the rows that are kept say behind each place of their blocks: (B, r, most · hidden_size)."""
        (batch, m), size = tokens.shape, self.config.block_size
        past = 0 if cache is None else int(cache.get_seq_length())
        if positions is None:
            positions = positions_of(mask, m, past, tokens.device)
        first = kept(tokens, logits_to_keep)  # (B, r)
        r = first.shape[1]
        block = F.pad(first[..., None], (0, size - 1), value=self.config.mask_token_id).flatten(1)
        seen = kept(seen_of(mask, m, past, tokens.device)[:, 0], logits_to_keep)  # (1 or B, r, total)
        steps = torch.arange(1, size + 1, device=tokens.device)
        places = kept(positions, logits_to_keep)[..., None] + steps  # (1 or B, r, size)
        out = self.model(
            noise_embeds=self._embedded(block).to(features),
            context_hidden_states=features,
            position_ids=torch.cat([positions, places.flatten(1)], dim=1).expand(batch, -1),
            attention_mask={FULL: self._masks(seen, None), SLIDING: self._masks(seen, self.config.window)},
            **{CACHE: _Context(cache, m)},
        )
        said: Tensor = out.last_hidden_state.unflatten(1, (r, size))[:, :, 1:]
        return said.flatten(2)

    def _masks(self, seen: Tensor, window: int | None) -> Tensor:
        """Which keys the places of r blocks see: (1 or B, 1, r · size, total + r · size).

        Args:
            seen: (1 or B, r, total) the tokens that a row sees.
            window: how many places back; None: to the beginning.
        """
        batch, r, size = *seen.shape[:2], self.config.block_size
        context = seen[:, :, None].expand(-1, -1, size, -1)
        if window is not None:
            newer = seen.long().flip(-1).cumsum(-1).flip(-1)  # 1 at the newest token that a row sees
            steps = torch.arange(size, device=seen.device)
            context = context & (newer[:, :, None] + steps[:, None] <= window)
        own = torch.eye(r, dtype=torch.bool, device=seen.device).repeat_interleave(size, 0).repeat_interleave(size, 1)
        return torch.cat([context.flatten(1, 2), own.expand(batch, -1, -1)], dim=-1)[:, None]

    def _embedded(self, tokens: Tensor) -> Tensor:
        """As `embedded`, without the norm that the target's embedding may have."""
        table = self.target_layers.embedding
        if isinstance(table, nn.Embedding) and embedding_norm(table) is not None:
            with torch.no_grad():
                return F.embedding(tokens, table.weight)
        return self.embedded(tokens)
