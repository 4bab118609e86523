"""A causal language model with an adapter: its forward for serving and for a learner, and what it has read of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.caches import CACHE, cache_tensors, copied_prefix
from .._compat.models import keeps_logits
from .._compat.rollback import crop, record_past
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora
from ..adapt.trainable import Prefix
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from ..runtime.forks import Lock
from .batch_reader import BatchReader, reads_rows
from .draft_model import Branch, DraftModel, KnownRow, Reader, TreeReader
from .draft_trees import added_mask, reads_trees, seen_by
from .row_features import RowFeatures


@final
class CausalLM(DraftModel):
    """A causal language model and its adapter, from call to call."""

    def __init__(self, adapter: GatedLora, experts: Experts, vocabulary: Vocabulary, lock: Lock, steps: Lock) -> None:
        super().__init__(adapter, experts, vocabulary, lock, steps)
        self._keeps_logits = keeps_logits(adapter.tree)

    @cached_property
    def reads_trees(self) -> bool:
        """Whether it reads several candidates at once, tried once."""
        with self.serving(base=True) as model:
            return reads_trees(model)

    def readable_source(self, source: Source | None) -> None:
        """See `DraftModel`: it reads none."""
        return None

    def reader(self, mask: Tensor | None, features: RowFeatures | None, source: Source | None = None) -> CausalReader:
        return CausalReader(self, mask)

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """See `DraftModel`: it reads none."""
        return None

    @cached_property
    def _reads_rows(self) -> bool:
        """Whether it reads several rows of any lengths at once, tried once."""
        with self.serving(base=True) as model:
            return reads_rows(model, self.keep(1))

    def shared_reader(self, rows: Mapping[int, KnownRow]) -> BatchReader | None:
        if not self._reads_rows:
            return None
        return BatchReader(self.config, self.device, self.positions, self.keep(1), rows)

    def inputs(self, tokens: Tensor, cached: int, mask: Tensor | None) -> dict[str, Tensor]:
        """Model inputs for `tokens` (rows, n) behind `cached` tokens, with the padding of `mask` (rows, prompt)."""
        if mask is None:
            return {"input_ids": tokens}
        length = cached + tokens.shape[1]
        if length > mask.shape[1]:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], dim=-1)
        mask = mask[:, :length]
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions[:, cached:]}

    def keep(self, n: int) -> dict[str, int]:
        """Tells the model to compute logits for its last n positions only, where it can be told."""
        return {"logits_to_keep": n} if self._keeps_logits else {}

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        n: int,
        base: bool = False,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.logits`: (rows, n, vocab)."""
        inputs = self.inputs(tokens.to(self.device), 0, mask)
        with self.serving(base) as model:
            logits: Tensor = model(use_cache=False, **inputs, **self.keep(n)).logits[:, -n:]
        return logits

    def training_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.training_logits`; held between two gradient steps."""
        rows, copies = tokens.shape[0], 1 if gates is None else gates.shape[0]
        start = 0 if prefix is None else prefix.length
        tokens = tokens.repeat(copies, 1)
        mask = None if mask is None else mask.repeat(copies, 1)
        inputs = self.inputs(tokens[:, start:-1], start, mask) | self.keep(n)
        past = {}
        if prefix is not None:
            assert isinstance(prefix.cache, Cache)
            past = {CACHE: copied_prefix(prefix.cache, start, self.config)}
        if base:
            logits = self.adapter.tree(use_cache=bool(past), **inputs, **past).logits
        else:
            own = None if gates is None else gates.repeat_interleave(rows, dim=0)
            with self.adapter.gated(own) as model:
                logits = model(use_cache=bool(past), **inputs, **past).logits
        found: Tensor = logits[:, -n:].unflatten(0, (copies, rows))
        return found

    def unrolled_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        steps: int = 1,
        sources: Sequence[Source | None] | None = None,
    ) -> list[Tensor]:
        """See `Trainable.unrolled_logits`. It reads what it drafted as it reads a text: there is one step."""
        return [self.training_logits(tokens, n, mask, gates, prefix, base)]

    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> Tensor:
        """What the draft says with these tensors in the place of its adapter's, by PEFT's names; gradients flow to them."""
        own = self.adapter.placed(adapter)
        with self._steps, self.adapter.gated() as model:
            logits: Tensor = functional_call(model, own, kwargs=inputs | {"use_cache": False}).logits
        return logits

    @torch.no_grad()
    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None, most: int) -> tuple[float, dict[bool, Reader]]:
        """Log-likelihood per token of `tokens` (1, L) under the learned draft minus that under the base draft.

        Of two drafts, the one that predicts a prompt better is the one that does better on its continuation: measured, see
        benchmarks/LOG.md. At most `most` last tokens are read, by both without the token that opens the text. Where
        that is all of them, what the learned (False) and the base draft (True) have read comes with it: all tokens but the last.
        """
        length = tokens.shape[1]
        tokens = tokens[:, -most:].to(self.device)
        if self._experts.serves_base or tokens.shape[1] < 2:
            return 0.0, {}
        mask = None if mask is None else mask[:, length - tokens.shape[1] :]
        found, caches = [], {base: DynamicCache(config=self.config) for base in (False, True)}
        for base, cache in caches.items():
            record_past(cache)
            found.append(float(self._log_likelihoods(tokens, mask, base, {CACHE: cache})[0]))
        difference = found[0] - found[1] if all(map(math.isfinite, found)) else 0.0
        if length > tokens.shape[1]:
            return difference, {}
        return difference, {base: CausalReader(self, mask, past, length - 1) for base, past in caches.items()}

    @torch.no_grad()
    def prompt_log_ratios(self, tokens: Tensor, mask: Tensor | None, most: int) -> list[float]:
        """See `Trainable.prompt_log_ratios`."""
        length = tokens.shape[1]
        tokens = tokens[:, -most:].to(self.device)
        if self._experts.serves_base or tokens.shape[1] < 2:
            return [0.0] * len(tokens)
        mask = None if mask is None else mask[:, length - tokens.shape[1] :]
        learned, of_base = (self._log_likelihoods(tokens, mask, base, {"use_cache": False}) for base in (False, True))
        both = torch.isfinite(learned) & torch.isfinite(of_base)
        found: list[float] = torch.where(both, learned - of_base, 0.0).tolist()
        return found

    def _log_likelihoods(self, tokens: Tensor, mask: Tensor | None, base: bool, inputs: Mapping[str, Any]) -> Tensor:
        """Per token, of every row of tokens (rows, L) without the first one."""
        weight = torch.ones_like(tokens) if mask is None else mask[:, : tokens.shape[1]].to(tokens)
        weight = (weight[:, 1:] * weight[:, :-1]).float()
        with self.serving(base) as model:
            logits = model(**inputs, **self.inputs(tokens[:, :-1], 0, mask)).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (chosen * weight).sum(-1) / weight.sum(-1).clamp_min(1)


@final
class CausalReader(TreeReader):
    """The KV cache of a causal language model in one row.

    Args:
        mask: (1, prompt) with zeros where the prompt is padded on the left; None: no padding.
        past: a KV cache to go on from, and how many tokens it holds.
    """

    def __init__(
        self, model: CausalLM, mask: Tensor | None = None, past: DynamicCache | None = None, length: int = 0
    ) -> None:
        self._model, self._mask, self._length = model, mask, length
        self._past = DynamicCache(config=model.config) if past is None else past
        record_past(self._past)
        self._row = 0  # tokens of the row; 0: it was not rolled back to a round yet
        # Candidates that were read beside the chain in this round: place in the cache, and what they follow.
        self._branches: dict[int, tuple[int, int]] = {}

    @property
    def shared(self) -> None:
        return None

    @property
    def source(self) -> None:
        return None

    @property
    def length(self) -> int:
        return self._length

    def can_draft(self, length: int) -> bool:
        return True

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        feed = prefix[:, self._length :].to(self._model.device)
        inputs = self._model.inputs(feed, self._length, self._mask) | self._model.keep(1)
        logits: Tensor = served(**{CACHE: self._past}, use_cache=True, **inputs).logits
        self._length += feed.shape[1]
        return logits[:, -1]

    @property
    def reads_trees(self) -> bool:
        return self._mask is None and self._model.reads_trees

    def can_branch(self, parent: int, depth: int) -> bool:
        known = parent in self._branches or self._row + parent < self._length
        return bool(self._row) and known and self._row + depth < self._model.positions

    def branch(self, served: PreTrainedModel, branches: Sequence[Branch]) -> Tensor:
        chain = {i: (self._row + i, i - 1) for i in range(self._length - self._row)}
        cached, device = self._length + len(self._branches), self._model.device
        seen = seen_by(branches, chain | self._branches, self._row, cached)
        inputs = {
            "input_ids": torch.tensor([[branch.token for branch in branches]], device=device),
            "attention_mask": added_mask(seen, served.dtype, device),
            "position_ids": torch.tensor([[self._row + branch.depth for branch in branches]], device=device),
        }
        logits: Tensor = served(**{CACHE: self._past}, use_cache=True, **inputs).logits
        self._branches |= {branch.node: (cached + i, branch.parent) for i, branch in enumerate(branches)}
        return logits[0]

    def rewind(self, length: int, same: int | None = None) -> None:
        keep = min(self._length, length - 1, length if same is None else same)
        crop(self._past, self._length + len(self._branches) - keep)
        self._length, self._row, self._branches = keep, length, {}

    def leave(self) -> None:
        pass

    def prefix(self, most: int) -> Prefix | None:
        length = min(self._length, most)
        return Prefix(self._past, length) if length > 0 and self._is_whole else None

    @property
    def _is_whole(self) -> bool:
        """Whether every layer holds all tokens: a sliding window drops the first ones."""
        held = self._length + len(self._branches)
        return all(keys.shape[-2] == held for keys, _ in cache_tensors(self._past))
