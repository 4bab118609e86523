"""Times are those of the work, not of the queue that it waits in, and nobody is waited for without need."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.causal_lm import CausalLM
from tests.conftest import tiny_llama
from tests.drafts import flat_params


class FakeDevice(str):
    """The CPU to torch, an accelerator to whoever asks for its type."""

    type = "cuda"


class Queue:
    """A clock that stands still while work is queued: every forward of the draft takes a second of the device's time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: PreTrainedModel) -> None:
        self.now, self.queued, self.waited = 0.0, 0.0, 0
        monkeypatch.setattr(CausalLM, "device", property(lambda draft: FakeDevice("cpu")))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        forward = type(target).forward  # the draft's too

        @functools.wraps(forward)
        def queues(model: PreTrainedModel, *args: Any, **named: Any) -> Any:
            self.queued += model is not target
            return forward(model, *args, **named)

        monkeypatch.setattr(type(target), "forward", queues)

    def synchronize(self, device: object = None) -> None:
        self.waited += 1
        self.work()

    def work(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_the_draft_is_priced_by_the_time_that_the_device_takes(monkeypatch, target, draft_model, prompt) -> None:
    draft = OnlineDraft(
        draft_model, OnlineSpecConfig(lookahead=3, memory_tokens=0, recycle=False, update_when="request")
    )
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    queue, told = Queue(monkeypatch, target), []
    observe, read = draft.governor.observe_rows, draft.governor.observe_prefill
    draft.governor.observe_rows = lambda rows, draft_s, target_s: (
        queue.work(),  # the answer of the target was read by then
        told.append((len(rows[0].drafted), draft_s)),
        observe(rows, draft_s, target_s),
    )[2]
    prompts: list[float] = []
    draft.governor.observe_prefill = lambda tokens, seconds: (prompts.append(seconds), read(tokens, seconds))[1]
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=24))
    drafted = [(k, draft_s) for k, draft_s in told[1:] if k]  # the first round reads the prompt
    assert drafted and all(draft_s == pytest.approx(float(k)) for k, draft_s in drafted)
    assert prompts == [1.0]
    rounds = draft.metrics.rounds
    assert queue.waited <= rounds + 2, "once in a round at most, and once for each time that is spent on learning"


def test_nobody_waits_for_a_device_whose_times_decide_nothing(monkeypatch, target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(lookahead=3, memory_tokens=0, update_every=1))
    queue = Queue(monkeypatch, target)
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=24)
    assert draft.metrics.updates > 0 and queue.waited == 0


def test_a_new_draft_leaves_the_random_numbers_of_all_devices_alone(monkeypatch) -> None:
    """torch.manual_seed seeds every visible device, and fork_rng wakes them all to keep their states."""
    model, forked = tiny_llama(2), []
    fork = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices=None, **more: (forked.append(devices), fork(devices, **more))[1]
    )
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    first = OnlineDraft(model, OnlineSpecConfig(rank=4, seed=3))
    assert forked and all(devices == [] for devices in forked) and not seeds
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(6)
    second = OnlineDraft(tiny_llama(2), OnlineSpecConfig(rank=4, seed=3))
    assert torch.equal(flat_params(first), flat_params(second)), "its own seed decides"
