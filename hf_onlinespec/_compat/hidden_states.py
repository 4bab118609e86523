"""How a target hands out its hidden states in a forward, and the keys and values that it shares with an assistant."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, output_capturing

# Whether a list asks for hidden states. Before transformers 5.23 the last one never comes with a list, and the draft's would be missing.
SELECTS = "selected_hidden_states" in vars(output_capturing)

# What a draft reads inside of its target: indices of `hidden_states`; by a type of layers ("full_attention"), the keys and values that
# a Gemma 4 target shares.
Reads = tuple[int | str, ...]


def takes_hidden_states(model: nn.Module) -> bool:
    """Whether a forward of the model can be asked for its hidden states."""
    parameters = inspect.signature(model.forward).parameters
    return "output_hidden_states" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def hidden_states_inputs(reads: Reads) -> dict[str, Any]:
    """Inputs of a forward that ask for what is read; (): nothing is asked for.

    Classes that collect their outputs by hooks hold the asked hidden states alone (transformers 5.23); for all others, and before, all
    of them come back.
    """
    indices = [read for read in reads if isinstance(read, int)]
    asked: dict[str, Any] = {"output_hidden_states": indices if SELECTS else True} if indices else {}
    return asked | ({"return_shared_kv_states": True} if len(indices) < len(reads) else {})


def hidden_states(outputs: ModelOutput, reads: Reads, fed: int) -> Tensor | None:
    """What is read at the last `fed` tokens, concatenated: (batch, fed, width). Keys go before the values of the same layers.

    Of an encoder–decoder, the decoder's. None: the model hands out none, or keeps something else in their place than one row for
    each token.
    """
    states = outputs.get("hidden_states") or outputs.get("decoder_hidden_states") or ()
    shared = outputs.get("shared_kv_states") or {}
    found: list[Tensor | None] = []
    for read in reads:
        if isinstance(read, str):
            found += [entries.transpose(1, 2).flatten(2) for entries in shared.get(read, ())] or [None]
        else:
            found.append(states[read] if -len(states) <= read < len(states) else None)
    rows = [state[:, -fed:] for state in found if state is not None and state.dim() == 3 and state.shape[1] >= fed]
    if not rows or len(rows) < len(found):
        return None
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)
