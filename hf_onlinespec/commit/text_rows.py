"""The text of a prompt with pictures or sounds in it: all that drafts, the suffix memory and learning are shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rounds import Rows
from .base import Call


@dataclass(frozen=True)
class TextRows:
    """One row without the tokens that stand for a part of a picture, a video or a sound.

    The target has hundreds of them for one picture. A draft that reads text has no use for them, and in the suffix memory they would
    take the room of text. What a proposal says does not depend on it: it follows the row, whatever was read of it.
    """

    hidden: Tensor  # (prompt,) which places of the prompt hold such a token

    @classmethod
    def of(cls, call: Call) -> TextRows | None:
        """None: all of the prompt is text, or there are several rows: `Gaps` leaves out what their mask does."""
        if call.prompts is None or call.rows != 1 or not call.placeholders:
            return None
        hidden = torch.isin(call.prompts[0], torch.tensor(sorted(call.placeholders), device=call.prompts.device))
        return cls(hidden) if bool(hidden.any()) and not bool(hidden.all()) else None

    def call(self, call: Call) -> Call:
        """The call of the text alone."""
        assert call.prompts is not None
        mask = None if call.mask is None else self._text(call.mask)
        return replace(call, mask=mask, prompts=self._text(call.prompts))

    def rows(self, rows: Rows) -> Rows:
        return Rows(self._text(rows.tokens), (rows.lengths[0] - int(self.hidden.sum()),), rows.numbers)

    def features(self, features: Tensor, end: int) -> Tensor:
        """Of hidden states (1, fed, width) of the last tokens in front of the place `end`, those at text."""
        start = end - features.shape[1]
        hidden = self.hidden[start:] if start < len(self.hidden) else self.hidden[:0]
        return torch.cat(
            [features[:, : len(hidden)][:, ~hidden.to(features.device)], features[:, len(hidden) :]], dim=1
        )

    def _text(self, values: Tensor) -> Tensor:
        """Columns (1, prompt and more) at text."""
        prompt = len(self.hidden)
        return torch.cat([values[:, :prompt][:, ~self.hidden.to(values.device)], values[:, prompt:]], dim=1)
