"""Guesses that cost no model: what the suffix memory and the table of recycled tokens say may follow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..govern.acceptance import Acceptances, Continuation, RequestStats
from ..govern.guesses import NOWHERE, GuessChances, Place
from ..metrics import Counts
from ..rounds import Proposal, Rows
from ..runtime.failures import Attempt, Backoff
from .recycling import RecyclingTable, best_tokens
from .request_memory import RequestMemory
from .sampling import draw
from .suffix_memory import SuffixMemory


class Guesser:
    """What the suffix memory and the table of recycled tokens say in one row.

    Args:
        memory: of the row; None: there is none.
        table: of recycled tokens; None: there is none.
        chances: how likely guesses are.
        context: the last tokens of the row.
        calibration: of the memory in this request.
        vocabulary: ids below it may be guessed; the memory may know other targets. None: all.
        draws: whether one token is drawn from what the memory says, in place of several guesses.
    """

    def __init__(
        self,
        memory: RequestMemory | None,
        table: RecyclingTable | None,
        chances: GuessChances,
        context: list[int],
        calibration: float,
        vocabulary: int | None,
        draws: bool = False,
    ) -> None:
        self._memory, self._table, self._chances = memory, table, chances
        self.context, self._calibration, self._vocabulary, self._draws = context, calibration, vocabulary, draws

    def place(self, context: list[int], first: bool) -> Place:
        """What may follow these last tokens; `first`: at the beginning of a round."""
        answers = self._answers(context)
        if self._vocabulary is not None:
            answers = [known for answer in answers if (known := answer.below(self._vocabulary)) is not None]
        recycled = () if self._table is None or not context else self._table.successors(context[-1])
        if self._vocabulary is not None and recycled and max(recycled) >= self._vocabulary:
            recycled = [token for token in recycled if token < self._vocabulary]  # its head may have more rows
        if not answers and not recycled:
            return NOWHERE
        place = self._chances.place(answers, recycled, first, self._calibration)
        if self._draws and answers and len(answers[0].tokens) > 1:
            drawn = int(draw(torch.tensor([answers[0].probs], dtype=torch.float32)))
            guess = self._chances.drawn(answers[0], answers[0].tokens[drawn], first, self._calibration)
            return Place(sorted([guess, *place.guesses], key=lambda one: -one.chance), place.answers)
        return place

    def _answers(self, context: list[int]) -> list[Continuation]:
        if self._memory is None:
            return []
        if not self._draws:
            return self._memory.answers(context)
        found = self._memory.lookup(context)
        return [] if found is None else [found]


class GuessSources:
    """Where guesses come from in one call of `generate`: the suffix memory, as each row sees it, and the table of recycled tokens.

    Args:
        memory: of earlier requests; None: there is none.
        table: of recycled tokens; None: there is none.
        backoff: of what fails in them: whether they are left out of this call.
        counts: of the call.
        lock: held while it is asked.
        acceptances: how likely the memory's answers are.
        chances: how likely guesses are.
        size: tokens that a row can have at most.
        padding: per row, tokens on the left that are none.
        vocabulary: ids below it may be guessed; the memory may know other targets. None: all.
        source: per row, tokens of the text that an encoder has read, which may be copied. (): there is no encoder.
    """

    def __init__(
        self,
        memory: SuffixMemory | None,
        table: RecyclingTable | None,
        backoff: Backoff,
        counts: Counts,
        lock: AbstractContextManager[Any],
        acceptances: Acceptances,
        chances: GuessChances,
        size: int,
        padding: Sequence[int],
        vocabulary: int | None = None,
        source: Sequence[Sequence[int]] = (),
    ) -> None:
        self._source = source
        self.asks = False  # whether it is asked about every generated token, for learning to be held against
        self._usable, self._memory, self._table = backoff.begin(), memory, table
        self._backoff, self._counts = backoff, counts
        self._lock, self._acceptances, self._size, self._padding = lock, acceptances, size, padding
        self._chances, self._vocabulary = chances, vocabulary
        self._rows: dict[int, RequestMemory] = {}
        self._asked = False
        self._read: tuple[list[int], Tensor, int] | None = (
            None  # tokens of the round, best tokens behind them, vocabulary
        )

    @property
    def in_use(self) -> bool:
        """Whether the memory takes part in this call."""
        return bool(self._rows)

    @property
    def worked(self) -> bool:
        """Whether the memory or the table was asked in this call, and nothing has failed in them."""
        return self._asked and self._usable

    def row(self, i: int, tokens: Tensor, stats: RequestStats, draws: bool = False) -> Guesser | None:
        """What guesses behind a row (1, L), once it was read; None: nobody, or it has failed.

        Args:
            draws: see `Guesser`.
        """
        if not self._usable or (self._memory is None and self._table is None):
            return None
        self._asked = True
        with self.attempt():
            calibration = self._acceptances.memory_calibration(stats)
            if self._memory is None:
                context = tokens[0, self._padding[i] :][-1:].tolist()
                return Guesser(None, self._table, self._chances, context, calibration, self._vocabulary, draws)
            if i not in self._rows:
                source = self._source[i] if self._source else ()
                self._rows[i] = RequestMemory(
                    self._memory, self._lock, self._size, self._padding[i], stats, self._acceptances, self.asks, source
                )
            memory = self._rows[i]
            memory.read(tokens)
            return Guesser(memory, self._table, self._chances, memory.context, calibration, self._vocabulary, draws)
        return None

    def begun(self, i: int) -> bool:
        """Whether the memory has read the prompt of a row, or there is none that could."""
        return self._memory is None or i in self._rows

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor) -> None:
        """Finds the target's best tokens in its raw logits (batch, n + 1, vocab) behind every row and every candidate."""
        if self._table is None or not self._usable:
            return
        with self.attempt():
            parts: list[Tensor] = []
            for i, n in enumerate(proposal.lengths):  # what pads a shorter row is no candidate
                parts += [rows.row(i)[0, -1:], proposal.tokens[i, :n]]
            behind = [logits[i, : n + 1] for i, n in enumerate(proposal.lengths)]
            found = best_tokens(behind[0] if len(behind) == 1 else torch.cat(behind))
            self._read = torch.cat(parts).tolist(), found, logits.shape[-1]

    def take_in(self) -> None:
        """Gives what was read last to the table; the draft's lock is held."""
        if self._read is not None and self._table is not None:
            tokens, best, vocabulary = self._read
            self._read = None
            self._table.update(tokens, best.tolist(), vocabulary)

    def expected(self, i: int, tokens: Tensor, new: slice | Sequence[int]) -> Sequence[float] | None:
        """The estimated acceptance of its answers at new tokens of a row; None: it was not asked. No memory expects nothing."""
        if not self._usable:
            return None
        if i not in self._rows:
            return ()
        if not self.asks:
            return None
        found = self._rows[i].read(tokens)
        return found[new] if isinstance(new, slice) else [found[at] for at in new]

    def attempt(self) -> Attempt:
        """A `with` block around whatever is asked of them."""
        return self._backoff.attempt(self._stop)

    def _stop(self) -> None:
        """The call goes on without them."""
        self._counts.failed_drafts += 1
        self._usable, self._rows, self._read = False, {}, None

    def commit(self, rows: Rows) -> int:
        """Gives every row to the memory; its bytes."""
        read = [(self._rows[i], rows.row(at)) for at, i in enumerate(rows.of_call) if i in self._rows]
        return max(
            (row.commit(tokens) for row, tokens in read), default=0 if self._memory is None else self._memory.nbytes
        )
