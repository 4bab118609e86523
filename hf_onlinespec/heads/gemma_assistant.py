"""A Gemma-4 assistant of transformers as a draft head: its layers have queries alone, and attend to keys and values of the target.

    x = pre_projection([embedding of the token, h]);  out = layers(x);  logits = lm_head(out);  next h = post_projection(out)

h is the target's last hidden state in a first step and what was said last in a later one. All steps behind a row stand at the place of
the row's token, and see what the row sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .._compat.hidden_states import Reads
from .base import Head, HeadOutput, kept, require_one
from .config import GemmaAssistantConfig
from .layer import FULL, SLIDING, seen_of
from .places import DIGITS, places_of


class GemmaAssistantHead(Head):
    """The assistant, with a copy of the keys and values that it reads: the target's own may lie behind holes, or be gone.

    A drafted token has none: it takes an empty place of the cache, which is marked as such.

    Args:
        assistant: modules of its own over the assistant's weights, without the token embedding, which drafting does not use.
    """

    config: GemmaAssistantConfig
    config_class = GemmaAssistantConfig
    reads_places = True

    def __init__(self, config: GemmaAssistantConfig, assistant: Any) -> None:
        super().__init__(config)
        self.assistant: Any = assistant
        self.kinds = {kind: (int(heads), int(width)) for kind, (heads, width) in (config.shared or {}).items()}

    @property
    def reads(self) -> Reads:
        return (-1, *self.kinds)

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
        """See `Head.forward`. Where a row stands is in what it is given, and `position_ids` are not used."""
        require_one(features, hidden)
        given = features if features is not None else hidden
        assert given is not None
        cache = DynamicCache() if past_key_values is None else past_key_values
        past, width, n = int(cache.get_seq_length()), self.config.hidden_size, given.shape[1]
        numbers = given[..., -DIGITS:]
        shared = self._remember(cache, None if features is None else given[..., width:-DIGITS].to(self.dtype), given)
        mark = numbers.new_full((len(given), 1, n, 1), features is not None)
        marks, _ = cache.update(mark, mark, len(self.kinds))
        seen = seen_of(attention_mask, n, past, given.device)
        seen = kept(seen[:, 0], logits_to_keep)[:, None] & marks.bool().transpose(2, 3)
        seen = seen | ~seen.any(-1, keepdim=True)  # a row without any key has no softmax
        numbers = kept(numbers, logits_to_keep)
        state = kept(given[..., :width], logits_to_keep).to(self.dtype)
        out = self._read(kept(tokens, logits_to_keep), state, places_of(numbers) + 1, seen, shared)
        said = torch.cat([self.assistant.post_projection(out), numbers.to(self.dtype)], dim=-1)
        return HeadOutput(self._logits(out), said, cache if use_cache or past_key_values is not None else None)

    def _remember(self, cache: Cache, entries: Tensor | None, given: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Adds keys and values (B, n, widths), or empty places, to the cache: by type of layers all of it, each (B, heads, total, width)."""
        found, start = {}, 0
        for index, (kind, (heads, width)) in enumerate(self.kinds.items()):
            parts = []
            for _ in range(2):
                if entries is None:
                    parts.append(given.new_zeros(*given.shape[:2], heads, width, dtype=self.dtype))
                else:
                    parts.append(entries[..., start : start + heads * width].unflatten(-1, (heads, width)))
                start += heads * width
            keys, values = (part.transpose(1, 2) for part in parts)
            found[kind] = cache.update(keys, values, index)
        return found

    def _read(
        self, tokens: Tensor, state: Tensor, positions: Tensor, seen: Tensor, shared: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What the layers make of rows (B, r): (B, r, width of the assistant).

        Args:
            state: (B, r, width of the target).
            positions: (B, r) of the tokens.
            seen: (B, 1, r, total) boolean.
        """
        rows = self.assistant.pre_projection(torch.cat([self.embedded(tokens).to(state), state], dim=-1))
        newer = seen.long().flip(-1).cumsum(-1).flip(-1)  # 1 at the newest key that a row sees, 2 at the one before it
        out = self.assistant.model(
            inputs_embeds=rows,
            attention_mask={FULL: seen, SLIDING: seen & (newer <= self.config.window + 1)},
            position_ids=positions,
            shared_kv_states=shared,
            use_cache=False,
            output_hidden_states=True,  # else all but some rows could be left out, as in a prompt
        )
        found: Tensor = out.last_hidden_state
        return found

    def _logits(self, rows: Tensor) -> Tensor:
        parts = self.assistant
        logits: Tensor = (
            parts.masked_embedding(rows, parts.lm_head.weight) if self.config.ordered else parts.lm_head(rows)
        )
        return logits
