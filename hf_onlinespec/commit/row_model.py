"""A draft model's part in one row of a call: what it reads, and the tokens that it drafts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .._compat.generation import processed_scores
from ..adapt.request_feedback import Told
from ..adapt.trainable import Prefix
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..govern.routing import AdapterRouter
from ..models.common_strings import CommonStrings
from ..models.source import Source
from ..models.vocabulary import widened
from ..runtime.forks import Lock
from .base import Call
from .draft_model import Branch, DraftModel, TreeReader
from .recycling import best_tokens
from .row_features import MOST_HELD, RowFeatures
from .translation import Translation


class RowModel:
    """The draft model in one row of a call.

    Args:
        row: which one.
        stats: what the row shows of who drafts.
        router: whether the learned or the base draft serves the row.

    Attributes:
        number: of the row among all that are read together, also of other calls.
    """

    def __init__(
        self,
        model: DraftModel,
        governor: Governor,
        lock: Lock,
        call: Call,
        row: int,
        stats: RequestStats,
        router: AdapterRouter,
    ) -> None:
        self.model, self._call, self._stats = model, call, stats
        # Copied now: once the target's own are called, they keep the size of its scores.
        self._processors = call.stateless_processors(row)
        self._governor, self._lock, self.router = governor, lock, router
        self.vocabulary = call.vocabulary or model.vocabulary  # of the target
        self.number, self.padding = call.first_row + row, call.padding(row)
        own = None if call.mask is None else call.mask[row : row + 1]
        self.translation: Translation | None = None  # into the draft's tokens; None: it has the target's
        if call.retokenizer is not None:
            self.translation = Translation(call.retokenizer, self.padding, model.device)
            self.padding, own = 0, None
        self.mask = None if own is None or bool((own == 1).all()) else own.to(model.device)
        self.tokens: Tensor | None = None  # (1, L) the row so far as the draft reads it, on its device
        self._same: int | None = None  # tokens of it at the beginning that are as the model has read them
        self.length = 0  # of the row so far, as the target reads it
        self.prompt = 0  # how much of `tokens` was there before
        self.prompt_log_ratio: float | None = (
            None  # how much the prompt speaks for the learned draft; None: it was not asked
        )
        places = self.padding if model.reads_places else None
        self.features = RowFeatures(call.first_fed(row), MOST_HELD, places) if model.reads else None
        self._source = model.readable_source(None if call.source is None else call.source.row(row))
        self.reader = model.reader(self.mask, self.features, self._source)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def taught(self) -> int | Tensor | CommonStrings:
        """See `DraftedRow`."""
        if self.translation is not None:
            return self.translation.common
        return self.common if self.model.ids is None else self.model.ids

    @property
    def common(self) -> int:
        """Ids below it may be drafted: target and draft have them both."""
        if self.translation is not None:
            return self.vocabulary.size
        return min(self.vocabulary.size, self.model.vocabulary.size)

    @property
    def begun(self) -> bool:
        """Whether it was given the prompt."""
        return self.tokens is not None

    @property
    def samples(self) -> bool:
        """Whether its tokens are drawn."""
        return self._call.sample

    @property
    def has_processors(self) -> bool:
        """Whether scores are to be `processed`."""
        return bool(self._processors)

    @property
    def joins(self) -> bool:
        """Whether there are, or will be, other rows that it may be read with."""
        return self._call.rows > 1 or self.is_joined

    @property
    def is_joined(self) -> bool:
        """Whether other rows begin before or after it."""
        return self._call.at_once is not None

    @property
    def base(self) -> bool:
        """Whether the base draft serves this row, whatever was learned."""
        return self._stats.serves_base

    def reset(self) -> None:
        """Forgets what was read: after a failure the cache may hold anything."""
        self.reader = self.model.reader(self.mask, self.features, self._source)

    def take(self, tokens: Tensor) -> None:
        """The row as it is now, (1, L)."""
        begins, self.length = self.tokens is None, tokens.shape[1]
        if self.translation is None:
            self.tokens = self.readable(tokens).to(self.model.device)
        else:
            self.tokens = self.translation.take(tokens)
            same = self.translation.same
            self._same = min(same, self._same) if self.reader.length and self._same is not None else same
        if begins:
            self.prompt = self.tokens.shape[1]

    def readable(self, tokens: Tensor) -> Tensor:
        """`tokens` as the draft reads them: another one in the place of those that it has no embedding for."""
        if self.translation is not None:
            found = self.translation.read(tokens)
            if self.translation.same < self.reader.length:  # a character became whole
                self.reader.rewind(found.shape[1], self.translation.same)
            return found
        own = self.model.vocabulary
        return own.readable(tokens) if self.vocabulary.read > own.size else tokens

    def route(self, prompt: Tensor) -> None:
        """Once in a request: whether the learned or the base draft serves it, by its prompt (1, L) as the draft reads it."""
        if self.prompt_log_ratio is not None:
            return
        started, governor = time.perf_counter(), self._governor
        self.prompt_log_ratio, readers = self.model.prompt_log_ratio(
            prompt, self.mask, self.router.constants.prompt_tokens
        )
        if readers:
            with self._lock:
                governor.observe_prefill(2 * prompt.shape[1], self._call.rows * (time.perf_counter() - started))
        self.routed(self.prompt_log_ratio)
        if readers and not self.reader.length and not self.is_joined:  # the prompt is read already
            self.reader = readers[self.base]

    def routed(self, prompt_log_ratio: float) -> None:
        """Takes in how much its prompt speaks for the learned draft."""
        self.prompt_log_ratio = prompt_log_ratio
        with self._lock:
            self.router.observe_prompt(prompt_log_ratio)
            if not self.reader.length:  # who has begun goes on
                self.serve(self.router.use_base(prompt_log_ratio))

    def serve(self, base: bool) -> None:
        """Who serves this row: the base draft or the learned one."""
        self._stats.serves_base = self._governor.decisions.serves_base = base

    @property
    def source(self) -> Source | None:
        """See `DraftedRow`."""
        return self.reader.source

    def prefix(self, most: int) -> Prefix | None:
        """At most so many tokens that the learned draft has read; None: there are none that learning could build on."""
        return None if self.base else self.reader.prefix(most)

    def take_features(self, features: Tensor) -> None:
        """The target's features (1, fed, width) of what it was fed in this round."""
        if self.features is not None:
            self.features.take(features.to(self.model.device))

    def keep(self, length: int, proposed: int, path: Sequence[int]) -> None:
        """Of a round that began with `length` tokens this path of the proposed ones was kept."""
        if self.features is not None:
            self.features.keep(length, proposed, path)
        if self.translation is not None:  # it compares what was read with what is there
            return
        chain = next((i for i, candidate in enumerate(path) if candidate != i), len(path))
        self._same = length + chain  # what the model has read of a chain ends where the path leaves it

    def can_draft(self) -> bool:
        """Whether it can say what follows the row as it is now."""
        return self.reader.can_draft(self.length) and (self.translation is None or self.translation.can_draft)

    @property
    def reads_trees(self) -> bool:
        """Whether it reads several candidates behind one prefix. In another tokenizer a candidate may be several tokens."""
        return self.translation is None and isinstance(self.reader, TreeReader) and self.reader.reads_trees

    def unread(self, length: int) -> int:
        """Tokens that it has to read before it can say what follows `length` of them, about."""
        if self.tokens is None or not self.reader.length:
            return length
        return self.tokens.shape[1] + length - self.length - self.reader.length

    def rewind(self) -> None:
        """Takes back what was read beyond the row as it is now."""
        assert self.tokens is not None
        self.reader.rewind(self.tokens.shape[1], self._same)
        if self.translation is not None:
            self._same = None

    def learned_features(self, start: int, end: int) -> Tensor | None:
        """See `DraftedRow`."""
        if self.features is None:
            return None
        start = max(start, self.features.start)
        return self.features.rows(start, max(start, end - 1))

    def next_of(self, served: PreTrainedModel, branches: Sequence[Branch], n: int) -> list[list[tuple[int, float]]]:
        """The n likeliest tokens behind each of several candidates, and their probabilities before any processor."""
        assert isinstance(self.reader, TreeReader)
        scores = self.said(self.reader.branch(served, branches))
        shares = (scores / (self._call.temperature or 1.0)).softmax(-1)
        tokens = best_tokens(shares, n)
        found = zip(tokens.tolist(), shares.gather(-1, tokens).tolist(), strict=True)
        return [list(zip(own, probs, strict=True)) for own, probs in found]

    def said(self, scores: Tensor) -> Tensor:
        """What the reader says (rows, ids), over the common ids of the target (rows, common)."""
        if self.translation is not None:
            scores = self.translation.said(scores, self.common)
        return scores[:, : self.common].float()

    def told(self, logits: Tensor, new: int, positions: int) -> Told | None:
        """See `DraftedRow`."""
        if self.translation is not None:
            return self.translation.told(logits, new, positions)
        before = self.length - new
        seen = max(0, min(new, positions + 1 - before))
        return Told(logits[:, :seen], before + seen) if seen else None

    def processed(self, scores: Tensor, prefix: Tensor) -> Tensor:
        """Scores (1, common ids) as the target's stateless processors make them, so that q is warped as p is."""
        # They index the target's vocabulary; what the draft does not propose is impossible before and after them.
        scores = widened(scores, self.vocabulary.said, -torch.inf)
        return processed_scores(self._processors, prefix, scores)
