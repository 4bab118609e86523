"""`pipeline("automatic-speech-recognition")` with an attached Whisper: the text and the times of plain `generate`, in rounds of several tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

from hf_onlinespec import OnlineSpecConfig
from hf_onlinespec.generation.attachment import attached

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
WINDOW_S = 2  # of speech in one piece
RATE = 16_000


@pytest.fixture(scope="module")
def pipe() -> AutomaticSpeechRecognitionPipeline:
    """A random Whisper of two layers that hears two seconds at a time, and writes bytes and times."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    times = [f"<|{i * 0.02:.2f}|>" for i in range(50 * WINDOW_S + 1)]
    tokenizer.add_tokens([*SPECIAL, *times], special_tokens=True)
    end, start, *_, no_times = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        num_mel_bins=8,
        max_source_positions=50 * WINDOW_S,
        max_target_positions=64,
        init_std=1.0,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
        **heads,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.no_timestamps_token_id = no_times
    model.generation_config.is_multilingual = False
    model.generation_config.max_initial_timestamp_index = 10
    model.generation_config.max_length = 40
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=WINDOW_S)
    return pipeline("automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=extractor)


@pytest.mark.parametrize("seconds", [1, 3])
def test_says_what_a_plain_pipeline_says(pipe: AutomaticSpeechRecognitionPipeline, seconds: int) -> None:
    sound = np.random.default_rng(seconds).standard_normal(seconds * RATE).astype(np.float32)
    call = {"return_timestamps": True, "generate_kwargs": {"num_beams": 1}}
    plain = pipe(sound.copy(), **call)
    assert len(plain["text"]) > 5
    with attached(pipe.model, config=OnlineSpecConfig(lookahead=4)) as memory:
        before = memory.metrics.accepted_tokens
        for _ in range(2):  # the second time out of the memory
            assert pipe(sound.copy(), **call) == plain
        assert memory.metrics.accepted_tokens > before + 10
