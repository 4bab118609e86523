"""The loop for several rows, each of which keeps as many tokens of a round as it accepts.

A row that has ended leaves: it costs nothing while the others go on. The rows come back in their order, padded on the right as
`generate` pads them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache

from .._compat.adapters import adapts_by_row
from .._compat.attention import takes_positions
from .._compat.caches import held_tokens
from .._compat.compiling import COMPILED, is_compiled
from .._compat.generation import (
    Generated,
    generated_output,
    goes_on_finished,
    hands_back_cache,
    hidden_tokens,
    is_transformers,
    pad_token,
    read_once,
)
from .._compat.recurrent import is_recurrent
from ..commit.request import Request
from ..errors import UnsupportedError
from ..models.vocabulary import Vocabulary
from ..rounds import Proposal, Rows, Verdict
from .accept import accept, joined
from .batch_criteria import BatchCriteria, split_criteria
from .ended_rows import EndedRows
from .inputs import InputNames, given
from .lockstep import Lockstep
from .probe import why_plain
from .probe_rows import why_one_length
from .probe_trees import why_chains
from .ragged import RaggedVerifier
from .row_calls import RowCalls, check_row_calls
from .trees import MOST_NODES


def check_batch(
    target: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: object = None,
    all_begin: bool = True,
) -> None:
    """Refuses what the loop does not take of several rows, before any work. Each error names the value and the way out.

    Args:
        all_begin: whether all rows begin together: only then a criterion may judge them together.
    """
    n = len(input_ids)
    if n == 1:
        return
    if streamer is not None:
        raise UnsupportedError(
            f"A streamer with a batch of {n}: it is shown one sequence. Call generate once per sequence."
        )
    asked = bool(config.return_dict_in_generate and config.output_scores)
    # One that judges all rows would have to be shown their scores at one length too.
    own = split_criteria(criteria, input_ids)[0] if all_begin and not asked else criteria
    check_row_calls(processors, own, input_ids, Vocabulary.of(target).said, asked)


def why_plain_batch(
    target: PreTrainedModel,
    input_ids: Tensor,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    all_begin: bool = True,
    synced_gpus: bool = False,
) -> str:
    """Why several rows are decoded by transformers' own loop, without drafting; "": they need not be.

    Rows of different lengths ask of a target what a tree asks: keys in any order, and a position for each token.

    Args:
        all_begin: whether all rows begin together: only then they may have pictures or sounds, which are not told apart by row.
        synced_gpus: whether other processes hold the target too.
    """
    reason = goes_on_finished(criteria)
    if not reason and config.prefill_chunk_size:
        reason = f"prefill_chunk_size={config.prefill_chunk_size}"
    names = InputNames.of(target)
    if not reason:
        reason = _unread_beside_tokens(target, names, given(model_kwargs), all_begin)
    if not reason:
        reason = _odd_columns(names, input_ids, config, model_kwargs)
    if not reason and is_compiled(target):
        reason = COMPILED.format(name=type(target).__name__)
    if not reason and is_recurrent(target):
        reason = f"the target {type(target).__name__} keeps a recurrent state, and each row of a round is kept up to another token"
    if not reason and adapts_by_row(target):
        reason = "adapter_names= gives each row an adapter of its own"
    if not reason:
        tokens, one = longest_row(target, input_ids, model_kwargs)
        reason = why_plain(target, tokens, one)
        # Windows that no row comes to are none. Not where rows join later, nor where other processes try the target too.
        known = all_begin and not synced_gpus
        places = config.max_length + hidden_tokens(input_ids, config, model_kwargs) + MOST_NODES if known else None
        if not reason and takes_positions(target, names.positions):
            reason = why_chains(target, tokens, one, places)
        reason = reason or why_one_length(target, tokens, one, places)
    return f"a batch of {len(input_ids)} decoded plainly: {reason}" if reason else ""


def _unread_beside_tokens(target: PreTrainedModel, names: InputNames, inputs: set[str], all_begin: bool) -> str:
    """What of the inputs beside the tokens would have to be read in later rounds too, when some rows have left; "": nothing."""
    beside = inputs - names.text
    if not all_begin:
        beside |= inputs & (names.columns.keys() - {names.mask, names.positions})
    if beside and all_begin and all(map(read_once, beside)) and is_transformers(target):
        return ""
    return f"{', '.join(sorted(beside))} beside the tokens" if beside else ""


def _odd_columns(names: InputNames, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> str:
    """What has not one column for each token, those included that are in the cache alone; "": nothing. Plain decoding makes of it what
    it makes."""
    given = input_ids.shape[1]
    tokens = given + hidden_tokens(input_ids, config, model_kwargs)
    for name in names.columns:
        values = model_kwargs.get(name)
        if values is not None and values.shape[-1] not in ({tokens} if name == names.mask else {tokens, given}):
            return f"{name} has {values.shape[-1]} columns for {tokens} tokens"
    return ""


def longest_row(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The row (1, L) of a call with the most tokens, another one may be padding alone; and the inputs beside it.

    Of several rows without pictures and sounds: which of them is in which row is not told. A target is tried with the tokens alone
    then, as all rounds but the first one are.
    """
    if len(input_ids) == 1:
        return input_ids, model_kwargs
    names = InputNames.of(target)
    mask = model_kwargs.get(names.mask)
    row = 0 if mask is None else int(mask.sum(-1).argmax())
    text = {name: value for name, value in model_kwargs.items() if name in names.text}
    return input_ids[row : row + 1], names.of_rows(text, [row])


@dataclass
class BatchResults:
    """The rows that have ended, and what `generate` hands back beside the tokens, as far as it was asked for."""

    tokens: dict[int, Tensor] = field(default_factory=dict)  # by row of the call, (L,)
    scores: list[list[Tensor]] | None = None  # per row, processed ones (vocab,) of every new token
    logits: list[list[Tensor]] | None = None  # the same, raw

    @classmethod
    def of(cls, config: GenerationConfig, rows: int) -> BatchResults:
        def asked(output: bool | None) -> list[list[Tensor]] | None:
            return [[] for _ in range(rows)] if config.return_dict_in_generate and output else None

        return cls({}, asked(config.output_scores), asked(config.output_logits))

    @property
    def wants_logits(self) -> bool:
        return self.logits is not None

    def add(self, verdict: Verdict, raw: Tensor | None) -> None:
        """Takes in a round; `raw`: its logits (batch, n + 1, vocab), if they are wanted."""
        new = None if raw is None else verdict.of_new_tokens(raw)
        for i, row in enumerate(verdict.rows.of_call):
            if self.scores is not None and verdict.scores is not None:
                self.scores[row] += verdict.scores[i]
            if self.logits is not None and new is not None:
                self.logits[row] += new[i, : verdict.new_tokens[i]].unbind()
            if verdict.done[i]:
                self.tokens[row] = verdict.rows.row(i)[0]

    def end_at(self, length: int, rows: list[Tensor], prompt: int) -> None:
        """Ends all rows, as far as they have got, at a length that a prompt of so many tokens is part of."""
        self.tokens = {i: row[:length] for i, row in enumerate(rows)}
        if self.logits is not None:
            self.logits = [own[: length - prompt] for own in self.logits]

    def output(self, config: GenerationConfig, cache: object) -> Generated | Tensor:
        rows = [self.tokens[row] for row in range(len(self.tokens))]
        longest = max(map(len, rows))
        sequences = rows[0].new_full((len(rows), longest), pad_token(config))
        for own, padded in zip(rows, sequences, strict=True):
            padded[: len(own)] = own
        if not config.return_dict_in_generate:
            return sequences
        return generated_output(sequences, _by_token(self.scores), _by_token(self.logits), cache)


def _by_token(rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Values (vocab,) per row and token as (batch, vocab) per token; 0 at tokens that pad a row."""
    if rows is None:
        return None
    nothing, most = torch.zeros_like(rows[0][0]), max(map(len, rows))
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(most))


class BatchRounds:
    """The rounds of several rows, of all that are generated at the time or of those that begin."""

    def __init__(self, request: Request, calls: RowCalls, config: GenerationConfig, results: BatchResults) -> None:
        self._request, self._calls, self._config, self._results = request, calls, config, results
        self._sample = bool(config.do_sample)

    def next(self, rows: Rows, verifier: RaggedVerifier) -> Verdict:
        """One round of rows that go on; the verifier holds what they keep, those included that have ended in it."""
        # 1. The draft commits. Of a row that is nearer to its end than others, what lies behind it is never reached.
        request, clock, reads_prompts = self._request, time.perf_counter(), verifier.first
        room = min(self._config.max_length - min(rows.lengths) - 1, verifier.room())
        proposal = request.propose(rows, max(0, room), verifier.trees)
        draft_s = time.perf_counter() - clock

        # 2. The target verifies all of it in one forward.
        clock = time.perf_counter()
        logits = verifier.verify(rows, proposal)  # (batch, n + 1, vocab)
        request.read(rows, proposal, logits, verifier.features)
        raw = logits.clone() if self._results.wants_logits else None

        # 3. Every row accepts a prefix, and one token more.
        verdict = _accept(proposal, logits, rows, self._calls, self._sample, self._results.scores)
        kept = replace(verdict.rows, numbers=rows.of_call)
        verdict = replace(verdict, rows=kept, draft_s=draft_s, target_s=time.perf_counter() - clock)
        self._results.add(verdict, raw)
        verifier.keep(verdict)

        # 4. The draft adapts.
        request.observe(verdict, reads_prompts)
        return verdict


def going_on(verdict: Verdict) -> list[int]:
    """The places of the rows that have not ended."""
    return [i for i, done in enumerate(verdict.done) if not done]


def decode_rows(
    input_ids: Tensor,
    verifier: RaggedVerifier,
    request: Request,
    calls: RowCalls,
    together: BatchCriteria,
    config: GenerationConfig,
    cache: Cache,
    lockstep: Lockstep,
) -> Generated | Tensor:
    """Generates several rows; arguments and result are those of transformers' decoding methods.

    Args:
        calls: processors and criteria of each row.
        together: criteria that end all rows at once.
        cache: of the call. Where the caller has it afterwards, it is left as plain decoding leaves it.
    """
    results, rows = BatchResults.of(config, len(input_ids)), Rows.of(input_ids)
    rounds = BatchRounds(request, calls, config, results)
    handed_back = hands_back_cache(config) or held_tokens(cache) > 0
    ended = EndedRows(verifier.shown, input_ids.shape[1]) if handed_back else None
    while rows.lengths:
        verdict = rounds.next(rows, verifier)
        end = together.end(verdict)
        left = going_on(verdict) if end is None else []
        if ended is not None:
            _take_ended(ended, verdict.rows, left, verifier)
        elif 0 < len(left) < len(verdict.done):
            verifier.leave(left)
        if end is not None:
            results.end_at(end, together.rows, input_ids.shape[1])
        rows = verdict.rows if len(left) == len(verdict.done) else verdict.rows.of_rows(left)
        if not left and ended is not None:
            ended.fill(cache, [results.tokens[row] for row in range(len(input_ids))], lockstep)
        lockstep.end_round(not left)
    return results.output(config, cache)


def _take_ended(ended: EndedRows, rows: Rows, left: list[int], verifier: RaggedVerifier) -> None:
    """Rows that have ended leave, with what the target has read of them."""
    leaving = [i for i in range(len(rows.lengths)) if i not in left]
    if leaving:
        ended.add(rows.of_rows(leaving).of_call, verifier.split(leaving) if left else verifier)


def _accept(
    proposal: Proposal,
    logits: Tensor,
    rows: Rows,
    calls: RowCalls,
    sample: bool,
    scores: list[list[Tensor]] | None,
) -> Verdict:
    """What every row keeps: rows of one length together, or each one by itself with its own processors and criteria."""
    groups = defaultdict(list)
    for i, (length, row) in enumerate(zip(rows.lengths, rows.of_call, strict=True)):
        groups[length if calls.shared else row].append(i)
    verdicts = {}
    for members in groups.values():
        own, all_rows = rows.of_rows(members), len(groups) == 1
        row = own.of_call[0]
        # Those that are shared do not look at earlier scores.
        earlier = None if scores is None else () if calls.shared else tuple(one[None] for one in scores[row])
        index = torch.tensor(members, device=logits.device)
        verdicts[tuple(members)] = accept(
            proposal if all_rows else proposal.of(members),
            logits if all_rows else logits[index],
            own,
            calls.processors[row],
            calls.criteria[row],
            sample,
            earlier,
        )
    return next(iter(verdicts.values())) if len(verdicts) == 1 else joined(proposal, verdicts)
