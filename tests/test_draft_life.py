"""The life of a draft in any order: served, frozen, saved and loaded, under other targets, in threads and children, with failures anywhere.

What is held after every step: answers are plain `generate`'s, the adapter is finite, the user's draft computes what it computed, and no thread
is left over. A hypothesis state machine draws the order; tests/adapt and tests/share say each of these of one order alone.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import hf_onlinespec
from hf_onlinespec import OnlineDraft, UnsupportedError
from tests.drafts import flat_params
from tests.tiny_models import tiny_llama

pytestmark = pytest.mark.failures  # they are a part of the life

PACKAGE = str(Path(hf_onlinespec.__file__).parent)
LONG_S = 120.0
NEW_TOKENS = 6
# Repeatable, and nothing that a saved draft leaves behind: a loaded one learns on as if it had never stopped.
FIXED: dict[str, Any] = dict(
    rank=2,
    alpha=2.0,
    lookahead=3,
    update_every=1,
    lr=1e-2,
    memory_tokens=0,
    recycle=False,
    replay_tokens=0,
    replay_passes=0,
)
WHEN = ("round", "request", "idle")
LEARNERS = ("ogd", "optimistic", "ensemble")
PROMPTS = ((3, 14, 15, 9, 2), (6, 5, 3), (5, 8, 9, 7, 9, 3, 2))
NAMES = (None, "one", "two")
# Where an error is none that a program can meet: what gives back a lock, or counts what has ended.
SPARED = ("__exit__", "__del__", "release", "close", "renew")


class Simulated(Exception):
    """Raised on demand."""


@cache
def target_of(seed: int) -> PreTrainedModel:
    return tiny_llama(seed, layers=2)


@cache
def plain(seed: int, rows: tuple[int, ...]) -> Tensor:
    """What a target says to some of the prompts."""
    with torch.no_grad():
        return target_of(seed).generate(**batch(rows), do_sample=False, max_new_tokens=NEW_TOKENS)


def batch(rows: tuple[int, ...]) -> dict[str, Tensor]:
    longest = max(len(PROMPTS[row]) for row in rows)
    pads = [longest - len(PROMPTS[row]) for row in rows]
    return {
        "input_ids": torch.tensor([[0] * n + list(PROMPTS[row]) for n, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(PROMPTS[row]) for n, row in zip(pads, rows, strict=True)]),
    }


@contextmanager
def strikes(at: int, error: type[BaseException]) -> Iterator[list[str]]:
    """The at-th function of this package that is entered in this thread raises; yields its name, once it has."""
    struck: list[str] = []
    calls = 0

    def trace(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        code = frame.f_code
        if struck or not code.co_filename.startswith(PACKAGE) or code.co_flags & CO_GENERATOR or code.co_name in SPARED:
            return
        calls += 1
        if calls == at:
            struck.append(f"{Path(code.co_filename).name}:{code.co_name}")
            raise error("simulated")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield struck
    finally:
        sys.settrace(before)


class Raises(LogitsProcessor):
    """A processor of the caller's that raises at a call."""

    def __init__(self, at: int) -> None:
        self._at, self._calls = at, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == self._at:
            raise Simulated
        return scores


class DraftLife(RuleBasedStateMachine):
    """One draft and what happens to it."""

    @initialize(learner=st.sampled_from(LEARNERS), when=st.sampled_from(WHEN))
    def begin(self, learner: str, when: str) -> None:
        self.model = tiny_llama(2)
        self.tokens = torch.tensor([PROMPTS[0]])
        with torch.no_grad():
            self.logits = self.model(self.tokens).logits
        self.settings = FIXED | {"learner": learner, "update_when": when}
        self.draft = OnlineDraft(self.model, **self.settings)
        self.seed = 1  # of the target
        self.failed = False  # whether something has: what failed is left out for some requests

    def ask(self, rows: tuple[int, ...] = (0,), **how: Any) -> Tensor:
        how = {"assistant_model": self.draft, "do_sample": False, "max_new_tokens": NEW_TOKENS} | how
        return target_of(self.seed).generate(**batch(rows), **how)

    def answers(self, rows: tuple[int, ...] = (0,), **how: Any) -> None:
        assert torch.equal(self.ask(rows, **how), plain(self.seed, rows))

    # Serving

    @rule(rows=st.lists(st.sampled_from(range(len(PROMPTS))), min_size=1, max_size=3), name=st.sampled_from(NAMES))
    def serves(self, rows: list[int], name: str | None) -> None:
        before = self.draft.steps
        self.answers(tuple(rows), adapter=name)
        assert self.draft.catch_up(LONG_S) or self.failed
        if name is None and not self.failed:
            assert self.draft.steps > before

    @rule(row=st.sampled_from(range(len(PROMPTS))))
    def is_frozen(self, row: int) -> None:
        self.draft.catch_up(LONG_S)
        before = flat_params(self.draft)
        self.answers((row,), onlinespec=False)
        assert torch.equal(flat_params(self.draft), before)

    @rule(temperature=st.sampled_from([0.7, 1.0]))
    def samples(self, temperature: float) -> None:
        torch.manual_seed(self.draft.metrics.requests)
        out = self.ask(do_sample=True, temperature=temperature)
        assert (
            torch.equal(out[:, : len(PROMPTS[0])], batch((0,))["input_ids"])
            and out.shape == plain(self.seed, (0,)).shape
        )

    @rule(seed=st.sampled_from([1, 3]))
    def target_is_swapped(self, seed: int) -> None:
        self.seed = seed

    @rule()
    def is_disabled_for_a_while(self) -> None:
        hf_onlinespec.disable()
        try:
            out = target_of(self.seed).generate(
                **batch((0,)), do_sample=False, max_new_tokens=NEW_TOKENS, custom_generate=self.draft.generate_fn()
            )
        finally:
            hf_onlinespec.enable()
        assert torch.equal(out, plain(self.seed, (0,)))

    @rule()
    def serves_two_threads(self) -> None:
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda row=row: found.append(self.ask((row,)))) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        assert sorted(out.tolist() for out in found) == sorted(plain(self.seed, (row,)).tolist() for row in (0, 1))
        assert self.draft.catch_up(LONG_S) or self.failed

    @precondition(lambda self: hasattr(os, "fork"))
    @rule()
    def serves_in_a_child(self) -> None:
        before = flat_params(self.draft)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a learning thread may run
            child = os.fork()
        if not child:
            code = 3
            try:
                same = torch.equal(self.ask(), plain(self.seed, (0,)))
                code = 0 if same and (self.draft.catch_up(LONG_S) or self.failed) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(flat_params(self.draft), before)

    # Saving

    @rule(goes_on=st.booleans())
    def is_saved_and_loaded(self, goes_on: bool) -> None:
        self.draft.catch_up(LONG_S)
        with tempfile.TemporaryDirectory() as folder:
            self.draft.save_unexamined(folder)
            loaded = OnlineDraft.from_pretrained(folder, base_model=self.model)
        assert torch.equal(flat_params(loaded), flat_params(self.draft)) and loaded.steps == self.draft.steps
        assert {name: own.steps for name, own in loaded.adapters.items()} == {
            name: own.steps for name, own in self.draft.adapters.items()
        }
        if not self.failed:  # what had failed is tried at once by a loaded draft
            for one in (self.draft, loaded):
                self.answers((1,), assistant_model=one)
                assert one.catch_up(LONG_S)
            assert torch.equal(flat_params(loaded), flat_params(self.draft))
        if goes_on:
            self.draft, self.failed = loaded, False

    # Failures

    def _breaks(self, call: Callable[[], None]) -> None:
        """A call that answers, or raises what was simulated."""
        try:
            call()
        except (Simulated, KeyboardInterrupt):
            pass
        self.failed = True
        self.draft.catch_up(LONG_S)

    @rule(
        at=st.integers(1, 2000),
        error=st.sampled_from([Simulated, KeyboardInterrupt]),
        when=st.sampled_from(["serve", "save"]),
    )
    def breaks_anywhere(self, at: int, error: type[BaseException], when: str) -> None:
        def call() -> None:
            with tempfile.TemporaryDirectory() as folder, strikes(at, error):
                if when == "serve":
                    self.answers((0, 1) if at % 2 else (2,))
                else:
                    self.draft.save_unexamined(folder)

        self._breaks(call)

    @rule(at=st.integers(1, NEW_TOKENS), rows=st.sampled_from([(0,), (1, 2)]))
    def breaks_in_the_caller_s_own(self, at: int, rows: tuple[int, ...]) -> None:
        # With several rows it is tried before any work, and refused where that raises.
        with pytest.raises(UnsupportedError if len(rows) > 1 and at == 1 else Simulated):
            self.ask(rows, logits_processor=LogitsProcessorList([Raises(at)]))
        self.failed = True

    # What holds

    @invariant()
    def the_adapter_is_finite_and_the_users_draft_as_it_was(self) -> None:
        assert flat_params(self.draft).isfinite().all()
        with torch.no_grad():
            assert torch.equal(self.model(self.tokens).logits, self.logits)
            assert torch.equal(self.draft.model(self.tokens).logits, self.logits)

    @invariant()
    def it_answers(self) -> None:
        self.answers((1,), onlinespec=False)

    def teardown(self) -> None:
        if "draft" in vars(self):
            del self.draft
            gc.collect()
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_onlinespec")]
        assert names == []


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        DraftLife,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # a life that fails is told as it was: to shorten it takes minutes
        ),
    )


def test_whatever_happens_to_a_draft_it_answers_as_its_target_and_keeps_what_it_learned() -> None:
    run(6, 10)
