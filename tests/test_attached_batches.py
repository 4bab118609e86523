"""Batches of an attached model, whoever calls `generate`: pipelines, a trainer whose policy changes, adapters that are switched."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, pipeline

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, attach, attached, online_memory, online_metrics
from hf_onlinespec.commit.base import Draft
from hf_onlinespec.embedded import EmbeddedPair, load_draft, load_pair, prompts

from .conftest import tiny_llama
from .verify.test_batches import padded

FIXED = OnlineSpecConfig(lookahead=3, update_every=1, rank=2, alpha=2.0)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
BATCH = padded([[3, 14, 15], [9, 2, 6, 7, 8], [4, 4, 4, 4]])
# What PEFT says to a model that is not from the Hub, and what it still calls by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*", "ignore::DeprecationWarning")


def tokens_of(model: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], **call: Any) -> Tensor:
    found = model.generate(**inputs, **GREEDY, **call)
    assert isinstance(found, Tensor)
    return found


def compare(model: PreTrainedModel | PeftModel, draft: Draft) -> Tensor:
    """Greedy answers to a batch and to a row alone, which have to be those of plain decoding and served; returns those to the batch."""
    before = draft.metrics.requests
    alone = {name: values[1:2] for name, values in BATCH.items()}
    for inputs in (alone, BATCH):
        ours, plain = tokens_of(model, inputs), tokens_of(model, inputs, onlinespec=False)
        assert torch.equal(ours, plain)
    assert draft.metrics.requests == before + 2, draft.metrics.decisions.drafting
    return ours


# Pipelines


@pytest.mark.parametrize("with_draft", [False, True])
def test_a_pipeline_of_eight_rows_is_served(pair: EmbeddedPair, with_draft: bool) -> None:
    texts = [prompt[: len(prompt) - 3 * i] for i, prompt in enumerate(prompts("orders")[:10])]
    pipe = pipeline("text-generation", model=pair.target, tokenizer=pair.tokenizer)
    call: dict[str, Any] = dict(batch_size=8, max_new_tokens=12, do_sample=False)
    plain = pipe(texts, **call)
    online_memory(pair.target, anew=True)  # other tests have filled the one before
    with attached(pair.target, OnlineDraft(load_draft()) if with_draft else None):
        assert pipe(texts, **call) == plain
        metrics = online_metrics(pair.target)
        assert metrics.requests == 2 and metrics.new_tokens == 10 * 12 >= metrics.rounds > 0


# A trainer that samples from its policy


def as_a_trainer_leaves_it(policy: PreTrainedModel, way: str) -> None:
    """What TRL and accelerate make of a policy: training mode, a wrapped `forward`, autocast, checkpointing that is switched."""
    original = policy.forward

    @functools.wraps(type(policy).forward)
    def fused(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    policy.train()
    if way == "wrapped":
        policy.forward = types.MethodType(fused, policy)
    elif way == "autocast":
        inside = torch.autocast("cpu", dtype=torch.bfloat16)(type(policy).forward)
        policy.forward = types.MethodType(convert_outputs_to_fp32(types.MethodType(inside, policy).__func__), policy)
    elif way == "checkpointing":
        policy.gradient_checkpointing_enable()


@pytest.mark.parametrize("way", ["as it is", "wrapped", "checkpointing"])
def test_a_policy_that_changes_in_every_step_is_followed(way: str) -> None:
    """Sampled rollouts in training mode, left padding, equal prompts; after each step greedy answers are those of the policy as it is."""
    torch.manual_seed(0)
    policy = tiny_llama(1, layers=2)
    draft = attach(policy, tiny_llama(2), FIXED)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    rows = {name: values.repeat_interleave(2, dim=0) for name, values in BATCH.items()}
    rollout = GenerationConfig(
        max_new_tokens=12, do_sample=True, temperature=0.9, top_k=0, top_p=0.95, pad_token_id=0, disable_compile=True
    )
    said = []
    as_a_trainer_leaves_it(policy, way)
    for step in range(6):
        checkpointing = policy.is_gradient_checkpointing
        policy.gradient_checkpointing_disable()
        with torch.no_grad():
            sampled = policy.generate(**rows, generation_config=rollout)
            said.append(tokens_of(policy, BATCH))
            assert torch.equal(said[-1], tokens_of(policy, BATCH, onlinespec=False))
        assert policy.training and draft.metrics.requests == 2 * (step + 1), draft.metrics.decisions.drafting
        if checkpointing:
            policy.gradient_checkpointing_enable()
        assert isinstance(sampled, Tensor)
        rewarded = (sampled[:, rows["input_ids"].shape[1] :] == 7).float().sum(-1)
        logits = policy(sampled, attention_mask=(sampled != 0).long()).logits[:, :-1].log_softmax(-1)
        chances = logits.gather(-1, sampled[:, 1:, None]).squeeze(-1).mean(-1)
        optimizer.zero_grad()
        (-((rewarded - rewarded.mean()) * chances).mean()).backward()
        optimizer.step()
    assert draft.metrics.updates > 0 and draft.metrics.drafted_tokens > 0
    assert not torch.equal(said[0], said[-1])


def test_a_policy_whose_forward_enters_autocast_is_served() -> None:
    """Its weights are float32, and its logits differ as those of half precision do."""
    pair = load_pair()
    as_a_trainer_leaves_it(pair.target, "autocast")
    draft = attach(pair.target)
    texts = pair.tokenizer(prompts("shell")[4:6], padding=True, padding_side="left", return_tensors="pt")
    pair.target.generate(**texts, do_sample=False, max_new_tokens=4)
    assert draft.metrics.requests == 1, draft.metrics.decisions.drafting


def test_a_policy_with_dropout_is_served() -> None:
    policy = tiny_llama(1, layers=2)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    draft = attach(policy.train(), tiny_llama(2), FIXED)
    assert tokens_of(policy, BATCH).shape == (3, 21)
    assert draft.metrics.requests == 1 and draft.metrics.drafted_tokens > 0


# Adapters on the target


def lora(seed: int) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def test_adapters_on_the_target_are_switched_loaded_and_merged_between_calls(tmp_path) -> None:
    model = get_peft_model(tiny_llama(1, layers=2), lora(0), adapter_name="first").eval()
    draft = attach(model, tiny_llama(2), FIXED)
    first = compare(model, draft)
    model.save_pretrained(tmp_path)

    def second() -> None:
        model.add_adapter("second", lora(1))
        model.set_adapter("second")

    def loaded() -> None:
        model.load_adapter(tmp_path / "first", "loaded")
        model.set_adapter("loaded")

    steps: tuple[tuple[Callable[[], Any], bool], ...] = (
        (second, False),
        (lambda: model.set_adapter("first"), True),
        (model.merge_adapter, True),
        (model.unmerge_adapter, True),
        (lambda: model.delete_adapter("second"), True),
        (model.base_model.disable_adapter_layers, False),
        (model.base_model.enable_adapter_layers, True),
        (loaded, True),
    )
    for i, (step, as_first) in enumerate(steps):
        step()
        assert torch.equal(compare(model, draft), first) == as_first, i
    with model.disable_adapter():
        compare(model, draft)
    back = model.merge_and_unload()
    assert torch.equal(compare(back, draft), first)


def test_many_adapters_are_loaded_one_after_the_other() -> None:
    model = get_peft_model(tiny_llama(1, layers=2), lora(0), adapter_name="0").eval()
    draft = attach(model, tiny_llama(2), FIXED)
    for i in range(1, 12):
        model.add_adapter(str(i), lora(i))
        model.set_adapter(str(i))
        tokens_of(model, BATCH)
    assert draft.metrics.requests == 11, draft.metrics.decisions.drafting


def test_an_adapter_of_the_target_for_each_row_is_decoded_plainly() -> None:
    """PEFT counts the rows of each forward."""
    model = get_peft_model(tiny_llama(1, layers=2), lora(0), adapter_name="one").eval()
    model.add_adapter("two", lora(1))
    names = ["one", "two", "__base__"]
    plain = tokens_of(model, BATCH, adapter_names=names)
    draft = attach(model, tiny_llama(2), FIXED)
    for i in range(12):  # more than are tried
        tokens_of(model, {name: values[1:2] for name, values in BATCH.items()}, adapter_names=[names[i % 3]])
    assert draft.metrics.requests == 12
    assert torch.equal(plain, tokens_of(model, BATCH, adapter_names=names))
    assert draft.metrics.requests == 13 and "adapter_names=" in draft.metrics.decisions.drafting
    assert draft.metrics.last.plain_rounds == draft.metrics.last.new_tokens > 0


# Placed elsewhere, served elsewhere


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`")  # on "meta", transformers 5.18
@pytest.mark.parametrize("place", ["device_map", "offloaded"])
def test_a_target_that_accelerate_has_placed_is_served(place: str) -> None:
    target = tiny_llama(1, layers=2)
    if place == "offloaded":
        cpu_offload(target, torch.device("cpu"))
    else:
        dispatch_model(target, device_map={"": "cpu"}, force_hooks=True)
    draft = attach(target, tiny_llama(2), FIXED)
    compare(target, draft)
    assert draft.metrics.acceptance_length > 1


def test_continuous_batching_runs_plain() -> None:
    target = tiny_llama(1, layers=2)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=31)

    def answers() -> list[list[int]]:
        found = target.generate_batch(
            inputs=[[3, 14, 15], [9, 2, 6, 7, 8]],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=64),
        )
        return [found[name].generated_tokens for name in sorted(found)]

    plain = answers()
    draft = attach(target, tiny_llama(2), FIXED)
    assert answers() == plain and draft.metrics.requests == 0
