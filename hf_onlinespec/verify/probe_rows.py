"""Whether a target serves rows of different lengths: tried once for each model, on two rows.

Transformers' common decoders that take positions are known to. A class from elsewhere may make something of its own of the attention
mask, which then has holes at other places (GIT widens it by the places of a picture, whether there is one or not), or leave positions
out (HyperCLOVAX with pictures). A decoder that takes none ends its rows at the same place of the cache: that is right where it knows
its tokens by their distance (T5), and where its embedding of positions can be asked row by row (row_positions.py).
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .._compat.attention import takes_positions
from .._compat.caches import CACHE, fresh_cache, moves
from ..rounds import Proposal, Rows, Verdict
from ..runtime.failures import kind_and_place
from .inputs import InputNames
from .positions import PositionLimits
from .probe import (
    MOST_TRIALS,
    guesses,
    in_evaluation,
    is_random,
    made_of,
    off,
    own_inputs,
    own_random_numbers,
    read_on,
    tells_of_target,
    tolerance,
)
from .ragged import RaggedVerifier
from .target import Verifier

# For each model why its rows have to be of one length, by what it was made of when it was tried.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()
ROW_FORWARDS = 11  # of one trial


def why_one_length(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], places: int | None = None
) -> str:
    """Why the rows of a batch of this target would have to be of one length; "": they need not be.

    Args:
        input_ids: (1, L) the prompt of a row.
        places: as `why_chains` takes them.
    """
    known: str | tuple[dict[tuple[Any, ...], str], tuple[Any, ...]] = ""
    try:
        known = _as_known(target, model_kwargs, places)
        if isinstance(known, str):
            return known
        reason = _fault(target, input_ids, model_kwargs)
    except Exception as error:  # a class from elsewhere may raise anything
        reason = f"the target {type(target).__name__} was tried with rows of two lengths, and failed: {kind_and_place(error)}"
        if isinstance(known, str) or not tells_of_target(error, target, input_ids, model_kwargs):
            return reason
    tried, made = known
    tried[made] = reason
    return reason


def needs_row_trial(target: PreTrainedModel, model_kwargs: dict[str, Any]) -> bool:
    """Whether `why_one_length` would run forwards of its own."""
    try:
        return not isinstance(_as_known(target, model_kwargs), str)
    except Exception:  # as there
        return False


def _as_known(
    target: PreTrainedModel, model_kwargs: dict[str, Any], places: int | None = None
) -> str | tuple[dict[tuple[Any, ...], str], tuple[Any, ...]]:
    """The answer of `why_one_length`, where it is known; else where that of a trial belongs. Raises whatever hooks of others raise."""
    name, takes = type(target).__name__, takes_positions(target, InputNames.of(target).positions)
    if not takes and not target.config.is_encoder_decoder:
        return f"the target {name} takes no position for each token"
    if not moves(model_kwargs[CACHE], places) or PositionLimits.of(target.config).by_length:
        return f"the target {name} has a cache whose rows cannot be moved, or positions by the length of a forward"
    is_common, parts, values = made_of(target)
    if is_common and takes:
        return ""
    if not is_common and not takes:
        return f"the target {name} was altered, or is of a class that is not known"
    tried = _tried.setdefault(target, {})
    made = (*parts, *values, target.training)
    if made in tried:
        return tried[made]
    if len(tried) >= MOST_TRIALS:
        return next(filter(None, tried.values()), "")
    return tried, made


def _fault(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str:
    """What goes wrong with two rows of which one has accepted two tokens and the other none; "": nothing."""
    prompt, own = own_inputs(target, input_ids, model_kwargs)
    random = target.training and is_random(target, input_ids, model_kwargs)  # two forwards never agree then
    with own_random_numbers(target, input_ids), in_evaluation(target) if random else nullcontext():
        found, expected = _two_rows(target, prompt, own)
    apart = off(found, expected)
    if not bool((apart <= tolerance(target, input_ids.device.type)).all()):
        return (
            f"the target {type(target).__name__} computes something else for rows of different lengths than for each alone "
            f"(logits off by {float(apart.max()):.2g} of the largest)"
        )
    return ""


def _two_rows(target: PreTrainedModel, prompt: Tensor, own: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (4, vocab) behind a long and a short row and behind a candidate of each, of both together, and of each alone."""

    def cached() -> dict[str, Any]:
        return own | {CACHE: fresh_cache(target.config)}

    config, names = GenerationConfig(), InputNames.of(target)
    tokens, _ = read_on(Verifier(target, prompt, config, cached()), prompt, 4)
    n = prompt.shape[1]
    long, other = tokens, tokens[:, n + 1 : n + 2]
    short = torch.cat(
        [tokens[:, : n + 1], tokens[:, n + 3 :]], dim=-1
    )  # another token than the first candidate, if there is one
    alone = []
    for row in (long, short):
        verifier = Verifier(target, prompt, config, cached())
        verifier.verify(row[:, :-1], guesses(prompt[:, :0]))
        verifier.keep(row)
        alone.append(verifier.verify(row, guesses(other))[0])
    both = names.of_rows(cached(), [0, 0], one=True)
    ragged = RaggedVerifier(target, prompt.repeat(2, 1), config, both)
    rows = Rows.of(prompt.repeat(2, 1))
    begun = Rows.of(tokens[:, : n + 1].repeat(2, 1))
    ended = Rows(torch.cat([long, torch.nn.functional.pad(short, (0, 2))]), (n + 4, n + 2))
    ragged.verify(rows, Proposal.nothing(rows))
    ragged.keep(_verdict(Proposal.nothing(rows), begun, ((), ())))
    proposal = Proposal.joined([guesses(tokens[:, n + 1 : n + 3])] * 2)
    ragged.verify(begun, proposal)
    ragged.keep(_verdict(proposal, ended, ((0, 1), ())))
    found = ragged.verify(ended, Proposal.joined([guesses(other)] * 2))
    return found.flatten(0, 1), torch.cat(alone)


def _verdict(proposal: Proposal, rows: Rows, paths: tuple[tuple[int, ...], ...]) -> Verdict:
    new = tuple(len(path) + 1 for path in paths)
    return Verdict(proposal, rows, new, paths, ((), ()), ((), ()), (False, False), None)
