"""New tokens that a target has spoken about, and what of a request waits to be evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..models.opening import opening_tokens
from ..models.source import Source
from .feedback import Feedback, Teacher, concatenate


@dataclass(frozen=True)
class Segment:
    """New tokens that the target has spoken about, one teacher per row."""

    tokens: Tensor  # (batch, L)
    teachers: list[Teacher]  # of the last tokens of every row, at most n
    mask: Tensor | None  # (batch, prompt) with zeros where the prompt is padded on the left
    temperature: float  # of the call that generated the tokens, 0 for greedy
    # (batch, m, width) the target's hidden states at the last m of the tokens but the last one; None: the draft reads none.
    features: Tensor | None = None
    sources: tuple[Source | None, ...] | None = None  # of every row, see `Trainable.training_logits`

    @classmethod
    def of(cls, feedback: Feedback, temperature: float) -> Segment:
        """A whole request, of one row."""
        features = None if feedback.features is None else feedback.features[None]
        return cls(feedback.tokens[None], [feedback.teacher], None, temperature, features, (feedback.source,))

    @property
    def n(self) -> int:
        """New tokens of the row that has the most, as the draft reads them."""
        return max(teacher.length for teacher in self.teachers)

    @property
    def new_tokens(self) -> int:
        """Positions of all rows together that the target has spoken about."""
        return sum(map(len, self.teachers))

    @property
    def teaches(self) -> bool:
        """Whether the target has said anything that can be learned."""
        return self.n > 0 and any(teacher.teaches for teacher in self.teachers)

    @property
    def nbytes(self) -> int:
        features = 0 if self.features is None else self.features.nbytes
        sources = sum(source.nbytes for source in self.sources or () if source is not None)
        return self.tokens.nbytes + features + sources + sum(teacher.nbytes for teacher in self.teachers)

    @property
    def rows(self) -> list[Tensor]:
        """The tokens (L,) of every row, without padding."""
        if self.mask is None:
            return list(self.tokens)
        return [row[int((mask == 0).sum()) :] for row, mask in zip(self.tokens, self.mask, strict=True)]

    def taught(self, step: int) -> list[Teacher]:
        """One teacher per row of what a drafted step can learn, see `taught_by`."""
        if step == 0:
            return self.teachers
        features = None if self.features is None else self.features.shape[1]
        return [
            taught_by(teacher, step, len(row), features) for teacher, row in zip(self.teachers, self.rows, strict=True)
        ]

    @classmethod
    def joined(cls, segments: Sequence[Segment], context: int, config: PretrainedConfig | None) -> Segment:
        """Segments of one row each, of one call, as a padded batch whose rows end together.

        Args:
            context: most tokens in front of the new ones.
            config: of the draft model; None: no token opens what it reads.
        """
        features = [None if one.features is None else one.features[0] for one in segments]
        rows = []
        for one, known in zip(segments, features, strict=True):
            row, most = one.rows[0], one.n + context
            if known is not None:
                row = row[-len(known) - 1 :]
            elif len(row) > most:
                opening = [] if config is None else opening_tokens(config, row[:1].tolist())
                row = torch.cat([row.new_tensor(opening), row[-most:]])
            rows.append(row)
        tokens, mask = padded(rows)
        mask = None if mask is None else mask.to(tokens.device)
        teachers = [one.teachers[0] for one in segments]
        sources = tuple(source for one in segments for source in one.sources or (None,))
        return cls(tokens, teachers, mask, segments[0].temperature, padded_features(features), sources)

    @property
    def is_finite(self) -> bool:
        """Whether the target's distribution is one everywhere: no NaN, no +∞."""
        return not any(bool((t.log_probs.isnan() | t.log_probs.isposinf()).any()) for t in self.teachers)


@dataclass(frozen=True)
class Scores:
    """Acceptance at new tokens (all rows' one after the other), before anything was learned from them."""

    learned: list[float]  # of what serves
    base: list[float] | None  # of the base draft; None: it was not looked at

    def split(self, lengths: Sequence[int]) -> list[Scores]:
        """Those of every row, by how many tokens each has."""
        learned = split(self.learned, lengths)
        base = [None] * len(lengths) if self.base is None else split(self.base, lengths)
        return [Scores(own, of_base) for own, of_base in zip(learned, base, strict=True)]


def split(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    """Values of rows one after the other, by row."""
    ends = list(accumulate(lengths))
    return [list(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


@dataclass(frozen=True)
class PendingRequest:
    """What is not evaluated yet of one request."""

    segment: Segment
    accepted: list[list[float]]  # by row of the batched forward
    scores: Scores

    def continues(self, segment: Segment) -> bool:
        """Whether a segment is the next one of the same request."""
        before, new = self.segment.tokens, segment.teachers[0].length
        return segment.tokens.shape[1] - new == before.shape[1] and torch.equal(segment.tokens[:, :-new], before)

    def joined(self, segment: Segment, accepted: list[list[float]], scores: Scores) -> PendingRequest:
        earlier, new = self.segment, segment.tokens.shape[1] - self.segment.tokens.shape[1]
        teachers, features = segment.teachers, segment.features
        if features is None or features.shape[1] >= new:  # else those in between are held no longer
            teachers = [concatenate([a, b]) for a, b in zip(earlier.teachers, teachers, strict=True)]
            if features is not None and earlier.features is not None:
                features = torch.cat([earlier.features, features[:, -new:]], dim=1)
        rows = [a + b for a, b in zip(self.accepted, accepted, strict=True)]
        both = self.scores.base is not None and scores.base is not None
        original = [*(self.scores.base or []), *(scores.base or [])] if both else None
        whole = replace(segment, teachers=teachers, features=features)
        return PendingRequest(whole, rows, Scores(self.scores.learned + scores.learned, original))


LEAST_CONTEXT = 2  # tokens in front of the first one that a row of a head says


def sayable(features: int, step: int = 0) -> int:
    """How many of the last tokens of a text a head has a row for, of which the target's features are known at so many tokens.

    A row is made of the features at a token and of the token behind it, and says the next one; at a later step, one further behind.
    """
    return max(0, features - 1 - step)


def taught_by(teacher: Teacher, step: int, tokens: int, features: int | None) -> Teacher:
    """What a drafted step can learn of the last tokens of a text of so many: all, or at a later step those that a head has a row for.

    Args:
        features: at how many of the last tokens but one features are known; None: at all of them.
    """
    known = tokens - 1 if features is None else min(features, tokens - 1)
    return teacher.last(sayable(known, step)) if step else teacher


def padded_features(rows: list[Tensor | None]) -> Tensor | None:
    """Features (m_i, width) of each row as a batch (rows, most, width) that is padded on the left; None: not all rows have any."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    found = known[0].new_zeros(len(known), max(map(len, known)), known[0].shape[1])
    for i, row in enumerate(known):
        found[i, found.shape[1] - len(row) :] = row
    return found


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows (L_i,) as a batch (rows, longest) that is padded on the left, and its mask; None: all are equally long."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return tokens, None if min(map(len, rows)) == longest else mask
