"""A head as a model of transformers and PEFT: adapters, fingerprints, copies, saving; its target's layers stay the target's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_onlinespec.adapt.gated_lora import GatedLora, without_adapter
from hf_onlinespec.errors import DraftError
from hf_onlinespec.heads.base import Head, HeadOutput
from hf_onlinespec.heads.config import Eagle3Config
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.heads.writing import write_head
from hf_onlinespec.models.borrow import borrow
from hf_onlinespec.models.identity import BaseFingerprint
from hf_onlinespec.models.vocabulary import Vocabulary
from tests.heads import files
from tests.heads.files import DRAFT_IDS, HeadFiles, T, V

HEADS = {
    "EAGLE-3": files.eagle3(reduced=True),
    "EAGLE-3 with an embedding": files.eagle3(own=True),
    "EAGLE-1": files.eagle1(),
    "Hydra": files.hydra(blocks=3, prefix=True),
}


def opened(made: HeadFiles, folder: Path) -> Head:
    head = read_head(made.write(folder), files.target_config())
    head.share(files.target())
    return head


def said(head: Head) -> HeadOutput:
    out: HeadOutput = head(**head.dummy_inputs)
    return out


def moved(lora: GatedLora) -> None:
    generator = torch.Generator().manual_seed(3)
    lora.move(0.05 * torch.randn(lora.params.shape, generator=generator))


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_fits_on_every_linear_layer_of_a_head(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path)
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    lora = GatedLora(head, rank=4, alpha=8.0)
    linear = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
    assert len(lora.layers) == len(linear) + (head.get_input_embeddings() is not None) and lora.left_out == {}
    plain = said(head).logits
    with lora.gated() as tree:
        torch.testing.assert_close(said(tree).logits, plain, rtol=0.0, atol=0.0)
    moved(lora)
    with lora.gated() as tree:
        out = said(tree)
    assert not torch.equal(out.logits, plain)
    assert torch.equal(said(lora.tree).logits, plain)  # the gate is shut
    lora.fold()
    torch.testing.assert_close(said(lora.folded_tree).logits, out.logits, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(said(lora.folded_tree).hidden, out.hidden, rtol=0.0, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in head.state_dict().items())
    assert torch.equal(said(without_adapter(lora)).logits, plain)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_part_of_the_adapter_through_two_steps(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path)
    lora = GatedLora(head, rank=4, alpha=8.0)
    moved(lora)
    tokens = head.dummy_inputs["tokens"]
    with lora.gated() as tree:
        first = tree(**head.dummy_inputs, use_cache=True)
        second = tree(tokens, hidden=first.hidden, past_key_values=first.cache)
        third = tree(tokens, hidden=second.hidden, past_key_values=second.cache)
        (first.logits.square().sum() + second.logits.square().sum() + third.logits.square().sum()).backward()
    assert all(bool(part.abs().sum() > 0) for part in lora.named(lora.grads).values())


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_blocks_of_an_ensemble_speak_for_each_sequence_by_itself(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path)
    lora = GatedLora(head, rank=4, alpha=8.0, blocks=2)
    moved(lora)
    assert lora.left_out == {}
    token = head.dummy_inputs["tokens"][:, :1]

    def twice(weights: Tensor, rows: slice) -> Tensor:
        inputs = {key: value[rows] for key, value in head.dummy_inputs.items()}
        with lora.gated(weights) as tree:
            first = tree(**inputs, use_cache=True)
            hidden = first.hidden[:, -1:]
            return tree(token[rows], hidden=hidden, past_key_values=first.cache).logits

    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    both = twice(weights, slice(0, 2))
    for row in range(2):
        alone = twice(weights[row : row + 1], slice(row, row + 1))
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_merged_adapter_is_written_as_an_ordinary_head(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path / "first")
    lora = GatedLora(head, rank=4, alpha=8.0)
    moved(lora)
    write_head(head, tmp_path / "merged", weights=lora.merged_weights())
    merged = read_head(tmp_path / "merged", files.target_config())
    merged.share(files.target())
    with lora.gated() as tree:
        torch.testing.assert_close(said(merged).logits, said(tree).logits, rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it by its old name
def test_peft_adapts_the_layers_that_are_named(tmp_path: Path) -> None:
    head = opened(HEADS["EAGLE-3"], tmp_path)
    model = get_peft_model(head, LoraConfig(r=2, target_modules=["fc", "q_proj", "lm_head"]))
    layers = {
        name.rpartition(".lora_A")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name
    }
    assert {name.rpartition(".")[2] for name in layers} == {"fc", "q_proj", "lm_head"}
    assert model(**head.dummy_inputs).logits.shape == (2, 3, len(DRAFT_IDS))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_has_a_fingerprint_of_its_own(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path)
    one = BaseFingerprint.of(head)
    assert one.name == tmp_path.name
    assert one.is_same(BaseFingerprint.of(borrow(head)))
    parameter = next(head.parameters())
    with torch.no_grad():
        parameter.add_(1)
    assert not one.is_same(BaseFingerprint.of(head))


def test_a_vocabulary_counts_what_a_head_says_and_its_target_reads(tmp_path: Path) -> None:
    found = Vocabulary.of(opened(HEADS["EAGLE-3"], tmp_path / "eagle3"))
    assert (found.said, found.read) == (len(DRAFT_IDS), V)
    assert Vocabulary.of(opened(HEADS["EAGLE-1"], tmp_path / "eagle1")).size == V


@pytest.mark.parametrize("name", ["EAGLE-3", "EAGLE-1", "Hydra"])
def test_the_targets_layers_are_no_part_of_the_head(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path / "head")
    target = files.target()
    head.share(target)
    mine = {tensor.data_ptr() for tensor in head.state_dict().values()}
    embedding = target.get_input_embeddings()
    assert embedding.weight.data_ptr() not in mine and not any("embed_tokens" in key for key in head.state_dict())
    for twin in (copy.deepcopy(head), borrow(head)):
        assert isinstance(twin, Head) and twin.target_layers.embedding is embedding
        assert torch.equal(said(twin).logits, said(head).logits)
    plain = said(head).logits
    with torch.no_grad():
        embedding.weight.add_(0.5)
    assert not torch.equal(said(head).logits, plain)
    head.bfloat16()
    assert embedding.weight.dtype == torch.float32 and said(head).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_saved_and_loaded_as_transformers_does(name: str, tmp_path: Path) -> None:
    head = opened(HEADS[name], tmp_path / "head")
    head.save_pretrained(tmp_path / "saved")
    again = type(head).from_pretrained(tmp_path / "saved")
    a, b = head.state_dict(), again.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    again.share(files.target())
    torch.testing.assert_close(said(again).logits, said(head).logits, rtol=0.0, atol=0.0)


def wrong_ids() -> list[Tensor]:
    return [torch.arange(3), torch.tensor([3, 2, *range(4, 24)]), torch.arange(22) + 50, torch.arange(22) - 1]


@pytest.mark.parametrize("ids", wrong_ids())
def test_ids_of_a_draft_vocabulary_are_ascending_ones_of_the_target(ids: Tensor) -> None:
    with pytest.raises(DraftError, match="draft_ids"):
        Eagle3Head(Eagle3Config(**files.LAYER, vocab_size=V, draft_vocab_size=22), ids)


def test_what_a_head_needs_is_asked_for_by_name(tmp_path: Path) -> None:
    head = read_head(HEADS["EAGLE-3"].write(tmp_path / "eagle3"), files.target_config())
    inputs = head.dummy_inputs
    with pytest.raises(DraftError, match=r"head\.share\(target\)"):
        head(**inputs)
    head.share(files.target())
    with pytest.raises(DraftError, match="neither is given"):
        head(inputs["tokens"])
    with pytest.raises(DraftError, match="both are given"):
        head(**inputs, hidden=torch.zeros(2, 3, T))
    with pytest.raises(DraftError, match=r"width 24 .*32 wide"):
        head.share(files.target(hidden_size=32))
    with pytest.raises(DraftError, match=r"64 tokens .* has 60"):
        head.share(files.target(vocab_size=60))
    hydra = opened(files.hydra(heads=1), tmp_path / "hydra")
    out = said(hydra)
    with pytest.raises(DraftError, match="drafts 1 tokens"):
        hydra(inputs["tokens"], hidden=out.hidden)
