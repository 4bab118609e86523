"""No round reaches where the target's positions end, or where they change what is computed before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BioGptConfig,
    CodeGenConfig,
    CTRLConfig,
    DeepseekV32Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from tests.conftest import answered, tiny_llama
from tests.tiny_models import CACHE

# Whatever the memory holds is drafted, four tokens at a time.
FIXED = OnlineSpecConfig(lookahead=4, update_every=1)
SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=4, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)


def made(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).float().eval()


def longrope(kind: str) -> PreTrainedModel:
    """Trained with 16 positions first, then with 64."""
    trained: dict[str, Any] = dict(max_position_embeddings=64, original_max_position_embeddings=16)
    if kind == "phi3 with a window":
        return made(Phi3Config(**SIZES, **trained, rope_parameters=LONG, sliding_window=8))
    if kind == "phi3 without long rope":  # drops its cache all the same
        return made(Phi3Config(**SIZES, **trained, sliding_window=8))
    if kind == "phi3":
        return made(Phi3Config(**SIZES, **trained, rope_parameters=LONG))
    if kind == "phimoe":
        scales = dict(short_mscale=1.0, long_mscale=1.2, original_max_position_embeddings=16)
        experts = dict(num_local_experts=2, num_experts_per_tok=1)
        return made(PhimoeConfig(**SIZES, **trained, **experts, rope_parameters=LONG | scales))
    parameters = LONG | dict(original_max_position_embeddings=16)
    return made(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=parameters))


TWICE = [{"onlinespec": FIXED}] * 2  # the second time, the memory knows the answer


def prompt(n: int) -> torch.Tensor:
    return torch.randint(3, 32, (1, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "llama"])
@pytest.mark.parametrize("n", [10, 16, 20], ids=["before", "at", "beyond"])
def test_no_round_crosses_the_length_at_which_long_rope_changes(kind, n) -> None:
    target = longrope(kind)
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
    plain = target.generate(prompt(n), **call)
    for arm in TWICE:
        ours = target.generate(prompt(n), **call, **arm)
        assert torch.equal(plain.sequences, ours.sequences)
        assert plain.past_key_values.get_seq_length() == ours.past_key_values.get_seq_length()
    if plain.past_key_values.get_seq_length() < n:
        pytest.skip(f"plain decoding of transformers {transformers.__version__} loses its prompt at the crossing")
    # Behind the crossing it is drafted again: 20 tokens in far fewer rounds.
    assert online_memory(target).metrics.last.rounds < 14


@pytest.mark.parametrize("kind", ["phi3 with a window", "phi3 without long rope"])
def test_a_cache_that_is_dropped_at_the_crossing_keeps_what_a_round_takes_back(kind) -> None:
    """The memory is wrong now and then: a round in the second half has to be rolled back in the new cache."""
    target = longrope(kind)
    for n in (10, 11, 12):
        plain = target.generate(prompt(n), do_sample=False, max_new_tokens=30)
        for _ in range(2):
            assert torch.equal(plain, target.generate(prompt(n), do_sample=False, max_new_tokens=30, onlinespec=FIXED))
    metrics = online_memory(target).metrics
    assert metrics.accepted_tokens < metrics.drafted_tokens


def test_sparse_attention_is_dense_for_as_long_as_it_is_drafted_for() -> None:
    """DeepSeek-V3.2 attends to the 16 likeliest keys."""
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)
    indexed = dict(index_topk=16, index_n_heads=2, index_head_dim=16, first_k_dense_replace=1)
    target = made(DeepseekV32Config(**SIZES, **latent, **experts, **indexed, max_position_embeddings=64))
    plain = target.generate(prompt(8), do_sample=False, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt(8), do_sample=False, max_new_tokens=30, onlinespec=FIXED))
    last = online_memory(target).metrics.last
    assert 0 < last.accepted_tokens < 8 and "selects keys" in online_memory(target).metrics.decisions.drafting


def test_a_neural_draft_is_kept_from_the_crossing_too() -> None:
    """The target drafting for itself: everything is accepted."""
    target = longrope("phi3")
    draft = OnlineDraft(target, OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0))
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=20)
    plain = target.generate(prompt(10), **call)
    assert torch.equal(plain, target.generate(prompt(10), **call, assistant_model=draft))


def test_a_padded_prompt_and_a_second_turn_cross_as_plain_decoding_does() -> None:
    target = longrope("phi3")
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt(8)], dim=-1)
    mask = (torch.arange(12) >= 4).long()[None]
    for arm in ({}, *TWICE):
        out = target.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20, **arm)
        first = target.generate(
            prompt(8), do_sample=False, max_new_tokens=4, return_dict_in_generate=True, use_cache=True
        )
        turn = torch.cat([first.sequences, prompt(2)], dim=-1)
        second = target.generate(turn, **{CACHE: first.past_key_values}, do_sample=False, max_new_tokens=16, **arm)
        if not arm:
            expected = out, second
        assert torch.equal(out, expected[0]) and torch.equal(second, expected[1])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_dynamic_rope_is_decoded_plain_beyond_the_length_it_was_trained_with(kind) -> None:
    dynamic = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    if kind == "llama":
        target = made(LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=dynamic))
    else:  # one set of parameters for each type of layer
        layers = {"full_attention": dynamic, "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
        target = made(
            Gemma3TextConfig(
                **SIZES,
                head_dim=8,
                sliding_window=8,
                max_position_embeddings=16,
                rope_parameters=layers,
                layer_types=["sliding_attention", "full_attention"],
            )
        )
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=20)
    plain = target.generate(prompt(8), **call)
    for arm in TWICE:
        assert torch.equal(plain, target.generate(prompt(8), **call, **arm))
    assert "dynamic RoPE" in online_memory(target).metrics.decisions.drafting


class StopAt(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 23)


SMALL = dict(vocab_size=32, bos_token_id=1, eos_token_id=None, pad_token_id=0)
GPT = dict(n_positions=24, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3) | SMALL
TABLES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=4),
    "codegen": CodeGenConfig(**GPT, rotary_dim=4),
    "gpt_bigcode": GPTBigCodeConfig(**GPT),
    "ctrl": CTRLConfig(**GPT, dff=32),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32, num_layers=1, num_heads=4, max_position_embeddings=24, attention_types=[[["global"], 1]], **SMALL
    ),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=24,
        word_embed_proj_dim=32, init_std=0.3, **SMALL,
    ),
    "biogpt": BioGptConfig(**SIZES, max_position_embeddings=24),
    "bart": BartConfig(
        d_model=32, decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=4, max_position_embeddings=24, init_std=0.3,
        is_decoder=True, is_encoder_decoder=False, forced_eos_token_id=None, **SMALL,
    ),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=24, is_decoder=True),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=24, use_cache=True, initializer_range=0.3, **SMALL),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # GPT-BigCode's, transformers 5.20
@pytest.mark.parametrize("config", TABLES.values(), ids=TABLES)
def test_drafting_ends_with_the_table_of_positions(config) -> None:
    """Plain decoding is stopped in time by a criterion that a round could run past."""
    target = made(config)
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=100, stopping_criteria=StoppingCriteriaList([StopAt()]))
    plain = target.generate(prompt(9), **call)
    for _ in range(2):
        with answered():
            ours = target.generate(prompt(9), **call, onlinespec=FIXED)
        assert torch.equal(plain, ours)
    assert online_memory(target).metrics.last.accepted_tokens > 0


def test_padding_takes_no_place_in_the_table() -> None:
    """Of 28 places 8 are padding: plain decoding fits a table of 24 rows."""
    target = made(TABLES["gpt2"])
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), prompt(9)], dim=-1)
    mask = (torch.arange(17) >= 8).long()[None]
    call: dict[str, Any] = dict(do_sample=False, attention_mask=mask, max_new_tokens=15)
    plain = target.generate(padded, **call)
    for _ in range(2):
        assert torch.equal(plain, target.generate(padded, **call, onlinespec=FIXED))


def test_a_rotary_target_is_drafted_for_beyond_its_stated_maximum() -> None:
    target = tiny_llama(1, layers=2, max_position_embeddings=16)
    plain = target.generate(prompt(9), do_sample=False, max_new_tokens=40)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt(9), do_sample=False, max_new_tokens=40, onlinespec=FIXED))
    assert online_memory(target).metrics.last.acceptance_length > 4
