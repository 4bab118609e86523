"""A model that reads the source of an encoder–decoder target: its forward for serving and for a learner, and what it has read of a row.

It is an encoder–decoder itself, which reads the source once with its own encoder or shares the target's, or a decoder that was made
to read the target's encoder outputs. What a text's source is, its learning is given with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.caches import CACHE, cache_tensors, copied_prefix
from .._compat.rollback import crop, record_past
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora
from ..adapt.trainable import Prefix
from ..errors import UnsupportedError
from ..models.encoders import new_cache
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from ..runtime.forks import Lock
from .draft_model import DraftModel, KnownRow, Reader
from .row_features import RowFeatures
from .source_states import SourceStates


@final
class Seq2Seq(DraftModel):
    """A model that reads a source, and its adapter, from call to call."""

    def __init__(self, adapter: GatedLora, experts: Experts, vocabulary: Vocabulary, lock: Lock, steps: Lock) -> None:
        super().__init__(adapter, experts, vocabulary, lock, steps)
        self.sources = SourceStates(adapter)

    def belongs_to(self, target: PreTrainedModel) -> None:
        """Notes, weakly, the target whose encoder may be shared."""
        self.sources.belongs_to(target)

    @property
    def needs_source(self) -> bool:
        """Whether it can say nothing without a source: a decoder alone reads its text."""
        return self.sources.names.encodes is not None

    @torch.no_grad()
    def readable_source(self, source: Source | None) -> Source | None:
        """See `DraftModel`: what the target's encoder made of it, where the own one makes the same; else what is to be encoded."""
        if source is None or source.states is None:
            return None
        with self.serving(base=True) as model:
            return self.sources.readable(model, source.to(self.device).without_padding())

    # Serving

    def reader(self, mask: Tensor | None, features: RowFeatures | None, source: Source | None = None) -> Seq2SeqReader:
        padding = 0 if mask is None else int((mask == 0).sum())
        return Seq2SeqReader(self, source, padding)

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """See `DraftModel`: it reads none."""
        return None

    def shared_reader(self, rows: Mapping[int, KnownRow]) -> None:
        """See `DraftModel`. Most of these models count positions by what is in their cache: no row may have holes there."""

    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None, most: int) -> tuple[float, Mapping[bool, Reader]]:
        """See `DraftModel`. What a row begins with says nothing: it opens every text of the model."""
        return 0.0, {}

    def prompt_log_ratios(self, tokens: Tensor, mask: Tensor | None, most: int) -> list[float]:
        """See `DraftModel`: as above."""
        return [0.0] * len(tokens)

    def inputs(self, tokens: Tensor, states: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        """Inputs of a forward that writes tokens (rows, n), with encoder outputs and their mask; None: a decoder reads its text alone."""
        of_source = {} if states is None else self.sources.names.of_states(states, mask)
        return {self.sources.names.tokens: tokens, **of_source}

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
        with self.serving(base) as model:
            return self._said(model, tokens.to(self.device), n, mask, sources)

    # Learning

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
        tokens = tokens[:, :-1].repeat(copies, 1)
        mask = None if mask is None else mask.repeat(copies, 1)
        sources = None if sources is None else [*sources] * copies
        if base:
            logits = self._said(self.adapter.tree, tokens, n, mask, sources, prefix)
        else:
            own = None if gates is None else gates.repeat_interleave(rows, dim=0)
            with self.adapter.gated(own) as model:
                logits = self._said(model, tokens, n, mask, sources, prefix)
        found: Tensor = logits.unflatten(0, (copies, rows))
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
        return [self.training_logits(tokens, n, mask, gates, prefix, base, sources=sources)]

    def _said(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        n: int,
        mask: Tensor | None,
        sources: Sequence[Source | None] | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Logits (rows, n, vocab) behind the last n of tokens (rows, L).

        Rows that are padded on the left are read padded on the right: no token attends to one behind it, and positions count from 0.
        """
        sources = [None] * len(tokens) if sources is None else sources
        reads = self.needs_source or any(source is not None for source in sources)
        states, source_mask = self.sources.states(model, sources) if reads else (None, None)
        past: dict[str, Any] = {"use_cache": False}
        if prefix is not None:  # of one row without padding; what the source gives is learned too, and computed anew
            assert isinstance(prefix.cache, Cache)
            tokens, cache = tokens[:, prefix.length :], new_cache(model)
            if isinstance(cache, EncoderDecoderCache):
                cache.self_attention_cache = copied_prefix(prefix.cache, prefix.length, model.get_decoder().config)
            past = {CACHE: cache, "use_cache": True}
        length = tokens.shape[1]
        padding = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        if mask is not None:
            padding = (mask == 0).sum(dim=1, keepdim=True).to(padding)
        places = torch.arange(length, device=tokens.device)
        tokens = tokens.gather(1, (places + padding) % length)
        logits: Tensor = model(**self.inputs(tokens, states, source_mask), **past).logits
        last = (places[-n:] - padding).clamp_min(0)
        return (
            logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1])) if mask is not None else logits[:, -n:]
        )

    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> NoReturn:
        """See `DraftModel`. Raises UnsupportedError."""
        raise UnsupportedError(
            "warm_start trains causal language models: this draft reads a source beside its text. Let it learn while it serves."
        )


@final
class Seq2SeqReader(Reader):
    """The KV cache of a model that reads a source, in one row: what the source gives stays in it from round to round.

    Args:
        source: as `Seq2Seq.readable_source` returns it; None: there is none.
        padding: tokens on the left of the row that are none, which are not read.
    """

    def __init__(self, model: Seq2Seq, source: Source | None, padding: int) -> None:
        self._model, self._source, self._padding = model, source, padding
        self._states: Tensor | None = None if source is None else source.states  # (1, n, width); None: not encoded yet
        self._past: Cache | None = None
        self._held = 0  # tokens in it

    @property
    def source(self) -> Source | None:
        """See `Reader`: with the encoder's outputs, once they are known, unless they are learned."""
        return self._source

    @property
    def shared(self) -> None:
        return None

    @property
    def length(self) -> int:
        return self._padding + self._held if self._held else 0

    def can_draft(self, length: int) -> bool:
        return self._source is not None or not self._model.needs_source

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        if self._past is None:
            self._begin(served)
        feed = prefix[:, self._padding + self._held :].to(self._model.device)
        inputs = self._model.inputs(feed, self._states, None)
        logits: Tensor = served(**inputs, **{CACHE: self._past}, use_cache=True).logits
        self._held += feed.shape[1]
        return logits[:, -1]

    def _begin(self, served: PreTrainedModel) -> None:
        """The source is read: once, by whatever serves now."""
        if self._source is not None and self._states is None:
            with torch.inference_mode(False):  # learning reads them too
                self._states = self._model.sources.states(served, [self._source])[0]
            if not self._model.sources.learns_encoder:
                self._source = replace(self._source, states=self._states)
        self._past = new_cache(served)
        record_past(self._past)

    def rewind(self, length: int, same: int | None = None) -> None:
        if self._past is None:
            return
        kept = min(self.length, length - 1, length if same is None else same)
        keep = max(0, kept - self._padding)
        crop(self._past, self._held - keep)
        self._held = keep

    def leave(self) -> None:
        pass

    def prefix(self, most: int) -> Prefix | None:
        if not isinstance(self._past, EncoderDecoderCache) or self._padding:
            return None
        own, length = self._past.self_attention_cache, min(self._held, most)
        whole = all(keys.shape[-2] == self._held for keys, _ in cache_tensors(own))  # no window has dropped any
        return Prefix(own, length) if length > 0 and whole else None
