"""The public version of a draft: what is left out of its lineage."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.share.canaries import as_feedback, learn
from hf_onlinespec.share.card import model_card
from hf_onlinespec.share.lineage import Parent
from hf_onlinespec.share.public import public_version
from hf_onlinespec.training.combining import combine
from tests.conftest import tiny_llama

CONFIG = OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0, rank=4, alpha=4.0, replay_passes=0)


def test_statements_of_what_it_was_made_from_stay_behind() -> None:
    """They were made for the pushes of those, to those repositories; its own statement goes along."""
    parts = []
    for n in range(2):
        draft = OnlineDraft(tiny_llama(2), CONFIG)
        learn(draft, [as_feedback(torch.arange(12) + n, 4)])
        draft.lineage.data_statement = f"letters of customer {n}"
        draft.lineage.parent = Parent(f"me/letters-{n}", "0" * 40)
        parts.append(draft.artifact())
    inner = combine(parts, tiny_llama(2))
    inner.lineage.data_statement = "letters of both customers"
    outer = combine([inner.artifact()], tiny_llama(2))
    artifact = outer.artifact()
    artifact = replace(artifact, lineage=replace(artifact.lineage, data_statement="letters that are public"))
    public = public_version(artifact)
    assert public.lineage.data_statement == "letters that are public"
    assert public.lineage.merged[0].merged, "what it was made of is still told"
    for told in (str(public.lineage), model_card(public)):
        assert "letters that are public" in told
        assert "customer" not in told and "me/letters" not in told
    assert "customer" in str(artifact.lineage), "the private one keeps them"
