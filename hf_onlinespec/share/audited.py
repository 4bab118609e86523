"""What the privacy audit needs of a draft: what it learned from, its logits, and a copy that may learn secrets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..adapt.feedback import Feedback
from ..adapt.learned_texts import Examined, Learned
from ..config import OnlineSpecConfig
from ..metrics import Counts
from ..models.vocabulary import Vocabulary
from .lineage import Lineage


class Audited(Protocol):
    """A draft, as far as it is audited."""

    settings: OnlineSpecConfig
    vocabulary: Vocabulary
    lineage: Lineage
    examined: Examined | None  # what came out of what it learned from, when that was last looked at
    loaded_rollbacks: int  # of the guard, before it was loaded

    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def positions(self) -> int: ...
    @property
    def changed(self) -> bool: ...
    @property
    def target_at_hand(self) -> PreTrainedModel | None: ...

    def at_rest(self) -> AbstractContextManager[Learned]: ...
    def replayed(self) -> Sequence[Feedback]: ...
    def adapter_params(self) -> dict[str, Tensor]: ...
    def logits(self, tokens: Tensor, n: int, base: bool = False) -> Tensor: ...

    def learn_request(self, request: Feedback) -> Counts: ...
    def fold(self) -> None: ...
    def clone_for_audit(self, learning: OnlineSpecConfig | None = None) -> Audited: ...
