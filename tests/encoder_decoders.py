"""Tiny random encoder–decoders that still say something else at most tokens, and what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.architectures import tiny
from tests.tiny_models import random_model

START = 2  # the token that every answer begins with
VOCAB = 96
FRAMES = 20  # of speech
_BASE: dict[str, Any] = dict(is_decoder=None, tie_word_embeddings=False, decoder_start_token_id=START)
BART = _BASE | dict(forced_eos_token_id=None)
T5 = _BASE | dict(d_kv=8, d_ff=64, num_decoder_layers=2, initializer_factor=2.0)
WHISPER = _BASE | dict(max_target_positions=32, max_source_positions=FRAMES // 2, num_mel_bins=8, eos_token_id=0)

# What a layer adds to its input. Post-norm layers would say the same at every token, were it as large as the embedding.
_ADDED = ("out_proj.weight", "fc2.weight")


def encoder_decoder(model_type: str, seed: int = 0, **arguments: Any) -> PreTrainedModel:
    """A tiny model of that type, in float32, without a token that ends an answer."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**tiny(model_type, **arguments))
    auto = AutoModelForSpeechSeq2Seq if "num_mel_bins" in arguments else AutoModelForSeq2SeqLM
    model = random_model(config, seed, auto)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_ADDED):
                parameter.mul_(0.2)
        head = model.get_output_embeddings()  # T5's is the embedding, whatever its configuration says
        head.weight = nn.Parameter(torch.randn_like(head.weight))
    model.generation_config.decoder_start_token_id = START
    return model


def bart(seed: int = 0, **arguments: Any) -> PreTrainedModel:
    return encoder_decoder("bart", seed, **(BART | arguments))


def m2m(seed: int = 0, **arguments: Any) -> PreTrainedModel:
    return encoder_decoder("m2m_100", seed, **(BART | arguments))


def t5(seed: int = 0, **arguments: Any) -> PreTrainedModel:
    return encoder_decoder("t5", seed, **(T5 | arguments))


def whisper(seed: int = 0, **arguments: Any) -> PreTrainedModel:
    return encoder_decoder("whisper", seed, **(WHISPER | arguments))


def source(model: PreTrainedModel, rows: int = 1, seed: int = 5) -> dict[str, Tensor]:
    """What `rows` sequences read: speech, or texts of different lengths, padded on the right."""
    numbers = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(rows, 8, FRAMES, generator=numbers)}
    tokens = torch.randint(5, VOCAB - 5, (rows, 10), generator=numbers)
    mask = torch.ones_like(tokens)
    for row in range(1, rows):
        mask[row, 10 - 2 * row :] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}
