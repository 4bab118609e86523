"""Stopping criteria that say one thing of a whole batch, such as that a stop sequence is in every row by now.

Plain decoding asks them after each token, of all rows at one length, and ends all rows at once. Rows that accept different numbers
of tokens are at different lengths: such a criterion is shown each length once all rows have got that far, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from .._compat.generation import known_of_row
from ..rounds import Verdict
from .row_calls import of_row


class BatchCriteria:
    """What judges the rows of one call together.

    Args:
        input_ids: (batch, prompt), padded on the left.
        pad: what rows that have ended are padded with.

    Attributes:
        rows: per row of the call its tokens (L,), as far as they are known.
    """

    def __init__(self, criteria: StoppingCriteriaList, input_ids: Tensor, pad: int) -> None:
        self.rows = list(input_ids.unbind())
        self._criteria, self._pad, self._shown = criteria, pad, input_ids.shape[1]
        self._going_on = set(range(len(input_ids)))

    def end(self, verdict: Verdict) -> int | None:
        """After a round: at how many tokens all rows end, the prompt's included; None: they go on, or end each by itself."""
        if not self._criteria:
            return None
        for i, row in enumerate(verdict.rows.of_call):
            self.rows[row] = verdict.rows.row(i)[0]
            if verdict.done[i]:
                self._going_on.remove(row)
        reached = min((len(self.rows[row]) for row in self._going_on), default=max(map(len, self.rows)))
        while self._shown < reached:
            self._shown += 1
            if bool(self._criteria(self._at(self._shown), None).all()):
                return self._shown
        return None

    def _at(self, length: int) -> Tensor:
        """All rows (batch, length)."""
        shown = self.rows[0].new_full((len(self.rows), length), self._pad)
        for row, own in enumerate(self.rows):
            shown[row, : len(own)] = own[:length]
        return shown


def split_criteria(
    criteria: StoppingCriteriaList, input_ids: Tensor
) -> tuple[StoppingCriteriaList, StoppingCriteriaList]:
    """Those that say something of each row, and those that say one thing of all of them."""
    own, of_all = StoppingCriteriaList(), StoppingCriteriaList()
    for criterion in criteria:
        (of_all if says_one_thing(criterion, input_ids) else own).append(criterion)
    return own, of_all


def says_one_thing(criterion: object, input_ids: Tensor) -> bool:
    """Whether a criterion from elsewhere gives one answer for all rows of the prompts (batch, L): a copy of it is asked."""
    if known_of_row(criterion, 0) is not None:
        return False
    try:
        with torch.random.fork_rng([]):
            found = of_row(criterion, 0)(input_ids, None)
    except Exception:  # what comes from elsewhere may raise anything; whoever goes on with it says so
        return False
    return isinstance(found, bool) or (isinstance(found, Tensor) and found.numel() == 1)
