"""The loop: propose → verify → accept → adapt.

`generate` has done all its preparation when it hands over to `decode`. Every kept token is the target's own: greedy
decoding keeps its argmax, sampling keeps its law (speculative sampling, arXiv:2211.17192, algorithm 1), whatever the
draft proposes. This is the loop of one sequence; that of several: batch.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .._compat.caches import CACHE, held_tokens, make_ordinary
from .._compat.generation import Generated, generated_output, hidden_tokens, pad_token
from .._compat.recurrent import is_recurrent
from ..commit.base import Call, Draft, note_latest
from ..commit.gaps import Gaps
from ..commit.request import Request
from ..config.adapters import Asked, adapters_of_rows
from ..models.placeholders import mask_of_text, placeholder_tokens, replaced_tokens
from ..models.vocabulary import Vocabulary
from ..rounds import Rows, Verdict
from .accept import accept
from .batch import check_batch, decode_rows, longest_row, why_plain_batch
from .batch_criteria import BatchCriteria, split_criteria
from .checks import check_adapters, check_call, check_inputs, check_synced_gpus, retokenizer_for
from .inputs import InputNames, source_of
from .lockstep import Lockstep
from .plain_batch import decode_plainly
from .probe import why_plain
from .probe_trees import why_chains
from .ragged import RaggedVerifier
from .row_calls import RowCalls
from .streaming import OriginStreamer
from .target import Verifier

# Decodes one request.
Loop = Callable[[Request], Generated | Tensor]
CHAINS_ONLY = "; chains only: "  # in `decisions`, between what was decided and why no tree was verified


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
    tokenizer: object = None,
    assistant_tokenizer: object = None,
    adapter: Asked = None,
    synced_gpus: bool = False,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Generated | Tensor:
    """Generates with a learning draft; arguments and result are those of transformers' decoding methods.

    Works under `torch.inference_mode()` too: learning needs ordinary tensors, so the mode is left for the time of the call.

    Args:
        adapter: of the draft, by name: which one drafts and learns; or one per prompt. None: the one without a name.
        inputs_tensor: what `generate` gave to an encoder, a row for each prompt; None: not told.

    Raises:
        UnsupportedError, DraftError, ConfigError: before any work is done; the draft's learned state is untouched.
    """
    check_call(target, draft.model, generation_config, tokenizer, assistant_tokenizer, draft.exit_layers)
    check_inputs(target, input_ids, generation_config, model_kwargs)
    processors = LogitsProcessorList(logits_processor)
    check_batch(target, input_ids, processors, stopping_criteria, generation_config, streamer)
    copies = generation_config.num_return_sequences or 1
    adapters = check_adapters(draft, adapters_of_rows(adapter, len(input_ids), copies), learn)
    check_synced_gpus(synced_gpus, target, draft.model, generation_config)
    arguments = (target, input_ids, processors, stopping_criteria, generation_config)
    lockstep, several = Lockstep(target, input_ids, synced_gpus), len(input_ids) > 1

    def why() -> str:
        batch = (target, input_ids, stopping_criteria, generation_config, model_kwargs)
        return why_plain_batch(*batch, synced_gpus=synced_gpus) if several else ""

    with torch.inference_mode(False), torch.no_grad():
        plain = lockstep.begin(*longest_row(target, input_ids, model_kwargs), several, why)
    # The draft is given the tokens it can see; a prefix that lives only in the target's cache is unknown to it.
    mask = model_kwargs.get(InputNames.of(target).mask)
    mask = None if mask is None else mask[:, -input_ids.shape[1] :]
    placeholders = placeholder_tokens(target.config) | replaced_tokens(target, input_ids, model_kwargs)
    if several:
        mask = mask_of_text(mask, input_ids, placeholders)
    call = Call(generation_config, processors, input_ids.shape[0], mask, learn, Vocabulary.of(target))
    call = replace(call, adapters=adapters, prompts=input_ids, placeholders=placeholders)
    retokenizer = retokenizer_for(target, draft, tokenizer, assistant_tokenizer)
    source = source_of(target, len(input_ids), inputs_tensor, model_kwargs)
    call = replace(call, retokenizer=retokenizer, source=source)
    hidden = hidden_tokens(input_ids, generation_config, model_kwargs)
    gaps = Gaps.of(mask, 0 if hidden else min(held_tokens(model_kwargs[CACHE]), input_ids.shape[1] - 1))
    if gaps is not None:
        prompts = gaps.shown_tokens(input_ids, tuple(range(len(input_ids))))
        call = replace(call, mask=gaps.mask, prompts=prompts, gaps=gaps)
    if plain:
        draft.metrics.decisions.drafting = plain
        given = model_kwargs if streamer is None else model_kwargs | {"streamer": streamer}
        return decode_plainly(*arguments[:4], given | {"synced_gpus": synced_gpus}, draft, call)
    started = time.perf_counter()
    note_latest(target, draft)
    with draft.failures.records.attempt():
        draft.serves(target, own_tokens=retokenizer is None)
    with draft.generating(), torch.inference_mode(False), torch.no_grad():
        make_ordinary(model_kwargs[CACHE])
        loop = (
            _several(*arguments, model_kwargs, draft, lockstep)
            if several
            else _one(*arguments, model_kwargs, draft, streamer, lockstep)
        )
        request = Request(draft, call)
        try:
            output = loop(request)
        finally:  # an interrupted call counts too: the draft may have learned in it
            request.close(started)
    draft.warn_once(draft.governor.fit.message)
    return output


def _one(
    target: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    draft: Draft,
    streamer: BaseStreamer | None,
    lockstep: Lockstep,
) -> Loop:
    """The loop of one row."""
    plain = why_plain(target, input_ids, model_kwargs)
    if not plain and lockstep.synced and is_recurrent(target):
        # To catch up takes a forward that the other processes do not run.
        plain = f"synced_gpus with a recurrent state, which the target {type(target).__name__} keeps"
    verifier = Verifier(target, input_ids, config, model_kwargs, plain)
    verifier.trees_because = plain or verifier.compiled_because or why_chains(target, input_ids, model_kwargs)

    def loop(request: Request) -> Generated | Tensor:
        verifier.hand_out(request.reads)
        try:
            output = _loop(input_ids, verifier, request, processors, criteria, config, streamer, lockstep)
        except BaseException:  # a streamer's, a criterion's, the keyboard's: the caller may go on in this cache
            verifier.take_back()
            raise
        request.finish()
        _say_limits(draft, verifier)
        return output

    return loop


def _several(
    target: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    draft: Draft,
    lockstep: Lockstep,
) -> Loop:
    """The loop of several rows."""
    own, of_all = split_criteria(criteria, input_ids)
    calls = RowCalls.of(processors, own, input_ids.shape[0])
    together = BatchCriteria(of_all, input_ids, pad_token(config))

    def loop(request: Request) -> Generated | Tensor:
        verifier = RaggedVerifier(target, input_ids, config, model_kwargs, request.reads)
        output = decode_rows(input_ids, verifier, request, calls, together, config, model_kwargs[CACHE], lockstep)
        request.finish()
        if verifier.unread_because:
            with draft.lock:
                draft.metrics.decisions.drafting = f"guesses alone: {verifier.unread_because}"
        return output

    return loop


def _say_limits(draft: Draft, verifier: Verifier) -> None:
    """Says in `decisions` what the target kept from being drafted."""
    decisions = draft.metrics.decisions
    with draft.lock:
        reason = verifier.plain_because or verifier.limited_because
        if reason:
            decisions.drafting = reason
            return
        if verifier.unread_because:
            decisions.drafting = f"guesses alone: {verifier.unread_because}"
            return
        decided = decisions.drafting.partition(CHAINS_ONLY)[0]  # what an earlier request said of trees is left out
        chains = verifier.trees_because
        decisions.drafting = f"{decided}{CHAINS_ONLY}{chains}" if chains else decided


@dataclass
class _Asked:
    """What `generate` hands back beside the tokens, as far as it was asked for."""

    scores: tuple[Tensor, ...] | None  # processed, (batch, vocab) of every new token
    logits: tuple[Tensor, ...] | None  # raw ones

    @classmethod
    def of(cls, config: GenerationConfig) -> _Asked:
        in_dict = config.return_dict_in_generate
        return cls(() if in_dict and config.output_scores else None, () if in_dict and config.output_logits else None)

    def add(self, verdict: Verdict, raw: Tensor | None) -> None:
        if self.scores is not None and verdict.scores is not None:
            self.scores += tuple(scores[None] for scores in verdict.scores[0])
        if self.logits is not None and raw is not None:
            self.logits += tuple(verdict.of_new_tokens(raw).unbind(1))


def _loop(
    input_ids: Tensor,
    verifier: Verifier,
    request: Request,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    lockstep: Lockstep,
) -> Generated | Tensor:
    draws, asked = bool(generation_config.do_sample), _Asked.of(generation_config)
    rows, done = Rows.of(input_ids), False
    while not done:
        # 1. The draft commits. The last token of a round is the target's own, so one place is left for it.
        clock = time.perf_counter()
        room = min(generation_config.max_length - rows.lengths[0] - 1, verifier.room(rows.tokens))
        proposal = request.propose(rows, max(0, room), verifier.trees)
        draft_s = time.perf_counter() - clock

        # 2. The target verifies all of it in one forward.
        clock = time.perf_counter()
        logits = verifier.verify(rows.tokens, proposal)  # (batch, n + 1, vocab)
        request.read(rows, proposal, logits, verifier.features)
        raw = None if asked.logits is None else logits.clone()

        # 3. Accept a prefix, and one token more.
        verdict = accept(proposal, logits, rows, processors, stopping_criteria, draws, asked.scores)
        verdict = replace(verdict, draft_s=draft_s, target_s=time.perf_counter() - clock)
        asked.add(verdict, raw)
        if streamer is not None:
            stream(streamer, verdict)
        rows, done = verdict.rows, all(verdict.done)
        verifier.keep(rows.tokens, verdict.paths)
        lockstep.end_round(done)

        # 4. The draft adapts.
        request.observe(verdict, reads_prompts=verifier.caught_up)

    verifier.catch_up(rows.tokens)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return rows.tokens
    return generated_output(rows.tokens, asked.scores, asked.logits, verifier.cache)


def stream(streamer: BaseStreamer, verdict: Verdict) -> None:
    """Shows a streamer what the one row of a round has got."""
    tokens = verdict.rows.row(0)[0, -verdict.new_tokens[0] :].cpu()
    if isinstance(streamer, OriginStreamer):
        streamer.put_round(tokens, verdict.accepted[0])
        return
    for token in tokens:
        streamer.put(token.view(1))
