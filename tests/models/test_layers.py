"""Layers that are not what their names say are left out of adaptation, and an ensemble's gate follows the rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Glm4MoeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    OPTConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.gated_lora import GatedLora
from hf_onlinespec.models.layers import adaptable_layers
from hf_onlinespec.training.combining import combine
from tests.encoder_decoders import t5
from tests.tiny_models import SPOKEN, random_model, tiny_llama

SMALL = (SPOKEN | {"pad_token_id": 0}) | dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
DEEPSEEK = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama4": Llama4TextConfig(
        **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=32
    ),
    "phimoe": PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "deepseek": DeepseekV3Config(**SMALL, **EXPERTS, **MLA, **DEEPSEEK),
    "glm4_moe": Glm4MoeConfig(**SMALL, **EXPERTS, **DEEPSEEK, head_dim=8),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "jetmoe": JetMoeConfig(**SMALL, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "opt": OPTConfig(
        **SMALL | {"init_std": 0.6}, ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=True, dropout=0.0
    ),
    "falcon": FalconConfig(**SMALL, new_decoder_architecture=False, multi_query=True, alibi=False),
}
LEFT_OUT = {"llama4": "router ×2", "phimoe": "router ×2", "deepseek": "gate_proj ×2", "glm4_moe": "gate_proj ×2"}
TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [4, 4, 8, 11, 3, 0]])


def model_of(name: str) -> PreTrainedModel:
    return random_model(CONFIGS[name], 2)


def fault(model: PreTrainedModel, learner: str) -> str:
    """What goes wrong when a draft learns in a request; "" if it learned and the target said what it says alone."""
    target = tiny_llama(1, layers=2)
    try:
        draft = OnlineDraft(model, OnlineSpecConfig(lookahead=3, update_every=1, rank=2, learner=learner, experts=2))
        prompt = torch.tensor([[3, 14, 15, 9]])
        plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
        if not torch.equal(plain, target.generate(prompt, assistant_model=draft, max_new_tokens=8, do_sample=False)):
            return "the text differs"
    except Exception as error:
        return repr(error)
    return "" if draft.metrics.updates and not draft.metrics.skipped_updates else "it has not learned"


@pytest.mark.parametrize("name", ["deepseek", "glm4_moe", "llama4", "phimoe"])
def test_layers_that_are_not_what_their_names_say_do_not_end_the_call(name: str) -> None:
    assert fault(model_of(name), "optimistic") == ""


@pytest.mark.parametrize("name", ["jetmoe", "opt", "qwen2_moe"])
def test_an_ensemble_learns_where_rows_are_flattened(name: str) -> None:
    assert fault(model_of(name), "ensemble") == ""


@pytest.mark.parametrize(("name", "words"), LEFT_OUT.items())
def test_the_draft_says_what_is_left_out(name: str, words: str) -> None:
    draft = OnlineDraft(model_of(name), OnlineSpecConfig(target_modules=None))
    assert words in repr(draft) and type(draft.model.get_base_model()).__name__ in repr(draft)
    assert "left out" not in repr(OnlineDraft(tiny_llama(2)))


def test_layers_that_were_asked_for_are_left_out_by_name() -> None:
    model = model_of("llama4")
    draft = OnlineDraft(model, OnlineSpecConfig(target_modules=("router", "q_proj")))
    assert "2 adapted layers" in repr(draft) and "router ×2" in repr(draft)


def test_a_subclass_that_computes_w_x_keeps_its_adapter() -> None:
    """Falcon's linear layers have a forward of their own."""
    lora = GatedLora(model_of("falcon"), rank=2, alpha=2.0)
    assert len(lora.layers) == 2 * 4 + 2


@torch.no_grad()
def shaken(model: PreTrainedModel, blocks: int) -> GatedLora:
    lora = GatedLora(model, rank=2, alpha=2.0, blocks=blocks)
    lora.move(0.2 * torch.randn(lora.params.shape, generator=torch.Generator().manual_seed(5)))
    return lora


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|fan_in_fan_out).*")
@pytest.mark.parametrize("name", ["deepseek", "llama4"])
@torch.no_grad()
def test_plain_peft_loads_the_same_draft(name: str, tmp_path) -> None:
    lora = shaken(model_of(name), blocks=1)
    lora.model.save_pretrained(tmp_path, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = PeftModel.from_pretrained(model_of(name), tmp_path).eval()
    lora.fold()
    with lora.gated() as speaking:
        torch.testing.assert_close(speaking(TOKENS).logits, reloaded(TOKENS).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lora.folded_tree(TOKENS).logits, reloaded(TOKENS).logits, atol=1e-4, rtol=1e-4)


class Routed(nn.Module):
    """Two experts, each of which sees the tokens that are its own: their rows are no longer those of the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        size = inner.gate_proj.in_features
        self.shared = inner
        self.experts = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])  # (batch · length, size)
        out = self.shared(rows)
        first = rows[:, 0] > 0
        for expert, own in zip(self.experts, (first, ~first), strict=True):
            out[own] = out[own] + expert(rows[own])
        return out.view_as(hidden)


def routed_llama() -> PreTrainedModel:
    model = tiny_llama(2, layers=2)
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp)
    return model


def test_experts_that_see_a_selection_of_the_tokens_are_left_out_of_an_ensemble() -> None:
    assert fault(routed_llama(), "optimistic") == fault(routed_llama(), "ensemble") == ""
    assert "left out" not in repr(OnlineDraft(routed_llama()))
    assert "0 ×2, 1 ×2" in repr(OnlineDraft(routed_llama(), OnlineSpecConfig(learner="ensemble")))


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|fan_in_fan_out).*")
@torch.no_grad()
def test_plain_peft_loads_a_position_bias(tmp_path: Path) -> None:
    lora, texts = shaken(t5(), blocks=1), {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}
    lora.model.save_pretrained(tmp_path, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = PeftModel.from_pretrained(t5(), tmp_path).eval()
    lora.fold()
    with lora.gated() as speaking:
        for other in (lora.folded_tree, reloaded):
            torch.testing.assert_close(speaking(**texts).logits, other(**texts).logits, atol=1e-4, rtol=1e-4)
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert not torch.equal(lora.folded_tree.get_parameter(f"{bias}.weight"), t5().get_parameter(f"{bias}.weight"))


def test_the_position_bias_of_a_decoder_learns_by_default() -> None:
    """That of the encoder does not, and no ensemble's: it is looked up once for all rows of a batch."""
    biases = [name for name in adaptable_layers(t5()) if name.endswith("relative_attention_bias")]
    assert biases == ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias"]
    ensemble = OnlineSpecConfig(learner="ensemble", experts=2)
    assert "left out" not in repr(OnlineDraft(t5()))
    assert "relative_attention_bias (its rows are not" in repr(OnlineDraft(t5(), ensemble))


MIXED = {name: lambda name=name: model_of(name) for name in ("opt", "qwen2_moe", "jetmoe")}
MIXED["routed"] = routed_llama


@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
@torch.no_grad()
def test_rows_of_a_batch_are_the_experts_one_by_one(make) -> None:
    """Each row of a batch with its own weights is what these weights say alone, and what they say folded."""
    lora = shaken(make(), blocks=3)
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    tokens = torch.cat([TOKENS, TOKENS[:1]])
    with lora.gated(weights) as model:
        together = model(tokens).logits
    assert (together[0] - together[2]).abs().max() > 0.05
    for row, own in enumerate(weights):
        with lora.gated(own[None]) as model:
            alone = model(tokens[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
        lora.serve(own)
        lora.fold()
        folded = lora.folded_tree(tokens[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], folded, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(together[2], lora.tree(tokens[2:]).logits[0], atol=1e-4, rtol=1e-4)


def left_out(draft: OnlineDraft) -> str:
    """What a draft says of the layers that it leaves out."""
    return repr(draft).splitlines()[0].partition("left out: ")[2]


SERVED: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, ...] | None]] = {
    "named": (lambda: model_of("llama4"), "optimistic", ("router", "q_proj")),
    "an expert's name": (lambda: model_of("deepseek"), "optimistic", ("gate_proj", "o_proj")),
    "selected": (routed_llama, "ensemble", None),
    "named and selected": (routed_llama, "ensemble", ("experts.0", "experts.1", "o_proj", "lm_head")),
}


@pytest.mark.parametrize(("make", "learner", "layers"), SERVED.values(), ids=SERVED)
@torch.no_grad()
def test_layers_that_are_left_out_are_left_out_of_what_is_saved(
    make: Callable[[], PreTrainedModel], learner: str, layers: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """Loaded again, from its public version, and combined with itself it says the same."""
    settings = OnlineSpecConfig(lookahead=3, update_every=1, rank=2, alpha=2.0, learner=learner, target_modules=layers)
    target = tiny_llama(1, layers=2)
    try:
        draft = OnlineDraft(make(), settings)
        target.generate(TOKENS[:1], assistant_model=draft, max_new_tokens=8, do_sample=False)
    except Exception as error:
        pytest.fail(f"it does not learn: {error!r}")
    assert draft.metrics.updates
    live = draft(TOKENS).logits
    draft.save_pretrained(tmp_path / "whole")
    again = OnlineDraft.from_pretrained(tmp_path / "whole", make())
    assert torch.equal(again(TOKENS).logits, live)
    assert left_out(again) == left_out(draft) != ""
    from hf_onlinespec.share.public import public_version

    public_version(draft.artifact()).write(tmp_path / "public")
    for config in (None, OnlineSpecConfig(lookahead=3)):
        one = OnlineDraft.from_pretrained(tmp_path / "public", make(), config)
        torch.testing.assert_close(one(TOKENS).logits, live, atol=1e-4, rtol=1e-4)
    both = combine([draft.artifact(), one.artifact()], make())
    torch.testing.assert_close(both(TOKENS).logits, live, atol=1e-4, rtol=1e-4)
