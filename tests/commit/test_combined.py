"""Drafting on a cropped cache gives what a fresh forward gives; the same object serves transformers' own loop."""

from dataclasses import replace
from types import MethodType

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import AssistedCandidateGenerator

from hf_onlinespec import OnlineCandidateGenerator, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.base import Call
from hf_onlinespec.commit.request import Request
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params


def fixed(lookahead: int, **settings: object) -> OnlineSpecConfig:
    """The neural draft alone, at a fixed lookahead."""
    return OnlineSpecConfig(
        **({"lookahead": lookahead, "update_every": 1, "memory_tokens": 0, "recycle": False} | settings)
    )


class Drafting:
    """A draft in one call, of one row."""

    def __init__(self, draft: OnlineDraft, *, learn: bool = False, **settings: object) -> None:
        config = draft.generation_config.__class__(**({"do_sample": False, "max_length": 64} | settings))
        self.request = Request(draft, Call(config, LogitsProcessorList(), learns=learn))

    def propose(self, tokens: torch.Tensor, room: int) -> Proposal:
        return self.request.propose(Rows.of(tokens), room)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_proposals_after_rejections_equal_fresh_ones(make) -> None:
    """Whatever was accepted before, the draft proposes its own greedy continuation of the prefix."""
    model = make(2)
    candidates = Drafting(OnlineDraft(model, fixed(4)))
    prefix = torch.tensor([[1, 2, 3]])
    for kept in (0, 4, 2, 1, 3, 0):
        with torch.no_grad():
            proposal = candidates.propose(prefix, 4)
        expected = model.generate(prefix, max_new_tokens=4, do_sample=False)[:, prefix.shape[1] :]
        assert torch.equal(proposal.tokens, expected)
        own = torch.tensor([[(int(expected[0, min(kept, 3)]) + 1) % 32]])  # the target disagrees here
        prefix = torch.cat([prefix, proposal.tokens[:, :kept], own], dim=-1)


@torch.no_grad()
def test_rejected_tokens_leave_nothing_behind_in_silent_rounds(draft_model: PreTrainedModel) -> None:
    """A round that is rejected, two rounds in which nothing is drafted, and the draft's next words are those of a fresh one."""
    candidates = Drafting(OnlineDraft(draft_model, fixed(6)))
    prefix = torch.tensor([[1, 2, 3]])
    first = candidates.propose(prefix, 6).tokens
    for i in range(3):
        prefix = torch.cat([prefix, (first[:, i : i + 1] + 1) % 32], dim=-1)
        if i < 2:
            assert candidates.propose(prefix, 0).tokens.shape == (1, 0)
    proposal = candidates.propose(prefix, 6)
    expected = draft_model.generate(prefix, max_new_tokens=6, do_sample=False)[:, prefix.shape[1] :]
    assert torch.equal(proposal.tokens, expected)
    tokens = torch.cat([prefix, proposal.tokens[:, :5]], dim=-1)
    again = candidates.propose(torch.cat([tokens, tokens[:, :1]], dim=-1), 6)  # from a cache that holds all of them
    fresh = Drafting(OnlineDraft(draft_model, fixed(6))).propose(torch.cat([tokens, tokens[:, :1]], dim=-1), 6)
    assert torch.equal(again.tokens, fresh.tokens)


@torch.no_grad()
def test_sampled_law_is_the_draft_s_own(draft_model: PreTrainedModel) -> None:
    prefix = torch.tensor([[1, 2, 3]])
    proposal = Drafting(OnlineDraft(draft_model, fixed(3)), do_sample=True).propose(prefix, 9)
    logits = draft_model(torch.cat([prefix, proposal.tokens], dim=-1)).logits
    torch.testing.assert_close(proposal.q[0], logits[0, 2:5].softmax(-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_stops_after_an_end_of_sequence(draft_model: PreTrainedModel) -> None:
    prefix = torch.tensor([[1, 2, 3]])
    full = Drafting(OnlineDraft(draft_model, fixed(5))).propose(prefix, 9).tokens[0].tolist()
    stopped = Drafting(OnlineDraft(draft_model, fixed(5)), eos_token_id=full[1]).propose(prefix, 9).tokens[0].tolist()
    assert stopped == full[: full.index(full[1]) + 1]


@torch.no_grad()
def test_never_drafts_beyond_its_own_positions() -> None:
    """GPT-2 has a table of 64 positions and fails beyond it; the draft then simply stays silent."""
    candidates = Drafting(OnlineDraft(tiny_gpt2(2), fixed(5)))
    assert candidates.propose(torch.ones(1, 62, dtype=torch.long), 5).tokens.shape == (1, 2)
    assert candidates.propose(torch.ones(1, 66, dtype=torch.long), 5).tokens.shape == (1, 0)


@torch.no_grad()
def test_a_draft_that_lost_its_mind_proposes_nothing(draft_model: PreTrainedModel) -> None:
    draft = OnlineDraft(draft_model, fixed(4))
    draft.trainable.adapter.move(torch.full_like(draft.trainable.adapter.params, torch.nan))
    draft.learning.learner.experts.steps = 1
    assert Drafting(draft, do_sample=True).propose(torch.tensor([[1, 2]]), 4).tokens.shape == (1, 0)


@pytest.mark.parametrize("when", ["round", "request"])
@pytest.mark.parametrize("sample", [False, True])
def test_inside_transformers_own_loop(
    target: PreTrainedModel, draft_model: PreTrainedModel, sample: bool, when: str
) -> None:
    """Greedy output is plain greedy output, and the draft learns from every round."""
    draft = OnlineDraft(draft_model, fixed(5, update_when=when, rank=4, alpha=4.0))
    made: list[OnlineCandidateGenerator] = []

    def ours(self: PreTrainedModel, **kwargs) -> OnlineCandidateGenerator:
        made.append(OnlineCandidateGenerator(draft, kwargs["generation_config"], kwargs["logits_processor"]))
        return made[-1]

    target._get_candidate_generator = MethodType(ours, target)
    prompt = torch.tensor([[3, 14, 15, 9]])
    before = flat_params(draft)
    out = target.generate(prompt, assistant_model=draft_model, do_sample=sample, max_new_tokens=30)
    assert isinstance(made[0], OnlineCandidateGenerator) and not isinstance(made[0], AssistedCandidateGenerator)
    assert out.shape == (1, 34) and not torch.equal(flat_params(draft), before)
    if not sample:
        assert torch.equal(out, target.generate(prompt, do_sample=False, max_new_tokens=30))
    with torch.inference_mode():
        target.generate(prompt, assistant_model=draft_model, do_sample=sample, max_new_tokens=10)
    made[0].finish()
    assert [len(feedback.teacher) for feedback in draft.learning.replayed()] == [
        30
    ]  # one row per emitted token, none from behind a rejection


@torch.no_grad()
def test_q_is_the_law_that_was_drawn_from_whatever_the_default_type(draft_model: PreTrainedModel) -> None:
    prefix = torch.tensor([[1, 2, 3]])
    candidates = Drafting(OnlineDraft(draft_model, fixed(3)), do_sample=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        proposal = candidates.propose(prefix, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    logits = draft_model(torch.cat([prefix, proposal.tokens], dim=-1)).logits
    assert proposal.q is not None and proposal.q.dtype == torch.float32
    torch.testing.assert_close(proposal.q[0], logits[0, 2:5].softmax(-1), atol=1e-5, rtol=1e-4)


def test_the_memory_s_time_belongs_to_the_round(draft_model: PreTrainedModel, monkeypatch) -> None:
    draft = OnlineDraft(draft_model, fixed(3))
    candidates = Drafting(draft)
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(
        draft.governor, "observe_rows", lambda rows, draft_s, target_s: told.append((draft_s, target_s))
    )
    tokens = torch.tensor([[1, 2, 3]])
    for _ in range(2):  # the first one reads the prompt
        proposal = replace(candidates.propose(tokens, 4), model_s=0.2)
    verdict = Verdict(proposal, Rows.of(tokens), (0,), ((),), ((),), ((),), (False,), None, draft_s=0.5, target_s=1.0)
    for _ in range(2):  # the first round is not timed
        candidates.request.observe(verdict)
    assert told[-1] == (0.2, pytest.approx(1.3))
