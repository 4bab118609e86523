"""Random models that are small and still say something else at every token: for the tests, and for benchmarks that need any model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerateDecoderOnlyOutput

# What the KV cache is called in inputs and outputs; said here too, so that these tests can be run against earlier packages.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"

# No special tokens: an end of sequence would end most requests early, as a random model writes anything. Weights so wide that the
# logits are spread enough for sampling to matter.
SPOKEN: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.6)


def random_model(config: PretrainedConfig, seed: int, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A model of that configuration, in float32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = auto.from_config(copy.deepcopy(config)).float().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def tiny_llama(seed: int, vocab: int = 32, layers: int = 1, hidden: int = 16, **kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = SPOKEN | dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(LlamaConfig(**(settings | kwargs))).eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_windowed(seed: int, vocab: int = 32, window: int = 8) -> PreTrainedModel:
    """Its first layer attends to a window of tokens: where rows of a batch reach it, they cannot differ in length."""
    config = Gemma2Config(
        **SPOKEN,
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=window,
    )
    return random_model(config, seed)


def tiny_gpt2(seed: int, vocab: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab, n_positions=64, n_embd=16, n_layer=1, n_head=2, **SPOKEN)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    return model
