"""The tokens that spell the same in two tokenizers.

A draft with another tokenizer than its target proposes these alone: its distribution on them, normalised again, is one over the
target's ids with q = 0 elsewhere, so that speculative sampling stays exact whatever the draft has read. So it is done with the
reduced vocabularies of EAGLE-3 too.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from ..errors import DraftError
from .spelling import Spelling


class CommonStrings:
    """The tokens that spell the same in two tokenizers, by both ids.

    Special tokens are common where they have one name, and as the end of a text. What ends in the middle of a character is never
    common: the draft proposes whole characters.

    Attributes:
        target_ids: (n,) ascending.
        draft_ids: (n,) of the same tokens.
        size: ids that the draft can read lie below it.
        draft_of: the draft's id of every token of the target's that spells the same; several may be one for the draft.

    Args:
        sizes: ids of the two models, the target's first: higher ones are neither read nor said.

    Raises:
        DraftError: they have no token in common.
    """

    def __init__(self, target: Spelling, draft: Spelling, sizes: tuple[int, int]) -> None:
        self.target, self.draft, self.size = target, draft, sizes[1]
        theirs, ours = _ids_by_text(draft, sizes[1]), _ids_by_text(target, sizes[0])
        self.draft_of = {i: theirs[text][0] for text, ids in ours.items() if text in theirs for i in ids}
        pairs = [(ids[0], theirs[text][0]) for text, ids in ours.items() if text in theirs]
        if not pairs:
            raise DraftError(
                f"The tokenizers of target and draft ({len(target.spelled):,} and {len(draft.spelled):,} tokens) have no token in common. "
                "Use a draft with the target's own tokenizer."
            )
        marks = _common_marks(target, draft, sizes)
        self.draft_of |= marks
        pairs += [(i, j) for j, i in {j: i for i, j in marks.items()}.items()]
        self.target_ids, self.draft_ids = torch.tensor(sorted(pairs)).unbind(1)

    def __len__(self) -> int:
        return len(self.target_ids)


def _ids_by_text(spelling: Spelling, size: int) -> dict[str, list[int]]:
    """The ids below `size` that spell each text, first the one that the tokenizer writes it with."""
    found = defaultdict[str, list[int]](list)
    for i, spelled in spelling.spelled.items():
        if i < size and spelled:
            try:
                found[spelled.decode()].append(i)
            except UnicodeDecodeError:
                continue
    for text, ids in found.items():
        if len(ids) > 1:  # a character and the byte that stands for it elsewhere
            ids.sort(key=lambda i: [i] != spelling.read(text))
    return found


def _common_marks(target: Spelling, draft: Spelling, sizes: tuple[int, int]) -> dict[int, int]:
    """The draft's id of every special token of the target's that has one."""
    named = {name: i for i, name in draft.marks.items()}
    found = {i: named[name] for i, name in target.marks.items() if name in named}
    if target.eos is not None and draft.eos is not None:
        found[target.eos] = draft.eos
    return {i: j for i, j in found.items() if i < sizes[0] and j < sizes[1]}
