"""A draft that does not pay beside guesses is left alone for whole requests: nothing is read for it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.rounds import Proposal
from tests.heads.tiny import tiny_head
from tests.tiny_models import tiny_llama

PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6]])
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=24)


class Unpaid(Governor):
    """Leaves the draft alone in every request but the third."""

    requests = 0

    def takes_part(self) -> bool:
        self.requests += 1
        return self.requests == 3


@pytest.fixture
def target() -> PreTrainedModel:
    return tiny_llama(1, vocab=24, layers=3, initializer_range=0.3)


@pytest.fixture
def asked(target: PreTrainedModel) -> list[bool]:
    """Of every forward of the target: whether its hidden states were asked for."""
    found: list[bool] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found.append(bool(kwargs.get("output_hidden_states")))

    target.register_forward_pre_hook(note, with_kwargs=True)
    return found


def served(target: PreTrainedModel, draft: OnlineDraft, asked: list[bool]) -> tuple[bool, int]:
    """Whether hidden states were asked for in one request, in all of its rounds or in none; and updates of it."""
    plain = target.generate(PROMPT, **CALL)
    asked.clear()
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **CALL), plain)
    counted = asked[-draft.metrics.last.rounds :]  # those before belong to the trial of a new target
    assert len(set(counted)) == 1
    return counted[0], draft.metrics.last.updates


def test_a_head_that_is_left_alone_and_learns_nothing_reads_no_hidden_states(
    target: PreTrainedModel, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Unpaid)
    draft = OnlineDraft(tiny_head("EAGLE-3", target), memory_tokens=64)
    draft.governor.budget.spent(1e6, 1)  # a step takes long: none is affordable
    draft.governor.budget.spent(1e6, 1)
    assert [served(target, draft, asked) for _ in range(4)] == [(False, 0), (False, 0), (True, 0), (False, 0)]
    assert "left alone" in draft.metrics.decisions.learning
    assert draft.metrics.failed_drafts == draft.metrics.failed_updates == 0


def test_a_head_that_is_left_alone_still_learns_where_there_is_time(
    target: PreTrainedModel, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Unpaid)
    draft = OnlineDraft(tiny_head("EAGLE-3", target), memory_tokens=64)
    reads, updates = served(target, draft, asked)  # the price of a step is not known yet
    assert reads and updates
    assert not draft.metrics.last.candidates.by_source().get("model")


def test_a_number_of_tokens_that_was_asked_for_is_drafted_whatever_it_pays(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Unpaid)
    draft = OnlineDraft(tiny_llama(2, vocab=24), lookahead=3, memory_tokens=0)
    target.generate(PROMPT, assistant_model=draft, **CALL)
    assert draft.metrics.last.candidates.by_source()["model"]["verified"]


def test_a_draft_model_that_never_helps_is_left_alone_in_time(target: PreTrainedModel) -> None:
    """The governor is told that a step of the draft takes as long as one of the target's, and that nothing is kept."""
    draft = OnlineDraft(tiny_llama(2, vocab=24), memory_tokens=64)
    for _ in range(100):
        draft.governor.observe((), (), 0.0, 1.0)
        draft.governor.observe_draft(gained=0, own=1, candidates=1, draft_s=1.0)
    target.generate(PROMPT, assistant_model=draft, **CALL)
    assert draft.metrics.decisions.drafting.startswith("guesses alone: the draft model saves")
    assert not draft.metrics.last.candidates.by_source().get("model")


@pytest.mark.failures
def test_a_round_is_weighed_once_where_proposing_fails_afterwards(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed: list[int] = []
    monkeypatch.setattr(Governor, "observe_draft", lambda self, gained, *args: weighed.append(gained))
    draft = OnlineDraft(tiny_llama(2, vocab=24), memory_tokens=64)
    monkeypatch.setattr(Proposal, "check", fails_from_the_fourth_round())
    plain = target.generate(PROMPT, **CALL)
    assert torch.equal(target.generate(PROMPT, assistant_model=draft, **CALL), plain)
    assert draft.metrics.last.rounds > 10 and len(weighed) <= 4


def fails_from_the_fourth_round() -> Callable[..., None]:
    rounds = iter(range(100))

    def check(self: Proposal, *args: Any) -> None:
        if next(rounds) >= 3:
            raise RuntimeError("for a test")

    return check


def test_what_cannot_be_scored_is_not_asked_for() -> None:
    governor = Governor(0.1, 2)
    assert governor.request_ended(40) and not Governor(0.1, 2).request_ended(40, can_score=False)
