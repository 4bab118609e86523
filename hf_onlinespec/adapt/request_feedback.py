"""What one request teaches, while it grows: the target's distributions at its new tokens, and what the replay will keep of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..config import OnlineSpecConfig
from ..models.common_strings import CommonStrings
from ..models.opening import opening_tokens
from ..models.source import Source
from .feedback import Feedback, Teacher, concatenate
from .segment import LEAST_CONTEXT, sayable


class Held(Protocol):
    """What takes memory for the time of a request."""

    @property
    def nbytes(self) -> int: ...


class Told(NamedTuple):
    """What the target said at the latest tokens of a row, as far as its draft can learn from it."""

    logits: Tensor  # (rows, n, vocab) raw, at n positions
    end: int  # tokens of the row, as the draft reads it, that they reach up to
    spans: Tensor | None = None  # (n,) see `Teacher`
    places: tuple[int, ...] | None = (
        None  # (n,) which of the tokens that the target has written; None: the latest n that it reaches
    )


class RequestFeedback:
    """The feedback of one request, batch rows side by side.

    Args:
        taught: the target's ids that the draft learns the distribution of: these, those below a number, or the tokens that two
            tokenizers have in common; None: all.
        temperature: of the call, 0 for greedy.
        config: of the draft model; None: no token opens what it reads.
        features: the target's hidden states that the row holds meanwhile; None: the draft reads none.
    """

    def __init__(
        self,
        settings: OnlineSpecConfig,
        taught: int | Tensor | CommonStrings | None = None,
        temperature: float = 0.0,
        config: PretrainedConfig | None = None,
        features: Held | None = None,
    ) -> None:
        self.waiting = 0  # tokens that are neither learned from nor put off
        self.end = 0  # how much of the request, as the draft reads it, it can learn from
        self._settings, self._temperature = settings, temperature
        self._taught = taught
        self._config, self._features = config, features
        self._segment: list[Tensor] = []  # per round (batch, n, vocab) target logits of the waiting tokens
        self._spans: list[Tensor] = []  # of the same positions, see `Teacher`; []: one token each
        self._kept: list[list[Teacher]] = []  # per row: what the replay will be given

    @property
    def kept(self) -> bool:
        """Whether the replay will be given anything."""
        return bool(self._kept)

    @property
    def learned(self) -> int:
        """The draft's tokens that the replay will be given the target's distributions of."""
        return max((sum(teacher.length for teacher in row) for row in self._kept), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of what was recorded and not handed out, of what is kept for the replay, and of the hidden states that are held."""
        kept = sum(teacher.nbytes for row in self._kept for teacher in row)
        kept += 0 if self._features is None else self._features.nbytes
        return kept + sum(logits.nbytes for logits in self._segment)

    def record(self, logits: Tensor, end: int, spans: Tensor | None = None) -> None:
        """The target's raw logits (batch, n, vocab) at the last n positions of the first `end` tokens.

        Args:
            spans: (n,) of the positions, see `Teacher`; None: each is about one token.
        """
        self._segment.append(logits)
        if spans is not None:
            self._spans.append(spans)
        self.waiting += logits.shape[1]
        self.end = end

    def teachers(self) -> list[Teacher]:
        """The target's distributions at the waiting tokens, one teacher per row; they are handed out once."""
        logits = torch.cat(self._segment, dim=1)
        spans = torch.cat(self._spans) if self._spans else None
        self._segment, self._spans, self.waiting = [], [], 0
        settings, taught, call, ids = self._settings, self._taught, self._temperature, None
        if isinstance(taught, CommonStrings):
            ids, taught = taught.draft_ids.to(logits.device), taught.target_ids.to(logits.device)
        temperature, top_k = settings.temperature, settings.top_k
        return [Teacher.from_logits(row, temperature, top_k, taught, call, ids, spans) for row in logits]

    def defer_to_replay(self) -> None:
        """Leaves the waiting tokens to the replay."""
        if self.waiting:
            self.keep(self.teachers())

    def keep(self, teachers: list[Teacher]) -> None:
        """What `teachers` handed out goes to the replay; of one request, all of them or none."""
        self._kept = self._kept or [[] for _ in teachers]
        for kept, teacher in zip(self._kept, teachers, strict=True):
            kept.append(teacher.top(self._settings.replay_top_k))

    def feedback(
        self, tokens: Tensor, mask: Tensor | None, features: Tensor | None = None, source: Source | None = None
    ) -> list[Feedback]:
        """The request as the replay keeps it, one per row of `tokens` (batch, L), without padding.

        At most `context_tokens` of its prompt, behind the token that opens it where the model has one.

        Args:
            features: (batch, m, width) the target's hidden states at the last m of what can be learned from, but the last token.
            source: of one row, what it was written from.
        """
        found, source = [], None if source is None else source.to_keep()
        for row, teachers in enumerate(self._kept):
            new = sum(teacher.length for teacher in teachers)
            padding = 0 if mask is None else int((mask[row] == 0).sum())
            context = self._settings.context_tokens
            start = max(padding, self.end - new - context)
            if features is not None:
                start = max(padding, self.end - new - max(LEAST_CONTEXT, context), self.end - 1 - features.shape[1])
            kept = tokens[row, start : self.end].clone()
            if features is not None:
                known = features[row, features.shape[1] + 1 - len(kept) :].clone()
                teacher = concatenate(teachers).last(sayable(len(known)))
                found += [Feedback(kept, teacher, known)] if len(teacher) else []
                continue
            if start > padding and self._config is not None:
                opening = opening_tokens(self._config, tokens[row, padding : padding + 1].tolist())
                kept = torch.cat([kept.new_tensor(opening), kept])
            found.append(Feedback(kept, concatenate(teachers), source=source))
        return found
