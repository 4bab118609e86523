"""The user's draft is not touched: its hooks are not run by us, what hangs on its modules is not copied, its weights are shared."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers import Phi3Config, PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.share.canaries import as_feedback, learn
from tests.conftest import tiny_llama
from tests.tiny_models import SPOKEN, random_model

SETTINGS = OnlineSpecConfig(rank=4, alpha=4.0, lookahead=3, update_every=1)
TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7]])


class Watcher:
    """Counts the calls of its hooks; holds a lock, as loggers and profilers do."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def hook(self, *args: object) -> None:
        with self.lock:
            self.calls += 1


def served(target: PreTrainedModel, model: PreTrainedModel, prompt: torch.Tensor) -> OnlineDraft:
    """A draft that has served one request as plain decoding does, and learned from it."""
    plain = target.generate(prompt, do_sample=False, max_new_tokens=10)
    draft = OnlineDraft(model, SETTINGS)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10))
    assert draft.metrics.updates > 0
    return draft


HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "pre-forward": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "pre-backward": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "state-dict": lambda module, hook: module.register_state_dict_post_hook(hook),
}


@pytest.mark.parametrize("locked", [False, True], ids=["counts", "holds a lock"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_of_the_user_stay_with_the_user(target, draft_model, prompt, register, locked: bool) -> None:
    watcher = Watcher()
    calls: list[int] = []
    hook = functools.partial(watcher.hook) if locked else lambda *args: calls.append(1)
    for module in (draft_model.model.layers[0], draft_model.lm_head):
        register(module, hook)
    try:
        draft = served(target, draft_model, prompt)
    except TypeError as error:  # what a lock answers to a copy
        pytest.fail(str(error))
    draft.model.state_dict()
    assert watcher.calls == len(calls) == 0
    loss = draft_model(TOKENS).logits.sum()
    loss.backward()
    draft_model.state_dict()
    assert watcher.calls + len(calls) > 0, "the user's own forwards still run them"


def test_what_hangs_on_a_module_is_not_copied(target, draft_model, prompt, tmp_path) -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.state = model, [torch.zeros(3)]

        def __deepcopy__(self, memo: dict[int, object]) -> Trainer:
            pytest.fail("the trainer was copied")

    with open(tmp_path / "log", "w") as file:
        draft_model.trainer = Trainer(draft_model)
        draft_model.model.layers[0].log = [file, threading.Lock(), (i for i in range(3))]
        draft_model.model.layers[0].mlp.notes = {"lock": threading.Lock()}
        try:
            served(target, draft_model, prompt)
        except TypeError as error:
            pytest.fail(str(error))


def test_modules_that_are_reached_by_another_way_are_ours_too(draft_model) -> None:
    """A list that hides a module from torch, and a method of a module as an attribute."""
    layer = draft_model.model.layers[0]
    layer.hidden, layer.method = [layer.mlp], layer.mlp.forward
    own = OnlineDraft(draft_model, SETTINGS).model.get_base_model().model.layers[0]
    assert own.hidden[0] is own.mlp is not layer.mlp
    assert own.method.__self__ is own.mlp


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm], ids=["old", "parametrized"])
def test_weights_that_are_computed_stay_computed(target, prompt, norm) -> None:
    model = tiny_llama(2)
    norm(model.model.layers[0].mlp.up_proj)
    with torch.no_grad():
        expected = model(TOKENS).logits
    try:
        draft = served(target, model, prompt)
    except Exception as error:
        pytest.fail(repr(error))
    with draft.trainable.serving(base=True) as base:
        torch.testing.assert_close(base(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        beside = draft.trainable.logits_with(draft.learning.adapter_params(), input_ids=TOKENS)
        torch.testing.assert_close(draft(TOKENS).logits, beside, atol=1e-4, rtol=1e-4)
    assert "up_proj (its weight is computed at every forward)" in repr(draft)


def test_of_hooks_by_accelerate_only_its_own_go_along(target, draft_model, prompt) -> None:
    class Counting(ModelHook):
        def __init__(self) -> None:
            self.calls, self.lock = 0, threading.Lock()

        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            self.calls += 1
            return args, kwargs

    counting = Counting()
    attach_align_device_hook(draft_model, execution_device=torch.device("cpu"))
    add_hook_to_module(draft_model.model.layers[0], counting)
    try:
        draft = served(target, draft_model, prompt)
    except TypeError as error:
        pytest.fail(str(error))
    assert counting.calls == 0
    own = draft.model.get_base_model().model.layers[0].self_attn
    assert "_hf_hook" in vars(own.q_proj.get_base_layer())


def test_weights_are_shared_also_where_hooks_are_not(draft_model) -> None:
    draft_model.register_forward_hook(Watcher().hook)
    try:
        tree = OnlineDraft(draft_model, SETTINGS).model.get_base_model()
    except TypeError as error:
        pytest.fail(str(error))
    theirs = {weight.data_ptr() for weight in draft_model.parameters()}
    assert {weight.data_ptr() for name, weight in tree.named_parameters() if "lora_" not in name} == theirs


LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)


def test_frequencies_that_a_forward_overwrites_are_the_draft_s_own() -> None:
    """Long RoPE writes the frequencies for the length at hand into a buffer, which another thread's forward may be reading."""
    shape = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config = Phi3Config(
        **SPOKEN | shape,
        vocab_size=32,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=LONG,
    )
    target = random_model(config, 1)
    draft = OnlineDraft(target, SETTINGS)  # of itself: its modules are the target's, but for what learns
    learn(draft, [as_feedback(torch.arange(1, 13), 6)])
    long = torch.arange(24)[None]
    with torch.no_grad():
        before = target(long).logits
        frequencies = {name: buffer.clone() for name, buffer in target.named_buffers()}
        draft(TOKENS)  # both of its trees
        learn(draft, [as_feedback(torch.arange(1, 13), 6)])
        assert len(frequencies) > 0
        assert all(torch.equal(buffer, frequencies[name]) for name, buffer in target.named_buffers())
        short = {name: buffer.clone() for name, buffer in draft.model.get_base_model().named_buffers()}
        target(long)
        assert all(torch.equal(buffer, short[name]) for name, buffer in draft.model.get_base_model().named_buffers())
        assert torch.equal(target(long).logits, before)
