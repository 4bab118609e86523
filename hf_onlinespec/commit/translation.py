"""One row in the draft's own tokens, where the draft has another tokenizer than the target: what it reads, and what it may say."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..adapt.request_feedback import Told
from ..models.common_strings import CommonStrings
from ..models.retokenizing import Group, Open, Retokenizer

MOST_UNSPELLED = 0.1  # of a row's tokens, which its draft's tokenizer has no tokens for; chosen


@final
class Translation:
    """A row of the target's tokens as its draft reads it, while both grow.

    Args:
        padding: tokens on the left of the row that are none.
        device: of the draft.

    Attributes:
        same: tokens of the draft's at the beginning that are as they were when it read them last.
    """

    def __init__(self, retokenizer: Retokenizer, padding: int, device: torch.device) -> None:
        self._retokenizer, self._device = retokenizer, device
        self._length = padding  # of the row, as it was taken last
        self._left = Open()
        self._tokens = list(retokenizer.opening)  # of whole characters
        self._read = list(self._tokens)  # what the draft has read last, or a part of it
        self.same = 0
        self._prompt: int | None = None  # tokens of the target's that the row began with
        self._all = self._unspelled = 0  # groups of the row, and those that the draft's tokens do not spell
        self._groups: list[tuple[int, Group]] = []  # since `told`: where each begins in the row, of the target's tokens
        self._held: Tensor | None = None  # (1, n, vocab) what the target said of the character that is not whole yet

    @property
    def common(self) -> CommonStrings:
        return self._retokenizer.common

    @property
    def can_draft(self) -> bool:
        """Whether the draft has something to read, all of it: the last character of the row is whole.

        There may be nothing: the token that an encoder–decoder begins with is none of the draft's.
        """
        return bool(self._tokens) and self.is_spelled and not self._left.length

    @property
    def is_spelled(self) -> bool:
        """Whether the draft's tokens spell the row, nearly."""
        return self._unspelled <= MOST_UNSPELLED * self._all

    def take(self, row: Tensor) -> Tensor:
        """The row (1, L) as it is now, up to its last whole character, in the draft's tokens (1, L')."""
        groups, left = self._retokenizer.read(row[0, self._length :].tolist(), self._left)
        at = self._length - self._left.length
        for group in groups:
            self._groups.append((at, group))
            at += group.length
            self._unspelled += not group.is_spelled
        self._all += len(groups)
        self._prompt = row.shape[1] if self._prompt is None else self._prompt
        kept = len(self._tokens)
        self._tokens += [token for group in groups for token in group.tokens]
        self._length, self._left = row.shape[1], left
        return self._handed_out(list(self._tokens), kept)

    def read(self, prefix: Tensor) -> Tensor:
        """The row and what may follow it (1, ≥ L), in the draft's tokens."""
        groups, left = self._retokenizer.read(prefix[0, self._length :].tolist(), self._left)
        found = [*self._tokens, *(token for group in groups for token in group.tokens)]
        return self._handed_out([*found, *self._retokenizer.unfinished(left)], len(self._tokens))

    def _handed_out(self, tokens: list[int], kept: int) -> Tensor:
        """Notes how many of the tokens are as before, the first `kept` of them for sure."""
        same, most = kept, min(len(tokens), len(self._read))
        while same < most and tokens[same] == self._read[same]:
            same += 1
        self.same, self._read = min(same, most), tokens
        return torch.tensor([tokens], device=self._device)

    def said(self, scores: Tensor, size: int) -> Tensor:
        """Scores (rows, draft ids) as those of the target's ids (rows, size): −∞ where the two have no token in common."""
        found = scores.new_full((len(scores), size), -torch.inf)
        common = self.common
        found[:, common.target_ids.to(scores.device)] = scores[:, common.draft_ids.to(scores.device)]
        return found

    def told(self, logits: Tensor, new: int, positions: int) -> Told | None:
        """See `DraftedRow`: what the target said where each group of tokens begins."""
        begin, logits = self._length - new, logits[:, :new]
        if self._held is not None:
            begin, logits = begin - self._held.shape[1], torch.cat([self._held, logits], dim=1)
        open_tokens = min(self._left.length, logits.shape[1])
        self._held = logits[:, logits.shape[1] - open_tokens :].clone() if open_tokens else None
        groups, self._groups = self._groups, []
        end = len(self._tokens) - sum(len(group.tokens) for _, group in groups)
        places, spans = list[int](), list[int]()
        for at, group in groups:
            if end + len(group.tokens) > positions + 1:
                break
            before, end = end, end + len(group.tokens)
            if before and at >= begin and group.tokens:  # behind no token at all the draft says nothing
                places.append(at - begin)
                spans.append(len(group.tokens))
        if not places:
            return None
        written = begin - (self._prompt or 0)
        return Told(
            logits[:, places], end, torch.tensor(spans, device=self._device), tuple(written + at for at in places)
        )
