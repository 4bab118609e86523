"""Rows of different lengths are tried with a target that is not known to serve them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from hf_onlinespec import OnlineSpecConfig, online_memory
from hf_onlinespec._compat.caches import fresh_cache
from hf_onlinespec.verify.probe_rows import ROW_FORWARDS, needs_row_trial, why_one_length
from tests.tiny_models import CACHE

PLACES = 2  # of a picture
MEMORY = OnlineSpecConfig(lookahead=4)


class Widening(LlamaForCausalLM):
    """Its attention mask makes room for a picture, whether there is one or not, as GIT's does."""

    forwards = 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        Widening.forwards += 1
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] > input_ids.shape[1]:
            picture = attention_mask.new_ones(len(attention_mask), PLACES)
            attention_mask = torch.cat([picture, attention_mask[:, :-PLACES]], dim=1)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **inputs)


def widening(**more: Any) -> Widening:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = Widening(LlamaConfig(vocab_size=64, **sizes, **settings, **more)).eval()
    assert model.generation_config is not None
    model.generation_config.pad_token_id = 0
    return model


def test_a_target_that_widens_the_mask_decodes_batches_plainly() -> None:
    target, prompts = widening(), torch.tensor([[5, 9, 14, 3, 27, 9], [8, 8, 40, 2, 5, 9]])
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": 12}
    plain = target.generate(prompts, **arguments)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompts, **arguments, onlinespec=MEMORY))
    metrics = online_memory(target, MEMORY).metrics
    assert "for rows of different lengths than for each alone" in metrics.decisions.drafting
    assert metrics.drafted_tokens == 0
    target.generate(prompts[:1], do_sample=False, max_new_tokens=12, onlinespec=MEMORY)
    assert metrics.drafted_tokens > 0  # a row alone has no holes


def test_a_target_with_dropout_is_tried_without_it() -> None:
    target, prompt = widening(attention_dropout=0.5).train(), torch.tensor([[5, 9, 14, 3]])
    with torch.no_grad():
        reason = why_one_length(target, prompt, {CACHE: fresh_cache(target.config)})
    assert "for rows of different lengths than for each alone" in reason
    assert all(module.training for module in target.modules())


def test_a_trial_takes_as_many_forwards_as_other_processes_are_told_of() -> None:
    target, prompt = widening(), torch.tensor([[5, 9, 14, 3]])
    inputs = {"attention_mask": torch.ones_like(prompt), CACHE: fresh_cache(target.config)}
    assert needs_row_trial(target, inputs)
    Widening.forwards = 0
    with torch.no_grad():
        assert why_one_length(target, prompt, inputs)
    assert Widening.forwards == ROW_FORWARDS and not needs_row_trial(target, inputs)
