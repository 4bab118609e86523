"""One target in several processes (ZeRO-3, FSDP): a forward in one of them needs one in each of the others.

The contract of `synced_gpus`: after every round all say whether they are done, and who is done runs forwards for nothing until all
are. So all processes have to begin alike, which is agreed on before the first forward: where one has to try the target (probe.py,
probe_trees.py, probe_rows.py), all run as many forwards, and where one decodes its rows plainly by transformers' own loop, all do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat.generation import unfinished_anywhere
from .probe import needs_trial, trial_forwards, why_plain
from .probe_rows import ROW_FORWARDS, needs_row_trial, why_one_length
from .probe_trees import TREE_FORWARDS, needs_tree_trial, why_chains

ELSEWHERE = "synced_gpus: another process decodes its rows plainly, and all have to decode alike"


class Lockstep:
    """The other processes that hold a target, from the side of one call of `generate`.

    Args:
        synced: whether there are any; False: nothing is waited for.
    """

    def __init__(self, target: PreTrainedModel, input_ids: Tensor, synced: bool) -> None:
        self.synced, self._target, self._token = synced, target, input_ids[:1, -1:]

    def begin(self, row: Tensor, model_kwargs: dict[str, Any], several: bool, why: Callable[[], str]) -> str:
        """Before the first forward: why all processes decode plainly; "": each drafts as far as it can.

        Args:
            row: (1, L) of the call, that the target is tried with where it has to be, and the inputs beside it.
            several: whether this process has more rows.
            why: why this process decodes plainly; asked when the target has been tried.
        """
        if not self.synced:
            return why()
        target = self._target
        self._try(
            needs_trial(target, model_kwargs), lambda: why_plain(target, row, model_kwargs), trial_forwards(target)
        )
        drafts = not why_plain(target, row, model_kwargs)
        tries = drafts and needs_tree_trial(target, row, model_kwargs)
        self._try(tries, lambda: why_chains(target, row, model_kwargs), TREE_FORWARDS)
        tries = drafts and several and needs_row_trial(target, model_kwargs)
        self._try(tries, lambda: why_one_length(target, row, model_kwargs), ROW_FORWARDS)
        plain = why()
        elsewhere = self._anywhere(bool(plain))
        return plain or (ELSEWHERE if elsewhere else "")

    def _try(self, needed: bool, trial: Callable[[], str], forwards: int) -> None:
        """Runs a trial in the processes that need it, and as many forwards in the others."""
        if not self._anywhere(needed):
            return
        if needed:
            trial()
        else:
            self._idle(forwards)

    def _anywhere(self, here: bool) -> bool:
        """Whether something holds in any of the processes, all of which ask at once."""
        said = torch.tensor(float(here), device=self._token.device)
        torch.distributed.all_reduce(said)
        return said.item() > 0

    def end_round(self, done: bool) -> None:
        """After a forward of every process. One that is done goes on with forwards until all are."""
        if not self.synced:
            return
        while unfinished_anywhere(self._target, done, self._token.device) and done:
            self._idle(1)

    def _idle(self, forwards: int) -> None:
        """Forwards whose result nobody needs, on a token of its own and without a cache."""
        for _ in range(forwards):
            self._target(input_ids=self._token, use_cache=False, return_dict=True)
