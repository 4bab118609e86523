"""The rows of one call of `generate`, so many at a time: where some have ended, others begin, and join those that go on.

Rows that begin read their prompts in a round of their own, and then join the others as soon as there is room. That round holds up all
rows that run, and takes little longer for many prompts than for one: where no draft model reads, a batch of them is read ahead.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .._compat.generation import needs_synced_gpus
from ..commit.base import Call, Draft, note_latest
from ..commit.request import Request
from ..config.adapters import adapters_of_rows
from ..errors import UnsupportedError
from ..models.vocabulary import Vocabulary
from ..rounds import Rows, Verdict
from .batch import BatchResults, BatchRounds, check_batch, going_on, why_plain_batch
from .checks import check_adapters, check_call, check_inputs, retokenizer_for
from .custom_generate import PreparedCall
from .inputs import InputNames, source_of
from .ragged import RaggedVerifier
from .row_calls import RowCalls

# A forward over prompts takes as long as so many rounds, as far as it is decided when others begin. Measured on the embedded target, one
# thread: 22 ms of a forward over two prompts, beside what each of them adds, and 19 ms of a round of eight rows.
PROMPTS_ROUNDS = 1.0


class RunningBatch:
    """Decodes the rows of a call, step by step.

    Args:
        learn: False: nothing is remembered or learned.
        at_once: rows that are generated at a time.
        adapter: of the draft, by name: which one drafts and learns. None: the one without a name.
        tokenizers: of target and draft, where `generate` was given them.

    Raises:
        UnsupportedError, DraftError, ConfigError: before any work is done; it says why these rows cannot be decoded so.
    """

    def __init__(
        self,
        call: PreparedCall,
        draft: Draft,
        learn: bool,
        at_once: int,
        adapter: str | None = None,
        tokenizers: tuple[object, object] = (None, None),
    ) -> None:
        target, config, inputs = call.target, call.config, call.input_ids
        if needs_synced_gpus(target):
            raise UnsupportedError(
                "synced_gpus: rows begin at other times in each of the processes that hold the target"
            )
        check_call(target, draft.model, config, *tokenizers, exit_layers=draft.exit_layers)
        retokenizer = retokenizer_for(target, draft, *tokenizers)
        check_inputs(target, inputs, config, call.model_kwargs)
        self._processors = LogitsProcessorList(call.processors)
        check_batch(target, inputs, self._processors, call.criteria, config, all_begin=False)
        adapters = check_adapters(draft, adapters_of_rows(adapter, len(inputs)), learn)
        with torch.inference_mode(False), torch.no_grad():
            plain = why_plain_batch(target, inputs, call.criteria, config, call.model_kwargs, all_begin=False)
        if plain:
            raise UnsupportedError(plain)
        self._call, self._draft, self._at_once = call, draft, at_once
        self._waiting = deque(range(len(inputs)))
        self._rows = Rows(inputs[:0], ())
        self._verifier: RaggedVerifier | None = None  # of the rows that go on; None: there are none
        self._ready_rows = self._rows  # that have begun, and join when there is room
        self._ready: RaggedVerifier | None = None  # of these
        self._names = InputNames.of(target)
        mask = call.model_kwargs.get(self._names.mask)
        self._mask = torch.ones_like(inputs) if mask is None else mask[:, -inputs.shape[1] :]
        # A draft model reads all rows in each round, and could not leave those that are ready for later.
        self._ahead = draft.model is None  # whether more rows begin than there is room for
        self._row_rounds, self._ended_rows = (
            0,
            0,
        )  # rounds so far, each counted for each of its rows; rows that have ended
        self._seconds = 0.0  # that steps have taken: between them the caller's time passes
        self._open = ExitStack()
        note_latest(target, draft)
        with draft.failures.records.attempt():
            draft.serves(target, own_tokens=retokenizer is None)
        self._open.enter_context(draft.generating())
        try:
            with torch.inference_mode(False), torch.no_grad():
                rows = len(inputs)
                own = Call(config, self._processors, rows, self._mask, learn, Vocabulary.of(target))
                own = replace(own, adapters=adapters, prompts=inputs, at_once=min(at_once, rows))
                source = source_of(target, rows, call.inputs_tensor, call.model_kwargs)
                self._request = Request(draft, replace(own, source=source, retokenizer=retokenizer))
                calls = RowCalls.of(self._processors, call.criteria, rows)
                self._rounds = BatchRounds(self._request, calls, config, BatchResults.of(config, rows))
        except BaseException:
            self._open.close()
            raise

    @property
    def running(self) -> tuple[int, ...]:
        """The rows that have begun and not ended."""
        return self._rows.of_call + self._ready_rows.of_call

    @property
    def waiting(self) -> tuple[int, ...]:
        """The rows that have not begun."""
        return tuple(self._waiting)

    @property
    def done(self) -> bool:
        return not self._waiting and not self.running

    def step(self) -> dict[int, Tensor]:
        """One round; the rows that have ended in it, whole (L,), without padding on the right."""
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad():
                free = self._at_once - len(self._rows.lengths)
                if self._waiting and not self._ready_rows.lengths and free >= (1 if self._ahead else self._enough()):
                    return self._begin(self._at_once if self._ahead else free)
                self._join()
                return self._go_on()
        finally:
            self._seconds += time.perf_counter() - started

    def _enough(self) -> int:
        """Free places in which others begin, where none are read ahead.

        Of f places (f − 1) / 2 are empty while they are waited for, and one forward over prompts comes to f rows. Of B rows, each of
        T rounds, that takes (f − 1) / 2B + cB / fT of the time, which is least at f = B √(2c / T). Half of the places at most, as T is
        not known at first: short answers are the first to end.
        """
        if not self._ended_rows:
            return 1
        rounds = self._row_rounds / self._ended_rows
        best = round(self._at_once * math.sqrt(2 * PROMPTS_ROUNDS / rounds))
        return max(1, min(best, self._at_once // 2))

    def _begin(self, n: int) -> dict[int, Tensor]:
        """The first round of at most n rows; those that go on are ready to join."""
        call, own = self._call, [self._waiting.popleft() for _ in range(min(n, len(self._waiting)))]
        longest = int(self._mask[own].sum(dim=1).max())  # what all of them have as padding is not read
        tokens = call.input_ids[own]
        columns = {
            name: values[..., -longest:] if name in self._names.columns and values is not None else values
            for name, values in self._names.of_rows(call.model_kwargs, own).items()
        }
        self._ready_rows = rows = Rows(tokens, (tokens.shape[1],) * len(own), tuple(own))
        self._ready = RaggedVerifier(call.target, tokens[:, -longest:], call.config, columns, self._request.reads)
        verdict = self._rounds.next(rows, self._ready)
        left = going_on(verdict)
        self._ready_rows = verdict.rows.of_rows(left)
        if 0 < len(left) < len(own):
            self._ready.leave(left)
        return self._ended(verdict)

    def _join(self) -> None:
        """Rows that are ready join as far as there is room."""
        ready = len(self._ready_rows.lengths)
        n = min(ready, self._at_once - len(self._rows.lengths))
        if not n or self._ready is None:
            return
        joining = self._ready_rows.of_rows(range(n))
        verifier = self._ready if n == ready else self._ready.split(range(n))
        self._ready_rows = self._ready_rows.of_rows(range(n, ready))
        if self._verifier is None:
            self._rows, self._verifier = joining, verifier
        else:
            self._verifier.join(verifier)
            self._rows = self._rows.joined(joining)

    def _go_on(self) -> dict[int, Tensor]:
        if self._verifier is None:  # all that have begun ended in their first round
            return {}
        verdict = self._rounds.next(self._rows, self._verifier)
        left = going_on(verdict)
        self._rows = verdict.rows.of_rows(left)
        if not left:
            self._verifier = None
        elif len(left) < len(verdict.done):
            self._verifier.leave(left)
        return self._ended(verdict)

    def _ended(self, verdict: Verdict) -> dict[int, Tensor]:
        """What the rows that have ended have shown is learned now: nothing of them is held until all have ended."""
        ended = [i for i, done in enumerate(verdict.done) if done]
        self._row_rounds += len(verdict.done)
        self._ended_rows += len(ended)
        if ended:
            self._request.leave(verdict.rows.of_rows(ended))
        return {verdict.rows.of_call[i]: verdict.rows.row(i)[0] for i in ended}

    def close(self) -> None:
        """The end of the call, finished or broken off."""
        with self._open, torch.inference_mode(False), torch.no_grad():
            try:
                if self.done:
                    self._request.finish()
            finally:
                self._request.close(time.perf_counter() - self._seconds)
        self._draft.warn_once(self._draft.governor.fit.message)
