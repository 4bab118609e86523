"""A draft with another tokenizer, or with random weights, is said once; a right one on an unknown domain never is."""

from __future__ import annotations

import warnings

import pytest
import torch

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, prompts
from tests.conftest import tiny_llama


def serve(target, draft: OnlineDraft, prompt: torch.Tensor, new: int = 24) -> list[str]:
    """The warnings of one request, which says what plain decoding says."""
    plain = target.generate(prompt, do_sample=False, max_new_tokens=new)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=new)
    assert torch.equal(plain, found)
    return [str(warning.message) for warning in caught]


def random_prompt(seed: int, vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (1, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [{"update_every": 1}, {}], ids=["always", "auto"])
def test_a_draft_that_does_not_fit_is_said_once(settings: dict[str, object]) -> None:
    target = tiny_llama(1, vocab=512)
    draft = OnlineDraft(
        tiny_llama(2, vocab=512), OnlineSpecConfig(memory_tokens=0, recycle=False, lookahead=3, **settings)
    )
    heard = [message for seed in range(9) for message in serve(target, draft, random_prompt(seed, 512))]
    assert len(heard) == 1, heard
    assert "agrees with the target at" in heard[0] and "another tokenizer" in heard[0]
    if not settings:
        assert draft.metrics.decisions.budget_fraction == 1 / 16, "learning goes on costing"


def test_an_unknown_domain_is_no_misfit(pair) -> None:
    """The embedded draft has not seen it, and begins at 2 to 4 % of the tokens."""
    settings = OnlineSpecConfig(seed=0, update_every=1, lookahead=4, memory_tokens=0, recycle=False)
    draft = OnlineDraft(load_draft(), settings)
    for text in prompts("sql")[:6]:
        tokens = pair.tokenizer(text, return_tensors="pt").input_ids
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair.target.generate(tokens, assistant_model=draft, do_sample=False, max_new_tokens=32, pad_token_id=0)
    assert draft.metrics.verified_positions > 96 and draft.metrics.acceptance_length > 1.1
