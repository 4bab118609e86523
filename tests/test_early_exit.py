"""The target's own first layers as a draft: exact, learning, kept with the target, saved and loaded, and the target is not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, PreTrainedModel

import hf_onlinespec
from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.errors import ArtifactError, ConfigError, DraftError, UnsupportedError
from hf_onlinespec.models.early_exit import EarlyExit
from hf_onlinespec.share.manifest import Manifest
from tests.tiny_models import tiny_gpt2, tiny_llama

OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
FIXED: dict[str, Any] = {"lookahead": 3, "update_every": 1, "memory_tokens": 0, "recycle": False, "replay_tokens": 0}


def prompt(seed: int, length: int = 6) -> Tensor:
    return torch.randint(1, 32, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_it_says_what_norm_and_head_make_of_the_hidden_states() -> None:
    target = tiny_llama(0, layers=3)
    hidden = target(prompt(0), output_hidden_states=True).hidden_states[2]
    cut = EarlyExit(target, 2).cut()
    assert torch.equal(cut(prompt(0)).logits, target.lm_head(target.model.norm(hidden)))
    assert len(target.model.layers) == target.config.num_hidden_layers == 3


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 2])
def test_exact_and_kept_with_the_target(sample: bool, batch: int) -> None:
    target, plain = tiny_llama(0, layers=3), tiny_llama(0, layers=3)
    for seed in range(3):
        tokens = torch.cat([prompt(seed + row) for row in range(batch)])
        torch.manual_seed(seed)
        # At this temperature all but the likeliest token have no weight.
        how = OPTIONS | ({"do_sample": True, "temperature": 1e-4} if sample else {})
        found = target.generate(tokens, assistant_early_exit=1, onlinespec=OnlineSpecConfig(**FIXED), **how)
        assert torch.equal(found, plain.generate(tokens, **OPTIONS))
    metrics = hf_onlinespec.online_metrics(target)
    assert metrics.requests == 3 and metrics.drafted_tokens > 0 and metrics.updates > 0
    with pytest.raises(ConfigError, match="other settings"):
        target.generate(prompt(0), assistant_early_exit=1, onlinespec=OnlineSpecConfig(rank=4), **OPTIONS)
    for mine, others in zip(target.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, others)
    assert torch.equal(target(prompt(0)).logits, plain(prompt(0)).logits)


def test_several_answers_to_a_prompt() -> None:
    target = tiny_llama(0, layers=2)
    how = OPTIONS | {"do_sample": True, "num_return_sequences": 3}
    assert target.generate(prompt(0), assistant_early_exit=1, onlinespec=True, **how).shape == (3, 18)


def test_in_a_stream_and_in_a_saved_configuration() -> None:
    target, plain = tiny_gpt2(0), tiny_gpt2(0)
    with pytest.raises(ConfigError, match="1 layers"):  # nothing is left to verify with
        target.generate(prompt(0), assistant_early_exit=1, onlinespec=True, **OPTIONS)
    target, plain = tiny_llama(0, layers=2), tiny_llama(0, layers=2)
    given = [prompt(seed)[0] for seed in range(3)]
    how = {"assistant_early_exit": 1, "onlinespec": True, **OPTIONS}
    answers = list(hf_onlinespec.generate_stream(target, given, 2, **how))
    for answer, tokens in zip(answers, given, strict=True):
        assert torch.equal(answer.tokens, plain.generate(tokens[None], **OPTIONS)[0, 6:])
    target.generation_config.assistant_early_exit = 1
    assert torch.equal(target.generate(prompt(7), onlinespec=True, **OPTIONS), plain.generate(prompt(7), **OPTIONS))
    assert hf_onlinespec.online_metrics(target).new_tokens == 48


@pytest.mark.parametrize("layers", [0, 3, -1, True, 1.5])
def test_another_number_of_layers_is_refused(layers: Any) -> None:
    target = tiny_llama(0, layers=3)
    with pytest.raises(ConfigError, match=r"assistant_early_exit=.* has 3 layers. Expected a whole number from 1 to 2"):
        OnlineDraft.early_exit(target, layers)


def test_an_encoder_decoder_is_refused() -> None:
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    with pytest.raises(DraftError, match="encoder–decoder"):
        OnlineDraft.early_exit(BartForConditionalGeneration(config), 1)


def test_beside_another_draft_it_is_refused() -> None:
    target = tiny_llama(0, layers=3)
    with pytest.raises(UnsupportedError, match="assistant_early_exit=1"):
        target.generate(prompt(0), assistant_early_exit=1, assistant_model=tiny_llama(1), onlinespec=True, **OPTIONS)
    with pytest.raises(DraftError, match="PeftModel"):
        OnlineDraft.early_exit(OnlineDraft(target).model, 1)  # type: ignore[arg-type]


def test_a_target_that_is_trained_is_followed_and_one_that_is_moved_is_cut_anew() -> None:
    target = tiny_llama(0, layers=3)
    draft = OnlineDraft.early_exit(target, 2, **FIXED)
    target.generate(prompt(0), assistant_model=draft, **OPTIONS)
    steps = draft.steps
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1.1)
        target.generate(prompt(1), assistant_model=draft, onlinespec=False, **OPTIONS)
        hidden = target(prompt(0), output_hidden_states=True).hidden_states[2]
        with draft.trainable.serving(base=True) as served:
            assert torch.equal(served(prompt(0)).logits, target.lm_head(target.model.norm(hidden)))
    assert draft.steps == steps > 0
    target.double()
    with pytest.warns(UserWarning, match="learning begins anew"):
        target.generate(prompt(0), assistant_model=draft, onlinespec=False, **OPTIONS)
    assert draft.steps == 0 and draft.trainable.adapter.tree.dtype == torch.float64


def test_it_learns_what_the_layers_behind_it_say(pair: EmbeddedPair) -> None:
    """Acceptance on the last 3 of 9 requests, against the same layers without an adapter."""
    lengths = {}
    for learn in (False, True):
        draft = OnlineDraft.early_exit(pair.target, 1, **(FIXED | {"replay_tokens": 16_384}))
        tokens = rounds = 0
        for at in range(0 if learn else 6, 9):
            inputs = pair.tokenizer(prompts("orders")[at], return_tensors="pt")
            pair.target.generate(**inputs, do_sample=False, max_new_tokens=24, assistant_model=draft, onlinespec=learn)
            if at >= 6:
                tokens, rounds = tokens + draft.metrics.last.new_tokens, rounds + draft.metrics.last.rounds
        lengths[learn] = tokens / rounds
    assert lengths[True] > 1.2 * lengths[False], lengths


def served(draft: OnlineDraft, target: PreTrainedModel, seeds: range) -> None:
    for seed in seeds:
        target.generate(prompt(seed), assistant_model=draft, **OPTIONS)


def test_saved_and_loaded_with_its_target_it_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    target = tiny_llama(0, layers=3)
    whole, first = (OnlineDraft.early_exit(target, 2, **FIXED) for _ in range(2))
    served(whole, target, range(4))
    served(first, target, range(2))
    first.save_pretrained(tmp_path / "draft")
    second = OnlineDraft.from_pretrained(tmp_path / "draft", target=tiny_llama(0, layers=3))
    served(second, target, range(2, 4))
    mine, others = whole.state().part("adapter").tensors, second.state().part("adapter").tensors
    assert whole.steps == second.steps > 0 and all(torch.equal(mine[name], others[name]) for name in mine)
    assert second.exit_layers == Manifest.read(tmp_path / "draft").early_exit == 2
    assert "the first 2 layers of LlamaForCausalLM" in str(second)


def test_without_its_target_at_hand_the_target_is_loaded_and_another_one_is_refused(tmp_path: Path) -> None:
    tiny_llama(0, layers=3).save_pretrained(tmp_path / "target")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    draft = OnlineDraft.early_exit(target, 1, **FIXED)
    served(draft, target, range(2))
    draft.save_pretrained(tmp_path / "draft")
    mine = draft(prompt(0)).logits
    for given in ({}, {"base_model": target}, {"base_model": str(tmp_path / "target")}, {"target": target}):
        assert torch.equal(OnlineDraft.from_pretrained(tmp_path / "draft", **given)(prompt(0)).logits, mine)
    attached = hf_onlinespec.attach(target, tmp_path / "draft")
    assert isinstance(attached, OnlineDraft) and attached.exit_layers == 1
    with pytest.raises(ArtifactError, match="another base"):
        OnlineDraft.from_pretrained(tmp_path / "draft", target=tiny_llama(1, layers=3))
    with pytest.raises(ConfigError, match="has 1 layers"):
        OnlineDraft.from_pretrained(tmp_path / "draft", target=tiny_llama(0, layers=1))
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "target's first 1 layer" in card and "target=target" in card and "base_model=" not in card


def test_an_export_is_a_small_model_that_says_what_the_draft_says(tmp_path: Path) -> None:
    target = tiny_llama(0, layers=3)
    draft = OnlineDraft.early_exit(target, 2, **FIXED)
    served(draft, target, range(2))
    draft.merge_and_export(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.config.num_hidden_layers == 2
    assert torch.allclose(model(prompt(0)).logits, draft(prompt(0)).logits, atol=1e-4)
    assert torch.equal(
        target.generate(prompt(1), assistant_model=model, **OPTIONS), target.generate(prompt(1), **OPTIONS)
    )


def test_adapters_with_names_are_of_the_same_layers() -> None:
    target, plain = tiny_llama(0, layers=3), tiny_llama(0, layers=3)
    draft = OnlineDraft.early_exit(target, 2, **FIXED)
    tokens = torch.cat([prompt(0), prompt(1)])
    found = target.generate(tokens, assistant_model=draft, adapter=["sql", None], **OPTIONS)
    assert torch.equal(found, plain.generate(tokens, **OPTIONS))
    with draft.adapters.using("sql") as own:
        assert own.exit_layers == 2 and not own.trainable.adapter.folds
