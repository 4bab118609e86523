"""The draft head that ships with the package: its files agree with each other, and it drafts for a target of its shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_onlinespec import OnlineDraft
from hf_onlinespec.errors import DraftError
from hf_onlinespec.heads.outline import HeadOutline
from hf_onlinespec.heads.reading import check_head
from hf_onlinespec.models.identity import PACKAGED, SMOLLM2_HEAD
from hf_onlinespec.share.folder import ADAPTER_CONFIG
from hf_onlinespec.share.heads import head_folder, shipped_head_for

FOLDER = PACKAGED[SMOLLM2_HEAD]
TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
LARGEST_BYTES = 18e6
# What a head knows of SmolLM2-135M: width, layers and vocabulary. All else is small here.
SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
SMALL = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def shape(**changes: float) -> LlamaConfig:
    return LlamaConfig(**SHAPE | SMALL | changes, tie_word_embeddings=True, name_or_path=TARGET)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    return found


def test_it_is_found_by_its_name_and_is_small() -> None:
    assert head_folder(SMOLLM2_HEAD) == FOLDER
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md", "training.json"}
    assert sum(files.values()) <= LARGEST_BYTES


def test_its_record_agrees_with_its_files(record: dict[str, Any]) -> None:
    outline = HeadOutline.read(FOLDER)
    assert (outline.kind, outline.form) == ("EAGLE-3", "eagle3")
    assert record["target"] == TARGET
    assert outline.parameters == record["parameters"] < outline.nbytes / 2  # in bfloat16
    assert outline.reads == tuple(record["reads"])
    assert (outline.vocabulary, outline.draft_vocabulary) == (record["vocab_size"], record["draft_vocab_size"])


def test_the_numbers_of_its_record_agree_with_each_other(record: dict[str, Any]) -> None:
    kinds, measured, last = record["answers_by_kind"], record["acceptance_length"], record["curve"][-1]
    assert sum(kinds.values()) == record["answers"] >= record["sampled_answers"]
    assert "nq_open" not in kinds  # its licence asks to share alike
    assert record["learned_tokens"] >= record["answer_tokens"] > 0 and 0.5 < record["known_share"] <= 1
    assert set(measured) == {*record["held_out_answers"], "all"}
    of_kinds = [length for kind, length in measured.items() if kind != "all"]
    assert 1 < min(of_kinds) <= measured["all"] <= max(of_kinds) <= 1 + record["chain"]
    assert last["acceptance_length"] == measured and last["tokens"] == record["learned_tokens"]
    assert [point["tokens"] for point in record["curve"]] == sorted(point["tokens"] for point in record["curve"])
    assert last["acceptance_length"]["all"] > record["curve"][0]["acceptance_length"]["all"]
    assert str(Path.home()) not in json.dumps(record) and "/work" not in json.dumps(record)


def test_its_card_says_what_its_record_says(record: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for text in (
        f"base_model: {TARGET}",
        "license: apache-2.0",
        f"| target | {TARGET} |",
        f"| hidden states that it reads | {', '.join(map(str, record['reads']))} ",
        f"| draft vocabulary | {record['draft_vocab_size']:,} of {record['vocab_size']:,} tokens",
        f"{record['answers']:,} answers of the target, {record['answer_tokens']:,} tokens",
        f'OnlineDraft.from_pretrained("{SMOLLM2_HEAD}", target=model)',
    ):
        assert text in card
    for kind, length in record["acceptance_length"].items():
        assert any(line.startswith(f"| {kind} |") and f"| {length:.2f} |" in line for line in card.splitlines())
    licences = card.partition("## What it was trained on")[2]
    assert all(f"| {kind} |" in licences for kind in record["answers_by_kind"])


def test_it_is_offered_for_its_target_alone() -> None:
    config = shape()
    assert shipped_head_for(config) == SMOLLM2_HEAD
    config.name_or_path = "HuggingFaceTB/SmolLM2-135M"
    assert shipped_head_for(config) is None
    for size, other, field in (
        ("hidden_size", 960, "hidden_size"),
        ("vocab_size", 32000, "vocab_size"),
        ("num_hidden_layers", 12, "layer_ids"),
    ):
        assert shipped_head_for(shape(**{size: other})) is None
        with pytest.raises(DraftError, match=field):
            check_head(FOLDER, shape(**{size: other}))


def test_it_drafts_learns_and_comes_back_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = LlamaForCausalLM(shape(initializer_range=1 / math.sqrt(SHAPE["hidden_size"]))).eval()
    draft = OnlineDraft.from_pretrained(SMOLLM2_HEAD, target=target, config={"update_every": 1, "update_when": "round"})
    prompt, options = torch.arange(100, 110)[None], {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    found = target.generate(prompt, assistant_model=draft, **options)
    assert torch.equal(found, target.generate(prompt, **options))
    assert draft.steps > 0 and draft.metrics.requests == 1
    draft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == SMOLLM2_HEAD
    assert not any(str(FOLDER.parent).encode() in file.read_bytes() for file in tmp_path.iterdir())
    loaded = OnlineDraft.from_pretrained(tmp_path, target=target)
    assert loaded.steps == draft.steps and loaded.identity == draft.identity
