"""A draft head is loaded for its target, saved, resumed and exported, and what it learned for one target is told from another's."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_onlinespec
from hf_onlinespec import OnlineDraft
from hf_onlinespec.embedded import EmbeddedPair
from hf_onlinespec.errors import ArtifactError, ConfigError, DraftError, UnsupportedError
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.config import Eagle3Config
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.heads.writing import write_head
from hf_onlinespec.models.identity import GROWN, PACKAGED, SMOLLM2_HEAD
from hf_onlinespec.share.card import model_card
from hf_onlinespec.share.folder import ADAPTER_CONFIG
from hf_onlinespec.share.public import public_version
from hf_onlinespec.training.warm_start import warm_start

LEARNS = {"lookahead": 3, "update_every": 1, "update_when": "round", "memory_tokens": 0, "replay_tokens": 0}
VOCABULARY = 96


def new_target(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes | changes)).eval()


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return new_target()


@pytest.fixture(scope="module")
def folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 head of the target in its original form."""
    torch.manual_seed(1)
    config = Eagle3Config(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        draft_vocab_size=60,
        reads=(2, 3, 5),
        max_position_embeddings=2048,
    )
    ids = torch.randperm(VOCABULARY)[:60].sort().values
    found = tmp_path_factory.mktemp("heads") / "head"
    write_head(Eagle3Head(config, ids), found, "eagle3", target_config=target.config)
    return found


@pytest.fixture
def packaged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same head in the place of the one that ships with the package."""
    place = tmp_path / "package" / "smollm2_head"
    shutil.copytree(folder, place)
    monkeypatch.setitem(PACKAGED, SMOLLM2_HEAD, place)
    return place


def serve(target: PreTrainedModel, draft: OnlineDraft, seed: int, requests: int = 2) -> None:
    torch.manual_seed(seed)
    for _ in range(requests):
        prompt = torch.randint(VOCABULARY, (1, 6))
        target.generate(prompt, do_sample=False, max_new_tokens=16, pad_token_id=0, assistant_model=draft)


def said(head: torch.nn.Module, target: PreTrainedModel) -> Tensor:
    """Logits of a head about a text of the target."""
    tokens = torch.arange(9)[None]
    states = target(tokens, output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in (2, 3, 5)], dim=-1)
    logits: Tensor = head(tokens=tokens[:, 1:], features=features[:, :-1]).logits
    return logits


def test_a_head_that_is_saved_and_loaded_goes_on_as_if_it_had_never_stopped(
    target: LlamaForCausalLM, folder: Path, tmp_path: Path
) -> None:
    draft = OnlineDraft.from_pretrained(folder, target=target, config=LEARNS)
    serve(target, draft, 0)
    draft.save_pretrained(tmp_path / "evolved")
    loaded = OnlineDraft.from_pretrained(tmp_path / "evolved", target=target)
    for one in (draft, loaded):
        serve(target, one, 1)
    mine, others = draft.state().part("adapter").tensors, loaded.state().part("adapter").tensors
    assert draft.steps == loaded.steps > 10
    assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("form", ["eagle3", "speculators"])
def test_an_export_is_an_ordinary_head_that_says_what_the_draft_says(
    target: LlamaForCausalLM, folder: Path, tmp_path: Path, form: str
) -> None:
    draft = OnlineDraft.from_pretrained(folder, target=target, config=LEARNS)
    serve(target, draft, 0)
    draft.merge_and_export(tmp_path / "exported", form=form)
    exported = read_head(tmp_path / "exported", target.config)
    exported.share(target)
    with torch.no_grad(), draft.trainable.serving() as served:
        assert torch.equal(said(exported, target), said(served, target))
    assert OnlineDraft.from_pretrained(tmp_path / "exported", target=target).steps == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers under an old name
def test_peft_loads_the_adapter_onto_the_head(target: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    draft = OnlineDraft.from_pretrained(folder, target=target, config=LEARNS)
    serve(target, draft, 0)
    draft.save_pretrained(tmp_path)
    head: Head = read_head(folder, target.config)
    head.share(target)
    with torch.no_grad(), draft.trainable.serving() as served:
        before, expected = said(head, target), said(served, target)
        found = said(PeftModel.from_pretrained(head, tmp_path).eval(), target)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_needs_its_target(target: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DraftError, match=r"is a draft head.*target=target"):
        OnlineDraft.from_pretrained(folder)
    OnlineDraft.from_pretrained(folder, target=target).save_pretrained(tmp_path)
    with pytest.raises(DraftError, match=r"is a draft head.*target=target"):
        OnlineDraft.from_pretrained(tmp_path)


def test_another_target_is_refused_and_other_weights_of_the_same_one_are_told(
    target: LlamaForCausalLM, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    OnlineDraft.from_pretrained(folder, target=target).save_pretrained(tmp_path)
    other = new_target(num_attention_heads=4)
    with pytest.raises(ArtifactError, match="trained for another target"):
        OnlineDraft.from_pretrained(tmp_path, target=other)
    assert OnlineDraft.from_pretrained(tmp_path, target=other, force=True).steps == 0
    with caplog.at_level(logging.WARNING):
        OnlineDraft.from_pretrained(tmp_path, target=target)
        assert not caplog.records
        OnlineDraft.from_pretrained(tmp_path, target=new_target(seed=5))
    assert "this target has other weights" in caplog.text


def test_a_head_is_attached_by_name(folder: Path) -> None:
    target, plain = new_target(), new_target()
    draft = hf_onlinespec.attach(target, str(folder), lookahead=3)
    prompt = torch.arange(8)[None]
    found = target.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert torch.equal(found, plain.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0))
    assert draft.metrics.requests == 1 and draft.metrics.drafted_tokens > 0


def test_what_the_head_of_the_package_learned_comes_back_by_its_name_on_another_machine(
    target: LlamaForCausalLM, packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = OnlineDraft.from_pretrained(SMOLLM2_HEAD, target=target, config=LEARNS)
    serve(target, draft, 0)
    saved = tmp_path / "evolved"
    draft.save_pretrained(saved)
    assert json.loads((saved / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == SMOLLM2_HEAD
    assert not any(str(packaged.parent).encode() in file.read_bytes() for file in saved.iterdir())
    elsewhere = packaged.rename(tmp_path / "another_place")
    monkeypatch.setitem(PACKAGED, SMOLLM2_HEAD, elsewhere)
    loaded = OnlineDraft.from_pretrained(saved, target=target)
    mine, others = draft.state().part("adapter").tensors, loaded.state().part("adapter").tensors
    assert loaded.steps == draft.steps > 0 and all(torch.equal(mine[name], others[name]) for name in mine)


def test_the_head_of_the_package_has_its_name_where_its_folder_was_given_too(
    target: LlamaForCausalLM, packaged: Path
) -> None:
    assert OnlineDraft.from_pretrained(packaged, target=target).identity.name == SMOLLM2_HEAD


@pytest.mark.parametrize("name", [SMOLLM2_HEAD, GROWN])
def test_heads_without_a_folder_of_the_user_are_named_in_public(
    target: LlamaForCausalLM, packaged: Path, tmp_path: Path, name: str
) -> None:
    """Their name is all that others need to load the base."""
    draft = OnlineDraft.from_pretrained(name, target=target)
    public = public_version(draft.artifact())
    assert public.base.name == public.options.base_name == name
    assert "base_model=" not in model_card(public, "me/draft")
    public.write(tmp_path / "public", "")
    assert OnlineDraft.from_pretrained(tmp_path / "public", target=target).identity == draft.identity
    with pytest.raises(ConfigError, match=f"revision='main': {name} is on this machine"):
        OnlineDraft.from_pretrained(name, target=target, revision="main")


def test_the_head_of_the_package_is_refused_by_another_target(packaged: Path) -> None:
    for changes, field in (({"hidden_size": 48}, "hidden_size"), ({"num_hidden_layers": 4}, "layer_ids")):
        with pytest.raises(DraftError, match=field):
            OnlineDraft.from_pretrained(SMOLLM2_HEAD, target=new_target(**changes))


def test_only_heads_have_forms(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match="form='eagle3': only draft heads have forms"):
        OnlineDraft(new_target()).merge_and_export(tmp_path / "out", form="eagle3")


def test_a_head_is_not_warm_started(target: LlamaForCausalLM, folder: Path, pair: EmbeddedPair) -> None:
    """Said before the target writes anything."""
    draft = OnlineDraft.from_pretrained(folder, target=target)
    with pytest.raises(UnsupportedError, match="hf-onlinespec head"):
        warm_start(draft, target, pair.tokenizer, prompts=["a b"])
