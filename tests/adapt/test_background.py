"""Learning in the background: after the call, between calls, and never in a call's way."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.background import IdleWorker
from tests.conftest import tiny_llama

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


@pytest.mark.failures
def test_after_a_step_that_fails_it_waits_for_more_items_and_tries_again(caplog) -> None:
    owner = Owner()
    owner.gate.release(100)
    worker: IdleWorker[int] = IdleWorker(owner.work)
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        worker.add(-1)
        assert owner.begun.acquire(timeout=LONG_S)
        assert not worker.wait(LONG_S), "an item is lost"
        worker.add(1)  # it was the one to wait for
        assert worker.wait(LONG_S) and owner.done == [(1, 0), (1, 1)]
        for _ in range(3):
            worker.add(-1)
            assert not worker.wait(LONG_S)
        while owner.begun.acquire(blocking=False):
            pass  # of steps that are over
    assert worker.metrics.idle_failures == worker.metrics.idle_dropped == 4 and len(caplog.records) == 1
    worker.add(2)  # the third failure in a row: it takes four items to go on
    assert not owner.begun.acquire(timeout=0.2) and worker.waiting == 1
    assert worker.wait(LONG_S) and owner.done[-1] == (2, 1), "who waits has it tried at once"
    worker.close()


def test_what_waits_is_bounded_in_bytes_and_what_is_dropped_is_counted() -> None:
    owner = Owner()
    worker: IdleWorker[int] = IdleWorker(owner.work, size=lambda item: 10, most_bytes=160)
    with worker.call():
        for item in range(21):
            worker.add(item)
        assert worker.nbytes == 160
        owner.gate.release(100)
    assert not worker.wait(LONG_S) and worker.metrics.idle_dropped == 5
    assert [item for item, _ in owner.done[::2]] == list(range(5, 21))  # the oldest are dropped
    worker.add(21)
    assert worker.wait(LONG_S) and worker.nbytes == 0, "of what was handed over since, nothing is lost"
    large: IdleWorker[int] = IdleWorker(owner.work, size=lambda item: 161, most_bytes=160)
    large.add(1)
    assert not large.wait(LONG_S) and large.metrics.idle_dropped == 1
    worker.close()
    large.close()


def test_nothing_is_lost_while_there_is_room(draft_model, prompt) -> None:
    """The worker cannot keep up: forty requests wait, and all of them are learned in the end."""
    target = tiny_llama(1)
    draft = OnlineDraft(draft_model, replace(IDLE, update_every=1, replay_passes=0))
    with draft.learning.at_rest():
        held = []
        for start in range(40):
            target.generate((prompt + start) % 32, assistant_model=draft, do_sample=False, max_new_tokens=3)
            held.append(draft.learning_bytes)
    assert draft.catch_up(LONG_S) and draft.metrics.idle_updates == 40
    assert held[-1] - held[1] >= 38 * 3 * 12, "what waits is a part of the memory that learning takes"


@pytest.mark.parametrize("when", ["idle", "request"])
@pytest.mark.parametrize("held", [False, True])
def test_a_forked_child_generates_and_learns(target, draft_model, prompt, when: str, held: bool) -> None:
    """Also if another thread of the parent held the locks, or was in the middle of a call, when it forked."""
    draft = OnlineDraft(draft_model, replace(IDLE, update_every=1, update_when=when, replay_passes=0))
    plain = target.generate(prompt, **GREEDY)
    for _ in range(3):
        target.generate(prompt, assistant_model=draft, **GREEDY)
    draft.catch_up(LONG_S)
    done, free = draft.metrics.updates + draft.metrics.idle_updates, threading.Event()

    def holds() -> None:
        with draft.generating(), draft.learning.at_rest(), draft.lock:
            taken.set()
            free.wait(LONG_S)

    def child() -> None:
        same = torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
        caught_up = draft.catch_up(LONG_S)
        learned = draft.metrics.updates + draft.metrics.idle_updates > done
        os._exit(0 if same and caught_up and learned else 3)

    taken = threading.Event()
    other = threading.Thread(target=holds)
    if held:
        other.start()
        assert taken.wait(LONG_S)
    process = multiprocessing.get_context("fork").Process(target=child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: forks beside threads are what is tested
        process.start()
    free.set()
    process.join(LONG_S)
    code = process.exitcode
    if process.is_alive():
        process.kill()
        process.join()
    assert code == 0, "the child hangs" if code is None else f"the child ended with {code}"
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY)) and draft.catch_up(LONG_S)


def test_learns_after_the_call_has_returned(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, IDLE)
    plain = target.generate(prompt, **GREEDY)
    for _ in range(3):
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
        assert draft.catch_up(LONG_S)
    assert draft.metrics.updates == 0 and draft.metrics.update_time_s == 0  # nothing of it inside the calls
    assert draft.metrics.idle_updates == 9 and draft.metrics.idle_time_s > 0
    assert len(draft.learning.learner.replay) == 3
    changed = draft(prompt).logits
    with torch.no_grad():
        assert not torch.equal(changed, draft_model(prompt).logits)


@pytest.mark.failures
def test_a_failing_update_never_reaches_a_call_and_is_tried_again(
    target, draft_model, prompt, monkeypatch, caplog
) -> None:
    draft = OnlineDraft(draft_model, IDLE)
    plain = target.generate(prompt, **GREEDY)

    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "hf_onlinespec"):
        patch.setattr(draft.learning.learner, "segment", broken)
        for _ in range(3):
            assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
            draft.catch_up(LONG_S)
    assert len(caplog.records) == 1 and draft.metrics.requests == 3
    for _ in range(5):  # as many as it takes until it is tried again
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
    assert draft.catch_up(LONG_S) and draft.metrics.idle_updates > 0, "it learns again"
    assert draft.metrics.idle_failures == draft.metrics.idle_dropped == 3
    assert "works again" in draft.metrics.decisions.learning


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
    draft, before = OnlineDraft(draft_model, IDLE), set(threading.enumerate())
    target.generate(prompt, assistant_model=draft, **GREEDY)
    assert draft.catch_up(LONG_S)
    (thread,), gone = set(threading.enumerate()) - before, weakref.ref(draft)
    assert thread.is_alive()
    del draft
    gc.collect()
    assert gone() is None
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_a_process_that_ends_while_it_learns_ends_cleanly() -> None:
    code = """
import torch
from tests.conftest import tiny_llama
from tests.adapt.test_background import GREEDY, IDLE
from hf_onlinespec import OnlineDraft
torch.set_num_threads(1)
draft = OnlineDraft(tiny_llama(2), IDLE)
for i in range(4):
    tiny_llama(1, layers=2).generate(torch.tensor([[3, 4, 5]]), assistant_model=draft, **GREEDY)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr


def test_what_is_learned_when_idle_is_judged_at_the_temperature_of_its_call(prompt) -> None:
    """A draft that says what the target says is accepted always, whatever part of the target's distribution was kept."""
    target, draft_model = (tiny_llama(1, vocab=512, initializer_range=0.3) for _ in range(2))
    draft = OnlineDraft(draft_model, replace(IDLE, update_every="auto", replay_top_k=16, replay_passes=0, lr=1e-9))
    told: list[float] = []
    observe_comparison = draft.governor.observe_comparison
    draft.governor.observe_comparison = lambda learned, *rest: (
        told.extend(learned),
        observe_comparison(learned, *rest),
    )[1]
    sampled = {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": 16}
    for _ in range(2):
        target.generate(prompt, assistant_model=draft, **sampled)
        assert draft.catch_up(LONG_S)
    assert len(told) == 32 and min(told) > 0.999


def test_nothing_is_learned_between_examining_and_saving(
    target, draft_model, prompt, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is what was examined."""
    draft = OnlineDraft(draft_model, replace(IDLE, update_every=1, replay_passes=0))
    target.generate(prompt, assistant_model=draft, **GREEDY)
    assert draft.catch_up(LONG_S)
    steps: list[int] = []

    def examine(draft: OnlineDraft, seconds: float) -> None:
        target.generate(prompt, assistant_model=draft, **GREEDY)  # hands over a request
        assert not draft.catch_up(0.3), "it is learned from while the draft is examined"
        steps.append(draft.steps)

    monkeypatch.setattr("hf_onlinespec.share.saving.examine", examine)
    draft.save_pretrained(tmp_path)
    assert OnlineDraft.from_pretrained(tmp_path, draft_model).steps == steps[0] >= 1
    assert draft.catch_up(LONG_S) and draft.steps > steps[0]
