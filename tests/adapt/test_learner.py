"""What learning reads, how much memory it holds, and what it forgets with the adapter that is replaced."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt import feedback
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.objective import Objective
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.resuming import adopt, restore
from tests.conftest import tiny_llama
from tests.drafts import flat_params, learn_segment

GREEDY = {"do_sample": False, "max_new_tokens": 16}
SMALL: dict[str, Any] = {"rank": 4, "alpha": 4.0, "lookahead": 3, "update_every": 1, "lr": 1e-2, "memory_tokens": 0}


def served(draft: OnlineDraft, target: Any, times: int = 3) -> OnlineDraft:
    for start in range(times):
        target.generate(torch.tensor([[start + 1, 14, 15, 9]]), assistant_model=draft, **GREEDY)
    return draft


def test_learning_does_not_rely_on_a_cache_that_copies(target, prompt, monkeypatch) -> None:
    """Drafting fills its cache under inference_mode; a cache may as well keep the very tensors that it is given."""
    update, learned_on = DynamicLayer.update, list[bool]()

    def keeps(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor, *more: Any, **named: Any) -> Any:
        if layer.is_initialized and layer.keys.numel():
            if torch.is_grad_enabled():
                learned_on.append(layer.keys.is_inference())
            return update(layer, keys, values, *more, **named)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return keys, values

    plain = target.generate(prompt, **GREEDY)
    expected = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**SMALL, update_when="round"))
    target.generate(prompt, assistant_model=expected, **GREEDY)
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**SMALL, update_when="round"))
    # As if another version of transformers defined it: with a cache that somebody else changed, nothing is drafted.
    theirs = {**globals(), "__name__": update.__module__}
    keeps = FunctionType(keeps.__code__, theirs, closure=keeps.__closure__)
    monkeypatch.setattr(DynamicLayer, "update", keeps)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
    assert learned_on and not any(learned_on)
    assert draft.metrics.updates == expected.metrics.updates > 3
    torch.testing.assert_close(flat_params(draft), flat_params(expected))


class Watch(BaseStreamer):
    """Asks for the memory that learning holds whenever a token has come."""

    def __init__(self, draft: OnlineDraft) -> None:
        self.draft, self.seen = draft, list[int]()

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(self.draft.learning_bytes)

    def end(self) -> None: ...


def test_what_is_recorded_of_a_request_is_a_part_of_the_memory_of_learning(prompt) -> None:
    target, draft = tiny_llama(1, vocab=4096), OnlineDraft(tiny_llama(2, vocab=4096), OnlineSpecConfig(**SMALL))
    watch = Watch(draft)
    target.generate(prompt, assistant_model=draft, streamer=watch, do_sample=False, max_new_tokens=40)
    grown = watch.seen[-1] - watch.seen[0]
    assert grown >= 36 * 4096 * 4, "float32 logits of all tokens but those of the last round"
    assert draft.learning_bytes < watch.seen[0] + 36 * 4096 * 4, "they are gone with the request"


def saved_bytes(objective: Objective, teacher: Teacher, logits: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes that the loss keeps for its backward pass besides teacher and logits, and its gradient."""
    kept: dict[int, int] = {}
    given = {t.untyped_storage().data_ptr() for t in (logits, teacher.log_probs)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in given:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = logits.clone().requires_grad_()
    given.add(leaf.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.losses([teacher], leaf[None]).mean()
    loss.backward()
    return sum(kept.values()), leaf.grad


@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("loss", ["forward_kl", "js", "cross_entropy"])
def test_the_loss_of_a_large_vocabulary_is_taken_in_parts(monkeypatch, loss: str, top_k: int | None) -> None:
    """The gradient is the same; log-probabilities of all positions at once are several times as large as the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 1000, generator=generator)
    teacher = Teacher.from_logits(3 * torch.randn(40, 1000, generator=generator), 1.0, top_k)
    objective = Objective(OnlineSpecConfig(**SMALL, loss=loss))
    _, whole = saved_bytes(objective, teacher, logits)
    monkeypatch.setattr(feedback, "MOST_LOGITS", 4000, raising=False)
    held, parted = saved_bytes(objective, teacher, logits)
    torch.testing.assert_close(parted, whole, atol=1e-7, rtol=1e-5)
    assert held < 0.5 * logits.nbytes


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
def test_adopting_an_adapter_forgets_the_one_before(target, learner: str) -> None:
    config = OnlineSpecConfig(**SMALL, learner=learner, radius=5.0)
    draft = served(OnlineDraft(tiny_llama(2), config), target, 4)
    other = served(OnlineDraft(tiny_llama(2), config), tiny_llama(4, layers=2), 2)
    assert draft.learning.learner.guard.nbytes > 0 and draft.steps > 1
    adopt(draft, other.artifact().adapter)
    fresh = OnlineDraft(tiny_llama(2), config)
    adopt(fresh, other.artifact().adapter)
    assert draft.learning.learner.guard.nbytes == 0 and draft.steps == fresh.steps == 1
    ours, theirs = draft.learning.learner.state(), fresh.learning.learner.state()
    for part in ("adaptation", "guard", "experts", "learning"):
        a, b = ours.part(part), theirs.part(part)
        assert a.values == b.values and a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    draft.trainable.adapter.params.fill_(torch.nan)
    tokens, counts = torch.tensor([[1, 2, 3, 4]]), Counts()
    learn_segment(draft, tokens, [Teacher.from_logits(torch.randn(3, 32))], counts)
    assert draft.metrics.rollbacks == 0, "no state of the adapter that was replaced comes back"


def test_resuming_forgets_what_was_there(target) -> None:
    config = OnlineSpecConfig(**SMALL, learner="ensemble")
    saved = served(OnlineDraft(tiny_llama(2), config), target, 5).artifact()
    used = served(OnlineDraft(tiny_llama(2), config), tiny_llama(4, layers=2), 4)
    restore(used, saved)
    again = used.artifact().state
    assert again.values == saved.state.values
    assert again.tensors.keys() == saved.state.tensors.keys()
    assert all(torch.equal(t, again.tensors[name]) for name, t in saved.state.tensors.items())
