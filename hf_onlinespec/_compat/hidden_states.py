"""How a target hands out its hidden states in a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


def hidden_states_inputs(reads: Sequence[int]) -> dict[str, Any]:
    """Inputs of a forward that ask for these entries of `hidden_states`; (): none is asked for.

    Classes that collect their outputs by hooks hold the asked ones alone (transformers 5.23); for all others a list is a flag, and
    all of them come back.
    """
    return {"output_hidden_states": list(reads)} if reads else {}


def hidden_states(outputs: ModelOutput, reads: Sequence[int]) -> Tensor | None:
    """These entries of `hidden_states`, concatenated: (batch, n, width); None: the model hands out none."""
    states = outputs.get("hidden_states")
    if not reads or not states:
        return None
    found = [states[index] for index in reads]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
