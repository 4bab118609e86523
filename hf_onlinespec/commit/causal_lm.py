"""The draft model as one request uses it: its KV cache, which is cropped and never rebuilt, and its next token."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from .._compat.caches import CACHE, crop, record_past
from .._compat.generation import processed_scores
from ..govern.acceptance import RequestStats
from ..models.vocabulary import Vocabulary, widened
from .sampling import draw

if TYPE_CHECKING:
    from .learning_draft import LearningDraft


@dataclass(frozen=True)
class NextToken:
    """A token of the draft model's."""

    token: Tensor  # (batch, 1)
    known: int | None  # the same, where the host has it
    law: Tensor | None  # (batch, vocab) the distribution it was drawn from; None: greedy
    confidence: float | None  # probability of the likeliest token, where the host has it


class RequestModel:
    """The draft model in one request.

    Args:
        draft: whose model drafts.
        mask: (batch, prompt) with zeros where the prompt is padded on the left; None: no padding.
        vocabulary: of the target; None: the draft's own. Ids that the draft does not have too are never drafted, and it reads
            another token in the place of one that it has no embedding for.
        warpers: of the target's processors, those that are applied to the draft too.
        sample: whether tokens are drawn.
        seen: what the request shows of who drafts.
    """

    def __init__(
        self,
        draft: LearningDraft,
        mask: Tensor | None,
        vocabulary: Vocabulary | None,
        warpers: LogitsProcessorList,
        sample: bool,
        seen: RequestStats,
    ) -> None:
        self.draft = draft
        self.vocabulary = vocabulary or draft.vocabulary
        self.common = min(self.vocabulary.size, draft.vocabulary.size)  # ids below it may be drafted
        self.mask = None if mask is None else mask.to(draft.device)
        self.tokens: Tensor | None = None  # (batch, L) the request so far as the draft reads it, on its device
        self.sequence: Tensor | None = None  # the same as the target reads it
        self.prompt = 0  # how much of it was there before
        self.prompt_log_ratio: float | None = None  # how much the prompt speaks for the learned draft
        self.base = False  # whether the base draft serves this request, whatever was learned
        self.began = True  # whether this round is the first one that it reads in
        self._warpers, self._sample, self._seen = warpers, sample, seen
        self.reset()

    def reset(self) -> None:
        """Forgets what was read: after a failure the cache may hold anything."""
        self.cache = DynamicCache(config=self.draft.config)
        self.cached = 0  # tokens in it
        record_past(self.cache)

    def take(self, input_ids: Tensor) -> None:
        """The request as it is now, (batch, L)."""
        if self.tokens is None:
            self.prompt = input_ids.shape[1]
        self.sequence, self.tokens = input_ids, self.readable(input_ids).to(self.draft.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """`tokens` as the draft reads them."""
        own = self.draft.vocabulary
        return own.readable(tokens) if self.vocabulary.read > own.size else tokens

    def choose(self, tokens: Tensor) -> None:
        """Once in a request: whether the learned or the base draft serves it, by its prompt `tokens` as the draft reads it."""
        if self.prompt_log_ratio is not None or self.draft.settings.update_every != "auto":
            return
        started, governor = time.perf_counter(), self.draft.governor
        self.prompt_log_ratio, caches = self.draft.prompt_log_ratio(tokens, self.mask)
        with self.draft.lock:
            if caches:
                governor.observe_prefill(2 * tokens.shape[1], time.perf_counter() - started)
            governor.router.observe_prompt(self.prompt_log_ratio)
            if not self.cached:  # who has begun goes on
                self.serve(governor.router.use_base(self.prompt_log_ratio))
        if caches and not self.cached:  # the prompt is read already
            self.cache, self.cached = caches[self.base], tokens.shape[1] - 1

    def serve(self, base: bool) -> None:
        """Who serves this request: the base draft or the learned one."""
        self.base = self._seen.serves_base = self.draft.governor.decisions.serves_base = base

    def rewind(self, length: int) -> None:
        """Rolls the cache back to what was kept of `length` tokens."""
        keep = min(self.cached, length - 1)
        crop(self.cache, self.cached - keep)
        self.cached = keep

    def logits(self, served: PreTrainedModel, feed: Tensor) -> Tensor:
        """Logits (batch, common ids) after `feed` (batch, n), which joins the cache."""
        inputs = self.draft.inputs(feed, self.cached, self.mask)
        logits = served(**{CACHE: self.cache}, use_cache=True, **inputs, **self.draft.keep(1)).logits
        self.cached += feed.shape[1]
        return logits[:, -1, : self.common].float()

    def next_token(self, served: PreTrainedModel, prefix: Tensor) -> NextToken | None:
        """The token after `prefix` (batch, L), whose end joins the cache; None: what it says is not finite.

        Args:
            served: the module tree that drafts now, see `LearningDraft.serving`.
        """
        # The warpers may hold tensors on the target's device: theirs is the place to warp.
        scores = self.logits(served, self.readable(prefix[:, self.cached :]).to(self.draft.device))
        common = scores.shape[-1]
        if self._warpers:
            # They index the target's vocabulary; what the draft does not propose is impossible before and after them.
            scores = widened(scores.to(prefix.device), self.vocabulary.said, -torch.inf)
            scores = processed_scores(self._warpers, prefix, scores)
        scores = scores.to(prefix.device)
        host = prefix.device.type == "cpu" and prefix.shape[0] == 1  # elsewhere, reading a value waits for the device
        law = None
        if self._sample:
            law = scores.softmax(-1)
            if host and not math.isfinite(float(law.sum())):
                return None
            if not host:
                # Asking would wait for the device: the uniform law takes the place of none, what is drawn from q stays exact.
                uniform = widened(law.new_full((common,), 1 / common), law.shape[-1], 0.0)
                law = torch.where(torch.isfinite(law).all(-1, keepdim=True), law, uniform)
            token = draw(law)
        else:
            token = scores.argmax(-1, keepdim=True)
        if not host:
            return NextToken(token, None, law, None)
        confidence = float((scores.softmax(-1) if law is None else law).max())
        return NextToken(token, int(token), law, confidence)
