"""What the privacy audit needs of a draft: what it learned from, its logits, and a copy that may learn secrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..adapt.gated_lora import GatedLora
from ..adapt.service import LearningService
from ..config import OnlineSpecConfig
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from .lineage import Lineage
from .targets import Targets


class AdaptedModel(Protocol):
    """The model of a draft, as it serves."""

    adapter: GatedLora
    positions: int  # the longest context that it may see
    ids: Tensor | None  # the target's ids (n,) that it has logits for; None: those of its vocabulary, in order

    def logits(
        self,
        tokens: Tensor,
        n: int,
        base: bool = False,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor: ...


class Audited(Protocol):
    """A draft, as far as it is audited."""

    settings: OnlineSpecConfig
    vocabulary: Vocabulary
    lineage: Lineage
    learning: LearningService  # what it has learned, and from what
    targets: Targets

    @property
    def trainable(self) -> AdaptedModel: ...
    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def steps(self) -> int: ...  # gradient steps that the adapter has taken

    def clone_for_audit(self, learning: OnlineSpecConfig | None = None) -> Audited: ...


def logits_of_all_ids(draft: Audited, tokens: Tensor, n: int, base: bool, source: Source | None = None) -> Tensor:
    """What a draft says after each of the last n of `tokens` (rows, L): (rows, n, vocab), -inf where a head has no such token.

    Args:
        source: what all rows were written from, as the draft reads it; None: nothing that is known.
    """
    sources = None if source is None else [source] * len(tokens)
    logits, ids = draft.trainable.logits(tokens, n, base, sources=sources), draft.trainable.ids
    if ids is None:
        return logits
    found = logits.new_full((*logits.shape[:-1], draft.vocabulary.size), -torch.inf)
    found[..., ids] = logits
    return found
