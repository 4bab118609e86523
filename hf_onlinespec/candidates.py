"""The draft commits: plain forwards on a KV cache that is cropped, never rebuilt.

`OnlineCandidateGenerator` serves our own loop (`propose`, `observe`, `finish`) and is a transformers
`CandidateGenerator` as well (`get_candidates`, `update_candidate_strategy`), so that it also works inside theirs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel

from ._compat import CandidateGenerator, cache_tensors, crop, record_past, stateless
from .feedback import Feedback, FeedbackRecorder, Teacher, concatenate
from .metrics import Counts

if TYPE_CHECKING:
    from .draft import OnlineDraft


@dataclass(frozen=True)
class Proposal:
    """What the draft commits to in one round; k may be 0."""

    tokens: Tensor  # (batch, k) drafted tokens
    q: Tensor | None  # (batch, k, vocab) the law each was drawn from; None: greedy, no law needed


class OnlineCandidateGenerator(CandidateGenerator):
    """Drafts for one request and hands its feedback to the draft.

    Args:
        draft: who drafts and learns.
        generation_config: of the call (sampling or greedy, end of sequence, longest length).
        logits_processor: the target's list. A `FeedbackRecorder` is put in front of it; its stateless members are
            applied to the draft too, so that q is warped as p is.
        attention_mask: (batch, prompt) with zeros where the prompt is padded on the left; None: no padding.
        learn: False: this request is only drafted, nothing is recorded or learned.
    """

    def __init__(
        self,
        draft: OnlineDraft,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        attention_mask: Tensor | None = None,
        learn: bool = True,
    ) -> None:
        self.counts = Counts()
        self._draft, self._learn = draft, learn
        self._sample = bool(generation_config.do_sample)
        self._max_length: int = generation_config.max_length
        eos = generation_config.eos_token_id
        self._eos = torch.tensor([] if eos is None else eos, device=draft.device).view(-1)
        self._warpers = stateless(logits_processor)
        self._recorder = FeedbackRecorder()
        if learn:
            logits_processor.insert(0, self._recorder)
        self._mask = None
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            self._mask = attention_mask.to(draft.device)
        self._cache = DynamicCache(config=draft.config)
        record_past(self._cache)
        self._cached = 0  # tokens in the draft's cache
        self._tokens: Tensor | None = None  # (batch, L) the request so far
        self._segment: list[list[Teacher]] = []  # per round and row: what is not learned from yet
        self._learned: list[list[Teacher]] = []  # per row: the ones learned from, kept for the replay
        self._end = 0  # how much of the request the draft can learn from
        self._rounds = 0

    def propose(self, input_ids: Tensor, k: int) -> Proposal:
        """Drafts up to k tokens after `input_ids` (batch, L); fewer after an end of sequence or a non-finite law.

        Whether to go on is decided from the prefix and from q before the draw: every drawn token is submitted.
        """
        self._tokens = input_ids.to(self._draft.device)
        prefix = input_ids  # the warpers may hold tensors on the target's device: theirs is the place to warp
        k = min(k, self._draft.positions - prefix.shape[1])
        tokens: list[Tensor] = []
        laws: list[Tensor] = []
        if k > 0:
            keep = min(self._cached, prefix.shape[1] - 1)
            if self._cached:
                crop(self._cache, self._cached - keep)
            self._cached = keep
            feed = self._tokens[:, keep:]
            # Lighter than no_grad. What leaves the block is copied by cat and stack, or read by learning without being saved.
            with self._draft.serving() as model, torch.inference_mode():
                for _ in range(k):
                    scores = self._forward(model, feed)
                    if self._warpers:
                        scores = self._warpers(prefix, scores.to(prefix.device)).to(feed.device)
                    if self._sample:
                        q = scores.softmax(-1)
                        if not torch.isfinite(q).all():
                            break
                        feed = torch.multinomial(q, 1)
                        laws.append(q)
                    else:
                        feed = scores.argmax(-1, keepdim=True)
                    tokens.append(feed)
                    if len(self._eos) and bool(torch.isin(feed, self._eos).all()):
                        break
                    if self._warpers:
                        prefix = torch.cat([prefix, feed.to(prefix.device)], dim=-1)
        drafted = torch.cat(tokens, dim=-1) if tokens else input_ids[:, :0]
        return Proposal(
            drafted.to(input_ids.device),
            torch.stack(laws, dim=1).to(input_ids.device) if laws else None,
        )

    def _forward(self, model: PreTrainedModel, feed: Tensor) -> Tensor:
        """The draft's logits (batch, vocab) after `feed` (batch, n), which joins the cache."""
        inputs = self._draft.inputs(feed, self._cached, self._mask)
        logits = model(past_key_values=self._cache, use_cache=True, **inputs, **self._draft.keep(1)).logits
        self._cached += feed.shape[1]
        return logits[:, -1].float()

    def observe(self, input_ids: Tensor) -> None:
        """Takes in the outcome of a round: `input_ids` (batch, L) is the request with its new tokens."""
        self._record(input_ids)
        settings = self._draft.settings
        due = settings.update_when == "round" and self._rounds % settings.update_every == 0
        if due or self._pending >= settings.context_tokens:  # full target laws are kept for so many tokens at most
            self._update()

    def finish(self) -> None:
        """Ends the request: learns from what is left, remembers the request and rehearses."""
        self._update()
        if not self._learned or not self._learned[0]:
            return
        started = time.perf_counter()
        for row, teachers in enumerate(self._learned):
            self._draft.remember(Feedback(self._unpadded(row), concatenate(teachers)))
        self._draft.rehearse(self.counts)
        self._draft.fold()
        self.counts.update_time_s += time.perf_counter() - started

    def _record(self, input_ids: Tensor) -> None:
        """Keeps the target's laws for the new tokens, up to the last position that the draft can see."""
        if not self._learn or self._tokens is None:
            return
        before = self._tokens.shape[1]
        n = input_ids.shape[1] - before
        self._tokens = input_ids.to(self._draft.device)
        self._rounds += 1
        rows = self._recorder.take(n).to(self._draft.device)  # (batch, n, vocab)
        seen = max(0, min(n, self._draft.positions + 1 - before))
        if seen:
            settings = self._draft.settings
            laws = [Teacher.from_logits(row[:seen], settings.temperature, settings.top_k) for row in rows]
            self._segment.append(laws)
            self._end = before + seen

    @property
    def _pending(self) -> int:
        """Tokens recorded and not learned from yet."""
        return sum(len(laws[0]) for laws in self._segment)

    def _update(self) -> None:
        """One gradient step on the tokens since the last update, on top of the cached prefix."""
        if not self._segment or self._tokens is None:
            return
        started = time.perf_counter()
        teachers = [concatenate(list(laws)) for laws in zip(*self._segment, strict=True)]
        self._segment = []
        tokens = self._tokens[:, : self._end]
        prefix = min(self._cached, tokens.shape[1] - 1 - len(teachers[0]))
        if any(keys.shape[-2] != self._cached for keys, _ in cache_tensors(self._cache)):
            prefix = 0  # a sliding window has dropped the start: read everything anew
        self._draft.learn_segment(tokens, teachers, self._cache, prefix, self._mask, self.counts)
        self._draft.fold()
        self._learned = self._learned or [[] for _ in teachers]
        for kept, teacher in zip(self._learned, teachers, strict=True):
            kept.append(teacher.top(self._draft.settings.replay_top_k))
        self.counts.update_time_s += time.perf_counter() - started

    def _unpadded(self, row: int) -> Tensor:
        """One row's learned tokens without padding, and at most `context_tokens` of its prompt."""
        assert self._tokens is not None
        new = sum(len(teacher) for teacher in self._learned[row])
        padding = 0 if self._mask is None else int((self._mask[row] == 0).sum())
        start = max(padding, self._end - new - self._draft.settings.context_tokens)
        return self._tokens[row, start : self._end].clone()

    # The protocol of transformers' own loop. It has no end of request, so the draft learns every `update_every` rounds
    # whatever `update_when` says; whoever made the generator may call `finish()` for the rest and for the replay.

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`(input_ids with the drafted tokens, log q)`, for transformers' assisted decoding."""
        k = max(0, min(self._draft.settings.lookahead, self._max_length - input_ids.shape[1] - 1))
        with torch.inference_mode(False), torch.no_grad():
            proposal = self.propose(input_ids.clone(), k)
        candidates = torch.cat([input_ids, proposal.tokens], dim=-1)
        return candidates, None if proposal.q is None else proposal.q.log()

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Learns from a round of transformers' loop; the raw logits come from the recorder, not from `scores`."""
        with torch.inference_mode(False), torch.no_grad():
            self._record(input_ids.clone())
            if self._rounds % self._draft.settings.update_every == 0:
                self._update()
