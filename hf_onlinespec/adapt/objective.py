"""How well a draft's logits match what the target said: the loss that is learned, and the acceptance that it stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import OnlineSpecConfig
from .feedback import Feedback, Teacher, acceptance, parts
from .losses import LOSSES
from .segment import Segment, padded, padded_features
from .trainable import Trainable


class Objective:
    """The loss of the settings, at their temperature."""

    def __init__(self, settings: OnlineSpecConfig) -> None:
        self._loss, self._temperature = LOSSES[settings.loss], settings.temperature
        self._tail = settings.loss != "cross_entropy"  # whether the loss takes all other tokens as one outcome

    def losses(self, teachers: Sequence[Teacher], logits: Sequence[Tensor] | Tensor) -> Tensor:
        """The loss at every taught position, of rows of logits (≥ n, vocab): their last n."""
        found = []
        for teacher, row in zip(teachers, logits, strict=True):
            row = row[-len(teacher) :]
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
        """Acceptance (batch · n,) of logits (batch, n, vocab) at the taught tokens, at the temperature of their call."""
        found: list[float] = acceptance(segment.teachers, logits, segment.temperature, self._temperature).tolist()
        return found

    def request_losses(
        self, trainable: Trainable, requests: Sequence[Feedback], gates: Tensor | None, base: bool = False
    ) -> list[list[Tensor]]:
        """For every row of gates and every request the losses at its taught positions; rows of the batch end together."""
        tokens, mask = padded([request.tokens for request in requests])
        device = trainable.adapter.params.device
        mask = None if mask is None else mask.to(device)
        n = max(len(request.teacher) for request in requests)
        features = padded_features([request.features for request in requests])
        features = None if features is None else features.to(device)
        logits = trainable.training_logits(tokens.to(device), n, mask, gates, base=base, features=features)
        return [
            [self.losses([request.teacher], [own]) for request, own in zip(requests, part, strict=True)]
            for part in logits
        ]
