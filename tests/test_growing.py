"""A head grows with a target that has none: what it is served teaches it, and nothing else changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import hf_onlinespec
from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_pair, prompts
from hf_onlinespec.errors import ArtifactError, ConfigError
from hf_onlinespec.heads.eagle3 import Eagle3Head
from tests.architectures import ARCHITECTURES
from tests.encoder_decoders import bart
from tests.tiny_models import CACHE, tiny_llama

GROWS = OnlineSpecConfig(grow_head=True)
OPTIONS = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}


def test_it_is_begun_once_kept_with_the_target_and_lossless() -> None:
    target, plain = tiny_llama(0, layers=4), tiny_llama(0, layers=4)
    for seed in range(3):
        torch.manual_seed(seed)
        prompt = torch.randint(32, (1, 6))
        found = target.generate(prompt, onlinespec=GROWS if seed < 2 else True, **OPTIONS)
        assert torch.equal(found, plain.generate(prompt, **OPTIONS))
    assert hf_onlinespec.online_metrics(target).requests == 3
    with pytest.raises(ConfigError, match="other settings"):
        target.generate(prompt, onlinespec=OnlineSpecConfig(grow_head=True, rank=4), **OPTIONS)


def test_an_attached_target_grows_its_head() -> None:
    target = tiny_llama(0, layers=4)
    draft = hf_onlinespec.attach(target, config=GROWS)
    assert isinstance(draft, OnlineDraft) and isinstance(draft.trainable.adapter.tree, Eagle3Head)
    target.generate(torch.arange(8)[None], **OPTIONS)
    assert draft.metrics.requests == 1
    assert hf_onlinespec.detach(target) is draft


def test_it_learns_from_what_it_serves() -> None:
    """Its acceptance on requests of one kind, before it has learned and after."""
    pair = load_pair()
    config = OnlineSpecConfig(
        grow_head=True,
        lookahead=3,
        update_every=1,
        update_when="round",
        replay_passes=2,
        memory_tokens=0,
        recycle=False,
        lr=5e-3,
    )
    lengths = []
    texts = prompts("orders")[:12]
    for text in texts:
        inputs = pair.tokenizer(text, return_tensors="pt")
        pair.target.generate(**inputs, do_sample=False, max_new_tokens=24, onlinespec=config)
        lengths.append(hf_onlinespec.online_metrics(pair.target).last.acceptance_length)
    assert sum(lengths[-6:]) / 6 > 1.15 * sum(lengths[:3]) / 3, lengths


@pytest.mark.parametrize(("name", "learns"), [("mamba2", True), ("gemma3n_text", False)])
def test_it_begins_without_attention_in_the_target_and_where_layers_differ_in_width(name: str, learns: bool) -> None:
    """Gemma-3n hands out no hidden states that a head could read: the memory drafts."""
    target = next(row for row in ARCHITECTURES if row.name == name).build()
    if CACHE not in inspect.signature(target.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} hands {name}'s state on under another name")
    prompt = torch.tensor([[3, 14, 15, 9, 2, 6]])
    draft = hf_onlinespec.attach(target, config=OnlineSpecConfig(grow_head=True, update_every=1, update_when="round"))
    found = [target.generate(prompt, **OPTIONS) for _ in range(2)]
    assert isinstance(draft, OnlineDraft) and draft.metrics.drafted_tokens > 0 and (draft.metrics.updates > 0) == learns
    hf_onlinespec.detach(target)
    assert all(torch.equal(answer, target.generate(prompt, **OPTIONS)) for answer in found)


@pytest.mark.parametrize("make", [lambda seed: tiny_llama(seed, layers=4), bart], ids=["llama", "bart"])
def test_a_grown_head_is_saved_and_goes_on_with_its_target(
    make: Callable[[int], PreTrainedModel], tmp_path: Path
) -> None:
    target = make(0)
    draft = hf_onlinespec.attach(target, config=OnlineSpecConfig(grow_head=True, update_every=1, update_when="round"))
    torch.manual_seed(0)
    target.generate(torch.randint(32, (1, 6)), **OPTIONS)
    assert isinstance(draft, OnlineDraft) and draft.steps > 0
    draft.save_pretrained(tmp_path)
    loaded = OnlineDraft.from_pretrained(tmp_path, target=make(0))
    mine, others = draft.state().part("adapter").tensors, loaded.state().part("adapter").tensors
    assert loaded.steps == draft.steps and all(torch.equal(mine[name], others[name]) for name in mine)
    with pytest.raises(ArtifactError, match="another base"):
        OnlineDraft.from_pretrained(tmp_path, target=make(1))
