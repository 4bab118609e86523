"""A class from elsewhere is tried before its first round, and drafted for only where several tokens at once give what single ones give."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import ModelOutput

from hf_onlinespec import OnlineSpecConfig, online_memory
from hf_onlinespec.measure.bench import ForwardClock
from tests.conftest import tiny_llama
from tests.tiny_models import CACHE
from tests.verify.test_target import gemma3, paligemma, qwen2_vl

FIXED = OnlineSpecConfig(lookahead=4, update_every=1)
TREE = 5  # forwards over which a target is tried with a tree, see probe_trees.py; once, whatever it is


class Sound(LlamaForCausalLM):
    """Llama by another name."""


class LengthDependent(LlamaForCausalLM):
    """Keys depend on the length of the sequence that a forward reaches to."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        if position_ids is None:
            before = kwargs[CACHE].get_seq_length()
            position_ids = torch.arange(before, before + input_ids.shape[1])[None]
        stretched = position_ids * (1 + position_ids.max() // 2)
        return super().forward(input_ids, position_ids=stretched, **kwargs)


class LooksAhead(LlamaForCausalLM):
    """Each place hears of the mean of all tokens of its forward."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.mean(1, keepdim=True)
        return outputs


class Remembers(LlamaForCausalLM):
    """Keeps a state in the model, which a rejected token changes for good."""

    state = 0.0

    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        if kwargs[CACHE].get_seq_length() == 0:
            self.state = 0.0
        outputs = super().forward(input_ids, **kwargs)
        sums = self.state + input_ids.float().cumsum(-1)[0, -outputs.logits.shape[1] :]
        self.state += float(input_ids.sum())
        outputs.logits[..., ::2] += 4 * torch.sin(sums)[:, None]
        return outputs


class Raises(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        if kwargs["next_sequence_length"] not in (1, input_ids.shape[1]):
            raise NotImplementedError("one token at a time")
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def model(cls: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    target = tiny_llama(1, layers=2)
    target.__class__ = cls
    return target


@pytest.mark.parametrize("cls", [LengthDependent, LooksAhead, Remembers, Raises])
def test_what_depends_on_how_many_tokens_a_forward_reads_is_decoded_plain(cls, prompt) -> None:
    target = model(cls)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))
    metrics = online_memory(target).metrics
    assert metrics.drafted_tokens == 0 and cls.__name__ in metrics.decisions.drafting


def test_a_module_from_elsewhere_is_found_inside_a_known_class(target, prompt) -> None:
    class Later(nn.Module):
        """The norm at the end, with the number of tokens added."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: Tensor) -> Tensor:
            return self.norm(hidden) + hidden.shape[1] * torch.linspace(-1, 1, hidden.shape[-1])

    target.model.norm = Later(target.model.norm)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))


def forwards(target: nn.Module) -> list[int]:
    read: list[int] = []
    target.register_forward_pre_hook(lambda *_: read.append(1))
    return read


def test_a_sound_class_from_elsewhere_is_tried_once_and_drafted_for(prompt) -> None:
    target = model(Sound)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    read, counts = forwards(target), []
    for _ in range(3):
        read.clear()
        assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))
        counts.append(len(read) - online_memory(target).metrics.last.rounds)
    # `read` is part of a hook: with a tree the target is tried again for what it held after the first trial.
    assert counts == [7 + TREE, TREE, 0]
    assert online_memory(target).metrics.last.acceptance_length > 4


@pytest.fixture
def read(target) -> ForwardClock:
    """Counts the forwards of the target, by hooks of our own."""
    clock = ForwardClock()
    clock.watch(target)
    return clock


def compiled(target: LlamaForCausalLM) -> None:
    target.model.norm.forward = torch.compile(target.model.norm.forward, backend="eager")


def placed(target: LlamaForCausalLM) -> None:
    dispatch_model(target, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "_hf_hook" in vars(target)


def put_back(target: LlamaForCausalLM) -> None:
    placed(target)
    remove_hook_from_submodules(target)
    assert "forward" in vars(target)


def watched(target: LlamaForCausalLM) -> None:
    ForwardClock().watch(target)
    target.enable_input_require_grads()


@pytest.mark.parametrize("change", [lambda target: None, compiled, placed, put_back, watched])
def test_a_known_class_pays_for_a_tree_alone(change, target, prompt, read) -> None:
    """Nor for the hooks of accelerate, transformers and our own."""
    change(target)
    for tried in (TREE, 0):
        read.reset()
        target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED)
        assert read.calls - tried == online_memory(target).metrics.last.rounds > 0


VECTOR = torch.linspace(-3, 3, 64)


def steered(hidden: Tensor) -> Tensor:
    """Each token of a plain decoding, but only the last one of a round."""
    return torch.cat([hidden[:, :-1], hidden[:, -1:] + VECTOR[: hidden.shape[-1]]], dim=1)


class Steers:
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return steered(output)


class SteersByMethod:
    @torch.no_grad()
    def steer(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return steered(output)


class SteersFromAccelerate(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return steered(output)


def replaced(norm: nn.Module) -> None:
    inner = norm.forward
    norm.forward = functools.wraps(inner)(lambda hidden: steered(inner(hidden)))


def replaced_and_placed(norm: nn.Module) -> None:
    replaced(norm)
    add_hook_to_module(norm, AlignDevicesHook("cpu"))


ALTERED: dict[str, Callable[[nn.Module], Any]] = {
    "a hook": lambda norm: norm.register_forward_hook(lambda module, args, output: steered(output)),
    "a hook with settings": lambda norm: norm.register_forward_hook(
        functools.partial(lambda scale, module, args, output: scale * steered(output), 1.0)
    ),
    "an object as hook": lambda norm: norm.register_forward_hook(Steers()),
    "a hook under no_grad": lambda norm: norm.register_forward_hook(
        torch.no_grad()(lambda module, args, output: steered(output))
    ),
    "a method under no_grad": lambda norm: norm.register_forward_hook(functools.partial(SteersByMethod().steer)),
    "a hook before": lambda norm: norm.register_forward_pre_hook(lambda module, args: (steered(args[0]),)),
    "a forward": replaced,
    "a forward placed by accelerate": replaced_and_placed,
    "a hook among those of accelerate": lambda norm: add_hook_to_module(
        norm, SequentialHook(AlignDevicesHook("cpu"), SteersFromAccelerate())
    ),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_known_class_that_a_hook_alters_is_tried(alter, target, prompt, read) -> None:
    alter(target.model.norm)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    counts = []
    for _ in range(3):
        read.reset()
        assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))
        counts.append(read.calls)
    assert online_memory(target).metrics.drafted_tokens == 0
    assert counts == [24 + 7, 24, 24]


@pytest.fixture
def of_all_modules(target) -> Iterator[None]:
    hook = register_module_forward_hook(
        lambda module, args, output: steered(output) if module is target.model.norm else None
    )
    yield
    hook.remove()


@pytest.mark.usefixtures("of_all_modules")
def test_a_hook_of_all_modules_is_tried(target, prompt) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))


def own_attention(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return torch.cat([output[:, :-1], 3 * output[:, -1:]], dim=1), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "of the last token", attention)
    target.set_attn_implementation("of the last token")


def own_rotation(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = modeling_llama.apply_rotary_pos_emb

    def rotate(*args: Any) -> Any:
        query, key = inner(*args)
        return torch.cat([query[..., :-1, :], 5 * query[..., -1:, :]], dim=-2), key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)


def own_call(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = LlamaRMSNorm.__call__
    monkeypatch.setattr(LlamaRMSNorm, "__call__", lambda self, hidden: steered(inner(self, hidden)))


def own_positions(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = target.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        inputs = inner(*args, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] * (1 + inputs["position_ids"].max() % 3)
        return inputs

    monkeypatch.setattr(target, "prepare_inputs_for_generation", prepare)


@pytest.mark.parametrize("later", [False, True], ids=["before the first request", "after it"])
@pytest.mark.parametrize("alter", [own_attention, own_rotation, own_call, own_positions])
def test_a_function_in_the_place_of_transformers_is_tried(alter, later, target, prompt, monkeypatch) -> None:
    if later:
        target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED)
    alter(target, monkeypatch)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))


class Switched(nn.Module):
    """Steers as far as its settings say."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.scale = norm, 0.0
        self.register_buffer("vector", torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scaled(None, (), self.norm(hidden))

    def scaled(self, module: Any, args: Any, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :-1], hidden[:, -1:] + (self.scale + self.vector) * VECTOR[: hidden.shape[-1]]], 1)


SCALE = {"of all": 0.0}


def switched_by_number(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    switch = Switched(nn.Identity())
    target.model.norm.register_forward_hook(switch.scaled)
    return lambda: setattr(switch, "scale", 1.0)


def switched_by_tensor(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    target.model.norm = switch = Switched(target.model.norm)
    return lambda: switch.vector.fill_(1.0)


def switched_by_argument(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def steer(scale: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + scale * (steered(output) - output)

    hook = target.model.norm.register_forward_hook(functools.partial(steer, 0.0))

    def switch() -> None:
        hook.remove()
        target.model.norm.register_forward_hook(functools.partial(steer, 1.0))

    return switch


def switched_by_a_global_one(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    target.model.norm.register_forward_hook(
        lambda module, args, output: output + SCALE["of all"] * (steered(output) - output)
    )
    return lambda: monkeypatch.setitem(SCALE, "of all", 1.0)


@pytest.mark.parametrize(
    "alter", [switched_by_number, switched_by_tensor, switched_by_argument, switched_by_a_global_one]
)
def test_what_a_hook_refers_to_counts_too(alter, target, prompt, monkeypatch) -> None:
    """It adds nothing when it is tried first."""
    arguments = {"do_sample": False, "max_new_tokens": 24}
    switch = alter(target, monkeypatch)
    target.generate(prompt, **arguments, onlinespec=FIXED)
    assert online_memory(target).metrics.drafted_tokens > 0
    switch()
    plain = target.generate(prompt, **arguments)
    assert torch.equal(plain, target.generate(prompt, **arguments, onlinespec=FIXED))


def test_a_hook_that_counts_is_tried_a_few_times(target, prompt, read) -> None:
    """It refers to something else in every request."""

    class Counts:
        calls = 0

        def __call__(self, *_: Any) -> None:
            self.calls += 1

    target.model.norm.register_forward_hook(Counts())
    counts = []
    for _ in range(10):
        read.reset()
        target.generate(prompt, do_sample=False, max_new_tokens=8, onlinespec=FIXED)
        counts.append(read.calls - online_memory(target).metrics.last.rounds)
    assert counts == 8 * [7 + TREE] + 2 * [0]
    assert online_memory(target).metrics.drafted_tokens > 0


def served_with_a_class_over_it(prompt: Tensor) -> list[weakref.ref[Any]]:
    target, vector = tiny_llama(1), torch.zeros(16)

    class Adds:
        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + vector * target.config.hidden_size

    target.model.norm.register_forward_hook(Adds())
    target.generate(prompt, do_sample=False, max_new_tokens=4, onlinespec=FIXED)
    return [weakref.ref(target), weakref.ref(vector)]


def test_what_was_tried_is_not_held(prompt) -> None:
    """Neither the target nor what its hooks refer to."""
    alive = served_with_a_class_over_it(prompt)
    gc.collect()
    assert [one() for one in alive] == [None, None]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(("invocation", "drafts"), [([9, 2], False), ([30, 31], True)], ids=["found", "not found"])
def test_an_activated_lora_is_drafted_for_where_it_is_not_activated(invocation, drafts, target, prompt) -> None:
    """PEFT adapts the last tokens of each forward, as many as stand behind the invocation in the prompt."""
    torch.manual_seed(4)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=invocation,
    )  # fmt: skip
    tuned = get_peft_model(target, settings).eval()
    arguments = {"do_sample": False, "max_new_tokens": 24}
    plain = tuned.generate(input_ids=prompt, **arguments)
    for _ in range(2):
        assert torch.equal(plain, tuned.generate(input_ids=prompt, **arguments, onlinespec=FIXED))
    assert (online_memory(target).metrics.drafted_tokens > 0) == drafts


def test_what_was_changed_since_it_was_tried_is_tried_again(target, prompt, read) -> None:
    """A hook that each request registers anew, as for steering one of two, is tried once."""
    arguments = {"do_sample": False, "max_new_tokens": 24}
    plain = target.generate(prompt, **arguments)
    counts = []
    for _ in range(3):
        read.reset()
        assert torch.equal(plain, target.generate(prompt, **arguments, onlinespec=FIXED))
        counts.append(read.calls - online_memory(target).metrics.last.rounds)
        handle = target.model.norm.register_forward_hook(lambda module, args, output: steered(output))
        other = target.generate(prompt, **arguments)
        read.reset()
        assert torch.equal(other, target.generate(prompt, **arguments, onlinespec=FIXED))
        counts.append(read.calls - online_memory(target).metrics.last.rounds)
        handle.remove()
    assert counts == [TREE, 7, 0, 0, 0, 0] and not torch.equal(plain, other)


def test_a_module_that_is_exchanged_after_a_request_is_tried(target, prompt) -> None:
    class Steered(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: Tensor) -> Tensor:
            return steered(self.norm(hidden))

    arguments = {"do_sample": False, "max_new_tokens": 24}
    target.generate(prompt, **arguments, onlinespec=FIXED)
    target.model.norm = Steered(target.model.norm)
    plain = target.generate(prompt, **arguments)
    assert torch.equal(plain, target.generate(prompt, **arguments, onlinespec=FIXED))


def test_a_known_class_whose_forward_was_replaced_after_a_request_is_tried(target, prompt, monkeypatch) -> None:
    arguments = {"do_sample": False, "max_new_tokens": 24}
    target.generate(prompt, **arguments, onlinespec=FIXED)
    inner = LlamaRMSNorm.forward
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", functools.wraps(inner)(lambda self, hidden: steered(inner(self, hidden)))
    )
    plain = target.generate(prompt, **arguments)
    assert torch.equal(plain, target.generate(prompt, **arguments, onlinespec=FIXED))


@pytest.mark.parametrize("cls", [LengthDependent, LooksAhead])
def test_a_class_in_training_mode_without_dropout_is_tried(cls, prompt) -> None:
    target = model(cls).train()
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED))
    assert online_memory(target).metrics.drafted_tokens == 0


def test_a_class_with_dropout_is_drafted_for_in_training_mode(prompt) -> None:
    """Trying it draws none of the request's random numbers."""
    texts = []
    for cls in (LlamaForCausalLM, Sound):
        target = model(cls).train()
        for layer in target.model.layers:
            layer.self_attn.attention_dropout = 0.1
        torch.manual_seed(5)
        texts.append([target.generate(prompt, do_sample=False, max_new_tokens=24, onlinespec=FIXED) for _ in range(2)])
        assert online_memory(target).metrics.drafted_tokens > 0
    assert all(torch.equal(*pair) for pair in zip(*texts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_and_routers_at_a_tie_raise_no_alarm(dtype) -> None:
    class Routed(Qwen3MoeForCausalLM):
        """Mixture of experts by another name."""

    for seed in range(2):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_experts=8,
            num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, initializer_range=0.3, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        target = Routed(config).eval().to(dtype)
        target.generation_config.eos_token_id = None
        prompt = torch.randint(3, 64, (1, 9))
        target.generate(prompt, do_sample=False, max_new_tokens=4, onlinespec=True)
        assert "Routed" not in online_memory(target).metrics.decisions.drafting


@pytest.mark.parametrize("make", [paligemma, qwen2_vl, gemma3], ids=lambda make: make.__name__)
def test_a_model_from_elsewhere_that_reads_pictures_is_tried_with_them(make) -> None:
    target, inputs = make()

    class Elsewhere(type(target)):  # type: ignore[misc]
        """Known by another name."""

    target.__class__ = Elsewhere
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=12)
    for _ in range(2):
        assert torch.equal(plain, target.generate(**inputs, do_sample=False, max_new_tokens=12, onlinespec=FIXED))
    assert online_memory(target).metrics.last.accepted_tokens > 0


def test_trying_draws_no_random_number_and_leaves_the_request_alone(prompt) -> None:
    texts = []
    for cls in (LlamaForCausalLM, Sound):
        target = copy.deepcopy(model(cls))
        torch.manual_seed(5)
        texts.append(target.generate(prompt, do_sample=True, max_new_tokens=24, onlinespec=FIXED))
    assert torch.equal(*texts)


class BlocksAnId(LooksAhead):
    """Looks ahead, and blocks an id by the lowest number that there is, as Chameleon does with its image tokens."""

    blocked = torch.finfo(torch.float32).min

    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits[..., 3] = self.blocked
        return outputs


class SoundlyBlocksAnId(LlamaForCausalLM):
    """Sound, and an id is impossible."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits[..., 3] = -torch.inf
        return outputs


class HidesItsLayers(LlamaForCausalLM):
    """Does not say which of its layers is the embedding."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class DropsPositions(LlamaForCausalLM):
    """Counts positions itself behind the prompt."""

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        found.pop("position_ids", None)
        return found


@pytest.mark.parametrize(
    ("cls", "drafts"), [(BlocksAnId, False), (SoundlyBlocksAnId, True), (HidesItsLayers, True), (DropsPositions, True)]
)
def test_what_a_class_from_elsewhere_does_costs_no_answer(cls, drafts, prompt) -> None:
    target = model(cls)
    arguments = {"do_sample": False, "max_new_tokens": 24}
    plain = target.generate(prompt, **arguments)
    for _ in range(2):
        assert torch.equal(target.generate(prompt, **arguments, onlinespec=FIXED), plain)
    assert (online_memory(target).metrics.drafted_tokens > 0) == drafts


def test_a_shortage_of_memory_in_the_trial_passes(prompt, monkeypatch) -> None:
    target = model(Sound)
    arguments = {"do_sample": False, "max_new_tokens": 24, "onlinespec": FIXED}

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patch:
        patch.setattr("hf_onlinespec.verify.probe.Verifier", short)
        target.generate(prompt, **arguments)
    assert online_memory(target).metrics.drafted_tokens == 0
    for _ in range(2):
        target.generate(prompt, **arguments)
    assert online_memory(target).metrics.drafted_tokens > 0


class RoundsLikeTF32(LlamaForCausalLM):
    """Sums in another order where a forward reads another number of tokens, of products that have 10 bits."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        outputs = super().forward(input_ids, **kwargs)
        signs = 1 - 2 * (torch.arange(outputs.logits.shape[-1]) % 2)
        outputs.logits = outputs.logits + outputs.logits.abs().max() * 2e-3 * signs * (input_ids.shape[1] % 2)
        return outputs


# From torch 2.9 on, each kind of operation of each device has a setting of its own.
HAS_PRECISION = "fp32_precision" in dir(type(torch.backends))


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """The settings of how matrices are multiplied are the process's: the other tests get theirs back."""
    yield
    torch.set_float32_matmul_precision("highest")
    if HAS_PRECISION:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "none"


OF_A_DEVICE = {"tf32 on CUDA", "tf32 everywhere"}
NEEDS_PRECISION = pytest.mark.skipif(not HAS_PRECISION, reason="this torch has one setting for all devices")
SETTINGS: dict[str, Callable[[], Any]] = {
    "tf32 on CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "tf32 on CUDA, as of old": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "tf32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize(
    "setting",
    [None, *(pytest.param(name, marks=NEEDS_PRECISION if name in OF_A_DEVICE else ()) for name in SETTINGS)],
)
def test_the_tolerance_is_that_of_the_precision_in_use(setting: str | None, prompt, matmul_precision) -> None:
    target, faulty = model(RoundsLikeTF32), model(LooksAhead)
    context = None if setting is None else SETTINGS[setting]()
    with context or contextlib.nullcontext():
        for one in (target, faulty):
            one.generate(prompt, do_sample=False, max_new_tokens=8, onlinespec=FIXED)
    assert (online_memory(target).metrics.drafted_tokens > 0) == (setting is not None)
    assert online_memory(faulty).metrics.drafted_tokens == 0
