"""Several calls of `generate`, one row each, with settings, processors and memories of their own: the target verifies what is proposed
for all of them in one forward, and others join while they run.

Each call is decoded, counted, remembered and learned as if it were alone; what fails in one ends that one. A prompt is read in a round
of its own, which holds up those that run, with the prompts of the others that begin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .._compat.caches import CACHE, held_tokens
from .._compat.generation import needs_synced_gpus
from ..commit.base import Call, Draft, note_latest
from ..commit.common_rounds import CommonRounds, RequestRows
from ..commit.gaps import Gaps
from ..commit.request import Request
from ..errors import UnsupportedError
from ..models.placeholders import placeholder_tokens
from ..models.vocabulary import Vocabulary
from ..rounds import Proposal, Rows, Verdict
from .accept import accept, joined
from .batch import why_plain_batch
from .checks import check_adapters, check_call, check_inputs, retokenizer_for
from .custom_generate import PreparedCall
from .loop import stream
from .ragged import RaggedVerifier


def check_joins(call: PreparedCall, draft: Draft) -> None:
    """Refuses a call that cannot be decoded beside others.

    Raises:
        UnsupportedError, DraftError: it says why; alone it may be decoded nevertheless.
    """
    target, config, inputs, kwargs = call.target, call.config, call.input_ids, call.model_kwargs
    if len(inputs) > 1:
        raise UnsupportedError(f"A batch of {len(inputs)}: calls of one row are decoded beside others.")
    if config.return_dict_in_generate:
        raise UnsupportedError("return_dict_in_generate: the tokens alone are handed out.")
    if needs_synced_gpus(target):
        raise UnsupportedError("synced_gpus: calls begin at other times in each of the processes that hold the target")
    check_call(target, draft.model, config, exit_layers=draft.exit_layers)
    check_inputs(target, inputs, config, kwargs)
    if target.config.is_encoder_decoder:
        raise UnsupportedError(f"The target {type(target).__name__} is an encoder–decoder, whose sources differ.")
    if held_tokens(kwargs[CACHE]) or Gaps.of(kwargs.get("attention_mask"), 0) is not None:
        raise UnsupportedError(
            "A cache of an earlier turn, or padding between tokens: rows are read from their beginning."
        )
    with torch.inference_mode(False), torch.no_grad():
        # Its criteria end the one row that it has: none goes on behind its end until others have got to theirs.
        plain = why_plain_batch(target, inputs, StoppingCriteriaList(), config, kwargs, all_begin=False)
    if plain:
        raise UnsupportedError(plain)


@dataclass(eq=False)
class RunningCall:
    """One call while it runs beside others.

    Attributes:
        rows: its one row, so far.
        own_s: its share of the time of all rounds that it took part in; what it learned at its end is a part of it.
        done: whether it has ended.
        error: what ended it before its time; None: nothing did.
    """

    call: PreparedCall
    request: Request
    streamer: BaseStreamer | None
    rows: Rows
    open: ExitStack
    own_s: float = 0.0
    done: bool = False
    error: Exception | None = None

    @property
    def tokens(self) -> Tensor:
        """(1, L) the row so far, without padding."""
        return self.rows.row(0)


@dataclass
class _Part:
    """One call in one round."""

    running: RunningCall
    asked: RequestRows
    proposal: Proposal
    verdict: Verdict | None = None  # None: it has failed


class RunningCalls:
    """Decodes calls on one target with one draft, step by step."""

    def __init__(self, draft: Draft) -> None:
        self._draft, self._rounds = draft, CommonRounds(draft)
        self._running: list[RunningCall] = []
        self._opened = 0  # calls so far
        self._verifier: RaggedVerifier | None = None  # of these, in this order; None: there are none

    @property
    def running(self) -> Sequence[RunningCall]:
        return self._running

    def open(
        self, call: PreparedCall, learn: bool, adapter: str | None, streamer: BaseStreamer | None, beside: int
    ) -> RunningCall:
        """A call that is to begin; what drafts for it is settled, the suffix memory that it reads included.

        Args:
            learn: False: nothing is remembered or learned.
            adapter: of the draft, by name: which one drafts and learns. None: the one without a name.
            streamer: shown the prompt at once, and tokens as they are kept.
            beside: other calls that run, or begin with it.

        Raises:
            ConfigError, DraftError: before any work is done.
        """
        target, inputs, draft = call.target, call.input_ids, self._draft
        mask = call.model_kwargs.get("attention_mask")
        own = inputs if mask is None else inputs[:, int((mask[:, -inputs.shape[1] :] == 0).sum()) :]
        adapters = check_adapters(draft, () if adapter is None else (adapter,), learn)
        if streamer is not None:
            streamer.put(inputs.cpu())  # as generate does
        note_latest(target, draft)
        retokenizer = retokenizer_for(target, draft, None, None)
        with draft.failures.records.attempt():
            draft.serves(target, own_tokens=retokenizer is None)
        with ExitStack() as stack:
            stack.enter_context(draft.generating())
            with torch.inference_mode(False), torch.no_grad():
                about = Call(call.config, call.processors, 1, None, learn, Vocabulary.of(target))
                about = replace(about, adapters=adapters, prompts=own, at_once=beside + 1 if beside else None)
                about = replace(about, retokenizer=retokenizer, first_row=self._opened)
                self._opened += 1
                request = Request(draft, replace(about, placeholders=placeholder_tokens(target.config)))
            return RunningCall(call, request, streamer, Rows.of(own), stack.pop_all())

    def begin(self, calls: Sequence[RunningCall]) -> list[RunningCall]:
        """The first round of calls, in which their prompts are read; those of them that have ended in it. The others join those that run."""
        longest = max(one.rows.lengths[0] for one in calls)
        padded = [F.pad(one.tokens, (longest - one.rows.lengths[0], 0)) for one in calls]
        mask = [F.pad(torch.ones_like(one.tokens), (longest - one.rows.lengths[0], 0)) for one in calls]
        target = calls[0].call.target
        columns = {name: value for name, value in calls[0].call.model_kwargs.items() if name != "position_ids"}
        columns["attention_mask"] = torch.cat(mask)
        try:
            with torch.inference_mode(False), torch.no_grad():
                verifier = RaggedVerifier(target, torch.cat(padded), calls[0].call.config, columns, self._draft.reads)
                going_on = self._round(calls, verifier, Rows.of(torch.cat(padded)))
                if going_on and self._verifier is None:
                    self._running, self._verifier = list(going_on), verifier
                elif going_on and self._verifier is not None:
                    self._verifier.join(verifier)
                    self._running += going_on
        except Exception as error:  # the model's forward may raise anything, such as that memory has run out
            self._fail(calls, error)
        return self._ended(calls)

    def step(self) -> list[RunningCall]:
        """One round of all calls that run; those that have ended in it."""
        calls, verifier = self._running, self._verifier
        if verifier is None:
            return []
        try:
            with torch.inference_mode(False), torch.no_grad():
                ends = torch.cat([one.tokens[:, -1:] for one in calls])  # all that is read of rows that have begun
                self._running = self._round(calls, verifier, Rows.of(ends))
        except Exception as error:
            self._running = []
            self._fail(calls, error)
        if not self._running:
            self._verifier = None
        return self._ended(calls)

    def _round(self, calls: Sequence[RunningCall], verifier: RaggedVerifier, rows: Rows) -> list[RunningCall]:
        """One round; those that go on, which the verifier holds then.

        Args:
            rows: of all calls, as far as the verifier needs them.
        """
        # 1. The draft commits.
        started, first = time.perf_counter(), verifier.first
        room = verifier.room()
        asked = [RequestRows(one.request, one.rows, _room(one, room)) for one in calls]
        proposals = self._rounds.propose(asked, verifier.trees)
        parts = [_Part(*found) for found in zip(calls, asked, proposals, strict=True)]
        proposal = Proposal.joined(proposals)
        draft_s = time.perf_counter() - started

        # 2. The target verifies all of it in one forward.
        logits = verifier.verify(rows, proposal)  # (calls, n + 1, vocab)

        # 3. Every call accepts a prefix, and one token more.
        for i, part in enumerate(parts):
            self._accept(part, logits[i : i + 1], self._features(verifier, part, i, rows))
        verdicts: dict[tuple[int, ...], Verdict]
        verdicts = {(i,): part.verdict or _nothing(part) for i, part in enumerate(parts)}
        verifier.keep(joined(proposal, verdicts))
        going_on = [i for i, part in enumerate(parts) if not part.running.done]
        if 0 < len(going_on) < len(parts):
            verifier.leave(going_on)

        # 4. The draft adapts.
        target_s = (time.perf_counter() - started - draft_s) / len(calls)
        seen = [
            (part.asked, replace(part.verdict, draft_s=draft_s / len(calls), target_s=target_s))
            for part in parts
            if part.verdict is not None
        ]
        if seen:
            self._rounds.observe(seen, first)
        share_s = (time.perf_counter() - started) / len(calls)
        for one in calls:
            one.own_s += share_s
        return [calls[i] for i in going_on]

    def _features(self, verifier: RaggedVerifier, part: _Part, i: int, rows: Rows) -> Tensor | None:
        """(1, fed, width) the target's hidden states of what it was fed of a call."""
        if verifier.features is None or not part.running.request.reads:
            return None
        fed = part.proposal.tokens.shape[1] + (part.running.rows.lengths[0] if verifier.first else 1)
        end = rows.tokens.shape[1] if verifier.first else 1
        end += part.proposal.tokens.shape[1]
        return verifier.features[i : i + 1, end - fed : end]

    def _accept(self, part: _Part, logits: Tensor, features: Tensor | None) -> None:
        """What a call keeps of the round; its processors, criteria and streamer may raise anything."""
        own, call = part.running, part.running.call
        try:
            logits = logits[:, : part.proposal.tokens.shape[1] + 1]
            own.request.read(own.rows, part.proposal, logits, features)
            samples = bool(call.config.do_sample)
            verdict = accept(part.proposal, logits, own.rows, call.processors, call.criteria, samples, None)
            if own.streamer is not None:
                stream(own.streamer, verdict)
        except Exception as error:
            own.error, own.done = error, True
            return
        own.rows, own.done, part.verdict = verdict.rows, verdict.done[0], verdict

    def _fail(self, calls: Sequence[RunningCall], error: Exception) -> None:
        for one in calls:
            if not one.done:
                one.error, one.done = error, True

    def _ended(self, calls: Sequence[RunningCall]) -> list[RunningCall]:
        """Those that have ended, once they are remembered, learned and counted."""
        ended = [one for one in calls if one.done]
        for one in ended:
            self._end(one)
        return ended

    def _end(self, one: RunningCall) -> None:
        started, draft = time.perf_counter(), self._draft
        with one.open, torch.inference_mode(False), torch.no_grad():
            try:
                if one.error is None and one.streamer is not None:
                    one.streamer.end()
                if one.error is None:
                    one.request.finish()
            except Exception as error:
                one.error = error
            finally:
                one.own_s += time.perf_counter() - started
                one.request.close(time.perf_counter() - one.own_s)
        draft.warn_once(draft.governor.fit.message)


def _room(one: RunningCall, room: int) -> int:
    """How far a call may reach; the last token of a round is the target's own."""
    return max(0, min(one.call.config.max_length - one.rows.lengths[0] - 1, room))


def _nothing(part: _Part) -> Verdict:
    """Of a call that has failed: it leaves the round before it has kept anything."""
    return Verdict(part.proposal, part.running.rows, (1,), ((),), ((),), ((),), (True,), None)
