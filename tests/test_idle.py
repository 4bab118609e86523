"""Learning in the background: after the call, between calls, and never in a call's way."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.idle import PENDING, IdleWorker

from .conftest import tiny_llama

IDLE = OnlineSpecConfig(update_when="idle", rank=4, alpha=4.0, lookahead=3, lr=3e-3)
GREEDY = {"do_sample": False, "max_new_tokens": 16}
LONG_S = 30.0  # only a failure takes so long


class Owner:
    """Two steps per item, each of which waits until it is let through."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def work(self, item: int) -> Iterator[None]:
        for step in range(2):
            self.begun.release()
            assert self.gate.acquire(timeout=LONG_S)
            if item < 0:
                raise ZeroDivisionError("on purpose")
            self.done.append((item, step))
            yield


def test_a_call_stops_the_work_after_the_step_at_hand() -> None:
    owner = Owner()
    worker: IdleWorker[int] = IdleWorker(owner.work)
    worker.add(1)
    assert owner.begun.acquire(timeout=LONG_S)
    with worker.call():  # comes in while the first step runs
        owner.gate.release(2)
        assert not owner.begun.acquire(timeout=0.2)  # no second step
        assert owner.done == [(1, 0)]
    assert worker.wait(LONG_S) and owner.done == [(1, 0), (1, 1)]
    worker.close()


def test_a_failing_step_is_counted_logged_once_and_ends_the_work(caplog) -> None:
    owner = Owner()
    owner.gate.release(10)
    worker: IdleWorker[int] = IdleWorker(owner.work)
    with caplog.at_level(logging.ERROR, "hf_onlinespec"):
        worker.add(-1)
        assert worker.wait(LONG_S)
        for item in range(5):
            worker.add(item)
        assert worker.wait(LONG_S)
    assert worker.failures == 1 and len(caplog.records) == 1 and owner.done == []
    worker.close()


def test_what_waits_is_bounded() -> None:
    owner = Owner()
    worker: IdleWorker[int] = IdleWorker(owner.work)
    with worker.call():
        for item in range(PENDING + 5):
            worker.add(item)
        owner.gate.release(10 * PENDING)
    assert worker.wait(LONG_S)
    assert [item for item, _ in owner.done[::2]] == list(range(5, PENDING + 5))  # the oldest are forgotten
    worker.close()


def test_learns_after_the_call_has_returned(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, IDLE)
    plain = target.generate(prompt, **GREEDY)
    for _ in range(3):
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
        assert draft.catch_up(LONG_S)
    assert draft.metrics.updates == 0 and draft.metrics.update_time_s == 0  # nothing of it inside the calls
    assert draft.metrics.idle_updates == 9 and draft.metrics.idle_time_s > 0
    assert len(draft._replay) == 3
    changed = draft(prompt).logits
    with torch.no_grad():
        assert not torch.equal(changed, draft_model(prompt).logits)


def test_a_failing_update_never_reaches_a_call(target, draft_model, prompt, monkeypatch, caplog) -> None:
    draft = OnlineDraft(draft_model, IDLE)
    plain = target.generate(prompt, **GREEDY)

    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(draft._learning, "segment", broken)
    with caplog.at_level(logging.ERROR, "hf_onlinespec"):
        for _ in range(3):
            assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
            assert draft.catch_up(LONG_S)
    assert draft.metrics.idle_failures == 1 and len(caplog.records) == 1 and draft.metrics.requests == 3


@pytest.mark.parametrize("when", ["request", "idle"])
def test_threads_that_generate_with_one_draft(draft_model, when: str) -> None:
    """Each gets its target's own words, while the draft learns from all of them."""
    target = tiny_llama(1, layers=2)
    draft = OnlineDraft(
        draft_model, OnlineSpecConfig(update_when=when, update_every=1, rank=4, alpha=4.0, lookahead=3, lr=3e-3)
    )
    prompts = [torch.tensor([[3 + i, 14, 15, 9]]) for i in range(4)]
    plain = [target.generate(p, **GREEDY) for p in prompts]
    wrong: list[object] = []

    def serve(i: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(5):
                out = target.generate(prompts[i], assistant_model=draft, **GREEDY)
                if not torch.equal(out, plain[i]):
                    wrong.append(out)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert not wrong and draft.catch_up(LONG_S)
    metrics = draft.metrics
    assert metrics.requests == 20 and metrics.new_tokens == 20 * 16
    assert metrics.updates + metrics.idle_updates > 0 and metrics.skipped_updates == 0


def test_the_thread_goes_with_the_draft(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, IDLE)
    target.generate(prompt, assistant_model=draft, **GREEDY)
    assert draft.catch_up(LONG_S)
    thread, gone = draft._idle._thread, weakref.ref(draft)
    assert thread is not None and thread.is_alive()
    del draft
    gc.collect()
    assert gone() is None
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_a_process_that_ends_while_it_learns_ends_cleanly() -> None:
    code = """
import torch
from tests.conftest import tiny_llama
from tests.test_idle import GREEDY, IDLE
from hf_onlinespec import OnlineDraft
torch.set_num_threads(1)
draft = OnlineDraft(tiny_llama(2), IDLE)
for i in range(4):
    tiny_llama(1, layers=2).generate(torch.tensor([[3, 4, 5]]), assistant_model=draft, **GREEDY)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
