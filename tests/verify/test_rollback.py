"""Caches that are not transformers' default one: rolled back as far as they can be, and as plain decoding leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import QuantizedLayer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError, online_memory
from tests.conftest import answered, tiny_llama
from tests.tiny_models import CACHE, SPOKEN, random_model, tiny_windowed

FIXED = OnlineSpecConfig(lookahead=4, update_every=1)
PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6]])
FULL = "the target's window of 8 tokens is full, and cannot be rolled back"
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=40, return_dict_in_generate=True)


class Rounded(QuantizedLayer):
    """To sixteen steps between the least and the largest number of each channel, over all tokens that are quantised together."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        least, most = tensor.aminmax(dim=-2, keepdim=True)
        step = (most - least) / 15 + 1e-9
        return ((tensor - least) / step).round().to(torch.uint8), step, least

    def _dequantize(self, quantized: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        steps, step, least = quantized
        return steps * step + least


def rounded(config: Any) -> DynamicCache:
    """Quantises again whenever twelve tokens are there that are not."""
    cache = DynamicCache(config=config)
    cache.layers = [Rounded(residual_length=12) for _ in cache.layers]
    return cache


def fp8(config: Any) -> QuantizedCache:
    try:
        return QuantizedCache(backend="fp8", config=config)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


CACHES = {
    "quantised again and again": rounded,
    "quantised token by token": fp8,
    "preallocated": lambda config: StaticCache(config=config, max_cache_len=64),
    "preallocated, to the last place": lambda config: StaticCache(config=config, max_cache_len=45),
}


def kept(cache: Any) -> list[Tensor]:
    """Whatever the layers of a cache hold of their tokens."""
    found: list[Tensor] = []
    for layer in cache.layers:
        for value in (vars(layer)[name] for name in ("keys", "values", "_quantized_keys") if name in vars(layer)):
            found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
    return [states[:, :, :44] if states.dim() == 4 else states for states in found]  # behind it nothing is read


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_cache_that_can_be_rolled_back_is_drafted_for_and_left_as_plain_leaves_it(make) -> None:
    target = tiny_llama(1, layers=2)
    plain = target.generate(PROMPT, **{CACHE: make(target.config)}, **CALL)
    draft = OnlineDraft(tiny_llama(2), FIXED)
    for arm in ({"onlinespec": FIXED}, {"onlinespec": FIXED}, {"assistant_model": draft}):
        with answered():
            ours = target.generate(PROMPT, **{CACHE: make(target.config)}, **CALL, **arm)
        assert torch.equal(plain.sequences, ours.sequences)
        assert int(ours[CACHE].get_seq_length()) == int(plain[CACHE].get_seq_length()) == plain.sequences.shape[1] - 1
        for one, other in zip(kept(plain[CACHE]), kept(ours[CACHE]), strict=True):
            assert torch.allclose(one.float(), other.float(), atol=1e-4)
    memory = online_memory(target).metrics
    assert memory.accepted_tokens > 10 and memory.decisions.drafting.startswith("lookahead=4 was asked for")
    assert draft.metrics.accepted_tokens < draft.metrics.drafted_tokens  # some had to be taken back


@pytest.mark.parametrize("make", [rounded, CACHES["preallocated"]], ids=["quantised", "preallocated"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_conversation_goes_on_in_the_same_cache(make, mode) -> None:
    def turns(**arm: Any) -> list[Tensor]:
        with mode():  # what is made in inference mode is written to outside of it
            cache = make(target.config)
            first = target.generate(PROMPT, **{CACHE: cache}, do_sample=False, max_new_tokens=14, **arm)
            more = torch.cat([first, PROMPT], dim=-1)
            return [first, target.generate(more, **{CACHE: cache}, do_sample=False, max_new_tokens=24, **arm)]

    target = tiny_llama(1, layers=2)
    plain = turns()
    for _ in range(2):
        with answered():
            ours = turns(onlinespec=FIXED)
        assert all(map(torch.equal, plain, ours))


def test_a_preallocated_window_is_rolled_back_until_it_is_full() -> None:
    target = tiny_windowed(1)
    arguments = dict(do_sample=False, max_new_tokens=24, cache_implementation="static", disable_compile=True)
    short = torch.tensor([[3, 14]])
    plain = target.generate(short, **arguments)
    draft = OnlineDraft(tiny_llama(2), FIXED)
    assert torch.equal(plain, target.generate(short, **arguments, assistant_model=draft))
    assert draft.metrics.drafted_tokens > 0 and draft.metrics.rounds > 24 - 8  # one token each from there on
    assert draft.metrics.decisions.drafting == FULL


def encoder_decoder() -> PreTrainedModel:
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config = T5Config(**SPOKEN | dict(pad_token_id=0, decoder_start_token_id=0), **sizes)
    return random_model(config, 1, AutoModelForSeq2SeqLM)


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, layers=2), encoder_decoder], ids=["decoder", "encoder–decoder"])
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampled"])
def test_a_static_cache_is_served_by_its_name(make, samples) -> None:
    target = make()
    call = dict(max_new_tokens=30, do_sample=samples, cache_implementation="static", disable_compile=True)
    for _ in range(2):
        torch.manual_seed(3)
        with answered():
            ours = target.generate(PROMPT, **call, onlinespec=FIXED)
    if not samples:
        assert torch.equal(ours, target.generate(PROMPT, **call))
    assert online_memory(target).metrics.accepted_tokens > 0


def test_a_batch_with_a_static_cache_is_decoded_plainly_and_said() -> None:
    target = tiny_llama(1, layers=2)
    call = dict(max_new_tokens=10, do_sample=False, cache_implementation="static", disable_compile=True)
    batch = torch.tensor([[3, 14, 15], [9, 2, 6]])
    plain = target.generate(batch, **call)
    assert torch.equal(plain, target.generate(batch, **call, onlinespec=FIXED))
    assert "a batch of 2 decoded plainly" in online_memory(target).metrics.decisions.drafting


def test_tokens_that_were_quantised_together_are_not_taken_back() -> None:
    """A cache that holds the whole prompt: its last token is read again."""
    target = tiny_llama(1, layers=2)
    cache = rounded(target.config)
    with torch.no_grad():
        target(PROMPT, **{CACHE: cache})
    with answered(), pytest.raises(UnsupportedError, match="quantised together"):
        target.generate(PROMPT, **{CACHE: cache}, max_new_tokens=5, do_sample=False, onlinespec=True)
