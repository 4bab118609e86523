"""What one call of `generate` has shown: the target's distributions at the new tokens of its rows, until they are learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from ..models.common_strings import CommonStrings
from ..models.source import Source
from ..rounds import Rows
from .feedback import Feedback
from .request_feedback import Held, RequestFeedback, Told
from .segment import LEAST_CONTEXT, Segment, sayable
from .service import LearningService
from .trainable import Prefix, Trainable


class DraftedRow(Protocol):
    """A row of a call, as its draft reads it."""

    tokens: Tensor | None  # (1, L) the row so far, on the draft's device; None: it has not begun
    length: int  # of the row so far, as the target reads it
    prompt: int  # how much of `tokens` was there before
    mask: Tensor | None  # (1, prompt) with zeros where the prompt is padded on the left; None: no padding
    prompt_log_ratio: float | None  # how much the prompt speaks for the learned draft; None: it was not asked

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def features(self) -> Held | None:
        """The target's hidden states that it holds; None: the draft reads none."""
        ...

    @property
    def source(self) -> Source | None:
        """What the row is written from, as the draft reads it; None: it reads nothing beside the row."""
        ...

    @property
    def taught(self) -> int | Tensor | CommonStrings:
        """The target's ids that the draft learns the distribution of, see `RequestFeedback`."""
        ...

    def told(self, logits: Tensor, new: int, positions: int) -> Told | None:
        """What the target has said in its raw logits (1, ≥ new, vocab) at the last tokens of the row; None: nothing yet to learn from.

        Args:
            positions: tokens that the draft can read.
        """
        ...

    def take(self, tokens: Tensor) -> None:
        """The row as it is now, (1, L)."""
        ...

    def reset(self) -> None:
        """Forgets what the draft has read of it."""
        ...

    def route(self, prompt: Tensor) -> None:
        """Once in a request: whether the learned or the base draft serves it, by its prompt."""
        ...

    def routed(self, prompt_log_ratio: float) -> None:
        """The same, where the prompt was scored together with others."""
        ...

    def prefix(self, most: int) -> Prefix | None:
        """At most so many tokens that the learned draft has read already."""
        ...

    def learned_features(self, start: int, end: int) -> Tensor | None:
        """The target's hidden states (1, m, width) at the tokens from `start` to `end`, but the last; None: the draft reads none.

        Of some of the first ones it may hold none any more.
        """
        ...


def route(rows: Sequence[DraftedRow], prompts: Sequence[Tensor], trainable: Trainable, most: int) -> None:
    """Scores the prompts (1, L) of some rows of a call, those together that were not scored yet.

    Args:
        most: tokens at the end of each that are read.
    """
    left = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if row.prompt_log_ratio is None]
    if len(left) == 1:
        left[0][0].route(left[0][1])
    if len(left) < 2:
        return
    longest = max(prompt.shape[1] for _, prompt in left)  # those of drafts with another tokenizer differ in length
    masks = [prompt.new_ones(prompt.shape) if row.mask is None else row.mask.to(prompt) for row, prompt in left]
    tokens = torch.cat([F.pad(prompt, (longest - prompt.shape[1], 0)) for _, prompt in left])
    mask = torch.cat([F.pad(own, (longest - own.shape[1], 0)) for own in masks])
    ratios = trainable.prompt_log_ratios(tokens, None if bool(mask.all()) else mask, most)
    for (row, _), ratio in zip(left, ratios, strict=True):
        row.routed(ratio)


class CallFeedback:
    """The rows of a call and what the target said about them.

    Args:
        temperature: of the call, 0 for greedy.
    """

    def __init__(self, learning: LearningService, rows: Sequence[DraftedRow], temperature: float) -> None:
        self.rows, self._learning, self._temperature = rows, learning, temperature
        self._context = max(LEAST_CONTEXT, learning.settings.context_tokens)  # in front of what a head learns
        self._latest: dict[
            int, tuple[Rows, int]
        ] = {}  # per row: where it is, as the target reads it, and its place there
        self._places: dict[
            int, list[int]
        ] = {}  # of waiting tokens, per row, see `Told`; of rows whose draft has the target's tokenizer: none
        self.open = set(range(len(rows)))  # those that have not ended, see `close`
        self.recorded = False  # whether there was anything that the draft can see
        self.begin_anew()

    def begin_anew(self) -> None:
        """What was recorded is forgotten."""
        self._of = list(map(self._new, self.rows))

    def _new(self, row: DraftedRow) -> RequestFeedback:
        return self._learning.new_feedback(row.taught, self._temperature, row.config, row.features)

    def close(self, rows: Sequence[int]) -> None:
        """These rows have ended, and what they have shown was learned or deferred: nothing of them is held any longer."""
        for i in rows:
            self.open.discard(i)
            self.rows[i].reset()
            self._of[i] = self._new(self.rows[i])

    def begin(self, rows: Rows, at: int) -> None:
        """The prompt of one of the rows, before the first round."""
        row = rows.of_call[at]
        self._latest[row] = rows, at
        self.rows[row].take(rows.row(at))

    def latest(self, i: int) -> Tensor:
        """(1, L) a row as the target reads it, once it has begun."""
        rows, at = self._latest[i]
        return rows.row(at)

    def begun(self, rows: Sequence[int]) -> bool:
        """Whether all of these rows were read."""
        return all(self.rows[i].tokens is not None for i in rows)

    @property
    def waiting(self) -> list[int]:
        """Rows with tokens that are neither learned from nor deferred."""
        return [
            i
            for i, (row, of) in enumerate(zip(self.rows, self._of, strict=True))
            if of.waiting and row.tokens is not None
        ]

    def waiting_tokens(self, i: int) -> int:
        """How many of a row they are."""
        return self._of[i].waiting

    def kept(self, rows: Sequence[int]) -> bool:
        """Whether the replay will be given anything of these rows."""
        return any(self._of[i].kept for i in rows)

    @property
    def full(self) -> bool:
        """Whether a row has as many full target distributions as are kept at most."""
        return any(of.waiting >= self._learning.settings.context_tokens for of in self._of)

    def record(self, rows: Rows, logits: Tensor | None) -> None:
        """Takes in the rows as they are now, and the target's raw logits (batch, ≥ new tokens, vocab) at their new tokens.

        Up to the last position that the draft can see. None: nothing is recorded.
        """
        for at, i in enumerate(rows.of_call):
            row = self.rows[i]
            self._latest[i] = rows, at
            if row.tokens is None:
                continue
            new = rows.lengths[at] - row.length
            row.take(rows.row(at))
            told = None if logits is None else row.told(logits[at : at + 1], new, self._learning.positions)
            if logits is not None and told is not None:
                self.recorded = True
                own = told.logits
                # Logits of rejected tokens, and of other rows, are not held with the others.
                own = own if own.shape[:2] == logits.shape[:2] else own.clone()
                self._of[i].record(own.to(self._learning.device), told.end, told.spans)
                if told.places is not None:
                    self._places.setdefault(i, []).extend(told.places)

    def segment(self, i: int) -> Segment:
        """The waiting tokens of a row; they are handed out once."""
        row, of = self.rows[i], self._of[i]
        assert row.tokens is not None
        teachers = of.teachers()
        features = row.learned_features(of.end - teachers[0].length - self._context, of.end)
        if features is not None:
            teachers = [teacher.last(sayable(features.shape[1])) for teacher in teachers]
        return Segment(row.tokens[:, : of.end], teachers, row.mask, self._temperature, features, (row.source,))

    def written(self, i: int, segment: Segment) -> slice | list[int]:
        """Which of the tokens that the target has written in a row the positions of a segment are, once it was handed out."""
        if i in self._places:
            return self._places[i][-len(segment.teachers[0]) :]
        row, end = self.rows[i], segment.tokens.shape[1]
        return slice(end - segment.n - row.prompt, end - row.prompt)

    def joined(self, segments: Sequence[Segment]) -> Segment:
        """Segments of several rows as one padded batch."""
        return Segment.joined(segments, self._learning.settings.context_tokens, self.rows[0].config)

    def keep(self, i: int, segment: Segment) -> None:
        """What was handed out goes to the replay; of one request, all of it or nothing."""
        self._of[i].keep(segment.teachers)

    def defer_to_replay(self, rows: Iterable[int] | None = None) -> None:
        """Leaves the waiting tokens of these rows to the replay; None: of all."""
        for i in self.open if rows is None else rows:
            self._of[i].defer_to_replay()

    def finished(self, rows: Sequence[int]) -> list[tuple[int, Feedback]]:
        """Every one of these rows as the replay keeps it."""
        found = []
        for i in rows:
            row, of = self.rows[i], self._of[i]
            assert row.tokens is not None
            features = row.learned_features(of.end - of.learned - self._context, of.end)
            found += [(i, one) for one in of.feedback(row.tokens, row.mask, features, row.source)]
        return found
