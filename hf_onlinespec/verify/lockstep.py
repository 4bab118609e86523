"""One target in several processes (ZeRO-3, FSDP): a forward in one of them needs one in each of the others.

The contract of `synced_gpus`: after every round all say whether they are done, and who is done runs forwards for nothing until all
are. So all processes have to begin alike, which is agreed on before the first forward: several rows in any of them are decoded plainly
in all, and where one has to try the target (probe.py), the others run as many forwards. Trees are not tried: chains alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat.generation import unfinished_anywhere
from .probe import TRIAL_FORWARDS, needs_trial, why_plain

CHAINS = "synced_gpus: the processes would have to try a tree together"
BATCH = "synced_gpus: a batch is decoded plainly, here or in another process"


class Lockstep:
    """The other processes that hold a target, from the side of one call of `generate`.

    Args:
        synced: whether there are any; False: nothing is waited for.
    """

    def __init__(self, target: PreTrainedModel, input_ids: Tensor, synced: bool) -> None:
        self.synced, self._target, self._token = synced, target, input_ids[:1, -1:]

    def begin(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str:
        """Before the first forward: why all processes decode plainly; "": each drafts as far as it can."""
        if not self.synced:
            return ""
        several = len(input_ids) > 1
        tries = not several and needs_trial(self._target, model_kwargs)
        said = torch.tensor([several, tries], dtype=torch.float32, device=input_ids.device)
        torch.distributed.all_reduce(said)
        anywhere = said.tolist()
        if anywhere[0]:
            return BATCH
        if tries:
            why_plain(self._target, input_ids, model_kwargs)
        elif anywhere[1]:
            self._idle(TRIAL_FORWARDS)
        return ""

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
