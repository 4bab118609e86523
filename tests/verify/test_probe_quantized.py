"""Quantised targets: drafted for where a token's numbers are its own, decoded plainly where all tokens of a forward share a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, attach, online_memory
from hf_onlinespec.verify.probe_quantized import why_one_by_one
from tests.architectures import ARCHITECTURES
from tests.conftest import answered, tiny_llama

FIXED = OnlineSpecConfig(lookahead=4, update_every=1)
PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6]])
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=40)
Quantize = Callable[[PreTrainedModel], PreTrainedModel]


def steps(values: Tensor, scale: Tensor) -> Tensor:
    """To 127 steps of either sign, as int8 holds them."""
    return (values / scale * 127).round().clamp(-127, 127) / 127 * scale


class PerTensor(nn.Linear):
    """One scale for all activations of a forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(steps(inputs, inputs.abs().amax()), self.weight, self.bias)


class PerToken(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(steps(inputs, inputs.abs().amax(-1, keepdim=True)), self.weight, self.bias)


class Calibrated(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(steps(inputs, torch.tensor(4.0)), self.weight, self.bias)


class Outliers(nn.Linear):
    """As LLM.int8: columns with a large number in any token are left as they are."""

    def forward(self, inputs: Tensor) -> Tensor:
        large = (inputs.abs() > 6).flatten(0, -2).any(0)
        rounded = steps(inputs, inputs.abs().amax(-1, keepdim=True))
        return F.linear(torch.where(large, inputs, rounded), self.weight, self.bias)


class PickyKernel(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.abs().max() > 500:
            raise RuntimeError("no such kernel")
        return F.linear(inputs, self.weight, self.bias)


class AnyOrder(nn.Linear):
    """A kernel that adds up in any order: the same inputs give other last bits in every second forward."""

    forwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        AnyOrder.forwards += 1
        return F.linear(inputs, self.weight, self.bias) + AnyOrder.forwards % 2 * 1e-7


for cls in (PerTensor, PerToken, Calibrated, Outliers, PickyKernel, AnyOrder):
    cls.__module__ = "bitsandbytes.nn"  # of a library that is known: nothing else is tried


def of_class(cls: type[nn.Linear]) -> Quantize:
    def quantize(target: PreTrainedModel) -> PreTrainedModel:
        for layer in target.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = cls
        return target

    return quantize


class Weight(Tensor):
    """A weight that decides how activations are rounded, as torchao's do: the layers stay torch's own."""

    per_token = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        inputs, weight, *bias = args
        scale = inputs.abs().amax(-1, keepdim=True) if weight.per_token else inputs.abs().amax()
        return F.linear(steps(inputs, scale), weight.as_subclass(Tensor), *bias)


class TokenWeight(Weight):
    per_token = True


def of_weight(cls: type[Weight]) -> Quantize:
    def quantize(target: PreTrainedModel) -> PreTrainedModel:
        for layer in target.modules():
            if type(layer) is nn.Linear:
                layer.weight = nn.Parameter(layer.weight.detach().as_subclass(cls), requires_grad=False)
        return target

    return quantize


class Packed(nn.Module):
    """No linear layer of torch's: its weights are integers in buffers, as GPTQ and AWQ keep them."""

    together = False  # whether its activations are rounded with one scale for all tokens of a forward

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, weight = layer.in_features, layer.out_features, layer.weight.detach()
        self.register_buffer("scales", weight.abs().amax(-1, keepdim=True) / 127)
        self.register_buffer("qweight", (weight / self.scales).round().to(torch.int8))

    def forward(self, inputs: Tensor) -> Tensor:
        rounded = steps(inputs, inputs.abs().amax()) if self.together else inputs
        return F.linear(rounded, self.qweight * self.scales)


def packed(library: str, name: str, together: bool) -> Quantize:
    cls = type(name, (Packed,), {"__module__": library, "together": together})

    def quantize(target: PreTrainedModel) -> PreTrainedModel:
        for path, layer in list(target.model.named_modules()):
            if type(layer) is nn.Linear:
                target.model.set_submodule(path, cls(layer))
        return target

    return quantize


def by_torch(target: PreTrainedModel) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, dtype=torch.qint8)


def check(target: PreTrainedModel, drafts: bool, said: str) -> None:
    plain = target.generate(PROMPT, **CALL)
    for _ in range(2):
        with answered():
            ours = target.generate(PROMPT, **CALL, onlinespec=FIXED)
        if not drafts:
            assert torch.equal(plain, ours)
    metrics = online_memory(target).metrics
    assert (metrics.drafted_tokens > 0) == drafts
    assert said in metrics.decisions.drafting


TOGETHER = "quantises the tokens of a forward together"


@pytest.mark.filterwarnings("ignore")  # torch says that its quantisation moves to torchao
@pytest.mark.parametrize(
    ("quantize", "drafts", "said"),
    [
        (by_torch, False, f"{TOGETHER} (Linear model.layers.0.self_attn.q_proj)"),
        (of_class(PerTensor), False, TOGETHER),
        (of_class(Outliers), False, TOGETHER),
        (of_weight(Weight), False, f"{TOGETHER} (Linear "),
        (of_class(PickyKernel), False, "could not be tried (model.layers.0.self_attn.q_proj): RuntimeError"),
        (of_class(PerToken), True, ""),
        (of_class(Calibrated), True, ""),
        (of_class(AnyOrder), True, ""),
        (of_weight(TokenWeight), True, ""),
    ],
    ids=[
        "torch.ao",
        "per tensor",
        "outliers",
        "weights",
        "a kernel fails",
        "per token",
        "calibrated",
        "added up in any order",
        "weights per token",
    ],
)
def test_a_quantised_target_is_drafted_for_where_each_token_is_computed_by_itself(quantize, drafts, said) -> None:
    check(quantize(tiny_llama(1, layers=2)), drafts, said)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM"),
        ("optimum.quanto.nn.qlinear", "QLinear"),
    ],
)
def test_layers_of_libraries_that_are_not_installed_are_tried_as_all_others(library, name, together) -> None:
    target = packed(library, name, together)(tiny_llama(1, layers=2))
    check(target, not together, f"{TOGETHER} ({name} model.layers.0.self_attn.q_proj)" if together else "")


def test_a_target_that_is_quantised_between_two_calls_is_tried_again() -> None:
    target = tiny_llama(1, layers=2)
    check(target, True, "lookahead=4")
    of_weight(Weight)(target)
    plain = target.generate(PROMPT, **CALL)
    drafted = online_memory(target).metrics.drafted_tokens
    assert torch.equal(plain, target.generate(PROMPT, **CALL, onlinespec=FIXED))
    assert online_memory(target).metrics.drafted_tokens == drafted


def test_a_router_that_is_a_linear_layer_of_its_own_class_is_not_quantised() -> None:
    target = next(row for row in ARCHITECTURES if row.name == "phimoe").build()
    assert any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in target.modules())
    assert why_one_by_one(target, torch.device("cpu")) == ""


def test_one_layer_of_many_is_enough_and_is_named() -> None:
    target = tiny_llama(1, layers=3)
    target.model.layers[2].mlp.down_proj.__class__ = PerTensor
    check(target, False, "PerTensor model.layers.2.mlp.down_proj")


def test_nobodys_hooks_hear_of_the_trial_and_the_request_draws_its_own_numbers() -> None:
    target, heard = of_class(PerToken)(tiny_llama(1)), []
    target.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, out: heard.append(float(args[0].abs().max()))
    )
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    target.generate(PROMPT, **CALL, onlinespec=FIXED)
    assert torch.equal(torch.rand(1), expected) and max(heard) < 100


def test_attached_and_in_batches_it_runs_plain_too() -> None:
    target = of_class(PerTensor)(tiny_llama(1, layers=2))
    batch = torch.tensor([[3, 14, 15], [9, 2, 6]])
    plain = [target.generate(prompt, **CALL) for prompt in (PROMPT, batch)]
    draft = OnlineDraft(tiny_llama(2), FIXED)
    attach(target, draft)
    for prompt, expected in zip((PROMPT, batch), plain, strict=True):
        assert torch.equal(expected, target.generate(prompt, **CALL))
        assert TOGETHER in draft.metrics.decisions.drafting
    assert draft.metrics.drafted_tokens == 0
