"""The loop: propose → verify → accept → adapt.

`generate` has done all its preparation when it hands over to `decode`. Every kept token is the target's own: greedy
decoding keeps its argmax, sampling keeps its law (speculative sampling, arXiv:2211.17192, algorithm 1), whatever the
draft proposes. One sequence for now; tensors carry the batch dimension throughout.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .._compat import CACHE, needs_synced_gpus
from ..commit.base import Draft, note_latest
from ..commit.combined import OnlineCandidateGenerator, Proposal
from ..commit.sampling import draw, speculative_sample
from ..errors import UnsupportedError
from ..models.vocabulary import Vocabulary, widened
from .checks import check_call, check_inputs, check_synced_gpus
from .probe import why_plain
from .streaming import OriginStreamer
from .target import Verifier

if TYPE_CHECKING:
    from ..config import OnlineSpecConfig

logger = logging.getLogger(__name__)


def decode(
    target: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    draft: Draft,
    learn: bool = True,
    streamer: BaseStreamer | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generates with a learning draft; arguments and result are those of transformers' decoding methods.

    Works under `torch.inference_mode()` too: learning needs ordinary tensors, so the mode is left for the time of the call.

    Raises:
        UnsupportedError, DraftError: before any work is done; the draft's learned state is untouched.
    """
    check_call(target, draft.model, generation_config, tokenizer, assistant_tokenizer)
    check_inputs(target, input_ids, generation_config, model_kwargs)
    started = time.perf_counter()
    note_latest(target, draft)
    with draft.failures.records.attempt():
        draft.serves(target)
    with draft.generating(), torch.inference_mode(False), torch.no_grad():
        processors = LogitsProcessorList(logits_processor)
        plain = why_plain(target, input_ids, model_kwargs)
        verifier = Verifier(target, input_ids, generation_config, model_kwargs, plain)
        # The draft is given the tokens it can see; a prefix that lives only in the target's cache is unknown to it.
        mask = model_kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, -input_ids.shape[1] :]
        vocabulary = Vocabulary.of(target)
        candidates = OnlineCandidateGenerator(draft, generation_config, processors, mask, learn, vocabulary)
        # In this loop the recorder hears a round at a time, instead of being called at every position.
        processors = LogitsProcessorList(p for p in processors if p is not candidates.recorder)
        try:
            output = _loop(input_ids, verifier, candidates, processors, stopping_criteria, generation_config, streamer)
            candidates.finish()
            reason = verifier.plain_because or verifier.limited_because
            if reason:
                with draft.lock:
                    draft.metrics.decisions.drafting = reason
        finally:  # an interrupted call counts too: the draft may have learned in it
            candidates.close(started)
    try:
        draft.warn_once(draft.governor.fit.message)
    except UserWarning as warning:  # where warnings are errors; the answer is there
        logger.warning("%s", warning)
    return output


def _loop(
    input_ids: Tensor,
    verifier: Verifier,
    candidates: OnlineCandidateGenerator,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> GenerateDecoderOnlyOutput | Tensor:
    counts = candidates.counts
    sample = bool(generation_config.do_sample)
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores: tuple[Tensor, ...] | None = () if keep_scores else None
    raw_logits: tuple[Tensor, ...] = ()

    done = False
    while not done:
        # 1. The draft commits. The last token of a round is the target's own, so one place is left for it.
        clock = time.perf_counter()
        room = min(generation_config.max_length - input_ids.shape[1] - 1, verifier.room(input_ids))
        proposal = candidates.propose(input_ids, max(0, room))
        draft_s = time.perf_counter() - clock

        # 2. The target verifies all of it in one forward.
        clock = time.perf_counter()
        logits = verifier.verify(input_ids, proposal.tokens)  # (batch, k + 1, vocab)
        candidates.hear(logits)
        if keep_logits:
            raw = logits.clone()

        # 3. Accept a prefix, and one token more.
        outcome = accept(proposal, logits, input_ids, processors, stopping_criteria, sample, scores)
        new_tokens = outcome.tokens.shape[1] - input_ids.shape[1]
        target_s = time.perf_counter() - clock
        if keep_logits:
            raw_logits += tuple(raw[:, i] for i in range(new_tokens))
        if isinstance(streamer, OriginStreamer):
            streamer.put_round(outcome.tokens[0, input_ids.shape[1] :].cpu(), outcome.accepted)
        elif streamer is not None:
            for token in outcome.tokens[0, input_ids.shape[1] :].cpu():
                streamer.put(token.view(1))
        input_ids, scores, done = outcome.tokens, outcome.scores, outcome.done
        verifier.keep(input_ids)
        counts.draft_time_s += draft_s
        counts.target_time_s += target_s
        counts.rounds += 1
        counts.new_tokens += new_tokens
        counts.drafted_tokens += proposal.tokens.shape[1]
        counts.accepted_tokens += outcome.accepted
        counts.verified_positions += outcome.verified
        counts.overlap += sum(outcome.overlaps)
        sources = {drafted.source for drafted in proposal.drafted}
        counts.drafted_by("memory" in sources, "neural" in sources)

        # 4. The draft adapts. The first forward reads the prompt: its time says nothing about a round's.
        candidates.observe(input_ids, proposal, outcome.overlaps, draft_s, target_s if counts.rounds > 1 else 0.0)

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=scores,
        logits=raw_logits if keep_logits else None,
        **{CACHE: verifier.cache},
    )


@dataclass(frozen=True)
class Outcome:
    """One verified round."""

    tokens: Tensor  # (batch, L + new) the sequence with its new tokens
    accepted: int  # drafted tokens kept
    verified: int  # drafted positions looked at: the accepted ones and the first rejection
    overlaps: list[float]  # at each of them Σ min(p, q)
    scores: tuple[Tensor, ...] | None  # processed scores (batch, vocab) of every generated token, if asked for
    done: bool


def accept(
    proposal: Proposal,
    logits: Tensor,
    tokens: Tensor,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    sample: bool,
    scores: tuple[Tensor, ...] | None,
) -> Outcome:
    """Keeps drafted tokens up to the first rejection or stop, then one token of the target's own.

    Position by position, so that a stateful processor or criterion sees every kept prefix once and in order, and
    nothing behind a rejection.

    Args:
        proposal: k drafted tokens.
        logits: (batch, k + 1, vocab) raw target logits.
        tokens: (batch, L) the sequence before this round.
    """
    k = proposal.tokens.shape[1]
    accepted = 0
    overlaps: list[float] = []
    for i in range(k + 1):
        processed = processors(tokens, logits[:, i])  # (batch, vocab)
        drafted = proposal.tokens[:, i] if i < k else None
        if not sample:
            token = processed.argmax(-1)
            kept = drafted is not None and bool((token == drafted).all())
            if drafted is not None:
                overlaps.append(float(kept))
        elif drafted is None:
            token, kept = draw(processed.softmax(-1)).squeeze(1), False
        else:
            assert proposal.q is not None
            p, q = processed.softmax(-1), proposal.q[:, i]
            # A law is 0 at ids that the other one has alone.
            p, q = widened(p, q.shape[-1], 0.0), widened(q, p.shape[-1], 0.0)
            token, kept = speculative_sample(p, q, drafted)
            overlaps.append(torch.minimum(p, q).sum().item())
        tokens = torch.cat([tokens, token[:, None]], dim=-1)
        if scores is not None:
            scores = (*scores, processed)
        accepted += kept
        # generate() passes the scores to the criteria only where the caller asked for them.
        done = bool(stopping_criteria(tokens, scores).all())
        if done or not kept:
            break
    return Outcome(tokens, accepted, len(overlaps), overlaps, scores, done)


class GenerateFn:
    """`generate(custom_generate=...)`: our loop, entered through transformers' public door."""

    def __init__(self, draft: Draft, streamer: BaseStreamer | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._draft, self._streamer, self._tokenizer = draft, streamer, tokenizer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        # Named here, generate() hands it to us; it would want a tokenizer of its own, and that it never hands over.
        stop_strings: str | list[str] | None = None,
        onlinespec: OnlineSpecConfig | bool | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        self._draft.begin_anew_if_changed()
        self._draft.check_setting(onlinespec)
        # generate() keeps its own synced_gpus from such callables: what it would have been is found out here.
        check_synced_gpus(bool(model_kwargs.pop("synced_gpus", False)) or needs_synced_gpus(model))
        check_call(model, self._draft.model, generation_config)
        check_inputs(model, input_ids, generation_config, model_kwargs)
        if stop_strings is not None:
            if self._tokenizer is None:
                raise UnsupportedError(
                    f"stop_strings={stop_strings!r} needs a tokenizer: use generate_fn(tokenizer=...)."
                )
            stop = StopStringCriteria(self._tokenizer, stop_strings)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stop])
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())  # as generate does with a streamer of its own
        return decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            draft=self._draft,
            learn=onlinespec is not False,
            streamer=self._streamer,
            **model_kwargs,
        )
