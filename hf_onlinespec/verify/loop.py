"""The loop: propose → verify → accept → adapt.

`generate` has done all its preparation when it hands over to `decode`. Every kept token is the target's own: greedy
decoding keeps its argmax, sampling keeps its law (speculative sampling, arXiv:2211.17192, algorithm 1), whatever the
draft proposes. One sequence for now; tensors carry the batch dimension throughout.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .._compat.generation import generated_output
from ..commit.base import Draft, note_latest
from ..commit.combined import OnlineCandidateGenerator
from ..models.vocabulary import Vocabulary
from .accept import accept
from .checks import check_call, check_inputs
from .probe import why_plain
from .streaming import OriginStreamer
from .target import Verifier

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
        candidates.record_round(logits)
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
        counts.drafted_by("memory" in sources, "model" in sources)

        # 4. The draft adapts. The first forward reads the prompt: its time says nothing about a round's.
        candidates.observe(input_ids, proposal, outcome.overlaps, draft_s, target_s if counts.rounds > 1 else 0.0)

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return generated_output(input_ids, scores, raw_logits if keep_logits else None, verifier.cache)
