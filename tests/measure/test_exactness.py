"""Outputs that differ from plain's: within the precision's rounding, or by a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

from hf_onlinespec.measure.exactness import (
    FAULT,
    ROUNDING,
    Examiner,
    first_difference,
    float32_copy,
)
from tests.tiny_models import tiny_llama

BEST, SECOND, THIRD = 7, 11, 13  # tokens
N = 20  # new tokens
INPUTS = BatchEncoding({"input_ids": torch.tensor([[3, 14, 15]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)})


def near_tie(gap: float, shift: float) -> PreTrainedModel:
    """A target whose best token leads the second one by `gap`; a forward over several positions moves that by `shift`."""
    model = tiny_llama(1)

    def rewrite(module: Any, args: Any, output: Any) -> None:
        logits = output.logits
        logits.zero_()
        logits[..., BEST] = 40.0
        logits[..., SECOND] = 40.0 - gap + (shift if logits.shape[1] > 1 else 0.0)
        logits[..., THIRD] = 20.0

    model.register_forward_hook(rewrite)
    return model


def sequence(*new: int) -> Tensor:
    return torch.cat([INPUTS["input_ids"], torch.tensor([new])], dim=1)


PLAIN = sequence(*[BEST] * N)


@pytest.mark.parametrize(
    ("gap", "shift", "kind"),
    [(0.0, 0.0, ROUNDING), (0.25, 0.25, ROUNDING), (0.5, 0.25, ROUNDING), (0.625, 0.25, FAULT), (0.125, 0.0, FAULT)],
)
def test_a_gap_of_at_most_twice_the_rounding_is_rounding(gap: float, shift: float, kind: str) -> None:
    target = near_tie(gap, shift)
    assert torch.equal(target.generate(**INPUTS, do_sample=False, max_new_tokens=N), PLAIN)
    other = sequence(*[BEST] * 5, SECOND, *[BEST] * (N - 6))
    found = Examiner(target).differences(INPUTS, PLAIN, {"ours": other, "same": PLAIN.clone()})
    assert found["same"] is None
    difference = found["ours"]
    assert difference is not None
    assert (difference.position, difference.gap, difference.rounding) == (5, gap, shift)
    assert difference.kind == kind and difference.gap_float32 is None


def test_a_token_that_is_not_near_the_best_is_a_fault_even_where_the_two_best_tie() -> None:
    found = Examiner(near_tie(0.0, 0.25)).differences(INPUTS, PLAIN, {"ours": sequence(BEST, THIRD)})["ours"]
    assert found is not None and found.gap == 20.0 and found.kind == FAULT


@pytest.mark.parametrize("length", [0, 3, N + 2])
def test_an_output_that_stops_elsewhere_is_a_fault(length: int) -> None:
    found = Examiner(near_tie(0.0, 0.25)).differences(INPUTS, PLAIN, {"ours": sequence(*[BEST] * length)})["ours"]
    assert found is not None and found.position == min(length, N)
    assert found.gap == float("inf") and found.kind == FAULT


def test_a_token_that_generation_forbids_is_a_fault() -> None:
    target = near_tie(0.0, 0.25)
    target.generation_config.suppress_tokens = [SECOND]
    found = Examiner(target).differences(INPUTS, PLAIN, {"ours": sequence(BEST, SECOND)})["ours"]
    assert found is not None and found.gap == float("inf") and found.kind == FAULT


def test_several_outputs_are_judged_by_the_same_rounding_each_at_its_own_place() -> None:
    others = {"early": sequence(SECOND), "late": sequence(*[BEST] * (N - 1), SECOND)}
    found = Examiner(near_tie(0.5, 0.25)).differences(INPUTS, PLAIN, others)
    places = {name: (d.position, d.gap, d.rounding) for name, d in found.items() if d is not None}
    assert places == {"early": (0, 0.5, 0.25), "late": (N - 1, 0.5, 0.25)}


def test_an_answer_of_one_token_has_its_rounding_measured_too() -> None:
    others = {"ours": sequence(SECOND)}
    found = Examiner(near_tie(0.25, 0.25)).differences(INPUTS, sequence(BEST), others)["ours"]
    assert found is not None and (found.position, found.gap, found.rounding, found.kind) == (0, 0.25, 0.25, ROUNDING)


def test_the_gap_in_float32_is_of_the_same_two_tokens_and_the_copy_is_made_once() -> None:
    made = []

    def reference() -> PreTrainedModel:
        made.append(near_tie(-0.125, 0.0))  # there the second token is the better one
        return made[-1]

    examiner = Examiner(near_tie(0.0, 0.25), reference)
    assert examiner.differences(INPUTS, PLAIN, {"ours": PLAIN}) == {"ours": None} and not made
    for position in (1, 2):
        other = sequence(*[BEST] * position, SECOND)
        found = examiner.differences(INPUTS, PLAIN, {"ours": other})["ours"]
        assert found is not None and found.gap_float32 == -0.125
    assert len(made) == 1


def test_real_rounding_is_seen_in_half_precision() -> None:
    target = tiny_llama(3, hidden=64).to(torch.bfloat16)
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=24, return_dict_in_generate=True, output_logits=True)
    out = target.generate(**INPUTS, **call)
    plain = out.sequences
    if torch.equal(torch.cat(out.logits), target(plain[:, :-1]).logits[0, 2:].float()):
        pytest.skip(f"in torch {torch.__version__} a forward over several positions rounds as forwards over one do")
    other = plain.clone()
    other[0, 20] = (other[0, 20] + 1) % 32
    found = Examiner(target).differences(INPUTS, plain, {"ours": other})["ours"]
    assert found is not None and 0 < found.rounding < 1


def test_where_two_sequences_part() -> None:
    one = torch.tensor([1, 2, 3])
    assert first_difference(one, one.clone()) is None
    assert first_difference(one, torch.tensor([1, 9, 3])) == 1
    assert first_difference(one, one[:2]) == 2 == first_difference(one[:2], one)
    assert first_difference(one, one[:0]) == 0


def test_the_float32_copy_is_made_where_it_fits() -> None:
    target = tiny_llama(1).to(torch.bfloat16)
    size = 4 * sum(p.numel() for p in target.parameters())
    copied = float32_copy(target, 2 * size)
    assert copied is not None and copied.dtype == torch.float32 and target.dtype == torch.bfloat16
    assert float32_copy(target, 2 * size - 1) is None and float32_copy(target, None) is None
    assert float32_copy(tiny_llama(1), 10**12) is None  # it is in float32 already
