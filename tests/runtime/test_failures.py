"""Whatever fails beside decoding costs no answer, changes nothing that was learned, is counted and told, and is tried again."""

from __future__ import annotations

import errno
import gc
import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from hf_onlinespec import OnlineCandidateGenerator, OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec._compat.caches import cache_tensors
from hf_onlinespec.adapt.gated_lora import GatedLora
from hf_onlinespec.adapt.guard import Guard, GuardConstants
from hf_onlinespec.adapt.idle import IdleLearning
from hf_onlinespec.adapt.learner import Learner
from hf_onlinespec.adapt.objective import Objective
from hf_onlinespec.adapt.replay import Replay
from hf_onlinespec.adapt.request_feedback import RequestFeedback
from hf_onlinespec.adapt.schedule import LearningSchedule
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.adapt.service import LearningService
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.commit.causal_lm import CausalLM
from hf_onlinespec.commit.proposal import ProposalBuilder
from hf_onlinespec.commit.recycling import RecyclingTable
from hf_onlinespec.commit.request import Request
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.draft import OnlineDraft as Draft
from hf_onlinespec.govern.acceptance import Acceptances
from hf_onlinespec.govern.budget import LearningBudget
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.govern.guesses import GuessChances
from hf_onlinespec.govern.planner import Plan
from hf_onlinespec.metrics import DraftMetrics
from tests.conftest import tiny_llama
from tests.drafts import flat_params
from tests.tiny_models import CACHE

pytestmark = pytest.mark.failures  # they are what is tested here

GREEDY = {"do_sample": False, "max_new_tokens": 8}
SMALL: dict[str, Any] = {"rank": 4, "alpha": 4.0, "lookahead": 3, "update_every": 1, "lr": 1e-2}


def draft_of(**settings: Any) -> OnlineDraft:
    return OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(SMALL | settings)))


def answer(target: PreTrainedModel, prompt: torch.Tensor, **arguments: Any) -> Any:
    """What `generate` gives, or what it raises."""
    try:
        return target.generate(prompt, **(GREEDY | arguments))
    except Exception as error:
        return error


@cache
def plain(tokens: tuple[int, ...]) -> torch.Tensor:
    """What the target says to a prompt (L,)."""
    return tiny_llama(1, layers=2).generate(torch.tensor([tokens]), **GREEDY)


def answers(target: PreTrainedModel, prompt: torch.Tensor, times: int = 1, **arguments: Any) -> None:
    """As many requests that are answered as plain `generate` answers them."""
    for start in range(times):
        inputs = (prompt + start) % 32
        found = answer(target, inputs, **arguments)
        assert isinstance(found, torch.Tensor), repr(found)
        assert torch.equal(found, plain(tuple(inputs[0].tolist())))


def put(patch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    """In the place of a function of a module or class, or of what a path names."""
    if isinstance(owner, str):
        patch.setattr(f"{owner}.{name}", value)
    else:
        patch.setattr(owner, name, value)


def runs_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory: simulated")


def learned_state(draft: OnlineDraft) -> dict[str, torch.Tensor]:
    state = draft.learning.learner.experts.state()
    values = {name: torch.tensor(state.values[name]) for name in ("steps", "weights")}
    return {"params": flat_params(draft)} | values | {name: part.clone() for name, part in state.tensors.items()}


@pytest.mark.parametrize(
    ("where", "when", "learner"),
    [
        ("backward", "round", "optimistic"),
        ("backward", "request", "ensemble"),
        ("loss", "request", "optimistic"),
        ("learner", "request", "ensemble"),
        ("join", "request", "optimistic"),
    ],
)
def test_a_step_that_raises_leaves_everything_as_it_was(target, prompt, monkeypatch, learner, where, when) -> None:
    draft = draft_of(learner=learner, update_when=when, replay_passes=0)
    answers(target, prompt, 2, assistant_model=draft)
    before, updates = learned_state(draft), draft.metrics.updates
    with monkeypatch.context() as patch:
        if where == "backward":
            patch.setattr(torch.Tensor, "backward", runs_out)
        elif where == "loss":
            patch.setattr(Objective, "losses", runs_out)
        elif where == "learner":
            patch.setattr(torch, "lerp", runs_out)
        else:
            patch.setattr(GatedLora, "join", runs_out)
        answers(target, prompt, 1, assistant_model=draft)
    after = learned_state(draft)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert draft.metrics.updates == updates and draft.metrics.failed_updates == draft.metrics.last.failed_updates == 1
    assert "OutOfMemoryError" in draft.metrics.decisions.learning
    with torch.no_grad():  # no gate is left open
        assert torch.equal(draft.model(prompt).logits, tiny_llama(2)(prompt).logits)
    answers(target, prompt, 4, assistant_model=draft)  # one is left out, then it learns on
    assert draft.metrics.updates > updates and draft.metrics.failed_updates == 1
    assert "works again" in draft.metrics.decisions.learning


# Modules that earlier packages do not have are named by their paths, so that the rest can be run against these.
REQUEST_MODEL = "hf_onlinespec.commit.row_model.RowModel"
PLACES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "the draft model's cache": ("hf_onlinespec.commit.causal_lm", "record_past", {}),
    "the draft model's part": (REQUEST_MODEL, "__init__", {"update_when": "round"}),
    "the part of learning": (RequestFeedback, "__init__", {}),
    "the budget": (LearningBudget, "affordable_steps", {"update_every": "auto"}),
    "the budget, with a clock": (LearningBudget, "affordable_steps", {"update_every": "auto", "lookahead": "auto"}),
    "scoring": (Objective, "acceptance", {}),
    "folding": (GatedLora, "fold", {}),
    "the guard": (Guard, "observe", {}),
    "the guard's trial": (GatedLora, "with_zero_b", {"snapshots": 2}),
    "the end of the request": (LearningService, "end_request", {}),
    "the replay": (Replay, "add", {}),
    "the replay's steps": (Learner, "replay_step", {}),
    "the prompt's preference": (CausalLM, "prompt_log_ratio", {"update_every": "auto"}),
    "the prompt's preference, before it drafts": (
        CausalLM,
        "prompt_log_ratio",
        {"update_every": "auto", "lookahead": "auto"},
    ),
    "a look": (LearningService, "score_offline", {"update_every": "auto", "lookahead": "auto"}),
    "recording": (LearningSchedule, "record", {}),
    "the copy of the logits": (LearningSchedule, "copied", {}),
    "what is handed over": (IdleLearning, "add", {"update_when": "idle"}),
    "the table's answer": (RecyclingTable, "successors", {"lookahead": "auto"}),
    "the table's tokens": (RecyclingTable, "update", {"lookahead": "auto"}),
    "the best tokens": ("hf_onlinespec.commit.guessing", "best_tokens", {"lookahead": "auto"}),
    "the chances of guesses": (GuessChances, "place", {}),
    "what guesses are learned from": (GuessChances, "observe", {}),
    "the tree": ("hf_onlinespec.commit.combined", "grow", {"lookahead": "auto"}),
    "the memory's answer": (SuffixMemory, "continuation", {}),
    "the memory's tokens": (SuffixMemory, "extend", {}),
    "the governor": (Governor, "observe_rows", {}),
    "the governor's end of a request": (Governor, "request_ended", {}),
    "the plan": (Governor, "plan", {"lookahead": "auto"}),
    "the counters": (DraftMetrics, "close", {}),
    "the target's name": (Draft, "serves", {}),
}


BEFORE = {"the guard's trial": GuardConstants().try_every - 1}  # requests until the next one comes to it
# What leads to a place where the clock would decide whether it is reached.
LEADING: dict[str, list[tuple[Any, str, Any]]] = {
    "the prompt's preference": [(LearningBudget, "affordable_steps", lambda *_: 1)],
    "the prompt's preference, before it drafts": [
        (Governor, "decide_prompt_scoring", lambda *_: True),
    ],
    "a look": [(LearningBudget, "affordable_steps", lambda *_: 0), (Governor, "request_ended", lambda *_, **__: True)],
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_beside_decoding_fails_a_call(target, prompt, monkeypatch, place: str) -> None:
    owner, name, settings = PLACES[place]
    draft = draft_of(**settings)
    answers(target, prompt, BEFORE.get(place, 2), assistant_model=draft)
    raised = []

    def broken(*_: Any, **__: Any) -> Any:
        raised.append(name)
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        put(patch, owner, name, broken)
        for leading in LEADING.get(place, []):
            patch.setattr(*leading)
        answers(target, prompt, 2, assistant_model=draft)
    assert raised, "the place was not reached"
    answers(target, prompt, 1, assistant_model=draft)
    draft.catch_up(30)
    with torch.no_grad():
        assert torch.equal(draft.model(prompt).logits, tiny_llama(2)(prompt).logits)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("lookahead", [3, "auto"])
def test_a_draft_whose_forward_fails_is_out_for_the_request(
    target, prompt, monkeypatch, sample: bool, lookahead: int | str
) -> None:
    """In the middle of a request, and from its first token on: the target goes on alone, and the next ones are drafted again."""
    if lookahead == "auto":  # it drafts in every round, whatever the times were
        monkeypatch.setattr(Governor, "plan", lambda *_, **__: Plan(3, 0.0, 0.0))
    draft = draft_of(lookahead=lookahead, memory_tokens=0, recycle=False, update_when="round")
    answers(target, prompt, 4, assistant_model=draft)
    drafted, calls = draft.metrics.drafted_tokens, []
    forward = type(draft.trainable.adapter.tree).forward

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not target:
            calls.append(None)
            if len(calls) > at:
                raise torch.OutOfMemoryError("out of memory: simulated")
        return forward(self, *args, **kwargs)

    for at in (0, 4):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(draft.trainable.adapter.tree), "forward", fails)
            if sample:
                found = answer(target, prompt, assistant_model=draft, do_sample=True)
                assert isinstance(found, torch.Tensor) and found.shape == (1, prompt.shape[1] + 8), repr(found)
            else:
                answers(target, prompt, 1, assistant_model=draft)
        assert len(calls) > at, "it did not fail"
        assert draft.metrics.last.new_tokens == 8
        answers(target, prompt, 4, assistant_model=draft)
    assert draft.metrics.failed_drafts == 2
    assert draft.metrics.drafted_tokens > drafted


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_not_held_up(target, prompt, monkeypatch, stop: type[BaseException]) -> None:
    draft = draft_of()

    def stops(*_: Any, **__: Any) -> Any:
        raise stop

    monkeypatch.setattr(torch.Tensor, "backward", stops)
    with pytest.raises(stop):
        target.generate(prompt, assistant_model=draft, **GREEDY)


def test_what_fails_is_tried_ever_more_rarely_and_told_once(target, prompt, monkeypatch, caplog) -> None:
    """While it is left out, nothing is recorded for it."""
    draft, tries, kept = draft_of(), [], []

    def fails(*_: Any, **__: Any) -> Any:
        tries.append(draft.metrics.requests)
        runs_out()

    copied = LearningSchedule.copied
    monkeypatch.setattr(torch.Tensor, "backward", fails)
    monkeypatch.setattr(
        LearningSchedule,
        "copied",
        lambda self, logits: (self.learns and kept.append(draft.metrics.requests), copied(self, logits))[1],
    )
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        answers(target, prompt, 30, assistant_model=draft)
    assert tries == [0, 2, 5, 10, 19] and sorted(set(kept)) == tries
    assert draft.metrics.failed_updates == 5 and len(caplog.records) == 1
    assert "OutOfMemoryError" in caplog.text and "OutOfMemoryError" in draft.metrics.decisions.learning


# What is called while the memory drafts, and with which settings; None: without a draft model.
ON_THE_WAY: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
    "its answer is looked up": (SuffixMemory, "continuation", None),
    "its answer is priced": (Governor, "guess_pays", None),
    "its answer is priced, beside a model": (Acceptances, "memory", {}),
    "its answer is taken": (ProposalBuilder, "add_branch", None),
    "its answer is taken, beside a model": (ProposalBuilder, "add_guess", {}),
    "the table's answer is looked up": (RecyclingTable, "successors", None),
    "the draft model is prepared": (REQUEST_MODEL, "__init__", {}),
    "the round is planned": (Governor, "plan", None),
    "the round is planned, with a model that learns of rounds": (
        Governor,
        "plan",
        {"lookahead": "auto", "update_when": "round"},
    ),
    "the round is closed": (ProposalBuilder, "proposal", None),
    "the round is closed, with a model": (ProposalBuilder, "proposal", {}),
    "the round is closed, with a model that learns of rounds": (ProposalBuilder, "proposal", {"update_when": "round"}),
}


@pytest.mark.parametrize("where", ON_THE_WAY)
def test_what_fails_while_the_memory_drafts_is_out_for_the_request(
    target, prompt, monkeypatch, caplog, where: str
) -> None:
    """Not for a round: it is tried again after 1, 2, 4 … requests, whoever else drafts goes on, and it is told once."""
    owner, name, settings = ON_THE_WAY[where]
    draft = None if settings is None else draft_of(**settings)
    way = {"onlinespec": True} if draft is None else {"assistant_model": draft}
    tries: list[int] = []

    def fails(*_: Any, **__: Any) -> Any:
        tries.append(request)
        raise RuntimeError("on purpose")

    metrics = (online_memory(target) if draft is None else draft).metrics
    prompt = prompt[:, :3].repeat(1, 4)  # the memory has something to say
    expected = plain(tuple(prompt[0].tolist()))
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        for request in range(6):  # noqa: B007 (`fails` notes it)
            put(monkeypatch, owner, name, fails)
            found = answer(target, prompt, **way)
            monkeypatch.undo()
            assert isinstance(found, torch.Tensor) and torch.equal(found, expected), repr(found)
    assert tries == [0, 2, 5]
    assert metrics.failed_drafts == 3 and "failed (RuntimeError in " in metrics.decisions.drafting
    assert len([record for record in caplog.records if "failed (RuntimeError in " in record.message]) == 1
    if where == "the draft model is prepared":  # without it nothing was learned either, and that is said
        assert "failed (RuntimeError in " in metrics.decisions.learning
    if draft is not None and "closed" not in where and "planned" not in where:
        assert metrics.drafted_tokens > 6
    for _ in range(5):
        assert torch.equal(answer(target, prompt, **way), expected)
    assert metrics.failed_drafts == 3 and "works again" in metrics.decisions.drafting


@pytest.mark.parametrize("where", ["the round is planned", "the round is closed"])
def test_learning_reads_no_rejected_tokens_after_what_failed(target, prompt, monkeypatch, where: str) -> None:
    """The request goes on plain, and learns on at every round: from the cache that it has, of what was written alone."""
    draft = draft_of(update_when="round", lookahead="auto", memory_tokens=0, replay_passes=0, lr=1e-30)
    rounds, read = [], []
    learn, close = LearningService.learn_segment, ProposalBuilder.proposal

    def plans(*_: Any, **__: Any) -> Plan:
        rounds.append(None)
        if len(rounds) == 2 and where == "the round is planned":
            raise RuntimeError("on purpose")
        return Plan(3, 0.0, 0.0)

    def closes(*arguments: Any) -> Any:
        if len(rounds) == 2 and where == "the round is closed":
            raise RuntimeError("on purpose")
        return close(*arguments)

    def learns(self: Any, segment: Segment, counts: Any, *, prefix: Prefix | None, **more: Any) -> None:
        if prefix is not None:
            keys = [keys[..., : prefix.length, :].clone() for keys, _ in cache_tensors(prefix.cache)]
            read.append((segment.tokens[:, : prefix.length], keys))
        learn(self, segment, counts, prefix=prefix, **more)

    monkeypatch.setattr(Governor, "plan", plans)
    monkeypatch.setattr(ProposalBuilder, "proposal", closes)
    monkeypatch.setattr(LearningService, "learn_segment", learns)
    answers(target, prompt, 1, assistant_model=draft)
    assert draft.metrics.failed_drafts == 1 and draft.metrics.drafted_tokens > draft.metrics.accepted_tokens
    assert read and draft.metrics.updates == draft.metrics.rounds > 3
    for tokens, found in read:
        cache = DynamicCache(config=draft.config)
        with torch.no_grad():
            tiny_llama(2)(tokens, **{CACHE: cache})
        for keys, (expected, _) in zip(found, cache_tensors(cache), strict=True):
            torch.testing.assert_close(keys, expected)


SECRET = "my password is swordfish"


@pytest.mark.parametrize("who", ["the error itself", "its cause", "what the caller was handling"])
def test_what_is_said_of_a_failure_quotes_no_text(target, prompt, monkeypatch, caplog, who: str) -> None:
    """An error may quote a request, and so may one that was being handled: the log and the decisions say what and where."""
    draft = draft_of()

    def fails(*_: Any, **__: Any) -> Any:
        if who == "its cause":
            try:
                raise KeyError(SECRET)
            except KeyError as error:
                raise RuntimeError("simulated") from error
        raise RuntimeError(SECRET if who == "the error itself" else "simulated")

    monkeypatch.setattr(Learner, "segment", fails)
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        try:
            if who == "what the caller was handling":
                raise ValueError(SECRET)
        except ValueError:
            answers(target, prompt, 1, assistant_model=draft)
        else:
            answers(target, prompt, 1, assistant_model=draft)
    assert len(caplog.records) == 1 and SECRET not in caplog.text
    assert SECRET not in draft.metrics.decisions.learning
    for told in (caplog.records[0].message, draft.metrics.decisions.learning):
        assert re.search(r"Learning failed \(RuntimeError in service\.py:\d+\)", told)
    assert "in fails" in caplog.text  # the lines that led there


def test_what_the_operating_system_says_of_a_failure_is_told(target, prompt, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, SECRET, SECRET)

    monkeypatch.setattr(SuffixMemory, "extend", full)
    answers(target, prompt, 1, onlinespec=True)
    assert "(OSError: No space left on device in " in online_memory(target).metrics.decisions.drafting


def test_what_failed_holds_no_memory(target, prompt, monkeypatch) -> None:
    """The frames of an error keep every tensor that was made in them."""
    import weakref

    draft, made = draft_of(), []
    losses = Objective.losses

    def watched(self: Objective, *args: Any) -> torch.Tensor:
        found = losses(self, *args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Objective, "losses", watched)
    monkeypatch.setattr(torch.Tensor, "backward", runs_out)
    answers(target, prompt, 1, assistant_model=draft)
    assert made and all(found() is None for found in made)


def test_the_memory_alone_survives_what_fails_in_it(target, prompt, monkeypatch) -> None:
    for name in ("extend", "continuation", "close"):
        monkeypatch.setattr(SuffixMemory, name, runs_out)
        answers(target, prompt, 3, onlinespec=True)
        monkeypatch.undo()
    answers(target, prompt, 3, onlinespec=True)
    assert online_memory(target).metrics.requests == 12


def test_a_checkpoint_thread_that_cannot_start_costs_no_answer(target, prompt) -> None:
    draft = draft_of()

    class Broken:
        def request_done(self) -> None:
            raise RuntimeError("can't start new thread")

        def close(self, *_: Any) -> None: ...

    draft.checkpoints = Broken()  # type: ignore[assignment]
    answers(target, prompt, 2, assistant_model=draft)


def test_transformers_own_loop_survives_it_too(target, prompt, monkeypatch) -> None:
    draft = draft_of(memory_tokens=0)
    config = draft.generation_config.__class__(do_sample=False, max_length=40)
    processors = LogitsProcessorList()
    candidates = OnlineCandidateGenerator(draft, config, processors)
    steps: list[Callable[[], Any]] = [
        lambda: candidates.get_candidates(prompt),
        lambda: [processor(prompt, torch.randn(1, 32)) for processor in list(processors)],
        lambda: candidates.update_candidate_strategy(torch.cat([prompt, prompt[:, :1]], 1), torch.randn(1, 1, 32), 0),
    ]
    monkeypatch.setattr(torch.Tensor, "backward", runs_out)
    for step in steps:
        try:
            step()
        except Exception as error:
            pytest.fail(f"raised {error!r}")
    assert candidates.counts.updates == 0


def test_counters_saved_before_failures_were_counted_are_read() -> None:
    metrics = DraftMetrics(requests=3, new_tokens=7)
    metrics.close(metrics.last)
    saved = metrics.state()
    assert all(len(row) == 14 for row in saved.values["history"]), "as every version has written it"
    for name in ("failed_updates", "failed_drafts", "idle_dropped"):
        saved.values.pop(name, None)
    again = DraftMetrics()
    again.resume(saved)
    assert again.requests == metrics.requests and again.new_tokens == 7


def test_what_the_caller_was_handling_keeps_its_frames(target, prompt, monkeypatch) -> None:
    draft = draft_of()

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("simulated")

    monkeypatch.setattr(Learner, "segment", breaks)

    def fails() -> None:
        kept = "state"
        raise ValueError(f"the caller's, with {kept}")

    try:
        fails()
    except ValueError as error:
        target.generate(prompt, **GREEDY, assistant_model=draft)
        assert error.__traceback__ is not None and error.__traceback__.tb_next is not None
        assert error.__traceback__.tb_next.tb_frame.f_locals == {"kept": "state"}
    assert draft.metrics.failed_updates > 0


def test_in_transformers_own_loop_a_copy_that_fails_is_tried_once(prompt, monkeypatch) -> None:
    draft = draft_of(memory_tokens=0)
    config = draft.generation_config.__class__(do_sample=False, max_length=40)
    processors = LogitsProcessorList()
    candidates = OnlineCandidateGenerator(draft, config, processors)
    candidates.get_candidates(prompt)
    monkeypatch.setattr(torch.Tensor, "clone", runs_out)
    for _ in range(4):
        processors(prompt, torch.randn(1, 32))
    monkeypatch.undo()
    candidates.update_candidate_strategy(torch.cat([prompt, prompt[:, :1]], 1), torch.randn(1, 1, 32), 0)
    assert candidates.counts.failed_updates == 1 and candidates.recorder is not None and not candidates.recorder.rows


def test_a_finished_request_holds_nothing(target, prompt) -> None:
    def held() -> set[int]:
        return {id(one) for one in gc.get_objects() if type(one) is Request}

    draft = draft_of()
    gc.collect()
    before = held()  # by the frames of a test that failed earlier in this process
    gc.disable()
    try:
        for _ in range(3):
            target.generate(prompt, **GREEDY, assistant_model=draft)
        new = held() - before
    finally:
        gc.enable()
    assert new == set()
