"""Whatever a proposer of another kind does, the answer is the target's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_onlinespec import MemoryDraft, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.rounds import Proposal
from tests.conftest import tiny_llama
from tests.fakes import PlainDraft, ScriptedProposer

Change = Callable[[Proposal], Any]


def raises(*_: Any) -> Any:
    raise RuntimeError("on purpose")


PROPOSALS: dict[str, Change] = {
    "none": lambda proposal: None,
    "no source": lambda proposal: replace(proposal, sources=((),)),
    "a source too many": lambda proposal: replace(proposal, sources=(proposal.sources[0] * 2,)),
    "more rows": lambda proposal: replace(proposal, sources=proposal.sources * 2),
    "an id out of range": lambda proposal: replace(proposal, tokens=proposal.tokens + 40),
    "a parent that comes later": lambda proposal: replace(proposal, parents=((1, -1, 1, 2),)),
    "a parent too few": lambda proposal: replace(proposal, parents=((-1, 0, 1),)),
    "a parent below the row": lambda proposal: replace(proposal, parents=((-2, 0, 1, 2),)),
    "drawn ones that q does not know": lambda proposal: replace(proposal, q=torch.ones(1, 1, 32) / 32, drawn=((0, 1),)),
    "drawn ones that are none": lambda proposal: replace(proposal, q=torch.ones(1, 1, 32) / 32, drawn=((4,),)),
    "a negative id": lambda proposal: replace(proposal, tokens=proposal.tokens - 40),
    "it raises": raises,
}


@pytest.mark.failures
@pytest.mark.parametrize("wrong", PROPOSALS)
def test_a_proposal_that_cannot_be_verified_is_left_out(target, prompt, monkeypatch, wrong: str) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=12)
    draft, right = PlainDraft(ScriptedProposer(plain)), ScriptedProposer.propose
    monkeypatch.setattr(ScriptedProposer, "propose", lambda *given: PROPOSALS[wrong](right(*given)))
    assert torch.equal(target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    assert draft.metrics.failed_drafts == 1 and draft.metrics.drafted_tokens == 0
    assert "failed (" in draft.metrics.decisions.drafting


SHAPES: dict[str, tuple[tuple[int, int], ...] | None] = {"a chain": None, "a tree": ((-1, 5), (-1, 0), (1, 3), (1, 0))}


@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_without_q_are_guesses_that_change_no_sample(target, prompt, shape: str) -> None:
    """The target draws each token from its own law: with the same random numbers it says the same, whatever was guessed."""
    accepted, said = [], torch.full((1, 18), 31)
    for _ in range(2):  # guesses that are wrong, then its own words
        draft = PlainDraft(ScriptedProposer(said, SHAPES[shape]))
        torch.manual_seed(4)
        found = target.generate(prompt, do_sample=True, max_new_tokens=12, assistant_model=draft)
        assert draft.metrics.failed_drafts == 0 and draft.metrics.new_tokens == 12
        accepted.append(draft.metrics.accepted_tokens)
        told, said = said, found
    assert torch.equal(said, told) and accepted[0] < 4 and accepted[1] >= 6


@pytest.mark.failures
@pytest.mark.parametrize("method", ["observe", "finish", "reset", "proposer"])
def test_a_proposer_that_raises_costs_no_answer_and_is_left_out_for_a_while(
    target, prompt, monkeypatch, method
) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=12)
    draft = PlainDraft(ScriptedProposer(plain))
    tried: list[int] = []

    def fails(*_: Any) -> Any:
        tried.append(draft.metrics.requests)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(PlainDraft if method == "proposer" else ScriptedProposer, method, fails)
    if method == "reset":
        monkeypatch.setattr(ScriptedProposer, "propose", raises)
    for _ in range(6):
        assert torch.equal(target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    assert tried and 0 < draft.metrics.failed_drafts <= 6 and draft.failures.proposing.failing


def test_a_memory_draft_is_a_draft_like_any_other(target, prompt) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=12)
    draft = MemoryDraft(OnlineSpecConfig(lookahead=4))
    for _ in range(2):
        assert torch.equal(target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    assert draft.metrics.last.rounds < 8


def test_the_memory_holds_what_the_target_wrote_where_the_draft_reads_other_tokens() -> None:
    """A target with more tokens than the draft, which learns at every round: the memory keeps the target's own."""
    target, prompt = tiny_llama(1, vocab=48, layers=2), torch.tensor([[3, 40, 15, 9, 45, 6]])
    config = OnlineSpecConfig(rank=4, alpha=4.0, update_when="round", update_budget=1.0, lookahead=2)
    draft = OnlineDraft(tiny_llama(2, vocab=32), config)
    assert draft.memory is not None
    written: list[list[int]] = []
    for start in range(6):
        asked = (prompt + start) % 48
        written.append(target.generate(asked, do_sample=False, max_new_tokens=30, assistant_model=draft)[0].tolist())
    assert draft.metrics.updates > 0 and any(token >= 32 for text in written for token in text[6:])
    for text in written:
        found = [draft.memory.continuation(text[: i + 1]) for i in range(8, len(text) - 1)]
        right = [one is not None and text[i + 9] in one.tokens for i, one in enumerate(found)]
        assert all(right), "what was remembered is what was written"
