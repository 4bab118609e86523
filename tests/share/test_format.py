"""The file format: a draft that commit 7397b09 saved is loaded, learns on, and is saved again under the same names.

`fixtures/format_1/` holds two experts of rank 1 with moments, hints, earlier states and the replay's random state, after nine
requests. Their base is not stored: its weights are counted out, the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_onlinespec import OnlineDraft

FOLDER = Path(__file__).with_name("fixtures") / "format_1"
ADAPTER, STATE, MANIFEST = "adapter_model.safetensors", "onlinespec_state.safetensors", "onlinespec_config.json"
MANIFEST_KEYS = {"format", "settings", "base", "versions", "lineage", "run", "files", "checksum"}
# Names of tensors in the state, but for those of the experts, which end in PEFT's names of the layers.
TENSORS = {
    "adaptation.ball.starts",
    "adaptation.cap.norms",
    "adaptation.hedge.round",
    "adaptation.hedge.scores",
    "adaptation.learner.hint",
    "adaptation.learner.m",
    "adaptation.learner.moved",
    "adaptation.learner.step",
    "adaptation.learner.v",
    "guard.candidate",
    "guard.states.0",
    "replay.random",
}
EXPERTS = {
    "experts.base_model.model.lm_head.lora_B.weight",
    "experts.base_model.model.model.embed_tokens.lora_embedding_B",
    *(f"experts.base_model.model.model.layers.0.mlp.{name}_proj.lora_B.weight" for name in ("down", "gate", "up")),
    *(f"experts.base_model.model.model.layers.0.self_attn.{name}_proj.lora_B.weight" for name in "kovq"),
}
VALUES = {
    "adaptation": {"steps", "removed", "alive", "weights", "losses", "serving"},
    "guard": {"states", "rollbacks", "reason", "age", "latest", "level", "spread", "wait", "tried", "trials"},
    "learning": {"loss"},
    "metrics": {
        "requests",
        "rounds",
        "new_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "verified_positions",
        "overlap",
        "updates",
        "learned_tokens",
        "skipped_updates",
        "wall_time_s",
        "draft_time_s",
        "target_time_s",
        "update_time_s",
        "replay_refused",
        "idle_updates",
        "idle_time_s",
        "idle_failures",
        "removed_experts",
        "rollbacks",
        "history",
    },
}
RUN = {
    "targets",
    "machine",
    "requests",
    "rounds",
    "new_tokens",
    "learned_tokens",
    "updates",
    "idle_updates",
    "idle_time_s",
    "rollbacks",
    "total",
    "before",
    "after",
    "history",
}


@torch.no_grad()
def counted_llama(step: int, layers: int = 1) -> LlamaForCausalLM:
    """A model whose weights are multiples of 1/504: no random numbers, which another version of torch may draw otherwise."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    for weight in model.parameters():
        places = torch.arange(weight.numel(), dtype=torch.float64)
        weight.copy_(((places * step % 1009 - 504) / 504).view_as(weight))
    return model


def state_values(folder: Path) -> dict[str, Any]:
    with safe_open(folder / STATE, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["values"])
    return found


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return found


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def draft() -> OnlineDraft:
    return OnlineDraft.from_pretrained(FOLDER, counted_llama(6007))


def test_the_names_in_a_folder_of_format_1() -> None:
    """The file format, as it was written: if this fails, the fixture was changed."""
    assert set(load_file(FOLDER / STATE)) == TENSORS | EXPERTS
    assert {part: set(values) for part, values in state_values(FOLDER).items()} == VALUES
    found = manifest(FOLDER)
    assert set(found) == MANIFEST_KEYS and found["format"] == 1 and set(found["run"]) == RUN


def test_settings_that_came_later_have_their_defaults(draft: OnlineDraft, tmp_path: Path) -> None:
    assert "head_steps" not in manifest(FOLDER)["settings"] and draft.settings.head_steps == 1
    draft.save_pretrained(tmp_path)
    assert manifest(tmp_path)["settings"]["head_steps"] == 1
    assert OnlineDraft.from_pretrained(tmp_path, counted_llama(6007)).settings == draft.settings


def test_what_was_loaded_is_saved_to_the_same_bits(draft: OnlineDraft, tmp_path: Path) -> None:
    draft.save_pretrained(tmp_path)
    for name in (ADAPTER, STATE):
        assert same_bits(load_file(FOLDER / name), load_file(tmp_path / name))
    before, after = state_values(FOLDER), state_values(tmp_path)
    for part in ("adaptation", "guard", "learning"):
        assert after[part] == before[part]
    told = {name: value for name, value in before["metrics"].items() if name != "history"}
    assert told.items() <= after["metrics"].items()


def test_it_serves_learns_on_and_is_saved_under_the_same_names(draft: OnlineDraft, tmp_path: Path) -> None:
    target, prompt = counted_llama(7919, layers=2), torch.tensor([[3, 14, 15, 9, 2, 6]])
    plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
    served = target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=draft)
    assert torch.equal(served, plain)
    before = state_values(FOLDER)
    assert draft.metrics.requests == before["metrics"]["requests"] + 1
    assert draft.steps > before["adaptation"]["steps"]
    draft.save_pretrained(tmp_path)
    tensors, values, found = set(load_file(tmp_path / STATE)), state_values(tmp_path), manifest(tmp_path)
    assert tensors == TENSORS | EXPERTS
    assert values.keys() == VALUES.keys()
    assert all(set(values[part]) == VALUES[part] for part in ("adaptation", "guard", "learning"))
    assert VALUES["metrics"] <= set(values["metrics"])  # counters may join them
    assert set(found) == MANIFEST_KEYS and found["format"] == 1 and set(found["run"]) >= RUN
