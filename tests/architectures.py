"""Every class that AutoModelForCausalLM of transformers 5.24 can build, from the smallest configuration, and how each is served.

One row for each model type of the mapping, and one for each variant whose positions or cache are of another kind. `target` and
`draft` say how it goes: "served", or words of the refusal. `test_architectures.py` holds them against plain `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.tiny_models import CACHE, random_model

TABLE_OF = "5.24"  # the release of transformers whose classes are listed
SERVED = "served"
PLAIN = "served without drafting"  # equal, but no round has room

VOCAB = 96
LIMIT = 32  # positions: tables of learned ones end here
WINDOW = 8  # of sliding and chunked attention, shorter than every prompt

# Values for the fields of those names, wherever a configuration has them.
TINY: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 32)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), LIMIT)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 16)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1)
    | dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "sliding_window"), 8)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "index_topk"), 8)
    | dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "state_size", "attention_chunk_size"), 8)
    | dict(vocab_size=VOCAB, num_key_value_heads=2, num_experts_per_tok=2, index_n_heads=2, is_decoder=True)
    | dict(mamba_n_heads=4, mamba_d_head=16, linear_num_key_heads=2, linear_num_value_heads=4)
    # Weights so wide that the logits of random models differ clearly from token to token.
    | dict(initializer_range=0.3, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None)
)


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and how it is served."""

    name: str  # the model type, and after a blank what the variant has of its own
    positions: str  # how the model knows the places of its tokens
    cache: str  # kinds of the layers of its cache
    target: str  # "served", "served without drafting", or words of the refusal
    draft: str  # "served", or words of the refusal
    arguments: dict[str, Any]  # for the configuration, beside TINY; None for an argument of TINY that must stay away
    reason: str = ""  # why it cannot be built
    every_run: bool = False  # among those that run without the marker

    @property
    def model_type(self) -> str:
        return self.name.split()[0]

    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.model_type](**tiny(self.model_type, **self.arguments))

    def build(self, seed: int = 0) -> PreTrainedModel:
        auto = AutoModelForImageTextToText if self.positions == "mrope, images" else AutoModelForCausalLM
        return random_model(self.config(), seed, auto)


def tiny(model_type: str, **arguments: Any) -> dict[str, Any]:
    """Arguments of a small configuration of that type. An older transformers may not know it: then its row is skipped."""
    known = {f.name for f in fields(CONFIG_MAPPING[model_type])} if model_type in CONFIG_MAPPING else set()
    found = {name: value for name, value in TINY.items() if name in known and arguments.get(name, ...) is not None}
    return found | {name: value for name, value in arguments.items() if value is not None}


def text(model_type: str, **arguments: Any) -> dict[str, Any]:
    """A tiny text configuration inside of another one."""
    return {"model_type": model_type} | tiny(model_type, **arguments)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def _row(
    name: str,
    positions: str,
    cache: str = "",
    target: str = SERVED,
    draft: str = SERVED,
    reason: str = "",
    every_run: bool = False,
    **arguments: Any,
) -> Architecture:
    return Architecture(name, positions, cache, target, draft, arguments, reason, every_run)


# fmt: off
ARCHITECTURES = [
    _row("afmoe", "rope", "sliding", every_run=True),
    _row("apertus", "rope", "full"),
    _row("apertus1p5_text", "rope", "full"),
    _row("arcee", "rope", "full"),
    _row("aria_text", "rope", "full"),
    _row("axk1", "rope", "full", num_key_value_heads=4),
    _row("axk2", "rope", "indexed", target="served without drafting", draft="more than keys and values", every_run=True, num_key_value_heads=4),
    _row("bailing_hybrid", "rope", "full, linear", draft="recurrent state", num_key_value_heads=4, layer_types=["linear_attention", "full_attention"]),
    _row("bamba", "rope", "full, linear", draft="recurrent state", every_run=True, attn_layer_indices=[1]),
    _row("bart", "learned", "full", every_run=True),
    _row("beam", "rope", "full, sliding"),
    _row("bert", "learned", "full", every_run=True),
    _row("bert-generation", "learned", "full"),
    _row("big_bird", "learned", "full"),
    _row("bigbird_pegasus", "learned", "full"),
    _row("biogpt", "learned", "full"),
    _row("bitnet", "rope", "full"),
    _row("blenderbot", "learned", "full"),
    _row("blenderbot-small", "learned", "full"),
    _row("bloom", "alibi", "full", every_run=True),
    _row("blt", "rope", reason="its forward reads bytes through four models; no tiny one was found"),
    _row("camembert", "learned", "full"),
    _row("codegen", "rope", "full", every_run=True, rotary_dim=4),
    _row("cohere", "rope", "full"),
    _row("cohere2", "rope", "sliding", every_run=True),
    _row("cohere2_moe", "rope", "sliding"),
    _row("cohere_compass_text", "rope", "full, sliding", layer_types=["sliding_attention", "full_attention"], rope_parameters={k: {"rope_type": "default", "rope_theta": 1e4} for k in ("sliding_attention", "full_attention")}),
    _row("cpmant", "relative", "full", target="served without drafting", draft="entries in its KV cache", every_run=True, dim_head=8, dim_ff=64, prompt_length=4),
    _row("ctrl", "sinusoidal", "full", every_run=True, dff=64),
    _row("cwm", "rope", "full, sliding", every_run=True),
    _row("data2vec-text", "learned", "full"),
    _row("dbrx", "rope", "full", every_run=True, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}),
    _row("deepseek_v2", "rope", "full", every_run=True, num_key_value_heads=4),
    _row("deepseek_v3", "rope", "full", every_run=True, num_key_value_heads=4),
    _row("deepseek_v32", "rope", "indexed", target="served without drafting", draft="more than keys and values", every_run=True, num_key_value_heads=4),
    _row("deepseek_v4", "rope", "DeepseekV4HCACache", target=PLAIN, draft="recurrent state", every_run=True),
    _row("diffllama", "rope", "full"),
    _row("doge", "rope", "sliding", every_run=True),
    _row("dory", "rope", "full, sliding", num_hidden_layers=4, n_input_layers=1, n_output_layers=1),
    _row("dots1", "rope", "full"),
    _row("dots3_note", "rope", reason="its vision tower has per-layer settings for 42 layers; no tiny one was found (dots3_note_text is the same class)"),
    _row("dots3_note_text", "rope", "indexed", target="served without drafting", draft="more than keys and values", num_key_value_heads=4),
    _row("electra", "learned", "full"),
    _row("emu3", "rope", "full", text_config=text("emu3_text_model")),
    _row("ernie", "learned", "full"),
    _row("ernie4_5", "rope", "full"),
    _row("ernie4_5_moe", "rope", "full"),
    _row("exaone", "rope", "full"),
    _row("exaone4", "rope", "sliding"),
    _row("exaone_moe", "rope", "sliding"),
    _row("falcon", "rope", "full", every_run=True),
    _row("falcon alibi", "alibi", "full", every_run=True, alibi=True),
    _row("falcon new-decoder", "rope", "full", new_decoder_architecture=True, num_kv_heads=2),
    _row("falcon_h1", "rope", "linear with full", draft="recurrent state", every_run=True, mamba_d_ssm=64),
    _row("falcon_mamba", "none", "linear", target=PLAIN, draft="recurrent state", every_run=True),
    _row("flex_olmo", "rope", "full"),
    _row("flint", "rope", "full"),
    _row("fuyu", "rope", "full", text_config=text("persimmon"), patch_size=2),
    _row("gemma", "rope", "full"),
    _row("gemma2", "rope", "full, sliding", every_run=True),
    _row("gemma2 past-window", "rope", "full, sliding", layer_types=["full_attention", "sliding_attention"]),
    _row("gemma3", "rope", "sliding", every_run=True, text_config=text("gemma3_text"), vision_config=VISION, mm_tokens_per_image=4),
    _row("gemma3_text", "rope", "sliding"),
    _row("gemma3_text mixed", "rope", "full, sliding", every_run=True, num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    _row("gemma3n", "rope", reason="its vision tower needs the package timm (gemma3n_text is the same language model)"),
    _row("gemma3n_text", "rope", "full, shared, sliding", every_run=True, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[64] * 4),
    _row("gemma4", "rope", "full, sliding", text_config=text("gemma4_text", num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0)),
    _row("gemma4_assistant", "rope", reason="a draft head that reads its target's cache, no model of its own"),
    _row("gemma4_text", "rope", "full, shared, sliding", every_run=True, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_experts=None, moe_intermediate_size=None),
    _row("gemma4_unified", "rope", "full, sliding", text_config=text("gemma4_unified_text")),
    _row("gemma4_unified_assistant", "rope", reason="a draft head that reads its target's cache, no model of its own"),
    _row("gemma4_unified_text", "rope", "full, sliding"),
    _row("git", "learned", "full", draft="No adapter fits", vision_config=VISION),
    _row("glm", "rope", "full"),
    _row("glm4", "rope", "full"),
    _row("glm4_moe", "rope", "full", every_run=True),
    _row("glm4_moe_lite", "rope", "full", num_key_value_heads=4),
    _row("glm_moe_dsa", "rope", "indexed", target="served without drafting", draft="more than keys and values", num_key_value_heads=4),
    _row("got_ocr2", "rope", "full", text_config=text("qwen2"), vision_config=VISION | {"image_size": 32, "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [0], "window_size": 2}),
    _row("gpt-sw3", "learned", "full"),
    _row("gpt2", "learned", "full", every_run=True),
    _row("gpt_bigcode", "learned", "full", every_run=True),
    _row("gpt_neo", "learned", "full", every_run=True, attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    _row("gpt_neox", "rope", "full", every_run=True),
    _row("gpt_neox_japanese", "rope", "full"),
    _row("gpt_oss", "rope", "full, sliding", every_run=True),
    _row("gptj", "rope", "full", every_run=True, rotary_dim=4),
    _row("granite", "rope", "full"),
    _row("granite_swa", "rope", "full, sliding"),
    _row("granitemoe", "rope", "full"),
    _row("granitemoe_swa", "rope", "full, sliding"),
    _row("granitemoehybrid", "none", "full, linear", draft="recurrent state", every_run=True, layer_types=["mamba", "attention"], shared_intermediate_size=32),
    _row("granitemoeshared", "rope", "full"),
    _row("helium", "rope", "full"),
    _row("hrm_text", "rope", "full"),
    _row("hunyuan_v1_dense", "rope", "full"),
    _row("hunyuan_v1_moe", "rope", "full"),
    _row("hy_v3", "rope", "full"),
    _row("hy_v4", "rope", "indexed", target="served without drafting", draft="more than keys and values", every_run=True),
    _row("hyperclovax", "rope", "full"),
    _row("inkling2_loop_text", "relative", "linear with sliding", draft="more than keys and values", unpadded_vocab_size=VOCAB),
    _row("inkling2_text", "relative", "linear with sliding", draft="more than keys and values", every_run=True, unpadded_vocab_size=VOCAB),
    _row("inkling_text", "relative", "linear with sliding", draft="more than keys and values"),
    _row("internlm3", "rope", "full"),
    _row("iquestcoder", "rope", "full"),
    _row("jais2", "rope", "full"),
    _row("jamba", "none", "full, linear", target=PLAIN, draft="recurrent state", every_run=True, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    _row("jetmoe", "rope", "full"),
    _row("kimi_linear", "none", "full, linear", draft="recurrent state", num_key_value_heads=4, layer_types=["linear_attention", "full_attention"], linear_head_dim=8, linear_num_heads=4),
    _row("kolibri1", "rope", "sliding"),
    _row("laguna", "rope", "full"),
    _row("lara_mini", "rope", "full, linear", draft="recurrent state", layer_types=["linear_attention", "full_attention"]),
    _row("lfm2", "rope", "full, linear", draft="more than keys and values", every_run=True, layer_types=["conv", "full_attention"], block_multiple_of=8),
    _row("lfm2_moe", "rope", "full, linear", draft="more than keys and values", layer_types=["conv", "full_attention"], num_dense_layers=1),
    _row("lfm3", "rope", "full, linear, sliding", draft="more than keys and values", every_run=True, layer_types=["conv", "sliding_attention", "full_attention"], num_hidden_layers=3),
    _row("llama", "rope", "full", every_run=True),
    _row("llama dynamic", "rope, dynamic", "full", every_run=True, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    _row("llama linear", "rope, linear", "full", every_run=True, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    _row("llama llama3", "rope, llama3", "full", every_run=True, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
    _row("llama yarn", "rope, yarn", "full", every_run=True, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}),
    _row("llama4", "rope", "sliding", text_config=text("llama4_text")),
    _row("llama4_text", "rope", "sliding", every_run=True),
    _row("llama4_text chunked", "rope, none in every other layer", "full, sliding", every_run=True, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
    _row("longcat_flash", "rope", "full", num_key_value_heads=4, zero_expert_num=2, expert_ffn_hidden_size=16, moe_topk=2, num_layers=1),
    _row("mamba", "none", "linear", target=PLAIN, draft="recurrent state"),
    _row("mamba2", "none", "linear", draft="recurrent state", every_run=True, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    _row("marian", "sinusoidal", "full"),
    _row("mbart", "learned", "full"),
    _row("megatron-bert", "learned", "full"),
    _row("mellum", "rope", "full"),
    _row("mimo_v2_flash", "rope", "full, sliding"),
    _row("minicpm3", "rope", "full", num_key_value_heads=4),
    _row("minimax", "rope", "full", target="instead of a transformers Cache", draft="more than keys and values", every_run=True),
    _row("minimax_m2", "rope", "full"),
    _row("minimax_m3_vl_text", "rope", "full"),
    _row("ministral", "rope", "sliding"),
    _row("ministral3", "rope", "sliding"),
    _row("mistral", "rope", "sliding", every_run=True),
    _row("mistral full", "rope", "sliding", sliding_window=None),
    _row("mixtral", "rope", "sliding", every_run=True),
    _row("mllama", "rope", "full", text_config=text("mllama_text_model", cross_attention_layers=[1])),
    _row("modernbert-decoder", "rope", "full, sliding", every_run=True),
    _row("moshi", "rope", "sliding", target="served without drafting", every_run=True),
    _row("moss_transcribe_diarize", "rope", "full", text_config=text("qwen3"), audio_config={"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 16, "vocab_size": 96}),
    _row("mpt", "alibi", "full", every_run=True, use_cache=True),
    _row("musicgen", "sinusoidal", reason="AutoModelForCausalLM hands the class a configuration that it does not take"),
    _row("musicgen_melody", "sinusoidal", reason="AutoModelForCausalLM hands the class a configuration that it does not take"),
    _row("mvp", "learned", "full"),
    _row("nanochat", "rope", "full"),
    _row("nemotron", "rope", "full"),
    _row("nemotron_h", "none", "full, linear, shared", target=PLAIN, draft="recurrent state", every_run=True),
    _row("olmo", "rope", "full"),
    _row("olmo2", "rope", "full"),
    _row("olmo3", "rope", "sliding", every_run=True),
    _row("olmo_hybrid", "rope", "full, linear", draft="recurrent state"),
    _row("olmoe", "rope", "full"),
    _row("openai-gpt", "learned", "full", draft=f"takes no {CACHE}", every_run=True),
    _row("opt", "learned", "full", every_run=True),
    _row("opt projected", "learned", "full", word_embed_proj_dim=16),
    _row("pegasus", "sinusoidal", "full", every_run=True),
    _row("persimmon", "rope", "full"),
    _row("phi", "rope", "full"),
    _row("phi3", "rope", "sliding"),
    _row("phi3 longrope", "rope, longrope", "sliding", every_run=True, original_max_position_embeddings=16, max_position_embeddings=64, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
    _row("phi4_multimodal", "rope", "sliding", vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "crop_size": 16}, audio_config={"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 32, "nemo_conv_channels": 32}),
    _row("phimoe", "rope", "sliding", every_run=True),
    _row("phimoe longrope", "rope, longrope", "sliding", original_max_position_embeddings=16, max_position_embeddings=64, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "short_mscale": 1.0, "long_mscale": 1.2, "original_max_position_embeddings": 16}),
    _row("plbart", "learned", "full"),
    _row("prophetnet", "learned", "full", target="served without drafting", draft="cannot read two tokens", num_decoder_layers=2, num_decoder_attention_heads=4, num_encoder_layers=2, num_encoder_attention_heads=4),
    _row("qwen2", "rope", "full"),
    _row("qwen2 window", "rope", "full, sliding", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]),
    _row("qwen2_5_vl", "mrope, images", "full", text_config=text("qwen2_5_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}), vision_config={"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]}, image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93),
    _row("qwen2_moe", "rope", "full"),
    _row("qwen2_vl", "mrope, images", "full", every_run=True, text_config=text("qwen2_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}), vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2}, image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93),
    _row("qwen3", "rope", "full", every_run=True),
    _row("qwen3_5", "mrope", "full, linear", draft="recurrent state", text_config=text("qwen3_5_text", layer_types=["linear_attention", "full_attention"])),
    _row("qwen3_5_moe", "mrope", "full, linear", draft="recurrent state", text_config=text("qwen3_5_moe_text", layer_types=["linear_attention", "full_attention"])),
    _row("qwen3_5_moe_text", "mrope", "full, linear", draft="recurrent state", layer_types=["linear_attention", "full_attention"]),
    _row("qwen3_5_text", "mrope", "full, linear", draft="recurrent state", every_run=True, layer_types=["linear_attention", "full_attention"]),
    _row("qwen3_moe", "rope", "full", every_run=True),
    _row("qwen3_next", "rope", "full, linear", draft="recurrent state", every_run=True, layer_types=["linear_attention", "full_attention"]),
    _row("qwen4_exp", "rope", "indexed, linear", draft="recurrent state", text_config=text("qwen4_exp_text", layer_types=["linear_attention", "full_attention"], hc_count=2, hc_lowrank=8, ngram_vocab_size_base=64, make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2, ple_embed_dim=8, ple_layer_ids=[1], eos_token_id=2)),
    _row("qwen4_exp_text", "rope", "indexed, linear", draft="recurrent state", every_run=True, layer_types=["linear_attention", "full_attention"], hc_count=2, hc_lowrank=8, ngram_vocab_size_base=64, make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2, ple_embed_dim=8, ple_layer_ids=[1], eos_token_id=2),
    _row("recurrent_gemma", "rope", "linear, sliding", target="recurrent state", draft="recurrent state", every_run=True, num_hidden_layers=3, attention_window_size=WINDOW, lru_width=32),
    _row("reformer", "axial", "no transformers cache", target="a state of its own from token to token", draft=f"takes no {CACHE}", every_run=True, axial_pos_embds_dim=(16, 16), axial_pos_shape=(8, 16), attention_head_size=8, attn_layers=("local", "lsh"), feed_forward_size=32, local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=4, max_position_embeddings=128),
    _row("rembert", "learned", "full"),
    _row("roberta", "learned", "full", every_run=True),
    _row("roberta-prelayernorm", "learned", "full"),
    _row("roc_bert", "learned", "full", pronunciation_embed_dim=8, pronunciation_vocab_size=96, shape_embed_dim=8, shape_vocab_size=96),
    _row("roformer", "sinusoidal", "full"),
    _row("rwkv", "none", "no transformers cache", target="recurrent state", draft="recurrent state", every_run=True),
    _row("sarvam_mla", "rope", "full", num_key_value_heads=4),
    _row("sarvam_moe", "rope", "full"),
    _row("seed_oss", "rope", "full"),
    _row("smollm3", "rope", "full"),
    _row("solar_open", "rope", "full"),
    _row("stablelm", "rope", "full"),
    _row("stablelm partial", "rope", "full", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    _row("starcoder2", "rope", "sliding"),
    _row("trocr", "learned", "full"),
    _row("vaultgemma", "rope", "full, sliding"),
    _row("whisper", "learned", "full", every_run=True),
    _row("xglm", "sinusoidal", "full", every_run=True),
    _row("xlm", "learned", "full", target=PLAIN, draft="2 entries in its KV cache", causal=True, embed_init_std=0.3, mask_token_id=5),
    _row("xlm-roberta", "learned", "full"),
    _row("xlm-roberta-xl", "learned", "full"),
    _row("xlnet", "relative", "no transformers cache", target="a state of its own from token to token", draft=f"takes no {CACHE}", every_run=True, d_inner=64, d_head=8),
    _row("xlstm", "none", "no transformers cache", target="recurrent state", draft="recurrent state", every_run=True, num_heads=2, hidden_size=128, chunk_size=8),
    _row("xmod", "learned", "full", default_language="en_XX"),
    _row("youtu", "rope", "full", num_key_value_heads=4),
    _row("zamba", "none", "linear, linear with full", target=PLAIN, draft="recurrent state", every_run=True, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, attention_head_dim=16, num_key_value_heads=4, use_mamba_kernels=False),
    _row("zamba2", "rope", "linear, linear with full", target=PLAIN, draft="recurrent state", every_run=True, num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], num_key_value_heads=4, use_mamba_kernels=False, n_mamba_heads=4, chunk_size=8, adapter_rank=4),
    _row("zaya", "rope", "linear with full", draft="recurrent state", every_run=True, num_experts_per_tok=1, router_hidden_size=16),
]
# fmt: on
