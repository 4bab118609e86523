"""How well a draft's logits match what the target said: the loss that is learned, and the acceptance that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import OnlineSpecConfig
from .feedback import Feedback, Teacher, acceptance, parts
from .losses import LOSSES
from .segment import Segment, padded, padded_features, taught_by
from .trainable import Prefix, Trainable

DECAY = 0.8  # weight of a drafted step's loss over that of the step before: EAGLE's


@dataclass(frozen=True)
class Losses:
    """What one copy of a draft loses on some texts."""

    first: list[Tensor]  # of each text at every taught position (≤ n,), in the first drafted step
    later: list[Tensor]  # of each further step that has any: at the taught positions that it can say, of all texts

    @property
    def mean(self) -> Tensor:
        """What is learned: the mean over positions of each step, weighed by how many tokens were drafted before."""
        found, weights = torch.cat(self.first).mean(), 1.0
        for k, losses in enumerate(self.later, 1):
            found, weights = found + DECAY**k * losses.mean(), weights + DECAY**k
        return found / weights if self.later else found

    @property
    def all(self) -> Tensor:
        """Of every position and step."""
        return torch.cat([*self.first, *self.later])


class Objective:
    """The loss of the settings, at their temperature."""

    def __init__(self, settings: OnlineSpecConfig) -> None:
        self._steps = settings.head_steps
        self._loss, self._temperature = LOSSES[settings.loss], settings.temperature
        self._tail = settings.loss != "cross_entropy"  # whether the loss takes all other tokens as one outcome

    def losses(self, teachers: Sequence[Teacher], logits: Sequence[Tensor] | Tensor) -> Tensor:
        """The loss at every taught position, of rows of logits (≥ n, vocab): their last n."""
        found = []
        for teacher, row in zip(teachers, logits, strict=True):
            row = teacher.of(row)
            pieces = parts(*row.shape)
            if len(pieces) == 1 or not row.requires_grad:
                found += [self._loss_at(teacher.rows(part), row[part]) for part in pieces]
                continue
            # Log-probabilities of all positions at once would take several times the memory of the logits.
            split = row.split([part.stop - part.start for part in pieces])
            for part, piece in zip(pieces, split, strict=True):
                loss = checkpoint(
                    self._loss_at, teacher.rows(part), piece, use_reentrant=False, preserve_rng_state=False
                )
                found.append(loss)
        return torch.cat(found)

    def _loss_at(self, teacher: Teacher, logits: Tensor) -> Tensor:
        return self._loss(*teacher.compare(logits, self._temperature, self._tail))

    def acceptance(self, segment: Segment, logits: Tensor) -> list[float]:
        """Acceptance of logits (batch, n, vocab) at the taught tokens, row by row, at the temperature of their call."""
        found: list[float] = acceptance(segment.teachers, logits, segment.temperature, self._temperature).tolist()
        return found

    def copies(self, taught: Callable[[int], Sequence[Teacher]], unrolled: Sequence[Tensor]) -> list[Losses]:
        """The losses of every copy of a draft.

        Args:
            taught: the teachers of a drafted step, one for each row.
            unrolled: of each step logits (copies, rows, ≥ n, vocab), see `Trainable.unrolled_logits`.
        """
        first, *later = unrolled
        teachers = [list(taught(k)) for k in range(len(unrolled))]
        found = []
        for copy, logits in enumerate(first):
            rows = [self.losses([teacher], [own]) for teacher, own in zip(teachers[0], logits, strict=True)]
            steps = [self._later(own, step[copy]) for own, step in zip(teachers[1:], later, strict=True)]
            found.append(Losses(rows, [losses for losses in steps if len(losses)]))
        return found

    def _later(self, teachers: Sequence[Teacher], logits: Tensor) -> Tensor:
        """The losses of a later step; none, where it has nothing to say."""
        some = [(teacher, own) for teacher, own in zip(teachers, logits, strict=True) if len(teacher)]
        if not some:
            return logits.new_zeros(0)
        taught, said = zip(*some, strict=True)
        return self.losses(taught, said)

    def unrolled(
        self,
        trainable: Trainable,
        segment: Segment,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
    ) -> list[Tensor]:
        """`Trainable.unrolled_logits` of a segment, of the steps that are learned."""
        return trainable.unrolled_logits(
            segment.tokens,
            segment.n,
            segment.mask,
            gates,
            prefix,
            base,
            segment.features,
            self._steps,
            segment.sources,
        )

    def segment_losses(self, trainable: Trainable, segment: Segment, base: bool) -> Losses:
        """The losses on a segment, of one copy and in a forward of its own."""
        return self.copies(segment.taught, self.unrolled(trainable, segment, base=base))[0]

    def request_losses(
        self, trainable: Trainable, requests: Sequence[Feedback], gates: Tensor | None, base: bool = False
    ) -> list[Losses]:
        """The losses on whole requests for every row of gates; rows of the batch end together."""
        tokens, mask = padded([request.tokens for request in requests])
        device = trainable.adapter.params.device
        mask = None if mask is None else mask.to(device)
        n = max(request.teacher.length for request in requests)
        features = padded_features([request.features for request in requests])
        features = None if features is None else features.to(device)
        unrolled = trainable.unrolled_logits(
            tokens.to(device),
            n,
            mask,
            gates,
            base=base,
            features=features,
            steps=self._steps,
            sources=[request.source for request in requests],
        )

        def taught(step: int) -> list[Teacher]:
            known = [None if request.features is None else len(request.features) for request in requests]
            of = zip(requests, known, strict=True)
            return [taught_by(request.teacher, step, len(request.tokens), features) for request, features in of]

        return self.copies(taught, unrolled)
