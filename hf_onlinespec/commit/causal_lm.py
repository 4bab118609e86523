"""A causal language model with an adapter: how it serves, its forward for a learner, and its part in one row of a call."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.caches import CACHE, cache_tensors, copied_prefix, crop, record_past
from .._compat.generation import processed_scores
from .._compat.models import keeps_logits, max_positions
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora
from ..adapt.trainable import Prefix
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..models.vocabulary import Vocabulary, widened
from ..runtime.clock import is_host
from ..runtime.forks import Lock
from .base import Call
from .recycling import best_tokens
from .sampling import draw


class CausalLM:
    """A causal language model and its adapter, from call to call.

    Args:
        adapter: its LoRA; the base's weights are borrowed.
        experts: what has been learned: whether any of it serves.
        lock: held for the moments in which the served weights change.
        steps: held for one gradient step at a time; taken before `lock` where both are.
    """

    def __init__(self, adapter: GatedLora, experts: Experts, vocabulary: Vocabulary, lock: Lock, steps: Lock) -> None:
        self.adapter, self.vocabulary = adapter, vocabulary
        self.positions = max_positions(adapter.tree.config)  # the longest context that it may see
        self._experts, self._lock, self._steps = experts, lock, steps
        self._keeps_logits = keeps_logits(adapter.tree)

    @property
    def config(self) -> PretrainedConfig:
        return self.adapter.tree.config

    @property
    def device(self) -> torch.device:
        return self.adapter.params.device

    @property
    def steps(self) -> int:
        """Gradient steps that the adapter has taken."""
        return self._experts.steps

    def fold(self) -> None:
        """Brings the weights that draft up to date with what was learned."""
        with self._steps, self._lock:
            self.adapter.fold()

    @contextmanager
    def serving(self, base: bool = False) -> Iterator[PreTrainedModel]:
        """The model as it drafts now; a draft that has not learned yet runs at the speed of its base.

        Args:
            base: the base draft, whatever was learned.
        """
        base = base or self._experts.serves_base
        if self.adapter.folds and not base:
            if self.adapter.stale:
                self.fold()
            if not self.adapter.stale:
                with self._lock, torch.no_grad():
                    yield self.adapter.folded_tree
                return
        with self._steps, torch.no_grad():  # learning switches the adapter on and off in this tree
            if base:
                yield self.adapter.tree
            else:
                weights = self.adapter.weights
                with self.adapter.gated(None if weights is None else weights[None]) as model:
                    yield model

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
    def logits(self, tokens: Tensor, n: int, base: bool = False, mask: Tensor | None = None) -> Tensor:
        """What the draft says after each of the last n of `tokens` (rows, L), as it serves: logits (rows, n, vocab).

        `training_logits` is about these n tokens themselves, each from those before it.
        """
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

    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> Tensor:
        """What the draft says with these tensors in the place of its adapter's, by PEFT's names; gradients flow to them."""
        own = self.adapter.placed(adapter)
        with self._steps, self.adapter.gated() as model:
            logits: Tensor = functional_call(model, own, kwargs=inputs | {"use_cache": False}).logits
        return logits

    @torch.no_grad()
    def prompt_log_ratio(
        self, tokens: Tensor, mask: Tensor | None, most: int
    ) -> tuple[float, dict[bool, DynamicCache]]:
        """Log-likelihood per token of `tokens` (rows, L) under the learned draft minus that under the base draft.

        Of two drafts, the one that predicts a prompt better is the one that does better on its continuation: measured, see
        benchmarks/LOG.md. At most `most` last tokens are read, by both without the token that opens the text. Where
        that is all of them, the KV caches of the learned (False) and of the base draft (True) come with it: each holds all tokens
        but the last.
        """
        length = tokens.shape[1]
        tokens = tokens[:, -most:].to(self.device)
        if self._experts.serves_base or tokens.shape[1] < 2:
            return 0.0, {}
        mask = None if mask is None else mask[:, length - tokens.shape[1] :]
        weight = torch.ones_like(tokens) if mask is None else mask[:, : tokens.shape[1]].to(tokens)
        weight = (weight[:, 1:] * weight[:, :-1]).float()
        found, caches = [], {base: DynamicCache(config=self.config) for base in (False, True)}
        for base, cache in caches.items():
            record_past(cache)
            with self.serving(base) as model:
                logits = model(**{CACHE: cache}, **self.inputs(tokens[:, :-1], 0, mask)).logits.float()
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            found.append(float((chosen * weight).sum() / weight.sum().clamp_min(1)))
        difference = found[0] - found[1] if all(map(math.isfinite, found)) else 0.0
        return difference, caches if length == tokens.shape[1] else {}


class DraftCache:
    """The KV cache of a draft in one row: it is cropped, never rebuilt."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.past = DynamicCache(config=config)
        self.length = 0  # tokens in it
        record_past(self.past)

    def rewind(self, length: int) -> None:
        """Rolls back to what was kept of `length` tokens, less the last one: it is read again, for its logits."""
        keep = min(self.length, length - 1)
        crop(self.past, self.length - keep)
        self.length = keep

    @property
    def is_whole(self) -> bool:
        """Whether every layer holds all tokens: a sliding window drops the first ones."""
        return all(keys.shape[-2] == self.length for keys, _ in cache_tensors(self.past))


@dataclass(frozen=True)
class NextToken:
    """A token of the draft model's."""

    token: Tensor  # (1, 1)
    known: int | None  # the same, where the host has it
    probs: Tensor | None  # (1, vocab) the distribution it was drawn from; None: greedy
    confidence: float | None  # probability of the likeliest token, where the host has it
    best: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their probabilities, where they were asked for


class RowModel:
    """The draft model in one row of a call.

    Args:
        row: which one.
        stats: what the row shows of who drafts.
    """

    def __init__(
        self, model: CausalLM, governor: Governor, lock: Lock, call: Call, row: int, stats: RequestStats
    ) -> None:
        self.model, self._call, self._stats = model, call, stats
        # Copied now: once the target's own are called, they keep the size of its scores.
        self._processors = call.stateless_processors()
        self._governor, self._lock = governor, lock
        self.vocabulary = call.vocabulary or model.vocabulary  # of the target
        own = None if call.mask is None else call.mask[row : row + 1]
        self.mask = None if own is None or bool((own == 1).all()) else own.to(model.device)
        self.tokens: Tensor | None = None  # (1, L) the row so far as the draft reads it, on its device
        self.prompt = 0  # how much of it was there before
        self.prompt_log_ratio: float | None = (
            None  # how much the prompt speaks for the learned draft; None: it was not asked
        )
        self.cache = DraftCache(model.config)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def common(self) -> int:
        """Ids below it may be drafted: target and draft have them both."""
        return min(self.vocabulary.size, self.model.vocabulary.size)

    @property
    def base(self) -> bool:
        """Whether the base draft serves this row, whatever was learned."""
        return self._stats.serves_base

    def reset(self) -> None:
        """Forgets what was read: after a failure the cache may hold anything."""
        self.cache = DraftCache(self.model.config)

    def take(self, tokens: Tensor) -> None:
        """The row as it is now, (1, L)."""
        if self.tokens is None:
            self.prompt = tokens.shape[1]
        self.tokens = self.readable(tokens).to(self.model.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """`tokens` as the draft reads them: another one in the place of those that it has no embedding for."""
        own = self.model.vocabulary
        return own.readable(tokens) if self.vocabulary.read > own.size else tokens

    def route(self, prompt: Tensor) -> None:
        """Once in a request: whether the learned or the base draft serves it, by its prompt (1, L) as the draft reads it."""
        if self.prompt_log_ratio is not None:
            return
        started, governor = time.perf_counter(), self._governor
        self.prompt_log_ratio, caches = self.model.prompt_log_ratio(
            prompt, self.mask, governor.router.constants.prompt_tokens
        )
        with self._lock:
            if caches:
                governor.observe_prefill(2 * prompt.shape[1], time.perf_counter() - started)
            governor.router.observe_prompt(self.prompt_log_ratio)
            if not self.cache.length:  # who has begun goes on
                self.serve(governor.router.use_base(self.prompt_log_ratio))
        if caches and not self.cache.length:  # the prompt is read already
            self.cache.past, self.cache.length = caches[self.base], prompt.shape[1] - 1

    def serve(self, base: bool) -> None:
        """Who serves this row: the base draft or the learned one."""
        self._stats.serves_base = self._governor.decisions.serves_base = base

    def prefix(self, most: int) -> Prefix | None:
        """At most so many tokens that the learned draft has read; None: there are none that learning could build on."""
        length = min(self.cache.length, most)
        return Prefix(self.cache.past, length) if length > 0 and self.cache.is_whole and not self.base else None

    def next_token(self, served: PreTrainedModel, prefix: Tensor, best: int = 0) -> NextToken | None:
        """The token after `prefix` (1, L), whose end joins the cache; None: what the draft says is not finite.

        Args:
            served: the module tree that drafts now, see `CausalLM.serving`.
            best: how many of the likeliest other tokens are asked for, where the host has them.
        """
        feed = self.readable(prefix[:, self.cache.length :]).to(self.model.device)
        inputs = self.model.inputs(feed, self.cache.length, self.mask) | self.model.keep(1)
        logits = served(**{CACHE: self.cache.past}, use_cache=True, **inputs).logits
        self.cache.length += feed.shape[1]
        scores = logits[:, -1, : self.common].float()
        # The processors may hold tensors on the target's device: theirs is the place to apply them.
        scores = self._processed(scores.to(prefix.device), prefix)
        host = is_host(prefix.device)  # elsewhere, reading a value waits for the device
        probs = None
        if self._call.sample:
            probs = scores.softmax(-1)
            if host and not math.isfinite(float(probs.sum())):
                return None
            if not host:
                # Asking would wait for the device: the uniform distribution takes the place of none, what is drawn from q stays exact.
                uniform = widened(probs.new_full((self.common,), 1 / self.common), probs.shape[-1], 0.0)
                probs = torch.where(torch.isfinite(probs).all(-1, keepdim=True), probs, uniform)
            token = draw(probs)
        else:
            token = scores.argmax(-1, keepdim=True)
        if not host:
            return NextToken(token, None, probs, None)
        known = int(token)
        shares = scores.softmax(-1) if probs is None else probs
        likeliest: tuple[tuple[int, float], ...] = ()
        if best:
            places = best_tokens(shares, best + 1)
            likeliest = tuple(zip(places[0].tolist(), shares[0, places[0]].tolist(), strict=True))
        return NextToken(token, known, probs, float(shares.max()), likeliest)

    def _processed(self, scores: Tensor, prefix: Tensor) -> Tensor:
        """Scores (1, common ids) as the target's stateless processors make them, so that q is warped as p is."""
        if not self._processors:
            return scores
        # They index the target's vocabulary; what the draft does not propose is impossible before and after them.
        scores = widened(scores, self.vocabulary.said, -torch.inf)
        return processed_scores(self._processors, prefix, scores)
