"""Whether a target verifies a tree of candidates in one forward: by what its configuration says, then tried once for each model.

Else its proposals are chains. A mask of two branches is refused by some models and ignored by others; what counts the places of
the keys instead of the positions of the tokens (windows, ALiBi, sinks) computes something else in a tree.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .._compat.attention import attention_kind, has_sinks, takes_positions, tree_obstacle
from .._compat.caches import CACHE, fresh_cache, moves, without_windows
from .._compat.generation import continues_inputs
from ..runtime.failures import kind_and_place
from .inputs import InputNames, given
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
    tells_of_target,
    tolerance,
)
from .target import Verifier

TREE_FORWARDS = 5  # of one trial
PROMPT_TOKENS = 8  # that a known class is tried with: its configuration has told what depends on the length; chosen

# Largest difference of two logits over the largest one, where `tolerance` allows for more. On SmolLM2 in bfloat16 both are the same to
# the bit; with the mask left out they are 0.12 to 0.38 apart. A router that flips at a tie costs trees, not an answer.
MOST_OFF = 0.05

# For each model why it is given chains alone, by what it was made of when it was tried, and by what its alterations referred to.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], dict[tuple[Any, ...], str]]] = (
    weakref.WeakKeyDictionary()
)


def why_chains(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], places: int | None = None
) -> str:
    """Why the proposals of a request of this target have to be chains; "": they may be trees.

    Args:
        input_ids: (1, L) the prompt, or its new part.
        places: that the request takes at most in a cache without windows; None: it is decoded in the cache that it has.
    """
    known: str | _Untried = ""
    try:
        known = _as_known(target, input_ids, model_kwargs, places)
        if isinstance(known, str):
            return known
        reason = _fault(target, input_ids, model_kwargs, known.is_common)
    except Exception as error:  # hooks and classes of others may raise anything
        reason = f"the target {type(target).__name__} was tried with a tree, and failed: {kind_and_place(error)}"
        if isinstance(known, str) or not tells_of_target(error, target, input_ids, model_kwargs):
            return reason
    known.tried[known.values] = reason
    return reason


def needs_tree_trial(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> bool:
    """Whether `why_chains` would run forwards of its own."""
    try:
        return not isinstance(_as_known(target, input_ids, model_kwargs), str)
    except Exception:  # as there
        return False


@dataclass(frozen=True)
class _Untried:
    """A target that is not tried yet, and where the answer belongs."""

    tried: dict[tuple[Any, ...], str]  # by what its alterations refer to
    values: tuple[Any, ...]  # of these, now
    is_common: bool  # whether it is transformers' own as it is


def _as_known(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], places: int | None = None
) -> str | _Untried:
    """The answer of `why_chains`, where it is known. Raises whatever hooks and classes of others raise."""
    name = type(target).__name__
    reason = tree_obstacle(target.config, places) or _inputs_obstacle(target, input_ids, model_kwargs, places)
    if reason:
        return f"the target {name} {reason}"
    is_common, parts, values = made_of(target)
    positions = model_kwargs.get(InputNames.of(target).positions)
    kinds = None if positions is None else positions.shape[:-2]
    made = (*parts, attention_kind(target.config), target.training, kinds)
    tried = _tried.setdefault(target, {}).setdefault(made, {})
    if values in tried:
        return tried[values]
    # Weights of a class from elsewhere are among the values: those of a policy in training change in every step.
    if len(tried) >= MOST_TRIALS:
        return next(filter(None, tried.values()), "")
    if has_sinks(target):
        return f"the target {name} has attention sinks"
    return _Untried(tried, values, is_common)


def _inputs_obstacle(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], places: int | None
) -> str:
    """What in this request keeps from verifying a tree, said of the target; "": nothing."""
    names = InputNames.of(target)
    mask, positions = model_kwargs.get(names.mask), model_kwargs.get(names.positions)
    if given(model_kwargs) - names.text:
        return "reads more than text"
    if continues_inputs(target):
        return "carries its inputs from one forward to the next in a way of its own"
    if not moves(model_kwargs[CACHE], places):
        return "has a cache whose keys cannot be moved"
    if PositionLimits.of(target.config).by_length:
        return "computes its positions, or selects its keys, by the length of a forward"
    if not takes_positions(target, names.positions) or (positions is not None and positions.ndim < 2):
        return "takes no position for each token"
    if mask is not None and (mask.ndim != 2 or (positions is None and not bool(mask.all()))):
        return "was given an attention mask without positions"
    return ""


def _fault(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], known: bool) -> str:
    """What a forward over a tree gets wrong, behind the request's own prompt and on a cache of its own; "": nothing."""
    prompt, own = own_inputs(target, input_ids, model_kwargs)
    prompt = prompt[:, -PROMPT_TOKENS:] if known else prompt
    # Positions are given where the request gives them: a class may count otherwise by itself.
    names = InputNames.of(target)
    inputs: dict[str, Any] = {"use_cache": True} | {name: own[name] for name in names.source if name in own}
    if model_kwargs.get(names.positions) is not None:
        kinds = model_kwargs[names.positions].shape[:-2]
        inputs[names.positions] = torch.arange(prompt.shape[1], device=prompt.device).expand(*kinds, 1, -1)
    # With dropout two forwards never agree, which says nothing of masks and positions.
    random = target.training and is_random(target, input_ids, model_kwargs)
    with own_random_numbers(target, input_ids), in_evaluation(target) if random else nullcontext():
        found, expected = _two_branches(target, prompt, inputs)
    apart = off(found, expected)
    if not bool((apart <= min(MOST_OFF, tolerance(target, input_ids.device.type))).all()):
        return (
            f"the target {type(target).__name__} computes something else in a tree than in its branches "
            f"(logits off by {float(apart.max()):.2g} of the largest)"
        )
    return ""


def _two_branches(target: PreTrainedModel, prompt: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (7, vocab) of a tree of two branches of two tokens and, with the second one kept, of two tokens more; and what they
    are where each branch is a chain."""
    cache = without_windows(fresh_cache(target.config))
    verifier = Verifier(target, prompt, GenerationConfig(), inputs | {CACHE: cache})
    logits = verifier.verify(prompt, guesses(prompt[:, :0]))[:, 0]
    likely = logits.topk(min(8, logits.shape[1])).indices  # (1, 8) tokens that differ, fewer where there are fewer
    likely = likely.repeat(1, 8)[:, :8]
    root = torch.cat([prompt, likely[:, :1]], dim=-1)
    first, second, more = likely[:, 1:3], likely[:, 3:5], likely[:, 5:]

    verifier.keep(root)
    one = verifier.verify(root, guesses(first))[0]  # (3, vocab)
    verifier.keep(root)
    # The branches lie between each other: neither is at its places in the cache.
    tree = guesses(torch.stack([first, second], dim=-1).flatten(1), parents=(-1, -1, 0, 1))
    both = verifier.verify(root, tree)[0]  # (5, vocab): behind the root, first, second, first, second
    longer = torch.cat([root, second, more[:, :1]], dim=-1)
    verifier.keep(longer, ((1, 3),))
    behind = verifier.verify(longer, guesses(more[:, 1:2]))[0]  # (2, vocab)
    verifier.keep(root)
    other = verifier.verify(root, guesses(torch.cat([second, more[:, :2]], dim=-1)))[0]  # (5, vocab)
    return torch.cat([both[[0, 1, 3, 2, 4]], behind]), torch.cat([one, other[[1, 2, 3, 4]]])
