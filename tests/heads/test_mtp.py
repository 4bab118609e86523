"""The MTP layers of a target's own checkpoint as a draft head: as transformers computes them, exact, learning, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel, cache_utils, modeling_layers

import hf_onlinespec
from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.errors import ArtifactError, DraftError, UnsupportedError
from hf_onlinespec.heads.mtp import MtpHead, mtp_head
from hf_onlinespec.models.identity import MTP
from hf_onlinespec.share.manifest import Manifest
from tests.heads.mtp_targets import mtp_target
from tests.tiny_models import tiny_llama

OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
FIXED: dict[str, Any] = {"lookahead": 3, "update_every": 1, "memory_tokens": 0, "recycle": False, "replay_tokens": 0}
KINDS = ("glm4_moe", "deepseek_v3", "sarvam_mla", "sarvam_moe")


def prompt(seed: int, length: int = 6) -> Tensor:
    return torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_transformers_says(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind every token of a text; a text that is read in two parts too."""
    if kind not in CONFIG_MAPPING or "forward_layer" not in vars(modeling_layers.MtpModel):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}, or no method that computes one MTP layer")
    target = mtp_target(kind, tmp_path, monkeypatch)
    head, theirs = mtp_head(target), modeling_layers.MtpModel.from_pretrained(target)
    tokens = prompt(0, 8)
    hidden = target(tokens[:, :-1], output_hidden_states=True).hidden_states[-1]
    found = head(tokens[:, 1:], features=hidden)
    cache = cache_utils.MtpCache(config=target.config.get_mtp_config())
    positions = torch.arange(1, 8)[None]
    out = theirs.forward_layer(0, hidden, positions, cache, input_ids=tokens[:, 1:])
    assert torch.allclose(found.hidden, out, atol=1e-4)
    assert torch.allclose(found.logits, target.lm_head(out), atol=1e-3)
    first = head(tokens[:, 1:5], features=hidden[:, :4], use_cache=True)
    rest = head(tokens[:, 5:], features=hidden[:, 4:], past_key_values=first.cache)
    assert torch.allclose(torch.cat([first.logits, rest.logits], dim=1), found.logits, atol=1e-3)


def test_exact_learning_and_kept_with_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = mtp_target("deepseek_v3", tmp_path, monkeypatch)
    before = {name: weight.clone() for name, weight in target.named_parameters()}
    for seed in range(3):
        plain = target.generate(prompt(seed), **OPTIONS)
        found = target.generate(prompt(seed), use_mtp=True, onlinespec=OnlineSpecConfig(**FIXED), **OPTIONS)
        assert torch.equal(found, plain)
    metrics = hf_onlinespec.online_metrics(target)
    assert metrics.requests == 3 and metrics.drafted_tokens > 0 and metrics.updates > 0
    assert all(torch.equal(weight, before[name]) for name, weight in target.named_parameters())
    batch = torch.cat([prompt(0), prompt(1)])
    found = target.generate(batch, use_mtp=True, onlinespec=True, **OPTIONS)
    assert torch.equal(found, target.generate(batch, **OPTIONS))


def served(draft: OnlineDraft, target: PreTrainedModel, seeds: range) -> None:
    for seed in seeds:
        target.generate(prompt(seed), assistant_model=draft, **OPTIONS)


def test_saved_and_loaded_with_its_target_it_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = mtp_target("glm4_moe", tmp_path / "target", monkeypatch)
    whole, first = (OnlineDraft.from_pretrained(MTP, config=FIXED, target=target) for _ in range(2))
    assert isinstance(whole.trainable.adapter.tree, MtpHead)
    served(whole, target, range(4))
    served(first, target, range(2))
    first.save_pretrained(tmp_path / "draft")
    second = OnlineDraft.from_pretrained(tmp_path / "draft", target=target)
    served(second, target, range(2, 4))
    mine, others = whole.state().part("adapter").tensors, second.state().part("adapter").tensors
    assert whole.steps == second.steps > 0 and all(torch.equal(mine[name], others[name]) for name in mine)
    facts = Manifest.read(tmp_path / "draft").head
    assert facts is not None and facts.kind == "MTP"
    with pytest.raises(DraftError, match="no folder of its own"):
        first.merge_and_export(tmp_path / "export")
    other = mtp_target("glm4_moe", tmp_path / "other", monkeypatch, seed=5)
    with pytest.raises(ArtifactError, match="another base"):
        OnlineDraft.from_pretrained(tmp_path / "draft", target=other)


def test_a_target_without_such_layers_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DraftError, match="num_mtp_layers"):
        tiny_llama(0).generate(prompt(0) % 32, use_mtp=True, onlinespec=True, **OPTIONS)
    target = mtp_target("glm4_moe", tmp_path, monkeypatch)
    with pytest.raises(UnsupportedError, match="use_mtp=True"):
        target.generate(prompt(0), use_mtp=True, assistant_model=OnlineDraft(target), onlinespec=True, **OPTIONS)
    target.config.name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(DraftError, match="not in the checkpoint"):
        mtp_head(target)
