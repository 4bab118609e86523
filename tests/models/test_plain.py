"""What can be a draft: one that keeps keys and values for every token, with all of its weights on one device."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    ProphetNetConfig,
    XLMConfig,
    XLNetConfig,
)

from hf_onlinespec import DraftError, OnlineDraft, OnlineSpecConfig
from tests.conftest import tiny_llama

NO_CACHE = {
    "gpt1": OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64),
    "xlm": XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=64, n_words=32),
    "xlnet": XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=32),
    "prophetnet": ProphetNetConfig(
        vocab_size=32, hidden_size=16, num_decoder_layers=1, num_encoder_layers=1, decoder_ffn_dim=32,
        num_decoder_attention_heads=2, num_encoder_attention_heads=2, encoder_ffn_dim=32, max_position_embeddings=64,
        is_encoder_decoder=False,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", NO_CACHE.values(), ids=NO_CACHE)
def test_a_draft_without_a_cache_is_refused(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(DraftError, match="cache"):
        OnlineDraft(model)


def test_a_draft_without_weights_is_refused() -> None:
    with pytest.raises(DraftError, match="meta"):
        OnlineDraft(tiny_llama(2).to("meta"))


def test_an_offloaded_draft_is_refused_with_the_way_out() -> None:
    model = tiny_llama(2)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(DraftError, match=r"offloaded by accelerate.*device_map"):
        OnlineDraft(model)
    model = tiny_llama(2)
    add_hook_to_module(model, CpuOffload(execution_device="cpu"))
    with pytest.raises(DraftError, match="offloaded by accelerate"):
        OnlineDraft(model)


def test_a_draft_on_several_devices_is_refused_with_the_way_out() -> None:
    class Elsewhere(nn.Parameter):
        device = property(lambda self: torch.device("cpu", 1))  # one that every machine has

    model = tiny_llama(2)
    model.lm_head.weight = Elsewhere(model.lm_head.weight.detach())
    with pytest.raises(DraftError, match=r"spread over cpu, cpu:1.*device_map"):
        OnlineDraft(model)


SHARED = dict(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    vocab_size_per_layer_input=32, hidden_size_per_layer_input=8, sliding_window=16, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.6,
)  # fmt: skip
SHARES_KEYS = {
    "gemma3n": Gemma3nTextConfig(
        **SHARED, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, query_pre_attn_scalar=8
    ),
    "gemma4": Gemma4TextConfig(**SHARED, global_head_dim=8, num_global_key_value_heads=1),
}


@pytest.mark.parametrize("config", SHARES_KEYS.values(), ids=SHARES_KEYS)
def test_a_draft_whose_layers_share_keys_drafts_and_learns(target, config: PretrainedConfig) -> None:
    """Past its window, too; of itself everything is accepted before it has learned."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    settings = OnlineSpecConfig(rank=2, lookahead=3, update_every=1, replay_passes=0, memory_tokens=0)
    prompt = torch.arange(3, 13)[None]
    try:
        draft = OnlineDraft(model, settings)
    except DraftError as error:
        pytest.fail(str(error))
    plain = model.generate(prompt, do_sample=False, max_new_tokens=16)
    itself = model.generate(prompt, assistant_model=draft, onlinespec=False, do_sample=False, max_new_tokens=16)
    assert torch.equal(plain, itself) and draft.metrics.acceptance_rate == 1.0
    plain = target.generate(prompt, do_sample=False, max_new_tokens=10)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10))
    assert draft.metrics.updates == 1 and draft.metrics.skipped_updates == 0
