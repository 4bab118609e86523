"""What every model that drafts with an adapter has in common: how it serves, and what it has read of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .._compat.hidden_states import Reads
from .._compat.models import max_positions
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora
from ..adapt.trainable import Prefix
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from ..runtime.forks import Lock
from .row_features import RowFeatures


class Branch(NamedTuple):
    """A candidate that a draft model is to read."""

    node: int
    parent: int  # the candidate that it follows; -1: the row
    depth: int  # candidates before it
    token: int


class KnownRow(Protocol):
    """A row as a draft model reads it."""

    tokens: Tensor | None  # (1, L) on the model's device, what the target has kept so far; None: it has not begun
    padding: int  # of them, on the left, tokens that are none
    features: RowFeatures | None  # the target's; None: the model reads none


class SharedReader(ABC):
    """What reads several rows of a call in one forward."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many rows it reads."""

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether anything was read."""

    @abstractmethod
    def row(self, i: int) -> Reader:
        """What it has read of one row of the call."""

    @abstractmethod
    def join(self, others: SharedReader) -> None:
        """Takes over the rows of another one that have begun, of the same model."""

    @abstractmethod
    def scores(self, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        """What the model says behind prefixes (1, L) of some of the rows, by their number, in this order: logits (rows, ids).

        Args:
            served: the module tree that drafts now, see `DraftModel.serving`.
        """


class Reader(ABC):
    """What a draft model has read of one row of a call: rolled back from round to round, never built anew."""

    @property
    @abstractmethod
    def shared(self) -> SharedReader | None:
        """What reads other rows in the same forward; None: this row is read by itself."""

    @property
    @abstractmethod
    def source(self) -> Source | None:
        """What it reads beside the row's tokens, for learning; None: nothing."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that it need not read again."""

    @abstractmethod
    def can_draft(self, length: int) -> bool:
        """Whether it can say what follows so many tokens."""

    @abstractmethod
    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        """What the model says behind `prefix` (1, L), of which it reads the rest: logits (1, ids), from id 0 on.

        Args:
            served: the module tree that drafts now, see `DraftModel.serving`.
        """

    @abstractmethod
    def rewind(self, length: int, same: int | None = None) -> None:
        """Rolls back to what was kept of `length` tokens, less the last one: it is read again, for its logits.

        Args:
            same: of what was read, so many tokens at the beginning are kept; None: as many as there are.
        """

    @abstractmethod
    def leave(self) -> None:
        """The row has ended: other rows need not be held up by it."""

    @abstractmethod
    def prefix(self, most: int) -> Prefix | None:
        """At most so many tokens that were read; None: there are none that learning could build on."""


class TreeReader(Reader):
    """What may read several candidates behind one prefix, too."""

    @property
    @abstractmethod
    def reads_trees(self) -> bool:
        """Whether the model reads several candidates behind one prefix; tried once, where it is not known."""

    @abstractmethod
    def can_branch(self, parent: int, depth: int) -> bool:
        """Whether a candidate of this depth stands behind one that it has read in this round (-1: the row), and within its positions."""

    @abstractmethod
    def branch(self, served: PreTrainedModel, branches: Sequence[Branch]) -> Tensor:
        """What the model says behind several candidates, which it reads in one forward: logits (branches, ids), from id 0 on."""


class DraftModel(ABC):
    """A model and its adapter, from call to call.

    Args:
        adapter: its LoRA; the base's weights are borrowed.
        experts: what has been learned: whether any of it serves.
        lock: held for the moments in which the served weights change.
        steps: held for one gradient step at a time; taken before `lock` where both are.

    Attributes:
        positions: the longest context that it may see.
        reads: what it reads of the target beside tokens; (): nothing.
        reads_places: whether it is told where each token stands, beside what it reads.
        most: tokens that it can draft in one round; None: any number.
        ids: the target's ids (n,) that it has logits for; None: those of its vocabulary, in order.
    """

    reads: Reads = ()
    reads_places = False
    most: int | None = None
    ids: Tensor | None = None

    def __init__(self, adapter: GatedLora, experts: Experts, vocabulary: Vocabulary, lock: Lock, steps: Lock) -> None:
        self.adapter, self.vocabulary = adapter, vocabulary
        self.positions = max_positions(adapter.tree.config)
        self._experts, self._lock, self._steps = experts, lock, steps

    @property
    def config(self) -> PretrainedConfig:
        return self.adapter.tree.config

    @property
    def device(self) -> torch.device:
        return self.adapter.params.device

    @property
    def steps(self) -> int:
        """Gradient steps that the adapter has taken."""
        return self._experts.steps

    def fold(self) -> None:
        """Brings the weights that draft up to date with what was learned."""
        with self._steps, self._lock:
            self.adapter.fold()

    @contextmanager
    def serving(self, base: bool = False) -> Iterator[PreTrainedModel]:
        """The model as it drafts now; a draft that has not learned yet runs at the speed of its base.

        Args:
            base: the base draft, whatever was learned.
        """
        base = base or self._experts.serves_base
        if self.adapter.folds and not base:
            if self.adapter.stale:
                self.fold()
            if not self.adapter.stale:
                with self._lock, torch.no_grad():
                    yield self.adapter.folded_tree
                return
        with self._steps, torch.no_grad():  # learning switches the adapter on and off in this tree
            if base:
                yield self.adapter.tree
            else:
                weights = self.adapter.weights
                with self.adapter.gated(None if weights is None else weights[None]) as model:
                    yield model

    @abstractmethod
    def readable_source(self, source: Source | None) -> Source | None:
        """What the model reads of the source of one row; None: it reads none of it."""

    @abstractmethod
    def reader(self, mask: Tensor | None, features: RowFeatures | None, source: Source | None = None) -> Reader:
        """What reads one row.

        Args:
            mask: (1, prompt) with zeros where the prompt is padded on the left; None: no padding.
            features: the target's of this row; None: the model reads none.
            source: that of this row, see `readable_source`; None: there is none, or the model reads none.
        """

    @abstractmethod
    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The target's hidden states (rows, n, width) at tokens (rows, n), in a forward of it; None: the model reads none.

        Raises:
            UnsupportedError: no target is known, or it hands out none.
        """

    @abstractmethod
    def shared_reader(self, rows: Mapping[int, KnownRow]) -> SharedReader | None:
        """What reads several rows, by their number in the call, in one forward; None: they are read one by one."""

    @abstractmethod
    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None, most: int) -> tuple[float, Mapping[bool, Reader]]:
        """See `Trainable.prompt_log_ratio`; what was read by the learned (False) and by the base draft (True), where it is all of it."""

    @abstractmethod
    def prompt_log_ratios(self, tokens: Tensor, mask: Tensor | None, most: int) -> list[float]:
        """See `Trainable.prompt_log_ratios`."""

    @abstractmethod
    def logits(
        self,
        tokens: Tensor,
        n: int,
        base: bool = False,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.logits`."""

    @abstractmethod
    def training_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.training_logits`; held between two gradient steps."""

    @abstractmethod
    def unrolled_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        steps: int = 1,
        sources: Sequence[Source | None] | None = None,
    ) -> list[Tensor]:
        """See `Trainable.unrolled_logits`; held between two gradient steps."""

    @abstractmethod
    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> Tensor:
        """What the draft says with these tensors in the place of its adapter's, by PEFT's names; gradients flow to them."""
