"""Why the draft learns or does not is said from the first request on."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from tests.conftest import tiny_llama

AUTO = dict(lookahead=3, rank=4, replay_passes=1)


def after(target, prompt, draft, new_tokens=8, **kwargs) -> str:
    """What is said about learning after a request."""
    mask = torch.ones_like(prompt)
    target.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, **kwargs
    )
    said: str = draft.metrics.decisions.learning
    return said


def test_the_first_request_is_learned_from_and_says_so(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO))
    said = after(target, prompt, draft)
    assert said.startswith("the last request was learned from, in 2 gradient steps")
    assert draft.metrics.last.updates == 2


def test_a_budget_that_is_spent_says_what_steps_take_and_what_is_left(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO))
    draft.governor.budget.spent(100.0, 1)  # a gradient step takes 100 s: more than requests of this size ever earn
    said = after(target, prompt, draft)
    assert draft.metrics.updates == 0
    assert said.startswith(
        "the last request was not learned from: 2 gradient steps take 2e+02 s, and 0 s are left of the "
    )
    assert "of the decoding time that learning may take" in said


def test_numbers_learn_after_every_request(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO, update_every=1, learner="ogd"))
    for _ in range(2):
        assert after(target, prompt, draft).startswith("the last request was learned from, in 2 gradient steps")


def test_what_was_found_out_about_learning_stands_behind_it(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO))
    draft.governor.budget.reset_full("the stream has changed")
    after(target, prompt, draft)
    said = after(target, prompt, draft, onlinespec=False)
    assert said.startswith("the last request was only drafted for: onlinespec=False; ") and said.endswith(
        ": full budget"
    )


def test_a_prompt_beyond_what_the_draft_reads_says_so(target, prompt) -> None:
    draft = OnlineDraft(tiny_llama(2, max_position_embeddings=4), OnlineSpecConfig(**AUTO, update_every=1))
    assert "beyond the 4 tokens that the draft can read" in after(target, prompt, draft)


def test_learning_when_idle_says_what_waits(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO, update_every=1, update_when="idle"))
    assert after(target, prompt, draft).startswith(
        "learned when nothing is generated: 1 request waiting, 0 gradient steps"
    )
    assert draft.catch_up(60)
    assert ", 2 gradient steps taken so far" in after(target, prompt, draft)


def test_without_a_draft_model_there_is_nothing_to_learn(target, prompt) -> None:
    mask = torch.ones_like(prompt)
    target.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, onlinespec=True)
    assert online_memory(target).metrics.decisions.learning.startswith("there is no draft model")


@pytest.mark.failures
def test_a_failure_is_the_reason_while_it_lasts(target, draft_model, prompt, monkeypatch, caplog) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**AUTO, update_every=1))

    def fails(*arguments: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched, caplog.at_level(logging.CRITICAL, "hf_onlinespec"):
        patched.setattr(draft.learning, "learn_segment", fails)
        assert after(target, prompt, draft).startswith("Learning failed (OutOfMemoryError")
    assert after(target, prompt, draft).startswith("Learning failed (OutOfMemoryError")  # left out for a request
    said = after(target, prompt, draft)
    assert (
        said.startswith("the last request was learned from") and "; learning works again after: Learning failed" in said
    )
