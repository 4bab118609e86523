"""How the fuzzer runs a case: its requests are answered twice, with the case's failure and clock, and what came to pass is counted."""

from __future__ import annotations

import contextlib
import copy
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from fuzz_answers import ask, differ
from fuzz_cases import FAILURES, HEADS, RAISED, SCRIPTED, Case, draw_case
from fuzz_drafts import checksums, draft_model, handed_over, scripted
from fuzz_models import ENCODER_DECODERS, PAIRS, SOME, model_of
from fuzz_requests import Request
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecError, online_draft
from hf_onlinespec.commit.base import latest_draft
from hf_onlinespec.commit.request import Request as CallOfDraft
from hf_onlinespec.rounds import Proposal


def run_case(seed: int, number: int) -> tuple[Case, list[str]]:
    """A case and how each of its requests went."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths that cannot be, and of failures: both are asked for
        return _run(draw_case(seed, number))


def _run(case: Case) -> tuple[Case, list[str]]:
    # The memory hangs on the target, and what is learned on the draft: copies, so that a case stands alone. Nobody writes to a
    # target's modules: another one over the same modules will do.
    target = copy.copy(model_of(case.target, 1))
    found: list[str] = []
    try:
        model = draft_model(case, target)
        ours = handed_over(case, model)
        before = {} if model is None else checksums(model)
    except OnlineSpecError as error:
        return case, [f"a refusal without reason: {type(error).__name__}: {error}"]
    for request in case.requests:
        torch.manual_seed(case.number)
        plain = ask(target, request)
        torch.manual_seed(case.number)
        if case.draft == SCRIPTED:
            ours = scripted(plain.tokens, case.number)
        with drawn_clock(case), failing(case, target, None if model is None else type(model)), counting(case):
            answer = ask(target, request, **ours)
        found.append(differ(request, target, plain, answer))
        _count(case, request, found[-1])
    if case.draft != SCRIPTED:
        _read_metrics(case, target, ours)
    if model is not None and not before.items() <= checksums(model).items():
        found.append("the user's draft was changed")
    return case, found


def _count(case: Case, request: Request, outcome: str) -> None:
    """What was equal, by its kind."""
    kinds = {
        "batches": request.rows > 1,
        "encoder_decoders": case.target in ENCODER_DECODERS,
        "heads": case.draft in HEADS,
        "other_tokenizers": case.draft in (PAIRS, SOME),
        "scripts": case.draft == SCRIPTED,
        "named_adapters": request.adapter is not None,
    }
    for name, is_one in kinds.items():
        case.counts[name] += is_one and outcome == "equal"


def _read_metrics(case: Case, target: PreTrainedModel, ours: dict[str, Any]) -> None:
    with contextlib.suppress(OnlineSpecError):  # it was refused
        draft = online_draft(ours["assistant_model"]) if "assistant_model" in ours else latest_draft(target)
        if isinstance(draft, OnlineDraft):
            draft.catch_up(20.0)
        for name in ("new_tokens", "drafted_tokens", "accepted_tokens", "updates", "idle_updates", "rollbacks"):
            case.counts[name] += 0 if draft is None else getattr(draft.metrics, name)


@contextlib.contextmanager
def counting(case: Case) -> Iterator[None]:
    """Counts the trees that are verified."""
    propose = CallOfDraft.propose

    def counted(self: CallOfDraft, *args: Any) -> Proposal:
        proposal = propose(self, *args)
        case.counts["trees"] += sum(not proposal.is_chain(row) for row in range(len(proposal.lengths)))
        return proposal

    with mock.patch.object(CallOfDraft, "propose", counted):
        yield


@contextlib.contextmanager
def failing(case: Case, target: PreTrainedModel, draft_class: Any) -> Iterator[None]:
    """The case's failure, at its n-th call; after that one all goes well."""
    if case.failure is None:
        yield
        return
    where, at, what = case.failure
    calls = 0

    def strike() -> bool:
        nonlocal calls
        calls += 1
        case.counts["failures"] += calls == at
        return calls == at

    place = FAILURES[where]
    with contextlib.ExitStack() as stack:
        if place is not None or where == "backward":
            for owner, name in [place] if place is not None else [(torch.autograd, "grad"), (Tensor, "backward")]:
                stack.enter_context(
                    mock.patch.object(owner, name, _raising(getattr(owner, name), strike, RAISED[what]))
                )
        elif where == "not finite":
            softmax = Tensor.log_softmax

            def log_softmax(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                out = softmax(self, *args, **kwargs)
                return out * torch.nan if self.requires_grad and strike() else out

            stack.enter_context(mock.patch.object(Tensor, "log_softmax", log_softmax))
        elif draft_class is not None:
            forward = draft_class.forward

            def of_draft(self: Any, *args: Any, **kwargs: Any) -> Any:
                if self is not target and strike():
                    raise RAISED[what]("simulated")
                return forward(self, *args, **kwargs)

            of_draft.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature is looked at
            stack.enter_context(mock.patch.object(draft_class, "forward", of_draft))
        yield


def _raising(function: Callable[..., Any], strike: Callable[[], bool], error: type[Exception]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if strike():
            raise error("simulated")
        return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def drawn_clock(case: Case) -> Iterator[None]:
    """Times that are drawn, not measured."""
    rng = random.Random(case.number)
    now = 0.0

    def perf_counter() -> float:
        nonlocal now
        now += rng.expovariate(1 / case.clock)
        return now

    with mock.patch.object(time, "perf_counter", perf_counter):
        yield
