"""Shared fixtures: tiny random models for exactness, the embedded pair for learning, the data folder where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_onlinespec.embedded import EmbeddedPair, load_pair


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Tiny models on many threads run many times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def process_settings() -> Iterator[None]:
    """A command line sets what belongs to its process; the other tests get theirs back."""
    threads, verbosity, bar = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if bar:
        logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny_llama(seed: int, vocab: int = 32, layers: int = 1, hidden: int = 16, **kwargs: object) -> LlamaForCausalLM:
    """A random Llama whose logits are spread enough for sampling to matter."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(LlamaConfig(**(settings | kwargs))).eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_gpt2(seed: int, vocab: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


@pytest.fixture
def draft_model() -> PreTrainedModel:
    return tiny_llama(2)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[3, 14, 15, 9, 2, 6]])


@pytest.fixture(scope="session")
def pair() -> EmbeddedPair:
    """The embedded pair. Its draft is never handed to an OnlineDraft by `onlinespec=True`: use `load_draft()` for that."""
    return load_pair()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder named by HF_ONLINESPEC_DATA; tests that need it are skipped without it."""
    folder = os.environ.get("HF_ONLINESPEC_DATA")
    if not folder:
        pytest.skip("HF_ONLINESPEC_DATA is not set: it names a folder with models/ and streams/")
    return Path(folder)
