"""The way out: a plain model that says exactly what the draft says, complete or not there at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_onlinespec import DraftError, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, load_pair, prompts
from hf_onlinespec.errors import ArtifactError
from hf_onlinespec.share.export import check_export, merge_and_export
from hf_onlinespec.share.resuming import adopt
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import move

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [4, 4, 8, 11, 3, 0]])
MODELS = {
    "untied": lambda: tiny_llama(2),
    "tied": lambda: tiny_llama(2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(2),
}
SMALL = {"rank": 2, "alpha": 2.0, "lookahead": 3, "update_every": 1}


def evolved(model: PreTrainedModel, size: float = 0.3, **settings: object) -> OnlineDraft:
    """A draft whose adapter has moved away from its start."""
    draft = OnlineDraft(model, OnlineSpecConfig(**(SMALL | settings)))
    generator = torch.Generator().manual_seed(3)
    move(draft, lambda part: part + size * torch.randn(part.shape, generator=generator))
    return draft


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("settings", [{}, {"learner": "ensemble", "experts": 3}], ids=["single", "ensemble"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_the_export_is_the_draft_bit_for_bit(make, settings, tmp_path) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(TOKENS).logits
    draft = evolved(model, **settings)
    merge_and_export(draft, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS).logits, draft(TOKENS).logits)
    assert not torch.allclose(again(TOKENS).logits, logits, atol=1e-2)
    # The user's model is what it was.
    assert torch.equal(model(TOKENS).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.tie_word_embeddings == make().config.tie_word_embeddings


def test_nothing_of_ours_or_of_peft_is_in_it(tmp_path) -> None:
    merge_and_export(evolved(tiny_llama(2)), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing was left aside
    text = (tmp_path / "out" / "config.json").read_text()
    assert "lora" not in text and "peft" not in text and "onlinespec" not in text and "auto_map" not in text
    assert stored(tmp_path / "out").keys() == tiny_llama(2).state_dict().keys()


def test_a_head_that_still_agrees_stays_tied(tmp_path) -> None:
    """Only where embedding and head were changed differently does the head get weights of its own."""
    merge_and_export(evolved(tiny_llama(2, tie_word_embeddings=True), target_modules=("up_proj",)), tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored(tmp_path / "tied")
    model = load(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    said = check_export(tmp_path / "tied", tiny_llama(1).config)
    assert len(said) == 1 and "No tokenizer" in said[0]
    merge_and_export(evolved(tiny_llama(2, tie_word_embeddings=True), target_modules=("lm_head",)), tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in stored(tmp_path / "own")


def test_a_draft_that_has_learned_nothing_is_its_base(tmp_path) -> None:
    model = tiny_llama(2)
    merge_and_export(OnlineDraft(model, OnlineSpecConfig(**SMALL)), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)


def test_half_precision(tmp_path) -> None:
    """Merged in float32 and rounded once: as the base has it, or wider."""
    wide, half = evolved(tiny_llama(2).to(torch.bfloat16)), tiny_llama(2).to(torch.bfloat16).float()
    exact = evolved(half)
    adopt(exact, wide.learning.adapter_params())  # a new adapter's first values are rounded as its base is
    merge_and_export(exact, tmp_path / "exact")
    reference = stored(tmp_path / "exact")
    merge_and_export(wide, tmp_path / "half")
    merge_and_export(wide, tmp_path / "wide", torch.float32)
    for name, value in stored(tmp_path / "half").items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, reference[name].bfloat16())
    for name, value in stored(tmp_path / "wide").items():
        assert value.dtype == torch.float32 and torch.equal(value, reference[name])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_as_an_assistant_model(tmp_path) -> None:
    """What generate says is the target's; what the draft has learned, the export has."""
    pair = load_pair()
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0, rank=8, alpha=8.0))
    texts = prompts("orders")
    for text in texts[:6]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        pair.target.generate(**inputs, max_new_tokens=40, do_sample=False, assistant_model=draft)
    merge_and_export(draft, tmp_path / "out")
    exported = load(tmp_path / "out")
    tokens = pair.tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, draft(tokens).logits)
    for text in texts[6:8]:
        inputs = pair.tokenizer(text, return_tensors="pt")
        plain = pair.target.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert torch.equal(
            pair.target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=exported), plain
        )
    # The tokenizer of the base lies beside it, and a target finds nothing to object to.
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(texts[0]).input_ids == tokens[0].tolist()
    assert check_export(tmp_path / "out", pair.target.config) == []


def test_a_tokenizer_that_is_given(tmp_path) -> None:
    tokenizer = load_pair().tokenizer
    merge_and_export(evolved(tiny_llama(2)), tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("order: 1").input_ids == tokenizer("order: 1").input_ids


def test_a_folder_that_holds_something_is_refused(tmp_path) -> None:
    draft = evolved(tiny_llama(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(ArtifactError, match="not empty"):
            merge_and_export(draft, tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    merge_and_export(draft, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(ArtifactError, match="not empty"):  # an earlier export too
        merge_and_export(draft, tmp_path / "empty")


def test_a_torn_export_is_not_there(tmp_path, monkeypatch) -> None:
    """A disk that is full half-way, and a folder under a file: an error that says so, and nothing left."""
    draft = evolved(tiny_llama(2))

    def full(self: PreTrainedModel, folder: Path) -> None:
        self.config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ArtifactError, match="No space left"):
            merge_and_export(draft, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not be exported"):
        merge_and_export(draft, tmp_path / "file" / "out")
    # What a killed process left aside is in nobody's way.
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model.safetensors").write_bytes(b"half of it")
    merge_and_export(draft, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(TOKENS).logits, draft(TOKENS).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_quantised_weights_are_refused(tmp_path) -> None:
    draft = evolved(tiny_llama(2))
    layer = draft.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(DraftError, match=r"up_proj.*full precision"):
        merge_and_export(draft, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def out(tmp_path) -> Path:
    merge_and_export(evolved(tiny_llama(2)), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    return tmp_path / "out"


def edited(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": None}, "architectures=None"),
        ({"auto_map": {"AutoModelForCausalLM": "ours.Model"}}, "its own code"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"vocab_size": 33}, "33 tokens in the vocabulary, the target has 32"),
        ({"max_position_embeddings": 100}, "reads 100 tokens, the target 256"),
        ({"tie_word_embeddings": True}, "there is a head"),
        ({"model_type": "gpt2"}, "SGLang leaves the head"),
        ({"model_type": "gemma2"}, "vLLM refuses"),
    ],
)
def test_what_a_server_would_refuse_is_said(out, values, said) -> None:
    target = tiny_llama(1).config
    assert check_export(out, target) == []
    found = check_export(edited(out, **values), target)
    assert len(found) == 1 and said in found[0]


def test_what_is_missing_is_said(out) -> None:
    target = tiny_llama(1).config
    weights = stored(out)
    del weights["lm_head.weight"]
    save_file(weights, out / "model.safetensors")
    assert "no head" in check_export(out, target)[0]
    (out / "tokenizer.json").unlink()
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
    said = " ".join(check_export(out, target))
    assert "No tokenizer" in said and "['pytorch_model.bin']" in said and "No safetensors" in said
    (out / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(ArtifactError, match="not a sound safetensors file"):
        check_export(out, target)
    (out / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json"):
        check_export(out, target)
