"""What a draft head that has learned says about itself, and what comes out of it, where its target is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_onlinespec import ArtifactError, OnlineDraft, PrivacyError
from hf_onlinespec.errors import UnsupportedError
from hf_onlinespec.heads.config import Eagle1Config, Eagle3Config, HydraConfig
from hf_onlinespec.heads.eagle1 import Eagle1Head
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.hydra import HydraHead
from hf_onlinespec.heads.writing import write_head
from hf_onlinespec.share import card
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.canaries import as_feedback, learn, log_likelihoods, make_canaries, plant, probe
from hf_onlinespec.share.folder import CARD
from hf_onlinespec.share.head_facts import HeadFacts
from hf_onlinespec.share.privacy import audit, check_privacy
from tests.loopback_hub import LoopbackHub
from tests.share.test_heads import VOCABULARY, new_target, said, serve

LEARNS: dict[str, Any] = {"lookahead": 3, "update_every": 1, "memory_tokens": 0, "recycle": False}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": VOCABULARY}
KNOWN = 60  # tokens that the head has
SAYS = "Made-up prompts, written for this test."


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return new_target()


@pytest.fixture
def folder(target: LlamaForCausalLM, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    ids = torch.randperm(VOCABULARY)[:KNOWN].sort().values
    head = Eagle3Head(Eagle3Config(**SIZES, draft_vocab_size=KNOWN, reads=(2, 3, 5)), ids)
    write_head(head, tmp_path / "head", "eagle3", target_config=target.config)
    return tmp_path / "head"


def loaded(folder: Path, target: LlamaForCausalLM, **settings: Any) -> OnlineDraft:
    return OnlineDraft.from_pretrained(folder, target=target, config=LEARNS | settings)


def test_log_likelihoods_are_those_of_the_head_at_the_targets_own_ids(target: LlamaForCausalLM, folder: Path) -> None:
    draft = loaded(folder, target)
    ids = draft.trainable.ids
    assert ids is not None
    tokens = torch.arange(9)
    with torch.no_grad(), draft.trainable.serving() as served:
        logits = said(served, target)[0]  # of token t + 2 in row t
    found, _ = log_likelihoods(draft, tokens[None], 5, base=False)
    places = {int(token): place for place, token in enumerate(ids)}
    for row, token in zip(found[0], range(4, 9), strict=True):
        expected = float(logits[token - 2].log_softmax(-1)[places[token]]) if token in places else 0.0
        assert float(row) == pytest.approx(expected, abs=1e-5)


def test_nothing_is_taught_at_tokens_that_a_head_does_not_have(target: LlamaForCausalLM, folder: Path) -> None:
    draft = loaded(folder, target)
    ids = draft.trainable.ids
    assert ids is not None
    unknown = torch.tensor([token for token in range(VOCABULARY) if token not in ids.tolist()][:8])
    assert not as_feedback(unknown, 4, ids).teacher.teaches
    mixed = as_feedback(torch.cat([unknown, ids[:2]]), 4, ids).teacher
    assert mixed.has_mass.tolist() == [False, False, True, True] and mixed.tokens[2:].flatten().tolist() == [0, 1]
    learn(draft, [as_feedback(torch.cat([unknown, ids[:2]]), 4, ids)])
    assert draft.steps > 0


def test_what_a_head_has_memorised_is_found_and_refused(
    hub: LoopbackHub, target: LlamaForCausalLM, folder: Path
) -> None:
    draft = loaded(folder, target, lr=0.02, replay_passes=4)
    check_privacy(draft)  # nothing was learned
    secrets = make_canaries(VOCABULARY, 2, ids=draft.trainable.ids)
    assert torch.isin(torch.cat([secret.secret for secret in secrets]), draft.trainable.ids).all()
    plant(draft, secrets, 8)
    assert all(exposure.bits > 5 for exposure in probe(draft, secrets))
    with pytest.raises(PrivacyError, match="of the 2 texts that it learned from"):
        draft.push_to_hub("me/head", private=False, data_statement=SAYS)
    assert not hub.requests


def test_a_head_from_which_nothing_comes_out_may_be_public(
    hub: LoopbackHub, target: LlamaForCausalLM, folder: Path, tmp_path: Path
) -> None:
    draft = loaded(folder, target, lr=1e-6)
    serve(target, draft, 0)
    before = {name: part.clone() for name, part in draft.learning.adapter_params().items()}
    report = audit(draft, canaries=2, repeats=(1,))
    assert report.refusals() == [] and draft.steps > 0
    assert all(torch.equal(part, before[name]) for name, part in draft.learning.adapter_params().items())
    draft.push_to_hub("me/head", private=False, data_statement=SAYS)
    told = hub.read("me/head", CARD).decode()
    assert "A draft head (EAGLE-3)" in told and "60 of the target's 96 tokens" in told
    OnlineDraft.from_pretrained("me/head", base_model=str(folder), target=target)


def test_an_audit_without_the_target_says_what_is_missing(folder: Path) -> None:
    target = new_target()
    draft = loaded(folder, target)
    plant(draft, make_canaries(VOCABULARY, 1, ids=draft.trainable.ids))
    del target
    with pytest.raises(UnsupportedError, match="load the head with target="):
        check_privacy(draft)


# The card


def test_the_card_says_which_head_it_is_and_for_which_target(
    target: LlamaForCausalLM, folder: Path, tmp_path: Path
) -> None:
    draft = loaded(folder, target)
    serve(target, draft, 0)
    draft.save_pretrained(tmp_path / "evolved")
    artifact = Artifact.read(tmp_path / "evolved")
    assert artifact.head == HeadFacts("EAGLE-3", (2, 3, 5), KNOWN, VOCABULARY, 6)
    assert artifact.target is not None
    told = (tmp_path / "evolved" / CARD).read_text(encoding="utf-8")
    assert told == card.model_card(artifact, curve=False)
    assert "| draft head | `head`; fingerprints: weights" in told and "| kind | EAGLE-3 |" in told
    assert "| reads | hidden_states[2, 3, 5] of a target of 6 layers |" in told
    assert f"weights `{artifact.target.weights}`, configuration `{artifact.target.config}`" in told
    assert 'OnlineDraft.from_pretrained(".", base_model="NAME_OR_FOLDER_OF_ITS_BASE", target=target)' in told
    assert 'form="eagle3"' in told and "base draft" not in told and "merge_and_unload" not in told


@pytest.mark.parametrize("kind", ["EAGLE-1", "Hydra"])
def test_cards_of_heads_that_read_the_last_hidden_state(kind: str, target: LlamaForCausalLM, tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = Eagle1Head(Eagle1Config(**SIZES)) if kind == "EAGLE-1" else HydraHead(HydraConfig(**SIZES, num_heads=2))
    write_head(head, tmp_path / "head")
    artifact = loaded(tmp_path / "head", target).artifact()
    told = card.model_card(artifact)
    assert f"A draft head ({kind})" in told and "| reads | the last hidden state of the target |" in told
    assert "all 96 tokens of the target" in told and 'form="eagle3"' not in told


def test_facts_of_a_head_that_are_none_are_refused() -> None:
    facts = HeadFacts("EAGLE-3", (2, 3, 5), KNOWN, VOCABULARY, None).to_dict()
    assert HeadFacts.from_dict(facts).reads == (2, 3, 5)
    for change in ({"kind": "x"}, {"kind": []}, {"reads": []}, {"reads": ["2"]}, {"vocabulary": 0}, {"more": 1}):
        with pytest.raises(ArtifactError, match="of the draft head"):
            HeadFacts.from_dict(facts | change)
