"""How a target hands out its hidden states in a forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


def takes_hidden_states(model: nn.Module) -> bool:
    """Whether a forward of the model can be asked for its hidden states."""
    parameters = inspect.signature(model.forward).parameters
    return "output_hidden_states" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def hidden_states_inputs(reads: Sequence[int]) -> dict[str, Any]:
    """Inputs of a forward that ask for these entries of `hidden_states`; (): none is asked for.

    Classes that collect their outputs by hooks hold the asked ones alone (transformers 5.23); for all others a list is a flag, and
    all of them come back.
    """
    return {"output_hidden_states": list(reads)} if reads else {}


def hidden_states(outputs: ModelOutput, reads: Sequence[int], fed: int) -> Tensor | None:
    """These entries of `hidden_states` at the last `fed` tokens, concatenated: (batch, fed, width).

    None: the model hands out none, or keeps something else in their place than one row for each token.
    """
    states = outputs.get("hidden_states") or ()
    found = [states[index] for index in reads if -len(states) <= index < len(states)]
    if not found or len(found) < len(reads) or any(s is None or s.dim() != 3 or s.shape[1] < fed for s in found):
        return None
    rows = [state[:, -fed:] for state in found]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)
