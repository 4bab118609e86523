"""A head's logits and hidden states against the references, over a prompt and rounds with rejections at every place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_onlinespec._compat.caches import crop
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.config import Eagle3Config
from hf_onlinespec.heads.eagle3 import Eagle3Head
from tests.heads import references

CLOSE = dict(rtol=0.0, atol=1e-5)
V, T = 64, 24
SIZES = dict(
    vocab_size=V, hidden_size=T, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.3,
)  # fmt: skip
EAGLE3: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": dict(norm_before_residual=True),
    "norm_before_fc": dict(norm_before_fc=True),
    "fc_norm": dict(fc_norm=True),
    "norm_output": dict(norm_output=True),
    "bias": dict(bias=True, attention_bias=True, mlp_bias=True),
    "two layers": dict(num_hidden_layers=2),
    "queries and keys normalised": dict(qk_norm=True),
    "another width": dict(hidden_size=32, target_hidden_size=T, own_embeddings=True),
    "reduced vocabulary": dict(draft_vocab_size=20),
    "five layers read": dict(reads=(1, 2, 3, 0, 4)),
}


def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=T, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def scrambled(head: Head) -> Head:
    """The head with random numbers in every parameter, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise / (4 * parameter.shape[-1]) ** 0.5)
    head.share(target())
    return head.eval()


def eagle3(**settings: Any) -> Eagle3Head:
    head = scrambled(Eagle3Head(Eagle3Config(**SIZES | {"reads": (1, 2, 3)} | settings)))
    assert isinstance(head, Eagle3Head)
    return head


def weights_of(head: Head) -> dict[str, Tensor]:
    embedding = target().get_input_embeddings().weight.detach()
    return {"embed_tokens.weight": embedding} | {k: v for k, v in head.state_dict().items() if v.is_floating_point()}


def settings_of(head: Head) -> dict[str, Any]:
    config = head.config.to_dict()
    return config | {"eps": config["rms_norm_eps"], "theta": config["rope_parameters"]["rope_theta"]}


@pytest.mark.parametrize("name", EAGLE3)
@torch.no_grad()
def test_eagle3_says_what_its_formulas_say_over_a_prompt_and_rounds_of_rejections(name: str) -> None:
    head = eagle3(**EAGLE3[name])
    weights, settings = weights_of(head), settings_of(head)
    generator = torch.Generator().manual_seed(2)

    def tokens(n: int) -> Tensor:
        return torch.randint(V, (2, n), generator=generator)

    def features(n: int) -> Tensor:
        return torch.randn(2, n, head.features_size, generator=generator)

    cache, past = None, None
    rows, length, drafted = 9, 0, 4
    for accepted in (0, 2, 1, 3, 4):  # of the drafted tokens; then the kept ones are read with their true features
        read, true = tokens(rows), features(rows)
        out = head(read, features=true, past_key_values=cache, use_cache=True)
        logits, hidden, past = references.eagle3(weights, settings, read, true, None, past)
        torch.testing.assert_close(out.logits, logits, **CLOSE)
        torch.testing.assert_close(out.hidden, hidden, **CLOSE)
        cache, length = out.past_key_values, length + rows
        ours, theirs, steps = out.hidden[:, -1:], hidden[:, -1:], past
        for _ in range(drafted):
            token = tokens(1)
            out = head(token, hidden=ours, past_key_values=cache, use_cache=True)
            logits, theirs, steps = references.eagle3(weights, settings, token, None, theirs, steps)
            torch.testing.assert_close(out.logits, logits, **CLOSE)
            torch.testing.assert_close(out.hidden, theirs, **CLOSE)
            ours = out.hidden
        assert cache.get_seq_length() == length + drafted
        crop(cache, drafted)
        rows = accepted + 1
