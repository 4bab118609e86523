"""Learning from several rows of a call: one gradient step for all of them, and each is weighed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec.adapt.guard import Guard
from hf_onlinespec.adapt.learner import Learner
from hf_onlinespec.govern.budget import LearningBudget
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.metrics import Counts
from tests.drafts import flat_params
from tests.heads.tiny import tiny_head
from tests.tiny_models import tiny_llama

FIXED: dict[str, Any] = {"lookahead": 3, "update_every": 1, "rank": 2, "alpha": 2.0, "replay_passes": 0}
CALL: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    tokens = torch.tensor([[0, 0, 0, 3, 9, 4], [5, 8, 2, 7, 1, 6], [0, 0, 0, 0, 11, 12]])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


@pytest.mark.parametrize("kind", ["model", "EAGLE-3", "ensemble"])
def test_the_step_of_a_call_is_the_step_on_its_rows_together(kind: str, target, rows) -> None:
    """Rows of different lengths, one of which ends early: what is learned is the mean over all of their tokens."""
    settings = FIXED | ({"learner": "ensemble", "rank": 4} if kind == "ensemble" else {})

    def fresh() -> OnlineDraft:
        if kind != "EAGLE-3":
            return OnlineDraft(tiny_llama(2), **settings)
        head = tiny_head(kind, target)
        head.share(target)
        return OnlineDraft(head, **settings)

    with torch.no_grad():
        ends = target.generate(**rows, **CALL)[0, 10:11].tolist()
    draft, other = fresh(), fresh()
    before = flat_params(draft)
    target.generate(**rows, assistant_model=draft, eos_token_id=ends, **CALL)
    assert draft.metrics.updates == 1
    requests = draft.learning.replayed()
    assert len(requests) == 3 and len({len(one.teacher) for one in requests}) > 1
    other.learning.learn(requests, Counts())
    assert torch.allclose(flat_params(draft), flat_params(other), atol=1e-6)
    assert (flat_params(draft) - before).abs().max() > 1e-4


def test_rounds_of_one_row_wait_for_each_other_whatever_other_rows_do(target, rows, monkeypatch) -> None:
    """Learning at every round, segments of the rows take turns: the guard is shown whole requests."""
    shown = list[int]()
    observe = Guard.observe

    def noted(self: Guard, learned: Sequence[float], *args: Any) -> Tensor | None:
        shown.append(len(learned))
        return observe(self, learned, *args)

    monkeypatch.setattr(Guard, "observe", noted)
    draft = OnlineDraft(tiny_llama(2), **FIXED, update_when="round")
    target.generate(**rows, assistant_model=draft, **CALL)
    assert draft.metrics.updates > 3 and shown == [12, 12, 12]
    alone = OnlineDraft(tiny_llama(2), **FIXED, update_when="round")
    target.generate(rows["input_ids"][1:2], assistant_model=alone, **CALL)
    assert shown[3:] == [12]


def test_the_governor_is_told_of_each_row(target, rows, monkeypatch) -> None:
    told = list[tuple[int, bool]]()

    def noted(self: Governor, learned: Sequence[float], base: Sequence[float] | None, *args: Any) -> None:
        told.append((len(learned), base is not None and len(base) == len(learned)))

    monkeypatch.setattr(Governor, "observe_comparison", noted)
    monkeypatch.setattr(LearningBudget, "affordable_steps", lambda self: 1)
    draft = OnlineDraft(tiny_llama(2), rank=2, alpha=2.0)
    for calls in (1, 2):
        target.generate(**rows, assistant_model=draft, **CALL)
        assert len(told) == 3 * calls and {n for n, _ in told} == {12} and draft.metrics.updates == calls
    assert all(compared for _, compared in told[3:])  # the base draft is looked at once anything was learned


def test_a_row_whose_target_says_nan_keeps_no_other_from_learning(target, rows, monkeypatch) -> None:
    record = Learner.rows
    learned = list[int]()

    def noted(self: Learner, segments: Any, batch: Any, *args: Any) -> Any:
        learned.append(len(segments))
        return record(self, segments, batch, *args)

    monkeypatch.setattr(Learner, "rows", noted)
    draft = OnlineDraft(tiny_llama(2), **FIXED)
    schedule_copied = "hf_onlinespec.adapt.schedule.LearningSchedule.copied"

    def copied(self: Any, logits: Tensor) -> Tensor:
        own = logits.clone()
        own[0] = torch.nan
        return own

    monkeypatch.setattr(schedule_copied, copied)
    target.generate(**rows, assistant_model=draft, **CALL)
    assert learned == [2] and draft.metrics.updates == 1 and draft.metrics.skipped_updates == 1


def test_rows_that_are_not_learned_are_scored_together_as_each_alone(target, rows, monkeypatch) -> None:
    told = list[tuple[list[float], list[float]]]()

    def noted(self: Governor, learned: list[float], base: list[float], *args: Any) -> None:
        told.append((learned, base))

    monkeypatch.setattr(Governor, "observe_comparison", noted)
    monkeypatch.setattr(LearningBudget, "affordable_steps", lambda self: 0)
    monkeypatch.setattr(Governor, "request_ended", lambda self, *args, **kwargs: True)
    with torch.no_grad():
        call = CALL | {"eos_token_id": target.generate(**rows, **CALL)[0, 10:11].tolist()}  # rows of different lengths
    draft = OnlineDraft(target, rank=2, alpha=2.0)  # it agrees with itself alone: at other tokens it does not
    target.generate(**rows, assistant_model=draft, **call)
    together, told = told, list[tuple[list[float], list[float]]]()
    for tokens, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        target.generate(tokens[mask.bool()][None], assistant_model=draft, **call)
    assert len(together) == len(told) == 3 and not draft.metrics.updates
    assert together == told and len({len(own) for own, _ in told}) > 1
    assert all(set(own) == {1.0} for own, _ in told)
