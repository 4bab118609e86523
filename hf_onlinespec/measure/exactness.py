"""Whether an output that differs from plain greedy generation differs by rounding alone, or by a fault.

A forward over several positions sums in another order than forwards over one position each, so that in half precision two
tokens whose logits are nearly equal may change places. The first place where an output leaves plain's decides:

    gap          plain's best score minus its score of the token that stands in the other output
    difference   the largest difference, over positions of this prompt and all of the vocabulary, between the logits of one
                 forward over n positions and those of n forwards over one, in the same precision
    gap <= 2 * difference: within rounding, since each of the two scores may have moved by that much; else a fault
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchEncoding, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .._compat.generation import generative
from .._compat.models import keeps_logits, max_positions
from .inputs import begins, logits_of

IDENTICAL, ROUNDING, FAULT = "identical", "within rounding", "fault"
LEAST_POSITIONS = (
    16  # that rounding is measured over, where plain's output has so many: one alone shows little (chosen)
)


@dataclass(frozen=True)
class Difference:
    """The first place where an output leaves plain's."""

    position: int  # new tokens before it
    gap: float  # between plain's score of its own token and of the other one; 0: a tie; inf: it has no score, or no token stands there
    rounding: float  # largest difference between logits of the two ways of computing them
    gap_float32: (
        float | None
    )  # the same gap in float32; negative: there the other token is the better one; None: not computed

    @property
    def kind(self) -> str:
        """`ROUNDING` or `FAULT`."""
        return ROUNDING if self.gap <= 2 * self.rounding else FAULT


class Examiner:
    """Compares the outputs of one target with plain's.

    Args:
        reference: gives the same target in float32, and is called once, at the first difference; if that is None, gaps in
            float32 are not computed.
    """

    def __init__(self, target: PreTrainedModel, reference: Callable[[], PreTrainedModel | None] = lambda: None) -> None:
        self._target, self._reference = target, functools.cache(reference)

    def differences(
        self, inputs: BatchEncoding, plain: Tensor, others: Mapping[str, Tensor]
    ) -> dict[str, Difference | None]:
        """Looks at each output's first difference from plain's; None: identical.

        Args:
            inputs: of the prompt, a batch of one.
            plain: (1, L) prompt (of an encoder–decoder, the token it starts with) and output of plain greedy generation.
            others: (1, L') each, by name.
        """
        prompt = begins(self._target, inputs)
        parted = {name: first_difference(plain[0, prompt:], output[0, prompt:]) for name, output in others.items()}
        at = {name: position for name, position in parted.items() if position is not None}
        found: dict[str, Difference | None] = dict.fromkeys(others)
        if not at:
            return found
        new = plain.shape[1] - prompt
        n = min(new, max(max(at.values()) + 1, LEAST_POSITIONS))
        logits, scores = self._one_by_one(inputs, plain[:, : prompt + n])
        rounding = _largest(logits, self._at_once(inputs, plain[:, : prompt + n], n))
        for name, position in at.items():
            if position >= new or prompt + position >= others[name].shape[1]:
                found[name] = Difference(
                    position, float("inf"), rounding, None
                )  # one of them stops where the other goes on
                continue
            own, other = int(plain[0, prompt + position]), int(others[name][0, prompt + position])
            row = scores[position]
            # Plain's own token is the best one, unless this machine's arithmetic differs from run to run.
            gap = float(row.max() - torch.minimum(row[own], row[other]))
            found[name] = Difference(
                position, gap, rounding, self._gap_float32(inputs, plain[:, : prompt + position], own, other)
            )
        return found

    def _one_by_one(self, inputs: BatchEncoding, plain: Tensor) -> tuple[Tensor, Tensor]:
        """Plain generation once more, over the tokens of `plain`: its logits and processed scores, (n, V) in float32 each."""
        prompt = begins(self._target, inputs)
        replay = _Replay(plain[0], prompt)
        out = generative(self._target).generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=plain.shape[1] - prompt,
            logits_processor=LogitsProcessorList([replay]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat(out.logits).float(), torch.stack(replay.scores)

    def _at_once(self, inputs: BatchEncoding, plain: Tensor, n: int) -> Tensor:
        """The logits (n, V), in float32, of the last n tokens of `plain`, from one forward over several positions.

        Behind a short output other tokens follow, which a causal model does not see: over the prompt alone both ways would be one.
        """
        room = max_positions(self._target.config) - plain.shape[1]
        more = min(max(0, LEAST_POSITIONS - n), max(0, room))
        tokens = torch.cat([plain[:, :-1], plain[:, -1:].expand(-1, more)], dim=1)
        with torch.no_grad():
            few = {"logits_to_keep": n + more} if keeps_logits(self._target) else {}
            logits = logits_of(self._target, inputs, tokens, **few)[-n - more :]
        return torch.as_tensor(logits[:n].float())

    def _gap_float32(self, inputs: BatchEncoding, prefix: Tensor, own: int, other: int) -> float | None:
        reference = self._reference()
        if reference is None:
            return None
        with torch.no_grad():
            logits = logits_of(reference, inputs, prefix)[-1]
        return float(logits[own] - logits[other])


class _Replay(LogitsProcessor):
    """Keeps the scores of each position, and lets nothing but the given token follow."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt
        self.scores: list[Tensor] = []  # (V,) in float32 per position

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores[0].float())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[self._prompt + len(self.scores) - 1]] = 0.0
        return forced


def first_difference(plain: Tensor, other: Tensor) -> int | None:
    """Where two sequences (n,) and (m,) part; the end of the shorter one where it is the other's beginning; None: they are equal."""
    shared = min(len(plain), len(other))
    parted = (plain[:shared] != other[:shared]).nonzero()
    if len(parted):
        return int(parted[0])
    return None if len(plain) == len(other) else shared


def _largest(one: Tensor, other: Tensor) -> float:
    """Largest difference; logits that are equal do not differ, infinite ones neither."""
    return float(torch.where(one == other, 0.0, (one - other).abs()).max())


def float32_copy(target: PreTrainedModel, free_bytes: int | None) -> PreTrainedModel | None:
    """The target in float32; None: it is in float32 already or quantized, or its copy could take more than half of the free memory.

    Args:
        free_bytes: on the target's device; None: not known.
    """
    weights = list(target.parameters())
    plain = all(type(p) is torch.nn.Parameter and p.is_floating_point() for p in weights)
    if not plain or all(p.dtype == torch.float32 for p in weights):
        return None
    if free_bytes is None or 4 * sum(p.numel() for p in weights) > free_bytes / 2:
        return None
    return copy.deepcopy(target).float()
