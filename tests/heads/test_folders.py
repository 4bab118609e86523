"""Folders of draft heads: read in every form to equal bits, refused by name, written and read again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hf_onlinespec.errors import DraftError
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.heads.recognising import is_head, is_head_config
from hf_onlinespec.heads.writing import write_head
from tests.heads import files
from tests.heads.files import DRAFT_IDS, LAYERS, HeadFiles, T, V

IDS = "eagle_aux_hidden_state_layer_ids"


def changed(
    made: HeadFiles, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> HeadFiles:
    """The same files with other fields and tensors in them; None takes one out."""

    def updated(old: dict[str, Any], new: dict[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in (old | (new or {})).items() if not (key in (new or {}) and value is None)}

    return HeadFiles(updated(made.config, config), updated(made.tensors, tensors), made.file, made.settings)


def read(made: HeadFiles, folder: Path, **target: Any) -> Head:
    return read_head(made.write(folder), files.target_config(**target))


def held(head: Head) -> dict[str, Tensor]:
    return dict(head.named_parameters())


EAGLE3 = files.eagle3(reduced=True, own=True)
SPECULATORS = files.as_speculators(EAGLE3, (1, 2, 4))
SGLANG = changed(EAGLE3, {"eagle_config": {IDS: [0, 1, 3], "use_aux_hidden_state": True}})
NEMO = HeadFiles(SPECULATORS.config, {f"model.{name}" if name not in ("lm_head.weight", "d2t", "t2d") else name: tensor for name, tensor in SPECULATORS.tensors.items()})  # fmt: skip
PICKLED = HeadFiles(EAGLE3.config, EAGLE3.tensors, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("made", "reads", "form"),
    [
        (EAGLE3, (2, LAYERS // 2, LAYERS - 3), "eagle3"),
        (SGLANG, (1, 2, 4), "eagle3"),
        (SPECULATORS, (1, 2, 4), "speculators"),
        (NEMO, (1, 2, 4), "speculators"),
        (PICKLED, (2, LAYERS // 2, LAYERS - 3), "eagle3"),
    ],
    ids=["EAGLE", "SGLang", "speculators", "NeMo", "pickled"],
)
def test_every_form_of_eagle3_reads_to_equal_bits(
    made: HeadFiles, reads: tuple[int, ...], form: str, tmp_path: Path
) -> None:
    head = read(made, tmp_path)
    assert isinstance(head, Eagle3Head) and head.form == form and head.reads == reads and head.most is None
    assert head.draft_ids is not None and head.draft_ids.tolist() == DRAFT_IDS
    expected = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in EAGLE3.tensors.items()}
    assert set(held(head)) == set(expected) - {"d2t", "t2d"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held(head).items())


def test_eagle1_and_hydra_read_to_equal_bits(tmp_path: Path) -> None:
    made = files.eagle1(layers=2, own=True)
    head = read(made, tmp_path / "eagle1")
    assert {name: tensor.tolist() for name, tensor in held(head).items()} == {
        name: tensor.tolist() for name, tensor in made.tensors.items()
    }
    made = files.hydra(heads=2, blocks=2, prefix=True)
    head = read(made, tmp_path / "hydra")
    assert head.most == 2 and head.reads == (-1,) and head.draft_ids is None
    tensors = made.tensors
    named = {
        "mlps.1.first.res_connection.bias": "hydra_mlp.1.1.res_connection.bias",
        "mlps.0.further.linear.weight": "hydra_mlp.0.3.linear.weight",
        "lm_heads.1.weight": "hydra_lm_head.1.1.weight",
        "prefix.self_attn.k_proj.weight": "prefix_embeding_layer.layers.0.self_attn.k_proj.weight",
        "prefix_norm.weight": "prefix_embeding_layer.norm.weight",
    }
    assert all(torch.equal(held(head)[ours], tensors[theirs]) for ours, theirs in named.items())
    assert len(held(head)) == len(tensors) - 1  # the embedding of the prefix is the target's


def test_layer_ids_are_hidden_states_at_the_top_and_outputs_of_layers_in_eagle_config(tmp_path: Path) -> None:
    plain = files.eagle3()
    nested = {"eagle_config": {IDS: [0, 2, 3]}}
    assert read(changed(plain, {IDS: [1, 3, 4]}), tmp_path / "top").reads == (1, 3, 4)
    assert read(changed(plain, nested), tmp_path / "nested").reads == (1, 3, 4)
    assert read(changed(plain, nested | {IDS: [1, 3, 4]}), tmp_path / "both").reads == (1, 3, 4)
    assert read(changed(plain, {"eagle_config": {IDS: []}}), tmp_path / "none").reads == (2, 2, 1)
    with pytest.raises(DraftError, match=r"eagle_aux_hidden_state_layer_ids=\[2, 3, 4\].*\[1, 3, 4\]"):
        read(changed(plain, nested | {IDS: [2, 3, 4]}), tmp_path / "other")


def test_the_longest_text_is_the_targets_and_a_scaled_rope_keeps_its_own_start(tmp_path: Path) -> None:
    head = read(files.eagle3(), tmp_path / "plain", max_position_embeddings=4096)
    assert files.LLAMA["max_position_embeddings"] == 16 and head.config.max_position_embeddings == 4096
    scaled = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    head = read(changed(files.eagle3(), scaled), tmp_path / "scaled", max_position_embeddings=4096)
    rope = head.config.rope_parameters
    assert rope is not None and rope["original_max_position_embeddings"] == 16 and rope["rope_theta"] == 500.0
    pictures = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    head = read(changed(files.eagle3(), pictures), tmp_path / "pictures")
    assert head.config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def test_a_map_of_the_whole_vocabulary_is_none_and_offsets_alone_are_enough(tmp_path: Path) -> None:
    whole = changed(files.eagle3(), tensors=files.vocabulary_map(list(range(V))))
    assert read(whole, tmp_path / "whole").draft_ids is None
    head = read(changed(EAGLE3, tensors={"t2d": None}), tmp_path / "offsets")
    assert head.draft_ids is not None and head.draft_ids.tolist() == DRAFT_IDS


def test_weights_are_of_one_type_the_stored_or_the_wanted_one(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in EAGLE3.tensors.items() if tensor.is_floating_point()}
    folder = changed(EAGLE3, tensors=half).write(tmp_path)
    head = read_head(folder, files.target_config())
    assert {tensor.dtype for tensor in held(head).values()} == {torch.bfloat16}
    assert torch.equal(held(head)["fc.weight"], half["fc.weight"])
    head = read_head(folder, files.target_config(), dtype=torch.float32)
    assert {tensor.dtype for tensor in held(head).values()} == {torch.float32}
    assert head.draft_ids is not None and head.draft_ids.dtype == torch.int64


def test_the_layout_of_before_torch_1_6_is_read(tmp_path: Path) -> None:
    folder = PICKLED.write(tmp_path)
    torch.save(PICKLED.tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    head = read_head(folder, files.target_config())
    assert torch.equal(held(head)["fc.weight"], PICKLED.tensors["fc.weight"])


def without(name: str) -> dict[str, Any]:
    return {name: None}


WRONG: dict[str, tuple[HeadFiles, str]] = {
    "missing": (changed(EAGLE3, tensors=without("midlayer.hidden_norm.weight")), r"midlayer\.hidden_norm\.weight is missing.*\(24,\)"),
    "missing, speculators": (changed(SPECULATORS, tensors=without("layers.0.hidden_norm.weight")), r"layers\.0\.hidden_norm\.weight is missing"),
    "no map": (changed(EAGLE3, tensors=without("d2t")), r"d2t is missing.*22 of its target's 64 tokens"),
    "unknown": (changed(EAGLE3, tensors={"medusa.weight": torch.zeros(2)}), r"medusa\.weight .* belongs to no part"),
    "norms without their flag": (changed(files.eagle3(fc_norm=True), without("fc_norm")), r"fc_norm\.\d\.weight .* belongs to no part"),
    "a flag without its norms": (changed(files.eagle3(), {"norm_before_fc": True}), r"input_norm\.weight is missing"),
    "shape": (changed(EAGLE3, tensors={"norm.weight": torch.ones(T + 1)}), r"norm\.weight .* \(25,\): \(24,\) follows"),
    "two kinds of norms": (files.eagle3(fc_norm=True, norm_before_fc=True), "norm_before_fc and fc_norm"),
    "d2t as ids": (changed(EAGLE3, tensors={"d2t": torch.tensor(DRAFT_IDS)}), "d2t .* holds offsets"),
    "d2t of floats": (changed(EAGLE3, tensors={"d2t": torch.zeros(22)}), r"d2t .* torch\.float32"),
    "d2t of another size": (changed(EAGLE3, tensors={"d2t": torch.zeros(9, dtype=torch.long)}), r"d2t .* \(9,\): expected \(22,\)"),
    "t2d of other tokens": (changed(EAGLE3, tensors={"t2d": torch.arange(V) < 22}), "d2t and t2d .* different tokens"),
    "quantised": (changed(EAGLE3, tensors={"fc.weight": torch.zeros(T, 3 * T, dtype=torch.int8)}), r"fc\.weight holds torch\.int8"),
    "another target's width": (changed(files.eagle3(), {"target_hidden_size": 32}), r"target_hidden_size=32: the target.* 24 wide"),
    "another target's vocabulary": (changed(files.eagle3(), {"vocab_size": 80}), r"vocab_size=80: the target has 64 tokens"),
    "another target's layers": (changed(files.eagle3(), {IDS: [2, 9, 17]}), rf"{IDS}=\[2, 9, 17\].*4 layers"),
    "layers that are none": (changed(files.eagle3(), {IDS: "all"}), rf"{IDS}='all'"),
    "more tokens than the target": (changed(files.eagle3(), {"draft_vocab_size": 65}), "draft_vocab_size=65"),
    "narrow without an embedding": (changed(files.eagle3(h=32, own=True), tensors=without("embed_tokens.weight")), r"embed_tokens\.weight"),
    "a size that is none": (changed(files.eagle3(), {"hidden_size": "wide"}), "hidden_size='wide'"),
    "a flag that is none": (changed(files.eagle3(), {"norm_output": 1}), "norm_output=1"),
    "an epsilon that is none": (changed(files.eagle3(), {"rms_norm_eps": "small"}), "rms_norm_eps"),
    "a rope that is none": (changed(files.eagle3(), {"rope_scaling": {"rope_type": "spiral"}}), "spiral"),
    "DeepSeek's": (changed(files.eagle3(), {"architectures": ["Eagle3DeepseekV2ForCausalLM"]}), "architectures=.*DeepSeek"),
    "another layer": (changed(files.eagle3(), {"model_type": "mamba"}), "model_type='mamba'"),
    "windows": (changed(files.eagle3(), {"layer_types": ["sliding_attention"]}), "layer_types=.*sliding_attention"),
    "part of a rope": (changed(files.eagle3(), {"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    "one hidden state": (changed(files.eagle3(), {"eagle_config": {"use_aux_hidden_state": False}}), "use_aux_hidden_state=False"),
    "P-EAGLE": (changed(SPECULATORS, {"speculators_model_type": "peagle"}), "speculators_model_type='peagle'"),
    "Medusa": (HeadFiles({"medusa_num_heads": 3}, {"0.linear.weight": torch.zeros(2, 2)}), "medusa_num_heads=3"),
    "Hydra's attention": (changed(files.hydra(), {"hydra_head_arch": "cross-attn"}), "hydra_head_arch='cross-attn'"),
    "Hydra that reads no tokens": (changed(files.hydra(), {"grounded_heads": False}), "grounded_heads=False"),
    "Hydra of an earlier layer": (changed(files.hydra(), {"hidden_state_offset": 1}), "hidden_state_offset=1"),
    "Hydra with fewer heads": (changed(files.hydra(), {"hydra_num_heads": 2}), r"hydra_(mlp|lm_head)\.2\..* belongs to no part"),
    "Hydra with blocks that differ": (changed(files.hydra(blocks=3), tensors={"hydra_mlp.0.2.linear.bias": torch.zeros(T)}), r"hydra_mlp\.0\.1\.linear\.bias and hydra_mlp\.0\.2\.linear\.bias"),
    "EAGLE-1 of another width": (changed(files.eagle1(), {"hidden_size": 32}), "hidden_size=32: the target.* 24 wide"),
    "no head": (HeadFiles({"model_type": "llama"}, {"model.norm.weight": torch.zeros(2)}), "no draft head"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_served_is_refused_by_its_tensor_or_field(name: str, tmp_path: Path) -> None:
    made, told = WRONG[name]
    with pytest.raises(DraftError, match=told):
        read(made, tmp_path)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2.5,
    10**30,
    "",
    "x",
    [],
    ["x"],
    [[]],
    {},
    {"type": 3},
    {"rope_type": "yarn"},
)


@pytest.mark.parametrize(
    "made", [SGLANG, SPECULATORS, files.eagle1(), files.hydra()], ids=["SGLang", "speculators", "EAGLE-1", "Hydra"]
)
def test_odd_values_in_a_configuration_are_read_or_refused_and_break_nothing(made: HeadFiles, tmp_path: Path) -> None:
    layer = made.config.get("transformer_layer_config", {})
    refused = 0
    for field in (*made.config, *layer):
        for odd in ODD:
            inner = {"transformer_layer_config": layer | {field: odd}} if field in layer else {field: odd}
            HeadFiles(made.config | inner, made.tensors, made.file).write(tmp_path)
            try:
                assert read_head(tmp_path, files.target_config()).features_size > 0
            except DraftError:
                refused += 1
    assert refused > 30


def test_a_prefix_layer_is_its_targets_and_needs_a_llama(tmp_path: Path) -> None:
    folder = files.hydra(prefix=True).write(tmp_path)
    config = files.target_config()
    config.model_type = "gpt2"
    with pytest.raises(DraftError, match=r"hydra_head_arch='prefix-mlp'.*gpt2"):
        read_head(folder, config)


def damage(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "config.json": lambda folder: damage(EAGLE3.write(folder), "config.json", b"{"),
    "no object": lambda folder: damage(EAGLE3.write(folder), "config.json", b"[]"),
    "model.safetensors": lambda folder: damage(EAGLE3.write(folder), "model.safetensors", b"\x00" * 20),
    "pytorch_model.bin": lambda folder: damage(PICKLED.write(folder), "pytorch_model.bin", b"\x80"),
    "code": lambda folder: damage(
        PICKLED.write(folder), "pytorch_model.bin", pickle.dumps({"fc.weight": print}, protocol=2)
    ),
    "no weights": lambda folder: HeadFiles(EAGLE3.config, {}, "other.safetensors").write(folder),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_refused_by_the_file(name: str, tmp_path: Path) -> None:
    folder = DAMAGED[name](tmp_path)
    with pytest.raises(DraftError, match=str(folder)):
        read_head(folder, files.target_config())


def test_heads_are_told_from_models_by_their_configuration(tmp_path: Path) -> None:
    heads = [EAGLE3, SPECULATORS, SGLANG, files.hydra(), files.eagle1(), WRONG["Medusa"][0], WRONG["P-EAGLE"][0]]
    for i, made in enumerate(heads):
        assert is_head(made.write(tmp_path / str(i)))
    assert is_head_config(EAGLE3.config) and not is_head_config(files.eagle1().config)
    config = files.target_config().to_dict()
    assert not is_head_config(config)
    assert not is_head(HeadFiles(config, {"model.norm.weight": torch.ones(2)}).write(tmp_path / "model"))
    one = config | {"num_hidden_layers": 1}
    assert not is_head(HeadFiles(one, {"model.norm.weight": torch.ones(2)}).write(tmp_path / "small"))
    assert not is_head(tmp_path / "nothing") and not is_head(DAMAGED["config.json"](tmp_path / "damaged"))


# Writing

WRITTEN: dict[str, HeadFiles] = {
    "EAGLE-3": EAGLE3,
    "EAGLE-3, whole vocabulary, two layers, biases": files.eagle3(layers=2, bias=True),
    "EAGLE-3, another width": files.eagle3(h=32, own=True, norm_before_residual=True),
    "EAGLE-3.1": files.eagle3(fc_norm=True, norm_output=True),
    "EAGLE-3, SGLang": SGLANG,
    "EAGLE-3, speculators": SPECULATORS,
    "EAGLE-3, Qwen3's layer": files.as_speculators(files.eagle3(qk_norm=True), (2, 2, 1)),
    "EAGLE-1": files.eagle1(layers=2),
    "EAGLE-1, no bias": files.eagle1(bias=False, own=True),
    "Hydra": files.hydra(blocks=3),
    "Hydra, prefix": files.hydra(blocks=2, prefix=True),
}


def same(one: Head, other: Head) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def described(head: Head) -> dict[str, Any]:
    return {key: value for key, value in head.config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_head_that_was_written_is_read_to_equal_bits(name: str, tmp_path: Path) -> None:
    head = read(WRITTEN[name], tmp_path / "first")
    write_head(head, tmp_path / "again", target_config=files.target_config())
    again = read_head(tmp_path / "again", files.target_config())
    assert same(head, again) and described(again) == described(head)
    assert type(again) is type(head) and again.reads == head.reads


@pytest.mark.parametrize("form", ["eagle3", "speculators"])
@pytest.mark.parametrize("name", [name for name in WRITTEN if name.startswith("EAGLE-3") and "Qwen3" not in name])
def test_an_eagle3_head_is_written_in_both_forms(name: str, form: str, tmp_path: Path) -> None:
    head = read(WRITTEN[name], tmp_path / "first")
    write_head(head, tmp_path / form, form)
    again = read_head(tmp_path / form, files.target_config())
    assert isinstance(again, Eagle3Head) and again.form == form and same(head, again)
    assert described(again) == described(head)


def test_a_form_without_a_place_for_what_a_head_is_is_refused(tmp_path: Path) -> None:
    head = read(WRITTEN["EAGLE-3, Qwen3's layer"], tmp_path / "qwen3")
    with pytest.raises(DraftError, match=r"'eagle3' has no place .* 'speculators'"):
        write_head(head, tmp_path / "out", "eagle3")
    head = read(files.as_speculators(files.eagle3(), (0, 2, 3)), tmp_path / "first")
    with pytest.raises(DraftError, match=r"hidden state 0 .* 'speculators'"):
        write_head(head, tmp_path / "out", "eagle3")
    with pytest.raises(DraftError, match="form='speculators': HydraHead is written as 'hydra'"):
        write_head(read(files.hydra(), tmp_path / "hydra"), tmp_path / "out", "speculators")


# What FACTS_DRAFTS.md states of public heads of EAGLE's and SGLang's form: SpecForge's configuration for Qwen3-8B, without what
# only Qwen3's own models use.
PUBLIC_FIELDS = {
    *(
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "draft_vocab_size",
        "eos_token_id",
        "head_dim",
    ),
    *("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "model_type"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta"),
    *("tie_word_embeddings", "torch_dtype", "use_cache", "vocab_size"),
}
PUBLIC_TENSORS = {
    "fc.weight": (T, 3 * T),
    "midlayer.input_layernorm.weight": (T,),
    "midlayer.hidden_norm.weight": (T,),
    "midlayer.self_attn.q_proj.weight": (32, 2 * T),
    "midlayer.self_attn.k_proj.weight": (16, 2 * T),
    "midlayer.self_attn.v_proj.weight": (16, 2 * T),
    "midlayer.self_attn.o_proj.weight": (T, 32),
    "midlayer.post_attention_layernorm.weight": (T,),
    "midlayer.mlp.gate_proj.weight": (40, T),
    "midlayer.mlp.up_proj.weight": (40, T),
    "midlayer.mlp.down_proj.weight": (T, 40),
    "norm.weight": (T,),
    "lm_head.weight": (22, T),
    "d2t": (22,),
    "t2d": (V,),
}


def test_the_original_form_has_the_keys_shapes_and_fields_of_public_heads(tmp_path: Path) -> None:
    write_head(
        read(files.eagle3(reduced=True), tmp_path / "first"), tmp_path / "out", target_config=files.target_config()
    )
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == PUBLIC_TENSORS
        assert opened.get_tensor("d2t").dtype == torch.int64 and opened.get_tensor("t2d").dtype == torch.bool
        assert opened.get_tensor("d2t").tolist() == [i - n for n, i in enumerate(DRAFT_IDS)]
        assert int(opened.get_tensor("t2d").sum()) == 22
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config) == PUBLIC_FIELDS
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["draft_vocab_size"] == 22 and config["vocab_size"] == V and config["rope_theta"] == 500.0


def test_what_is_not_the_default_is_written_for_both_engines(tmp_path: Path) -> None:
    write_head(read(SGLANG, tmp_path / "first"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_config"] == {IDS: [0, 1, 3], "use_aux_hidden_state": True}  # SGLang: outputs of these layers
    assert config[IDS] == [1, 2, 4]  # vLLM: hidden states


def test_the_speculators_form_names_its_verifier_and_its_layer(tmp_path: Path) -> None:
    config = files.target_config(architectures=["LlamaForCausalLM"])
    config.name_or_path = "some/target"
    write_head(read(EAGLE3, tmp_path / "first"), tmp_path / "out", "speculators", target_config=config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(SPECULATORS.config) <= set(written)
    verifier = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    assert written["speculators_config"]["verifier"] == verifier
    assert written["transformer_layer_config"]["model_type"] == "llama"


def test_the_speculators_form_holds_the_embedding_of_a_target_that_is_shared(tmp_path: Path) -> None:
    head, target = read(files.eagle3(), tmp_path / "first"), files.target()
    head.share(target)
    write_head(head, tmp_path / "speculators", "speculators")
    write_head(head, tmp_path / "eagle3", "eagle3")
    again = read_head(tmp_path / "speculators", files.target_config())
    assert torch.equal(held(again)["embed_tokens.weight"], target.get_input_embeddings().weight)
    assert not read_head(tmp_path / "eagle3", files.target_config()).config.own_embeddings


def test_other_weights_are_written_in_place_of_the_heads_own(tmp_path: Path) -> None:
    head = read(EAGLE3, tmp_path / "first")
    doubled = {name: 2 * tensor for name, tensor in held(head).items()}
    write_head(head, tmp_path / "out", weights=doubled)
    again = read_head(tmp_path / "out", files.target_config())
    assert all(torch.equal(tensor, doubled[name]) for name, tensor in held(again).items())
    assert again.draft_ids is not None and again.draft_ids.tolist() == DRAFT_IDS
