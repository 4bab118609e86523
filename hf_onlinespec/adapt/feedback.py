"""The target verifies: what it said at every kept position, recorded while it is said.

One request is one accepted token sequence and the target's distribution at each generated position. The logits that
predict token j sit at position j − 1: row i of a teacher belongs to token `start + i` and is compared with the draft's
logits after `tokens[: start + i]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..models.source import Source

# Logits that are compared at once, 64 MB in float32; more of them are taken in parts. Chosen: no part of the embedded pair's or of
# a small draft's request is that large, so that nothing is computed twice there.
MOST_LOGITS = 2**24


def parts(n: int, vocabulary: int) -> list[slice]:
    """n positions in parts of at most `MOST_LOGITS` logits."""
    size = max(1, MOST_LOGITS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass(frozen=True)
class Teacher:
    """Target distributions at n positions, whole or as the k most probable tokens and the mass of all others."""

    log_probs: Tensor  # (n, V), or (n, k) most probable
    tokens: Tensor | None = None  # (n, k) their ids; None: the whole vocabulary in order
    log_tail: Tensor | None = None  # (n,) log of the mass outside the top k
    # The distribution is over the token ids below this; None: over its own V, with a top k over all ids that the draft has.
    vocabulary: int | None = None
    # Whether some positions have no mass on these ids: -inf throughout. They are left out of every loss.
    has_gaps: bool = False
    # The distribution of the call is p^power, normalised: 1 where the call's temperature is the one of the distributions.
    power: float = 1.0
    log_tail_power: Tensor | None = None  # (n,) log Σ p^power outside the top k; None: power is 1
    # (m,) the draft's ids that the distribution is over, in its order; None: the first ones.
    ids: Tensor | None = None
    # (n,) the draft's tokens from each position up to the next one, its own included; None: one each. A draft with another
    # tokenizer reads a token of the target's as several: the target has said something about the first of them alone.
    spans: Tensor | None = None

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocabulary: int | Tensor | None = None,
        call_temperature: float = 0.0,
        ids: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Teacher:
        """From raw target logits (n, V); the logits are copied, so the caller may overwrite them.

        Args:
            temperature: that softens the distributions, for the loss.
            vocabulary: only the ids below it count, or only these ids (m,), and the distribution is normalised on them; None: all. Of
                these ids, positions are gaps whose likeliest token is none of them: there the draft has nothing to learn.
            call_temperature: that the tokens were sampled at, 0: greedy. Acceptance is told there.
            ids: the draft's own of `vocabulary` (m,), in its order; None: the draft has logits for these alone.
            spans: of the draft's tokens, see above.
        """
        common = logits.index_select(-1, vocabulary) if isinstance(vocabulary, Tensor) else logits[..., :vocabulary]
        scaled = common.float() if temperature == 1 else common.float() / temperature
        log_probs, has_gaps = scaled.log_softmax(-1), False
        if common.shape[-1] < logits.shape[-1]:
            best = common.amax(-1)
            without_mass = best < logits.amax(-1) if isinstance(vocabulary, Tensor) else best == -torch.inf
            has_gaps = bool(without_mass.any())
            if has_gaps:  # the softmax made them NaN
                log_probs = log_probs.masked_fill(without_mass[:, None], -torch.inf)
        power = temperature / call_temperature if call_temperature else 1.0
        whole = cls(log_probs, vocabulary=common.shape[-1], has_gaps=has_gaps, power=power, ids=ids, spans=spans)
        return whole if top_k is None else whole.top(top_k)

    def top(self, k: int) -> Teacher:
        """The same with at most k tokens per position."""
        n, size = self.log_probs.shape
        if size <= k:
            return self
        if n * size > MOST_LOGITS and n > 1:
            return concatenate([self.rows(part).top(k) for part in parts(n, size)])
        values, index = self.log_probs.topk(k, dim=-1)
        log_tail, log_tail_power = _outside(self.log_probs, index), None
        if self.log_tail is not None:
            log_tail = torch.logaddexp(log_tail, self.log_tail)
        if self.power != 1:
            log_tail_power = _outside(self.log_probs * self.power, index)
            if self.log_tail_power is not None:
                log_tail_power = torch.logaddexp(log_tail_power, self.log_tail_power)
        tokens = index if self.tokens is None else self.tokens.gather(-1, index)
        return replace(
            self,
            log_probs=values,
            tokens=tokens,
            log_tail=log_tail,
            vocabulary=size if self.tokens is None else self.vocabulary,
            log_tail_power=log_tail_power,
        )

    def rows(self, part: slice) -> Teacher:
        """The same at some of the positions."""
        return self._map(lambda tensor: tensor[part])

    def last(self, n: int) -> Teacher:
        """The same at the last n positions at most."""
        return self if n >= len(self) else self.rows(slice(len(self) - max(0, n), None))

    def for_the_loss(self) -> Teacher:
        """The same without what only the acceptance in its own call needs."""
        return replace(self, power=1.0, log_tail_power=None)

    def compare(self, logits: Tensor, temperature: float = 1.0, tail: bool = True) -> tuple[Tensor, Tensor]:
        """`(log_p, log_q)` over the same outcomes, from the draft's logits (n, V): what the losses take.

        `tail=False` leaves out the bucket of all other tokens: for a loss that asks for the most probable token.
        Positions without mass on the teacher's ids are left out, so that there may be fewer than n.
        """
        log_p, log_q = self._compare(logits, temperature, tail)
        if self.has_gaps:
            mass = self.has_mass
            return log_p[mass], log_q[mass]
        return log_p, log_q

    @property
    def has_mass(self) -> Tensor:
        """(n,) whether each position has mass on the teacher's ids."""
        return self.log_probs.amax(-1) > -torch.inf

    @property
    def teaches(self) -> bool:
        """Whether any position has mass on the teacher's ids."""
        return not self.has_gaps or bool(self.has_mass.any())

    @property
    def length(self) -> int:
        """The draft's tokens from the first position on."""
        return len(self) if self.spans is None else int(self.spans.sum())

    def of(self, logits: Tensor) -> Tensor:
        """Of the draft's logits (≥ length, V) at the last tokens those at the teacher's positions, (n, V)."""
        if self.spans is None:
            return logits[len(logits) - len(self) :]
        behind = self.spans.flip(0).cumsum(0).flip(0)  # tokens from each position to the end
        return logits.index_select(0, len(logits) - behind)

    def common(self, logits: Tensor) -> Tensor:
        """The draft's logits (..., V) at the teacher's ids."""
        if self.ids is not None:
            return logits.index_select(-1, self.ids)
        return logits[..., : self.log_probs.shape[-1] if self.tokens is None else self.vocabulary]

    def _compare(self, logits: Tensor, temperature: float, tail: bool = True) -> tuple[Tensor, Tensor]:
        """`compare` at all n positions."""
        log_q = (self.common(logits).float() / temperature).log_softmax(-1)
        if self.tokens is None or self.log_tail is None:
            log_p = self.log_probs
            if log_q.shape[-1] < log_p.shape[-1]:  # a draft whose forward leaves out rows of its head
                log_p = log_p[:, : log_q.shape[-1]].log_softmax(-1)
            return log_p, log_q
        if not tail:
            return self.log_probs, log_q.gather(-1, self.tokens)
        log_p = torch.cat([self.log_probs, self.log_tail[:, None]], dim=-1)
        return log_p, torch.cat([log_q.gather(-1, self.tokens), _outside(log_q, self.tokens)[:, None]], dim=-1)

    def compare_at(self, logits: Tensor, temperature: float, recorded_at: float = 1.0) -> tuple[Tensor, Tensor]:
        """`(log_p, log_q)` at the temperature of a call, from the draft's logits (n, V).

        p^(recorded_at / temperature), normalised. Of the top k that takes Σ p^power over all other tokens: at the temperature of
        its own call a teacher knows it; at another one they are taken to be equally likely.
        """
        log_p, log_q = self._compare(logits, temperature)
        power = recorded_at / temperature
        if power == 1:
            return log_p, log_q
        log_p = log_p * power
        if self.log_tail is not None and self.tokens is not None:
            if self.log_tail_power is not None and math.isclose(self.power, power):
                log_p[..., -1] = self.log_tail_power
            else:
                log_p[..., -1] += (1 - power) * math.log(max(1, self.common(logits).shape[-1] - self.tokens.shape[-1]))
        return log_p.log_softmax(-1), log_q

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def to(self, device: torch.device) -> Teacher:
        moved = self._map(lambda tensor: tensor.to(device))
        return moved if self.ids is None else replace(moved, ids=self.ids.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Teacher:
        own = (self.tokens, self.log_tail, self.log_tail_power, self.spans)
        tokens, log_tail, log_tail_power, spans = (None if t is None else change(t) for t in own)
        return replace(
            self,
            log_probs=change(self.log_probs),
            tokens=tokens,
            log_tail=log_tail,
            log_tail_power=log_tail_power,
            spans=spans,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of what belongs to the positions; `ids` are those of all teachers of a pair."""
        tensors = (self.log_probs, self.tokens, self.log_tail, self.log_tail_power, self.spans)
        return sum(t.nbytes for t in tensors if t is not None)


def _outside(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log of the mass (n,) of all other tokens, summed rather than subtracted from one: small tails stay exact."""
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def concatenate(teachers: list[Teacher]) -> Teacher:
    """One teacher over all positions of several, all of the same kind."""
    if len(teachers) == 1:
        return teachers[0]
    first = teachers[0]
    return Teacher(
        torch.cat([t.log_probs for t in teachers]),
        None if first.tokens is None else torch.cat([t.tokens for t in teachers if t.tokens is not None]),
        None if first.log_tail is None else torch.cat([t.log_tail for t in teachers if t.log_tail is not None]),
        first.vocabulary,
        any(t.has_gaps for t in teachers),
        first.power,
        None
        if first.log_tail_power is None
        else torch.cat([t.log_tail_power for t in teachers if t.log_tail_power is not None]),
        first.ids,
        None if first.spans is None else torch.cat([t.spans for t in teachers if t.spans is not None]),
    )


@torch.no_grad()
def acceptance(teachers: list[Teacher], logits: Tensor, temperature: float, teacher_temperature: float = 1.0) -> Tensor:
    """Σ min(p, q) of the draft's logits (batch, ≥ n, V) at every position of the teachers; at temperature 0:
    whether the argmax agrees.

    Other warpers of a call are not applied; of a top-k teacher's tail, only the whole mass is compared.

    Args:
        teacher_temperature: at which the teachers were recorded.
    """
    found = []
    for teacher, row in zip(teachers, logits, strict=True):
        row = teacher.of(row)
        if temperature == 0:
            best = teacher.log_probs.argmax(-1)
            if teacher.tokens is not None:
                best = teacher.tokens.gather(-1, best[:, None]).squeeze(-1)
            agrees = (teacher.common(row).argmax(-1) == best).float()
            found.append(torch.where(teacher.has_mass, agrees, 0.0) if teacher.has_gaps else agrees)
            continue
        for part in parts(*row.shape):
            there = teacher.rows(part)
            log_p, log_q = there.compare_at(row[part], temperature, teacher_temperature)
            accepted = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
            found.append(torch.where(there.has_mass, accepted, 0.0) if there.has_gaps else accepted)
    return torch.cat(found)


@dataclass(frozen=True)
class Feedback:
    """What one request taught: its tokens and the target's distribution at its last `teacher.length` of them."""

    tokens: Tensor  # (L,) prompt and accepted tokens as the draft reads them, no padding
    teacher: Teacher  # row i predicts tokens[L - len(teacher) + i], or with spans the token that its span begins with
    features: Tensor | None = (
        None  # (L - 1, width) the target's hidden states at all tokens but the last; None: not read
    )
    source: Source | None = None  # of one row, what the request was written from, as the draft reads it; None: not read

    def to(self, device: torch.device) -> Feedback:
        """The same on a device."""
        features = None if self.features is None else self.features.to(device)
        source = None if self.source is None else self.source.to(device)
        return Feedback(self.tokens.to(device), self.teacher.to(device), features, source)

    @property
    def nbytes(self) -> int:
        features = 0 if self.features is None else self.features.nbytes
        source = 0 if self.source is None else self.source.nbytes
        return self.tokens.nbytes + self.teacher.nbytes + features + source


class FeedbackRecorder(LogitsProcessor):
    """A logits processor that looks and changes nothing: it keeps the target's raw logits of every call.

    It must come first in the list, before any processor alters the scores.

    Args:
        attempt: makes the `with` block of every copy that is made in a foreign loop, which must not fail for it.
        wanted: whether anybody will take the copies.
    """

    def __init__(
        self,
        attempt: Callable[[], AbstractContextManager[Any]] = nullcontext,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.rows: list[Tensor] = []  # each (batch, V)
        self._attempt, self._wanted, self._closed = attempt, wanted, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._closed and self._wanted():
            # A copy: processors behind this one may write into the same memory.
            with self._attempt():
                self.rows.append(scores.clone())
        return scores

    def close(self) -> None:
        """Keeps nothing any more: nobody will take it."""
        self.rows, self._closed = [], True
        self._attempt, self._wanted = nullcontext, bool  # whoever made it refers to it, and can go now

    def take(self, n: int) -> Tensor:
        """The first n rows since the last call, (batch, n, V); those behind them are dropped as off the kept path."""
        rows, self.rows = self.rows[:n], []
        return torch.stack(rows, dim=1)
