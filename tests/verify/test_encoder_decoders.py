"""Encoder–decoders as targets: what plain `generate` says, with the memory, in rounds of several tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from hf_onlinespec import OnlineSpecConfig, online_memory
from tests.encoder_decoders import bart, source, t5, whisper

MEMORY = OnlineSpecConfig(lookahead=5)  # a number: no clock decides what is drafted
ARGUMENTS = {"do_sample": False, "max_new_tokens": 24}


@pytest.mark.parametrize("build", [t5, bart, whisper])
def test_says_what_plain_generate_says_and_drafts(build: Callable[[int], PreTrainedModel]) -> None:
    target = build(0)
    inputs = source(target)
    plain = target.generate(**inputs, **ARGUMENTS)
    assert len(plain[0].unique()) > 4
    for _ in range(2):
        assert torch.equal(target.generate(**inputs, onlinespec=MEMORY, **ARGUMENTS), plain)
    assert online_memory(target).metrics.accepted_tokens > 10
