"""The targets of a draft: their names, for its card, and the latest one, for its audit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from transformers import PreTrainedModel

from .._compat.models import model_name
from ..models.identity import public_name


class Targets:
    """The models that a draft drafts for.

    Not safe with several threads by itself: the caller holds the draft's lock.

    Attributes:
        names: of all of them, without the folders of this machine; a model may have none.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = list(dict.fromkeys(names))
        self._latest: weakref.ref[PreTrainedModel] | None = None

    def add(self, target: PreTrainedModel, own_tokens: bool = True) -> None:
        """Notes a model that is drafted for.

        Args:
            own_tokens: whether it has the draft's tokenizer. Else it is not at hand: it could not read what is learned from.
        """
        if own_tokens:
            self.keep_at_hand(target)
        name = public_name(model_name(target.config))
        if name and name not in self.names:
            self.names.append(name)

    def keep_at_hand(self, target: PreTrainedModel) -> None:
        """Notes, weakly, a model that is learned from: the privacy audit asks what it says by itself."""
        self._latest = weakref.ref(target)

    @property
    def at_hand(self) -> PreTrainedModel | None:
        """The latest one, if it is still there."""
        return None if self._latest is None else self._latest()
