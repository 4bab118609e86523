"""The fuzzer's models: targets and drafts whose windows, tables and ropes end within the lengths of its requests; and tokenizers."""

from __future__ import annotations

import copy
import random
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast, WhisperForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is not installed

from tests.encoder_decoders import bart, m2m, t5, whisper
from tests.tiny_models import random_model, tiny_llama
from tests.tokenizers import strings

LETTERS = string.ascii_letters + string.digits + "+/"  # what the tokens stand for
VOCAB = len(LETTERS)
PADDED = 72  # the same vocabulary with rows that no token uses

# Beside BASE. Windows, tables and ropes end within the lengths of the requests, 4 to 60 tokens.
BASE: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.4)
LLAMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
LLAMA |= dict(head_dim=8, max_position_embeddings=128)
GPT2 = dict(n_embd=16, n_layer=1, n_head=2, n_positions=40)
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, two layers": ("llama", LLAMA | {"num_hidden_layers": 2}),
    "llama, padded vocabulary": ("llama", LLAMA | {"vocab_size": PADDED}),
    "llama, dynamic rope": (
        "llama",
        LLAMA
        | {
            "max_position_embeddings": 20,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral, window": ("mistral", LLAMA | {"sliding_window": 8}),
    "gemma3, mixed windows": (
        "gemma3_text",
        LLAMA | {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3, wide windows": (  # most rows of a batch never reach their end
        "gemma3_text",
        LLAMA | {"num_hidden_layers": 2, "sliding_window": 112, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4, chunks": (
        "llama4_text",
        LLAMA
        | {
            "num_hidden_layers": 2,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
        },
    ),
    "phi3, long rope": (
        "phi3",
        LLAMA | {"max_position_embeddings": 64, "original_max_position_embeddings": 20, "rope_parameters": LONG},
    ),
    "qwen3, experts": ("qwen3_moe", LLAMA | MOE),
    "gpt2": ("gpt2", GPT2),
    "gpt2, padded vocabulary": ("gpt2", GPT2 | {"vocab_size": PADDED}),
    "gpt_neox": ("gpt_neox", dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)),
    "opt": (
        "opt",
        dict(
            hidden_size=16,
            ffn_dim=32,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            init_std=0.4,
        ),
    ),
    "bloom, alibi": ("bloom", dict(hidden_size=16, n_layer=2, n_head=2)),
    "lfm2, convolutions": (
        "lfm2",
        LLAMA | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "qwen3_next, delta rule": (
        "qwen3_next",
        LLAMA
        | dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=0)
        | dict(mlp_only_layers=[0, 1], linear_num_key_heads=2, linear_num_value_heads=2)
        | dict(linear_key_head_dim=8, linear_value_head_dim=8),
    ),
    "falcon_h1, a state beside attention": (
        "falcon_h1",
        LLAMA | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
    ),
    "mamba": ("mamba", dict(hidden_size=16, num_hidden_layers=1, state_size=4)),
}
RECURRENT = ["qwen3_next, delta rule", "falcon_h1, a state beside attention", "mamba"]  # "mamba" is decoded plainly
TARGETS = [name for name in MODELS if name not in RECURRENT] + ["llama"] * 3 + ["gpt2", "mistral, window"]
DRAFTS = [name for name in MODELS if name not in (*RECURRENT, "lfm2, convolutions")]
ENCODER_DECODERS = {"t5": t5, "bart": bart, "m2m_100": m2m, "whisper": whisper}
WHISPER_DECODER = "whisper, a decoder alone"  # reads the target's encoder outputs
HEADED = ["llama", "llama, two layers", "llama, padded vocabulary", "mistral, window", "gemma3, mixed windows", "gpt2"]
PAIRS, SOME = "llama, pairs of letters", "llama, some letters"  # tokens of drafts with another tokenizer
EXITS = "first layer"  # of the target's own, as assistant_early_exit


@cache
def model_of(name: str, seed: int) -> PreTrainedModel:
    if name in ENCODER_DECODERS:
        return ENCODER_DECODERS[name](seed, vocab_size=VOCAB)
    if name == WHISPER_DECODER:
        torch.manual_seed(seed)
        model = WhisperForCausalLM(copy.deepcopy(model_of("whisper", 1).config)).eval()
        model.generation_config = copy.deepcopy(model_of("whisper", 1).generation_config)
        return model
    if name in (PAIRS, SOME):
        return tiny_llama(seed, vocab=len(tokenizer_of(name)), initializer_range=0.4)
    model_type, arguments = MODELS[name]
    return random_model(CONFIG_MAPPING[model_type](**BASE | arguments), seed)


@cache
def tokenizer_of(name: str = "") -> PreTrainedTokenizerFast:
    """Of one letter a token; or the tokenizer of such a draft, which has the letters in another order."""
    if not name:
        return _of_letters()
    letters = random.Random(name).sample(LETTERS, VOCAB if name == PAIRS else VOCAB - 4)
    pairs = tuple(zip(letters[:20], letters[20:40], strict=True)) if name == PAIRS else ()
    return strings(*letters, *(one + other for one, other in pairs), merges=pairs)


def _of_letters() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
