"""Compiled targets: as plain decoding says, and without a program for every number of tokens that is verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from tests.conftest import tiny_llama
from tests.verify.test_probe_quantized import TOGETHER
from tests.verify.test_rollback import FULL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quantised_and_compiled.md"

PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6]])
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=40)
SEVEN = OnlineSpecConfig(lookahead=7, update_every=1)
CHAINS = "chains only: the target LlamaForCausalLM is compiled, once for each shape of its inputs"


class Programs:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, program: Any, inputs: list[Tensor]) -> Any:
        self.made += 1
        return program.forward


def in_place(target: PreTrainedModel, backend: Any) -> dict[str, Any]:
    target.forward = torch.compile(target.forward, backend=backend)
    return {}


def preallocated(target: PreTrainedModel, backend: Any) -> dict[str, Any]:
    target.forward = torch.compile(target.forward, backend=backend, dynamic=False)
    return {"cache_implementation": "static"}


def by_method(target: PreTrainedModel, backend: Any) -> dict[str, Any]:
    target.compile(backend=backend)
    return {}


def by_layers(target: PreTrainedModel, backend: Any) -> dict[str, Any]:
    for layer in target.model.layers:
        layer.compile(backend=backend)
    return {}


def by_generate(target: PreTrainedModel, backend: Any) -> dict[str, Any]:
    """As `generate` compiles by itself on an accelerator."""
    config = CompileConfig(backend=backend, dynamic=False, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def read_by(target: PreTrainedModel) -> list[int]:
    """How many tokens each forward has read."""
    read: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        read.append(args[0].shape[1])

    target.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    return read


@pytest.mark.parametrize("way", [in_place, preallocated, by_method, by_layers, by_generate])
def test_a_compiled_target_reads_a_power_of_two_of_tokens(way) -> None:
    """Run as it is, which takes no program: what matters are the shapes."""
    target, draft = tiny_llama(1, layers=2), OnlineDraft(tiny_llama(2), SEVEN)
    read, call = read_by(target), way(target, "eager")
    with torch.compiler.set_stance("force_eager"):
        plain = target.generate(PROMPT, **CALL, **call)
        read.clear()
        for arm in ({"onlinespec": SEVEN}, {"onlinespec": SEVEN}, {"assistant_model": draft}):
            assert torch.equal(plain, target.generate(PROMPT, **CALL, **call, **arm))
    trial = {3} if way is by_generate else set()  # of a target with a hook; nothing is compiled in it there
    assert set(read) <= {PROMPT.shape[1], 1, 2, 4, 8} | trial and 8 in read
    memory = online_memory(target).metrics
    assert memory.accepted_tokens > 20 and draft.metrics.accepted_tokens < draft.metrics.drafted_tokens
    assert memory.decisions.drafting.endswith(CHAINS)


def test_rounds_take_a_program_for_each_power_of_two() -> None:
    made = []
    for arms in ([{}, {}], [{"onlinespec": SEVEN}, {"onlinespec": SEVEN}]):
        torch.compiler.reset()
        target, programs = tiny_llama(1), Programs()
        call = preallocated(target, programs)
        said = [target.generate(PROMPT, **CALL, **call, **arm) for arm in arms]
        assert torch.equal(said[0], said[1])
        made.append(programs.made)
    assert made[0] == 2  # of the prompt, and of one token
    assert 2 < made[1] <= made[0] + 3  # of 2, 4 and 8


def test_what_a_rollback_leaves_takes_no_programs_of_its_own() -> None:
    """With several heads, what is left of the keys lies apart in memory."""
    torch.compiler.reset()
    target, programs = tiny_llama(1, num_key_value_heads=2), Programs()
    in_place(target, programs)
    target.generate(PROMPT, do_sample=False, max_new_tokens=20, onlinespec=OnlineSpecConfig(lookahead=3))
    metrics = online_memory(target).metrics
    assert metrics.accepted_tokens < metrics.drafted_tokens
    assert programs.made <= 4  # of the prompt, and of 1, 2 and 4 tokens


def test_a_batch_of_a_compiled_target_is_decoded_plainly() -> None:
    target = tiny_llama(1)
    in_place(target, "eager")
    batch = torch.tensor([[3, 14, 15], [9, 2, 6]])
    with torch.compiler.set_stance("force_eager"):
        plain = target.generate(batch, **CALL)
        assert torch.equal(plain, target.generate(batch, **CALL, onlinespec=SEVEN))
    assert online_memory(target).metrics.decisions.drafting.endswith(CHAINS.removeprefix("chains only: "))


def test_the_page_quotes_the_reasons_that_are_given() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(reason in page for reason in (CHAINS, TOGETHER, FULL))
