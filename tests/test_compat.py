"""What devices and versions differ in: a device without float64 is a kind of tensor here that notes it where it becomes one."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, VersionError
from hf_onlinespec._compat.modules import modules_of
from hf_onlinespec._compat.versions import OLDEST, SUPPORTED, refuse_older
from hf_onlinespec.adapt.learners import HEDGES
from hf_onlinespec.share.canaries import as_feedback, learn
from hf_onlinespec.share.memorization import examine
from hf_onlinespec.share.privacy import loss_gap

from .conftest import tiny_llama

made: list[str] = []  # functions that left float64 on the device


class OnMps(Tensor):
    """A tensor on a device that has no float64."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return out.as_subclass(Tensor)
        if isinstance(out, OnMps) and out.dtype == torch.float64:
            made.append(str(func))
        return out


@pytest.fixture
def on_mps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every Llama gives its logits on such a device."""
    forward = LlamaForCausalLM.forward

    def there(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits.as_subclass(OnMps)
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", there)
    made.clear()
    return made


def test_the_device_of_these_tests_notes_float64() -> None:
    made.clear()
    numbers = torch.ones(3).as_subclass(OnMps)
    assert numbers.cpu().double().dtype == torch.float64 and made == []
    numbers.double()
    assert len(made) == 1


def test_likelihoods_are_computed_without_float64_on_the_device(on_mps: list[str]) -> None:
    texts = [as_feedback(torch.randint(3, 32, (12,)), 6) for _ in range(4)]
    draft = OnlineDraft(
        tiny_llama(2), OnlineSpecConfig(rank=4, alpha=4.0, update_every=1, lookahead=3, memory_tokens=0)
    )
    assert loss_gap(draft, texts[:2], texts[2:]).texts == (2, 2)
    assert on_mps == []


def test_what_was_learned_is_examined_without_float64_on_the_device(request: pytest.FixtureRequest) -> None:
    texts = [as_feedback(torch.randint(3, 32, (12,)), 6) for _ in range(4)]
    draft = OnlineDraft(
        tiny_llama(2), OnlineSpecConfig(rank=4, alpha=4.0, update_every=1, lookahead=3, memory_tokens=0)
    )
    learn(draft, texts)
    on_mps = request.getfixturevalue("on_mps")
    assert examine(draft).texts == 4
    assert on_mps == []


def test_pip_and_our_errors_name_the_same_ranges() -> None:
    settings = ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    required = settings["options"]["install_requires"].split()
    for words in SUPPORTED.split(" with "):
        assert words.replace(" ", "") in required
    assert any(words.startswith("transformers>={}.{},".format(*OLDEST)) for words in required)


def test_an_older_transformers_is_refused_before_it_answers_otherwise_than_plain() -> None:
    with pytest.raises(VersionError, match=r"transformers 5\.17\.0 is too old.* >= 5\.18"):
        refuse_older("5.17.0")
    for newer in ("5.18.0", "5.25.0.dev0", "6.0"):
        refuse_older(newer)


@pytest.mark.parametrize("name", HEDGES)
def test_weights_over_experts_are_float64_on_the_cpu(name: str) -> None:
    made.clear()
    hedge = HEDGES[name](None)
    weights, _ = hedge.update(torch.tensor([0.25, 0.5, 1.0]).as_subclass(OnMps), hedge.init(3))
    assert made == [] and type(weights) is Tensor and weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(1.0) and weights[0] > weights[2]


def test_modules_are_found_once_wherever_they_are_held() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ModuleList([nn.Sequential(shared, nn.ReLU())]))
    model.register_module("nothing", None)
    found = modules_of(model)
    assert found[0] is model and len(found) == len(set(found)) and set(found) == set(model.modules())
