"""How the fuzzer answers a case twice, by plain `generate` and by ours, and in what the two differ."""

from __future__ import annotations

import contextlib
import copy
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fuzz_cases import FAILURES, RAISED, REFUSALS, Case, Follow, Fresh, Request, draw_case
from fuzz_models import model_of
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecError, online_draft, online_memory

TIE = 1e-4  # of two best scores: float32 differs by about 1e-5 from one shape of a forward to another
CLOSE = 1e-3  # scores of the same token in two forwards
CALLERS = (ZeroDivisionError, KeyboardInterrupt)  # raised by the caller's own processors and streamers


@dataclass
class Answer:
    """What one call gave, as far as the two ways may be compared."""

    tokens: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] | None = None  # (1, vocab) for every new token
    logits: list[Tensor] | None = None
    heard: tuple[list[int], int] | None = None
    calls: tuple[Any, ...] = ()  # of the caller's processors and criteria
    cached: int | None = None
    error: BaseException | None = None
    start: int = 0  # tokens that were there before


def ask(target: PreTrainedModel, request: Request, case: Case, **ours: Any) -> Answer:
    """One call; with `ours`, what makes it ours."""
    prompt = request.prompt
    answer = Answer(start=prompt.shape[1])
    try:
        arguments = request.call()
        if request.turn:
            first = target.generate(
                prompt, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0, **ours
            )
            whole = torch.cat([first.sequences, prompt], dim=-1)
            arguments["past_key_values"] = first.past_key_values
            arguments["attention_mask"] = torch.ones_like(whole)
            prompt = whole[:, first.past_key_values.get_seq_length() :] if request.turn == "new" else whole
            answer.start = prompt.shape[1]
        seen = [*arguments.get("logits_processor", []), *arguments.get("stopping_criteria", [])]
        streamer = arguments.get("streamer")
        if ours and request.through == "custom_generate":
            draft = ours.pop("assistant_model")
            arguments.pop("streamer", None)
            tokenizer = arguments.pop("tokenizer", None)
            ours = {"custom_generate": draft.generate_fn(streamer, tokenizer)}
        arguments |= ours
        if request.as_config:
            arguments = _in_config(arguments)
        with torch.inference_mode() if request.inference_mode else contextlib.nullcontext():
            out = target.generate(prompt, **arguments)
    except (Exception, KeyboardInterrupt) as error:
        answer.error = error
        return answer
    if isinstance(out, Tensor):
        answer.tokens = out.tolist()
    else:
        answer.tokens = out.sequences.tolist()
        answer.scores = None if out.scores is None else list(out.scores)
        answer.logits = None if out.logits is None else list(out.logits)
        with contextlib.suppress(AttributeError, ValueError):  # no cache, or one of states that have no length
            answer.cached = out.past_key_values.get_seq_length()
    if streamer is not None:
        answer.heard = (streamer.heard, streamer.ended)
    answer.calls = tuple(thing.calls for thing in seen)
    return answer


def _in_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with everything that a GenerationConfig may hold in one."""
    known = {name for name in GenerationConfig().to_dict() if name in arguments} | ({"onlinespec"} & set(arguments))
    if "custom_generate" in arguments:
        known -= {"stop_strings"}  # generate would want the tokenizer that it does not hand over
    config = GenerationConfig(pad_token_id=0, **{name: arguments[name] for name in known})
    return {k: v for k, v in arguments.items() if k not in known} | {"generation_config": config}


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


def differ(case: Case, request: Request, target: PreTrainedModel, plain: Answer, ours: Answer) -> str:
    """ "equal", "tie", "refused: …", "raised", or in what the two differ."""
    if isinstance(ours.error, OnlineSpecError):
        for words, reasons in REFUSALS:
            if words in str(ours.error) and request.reasons.intersection(reasons):
                return f"refused: {words}"
        return f"a refusal without reason: {named(ours.error)}"
    if request.arguments["do_sample"] and isinstance(ours.error, CALLERS):  # plain's own text may have ended before
        return f"raised: {type(ours.error).__name__}"
    # Plain's own text may have gone on to where the caller's processor fails, or the table of positions ends.
    if request.arguments["do_sample"] and isinstance(plain.error, (*CALLERS, IndexError)) and ours.error is None:
        return _could_be(request, case, target, ours)
    # Two things of the caller's fail: processors see all tokens of a round before the streamer is given the first.
    if isinstance(plain.error, CALLERS) and isinstance(ours.error, CALLERS):
        return f"raised: {type(ours.error).__name__}"
    if plain.error is not None or ours.error is not None:
        if type(plain.error) is type(ours.error):
            return f"raised: {type(ours.error).__name__}"
        return f"plain: {named(plain.error)}; ours: {named(ours.error)}"
    if request.arguments["do_sample"]:
        return _could_be(request, case, target, ours)
    for row, other in zip(plain.tokens, ours.tokens, strict=True):
        for i, (a, b) in enumerate(zip(row, other, strict=False)):
            if a != b:
                gap = _gap(request, case, target, i - plain.start)
                return "tie" if gap < TIE else f"token {i} of {len(row)}: {a} became {b}, gap {gap:.2g}"
        if len(row) != len(other):
            return f"{len(other)} tokens instead of {len(row)}"
    # Of several rows each has its own copies of what the caller gave, and the cache is handed back empty.
    for name in ("heard", "calls", "cached") if len(ours.tokens) == 1 else ("heard",):
        if getattr(plain, name) != getattr(ours, name):
            return f"{name}: {getattr(plain, name)} became {getattr(ours, name)}"
    for name in ("scores", "logits"):
        a, b = getattr(plain, name), getattr(ours, name)
        if (a is None) != (b is None) or (a is not None and len(a) != len(b)):
            return f"{name}: other lengths"
        if a is not None and not all(
            torch.allclose(x.float(), y.float(), CLOSE, CLOSE) for x, y in zip(a, b, strict=True)
        ):
            return f"{name} differ"
    return "equal"


def named(error: BaseException | None) -> str:
    if error is None:
        return "answers"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "hf_onlinespec" in f.filename]
    where = f" @ {frames[-1].filename.split('/')[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:160]}{where}"


def _gap(request: Request, case: Case, target: PreTrainedModel, place: int) -> float:
    """Between the two best processed scores of plain `generate` at a new token."""
    scored = copy.copy(request)
    scored.arguments = request.arguments | {"return_dict_in_generate": True, "output_scores": True}
    scores = ask(target, scored, case).scores
    assert scores is not None
    best = scores[place][0].topk(2).values
    return float(best[0] - best[1])


def _could_be(request: Request, case: Case, target: PreTrainedModel, ours: Answer) -> str:
    """Whether plain `generate`, left no other choice, writes the same text: in its support, and of its length."""
    for i, scores in enumerate(ours.scores or []):
        if not all(torch.isfinite(own[row[ours.start + i]]) for own, row in zip(scores, ours.tokens, strict=True)):
            return f"sampled token {i} has probability 0"
    followed = copy.copy(request)
    given = request.arguments.get("logits_processor")
    tokens = torch.tensor(ours.tokens)
    first = [] if given is None else given.make()
    followed.arguments = request.arguments | {"logits_processor": Fresh(lambda: [*first, Follow(tokens, ours.start)])}
    plain = ask(target, followed, case)
    if plain.error is not None:
        return f"plain cannot write the sampled text: {named(plain.error)}"
    return (
        "equal"
        if plain.tokens == ours.tokens
        else f"sampled {tokens.shape[1]} tokens; plain stops it at {len(plain.tokens[0])}"
    )


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
    ours: dict[str, Any] = {}
    model: PreTrainedModel | None = None
    checksum = 0.0
    try:
        if case.draft:
            model = copy.deepcopy(model_of(case.target, 1) if case.draft == "copy" else model_of(case.draft, 2))
            ours = _handed_over(case, model)
            checksum = _checksum(model)
        else:
            ours = {"onlinespec": case.settings}
    except OnlineSpecError as error:
        return case, [f"a refusal without reason: {type(error).__name__}: {error}"]
    for request in case.requests:
        torch.manual_seed(case.number)
        plain = ask(target, request, case)
        torch.manual_seed(case.number)
        with drawn_clock(case), failing(case, target, None if model is None else type(model)):
            answer = ask(target, request, case, **ours)
        found.append(differ(case, request, target, plain, answer))
    with contextlib.suppress(OnlineSpecError):  # it was refused
        draft = online_draft(ours["assistant_model"]) if model is not None else online_memory(target)
        if isinstance(draft, OnlineDraft):
            draft.catch_up(20.0)
        for name in ("new_tokens", "drafted_tokens", "accepted_tokens", "updates", "idle_updates", "rollbacks"):
            case.counts[name] += getattr(draft.metrics, name)
    if model is not None and _checksum(model) != checksum:
        found.append("the user's draft was changed")
    return case, found


def _handed_over(case: Case, model: PreTrainedModel) -> dict[str, Any]:
    """The draft as the caller gives it."""
    if case.wrapped == "OnlineDraft":
        return {"assistant_model": OnlineDraft(model, case.settings)}
    if case.wrapped == "bfloat16":
        model.to(torch.bfloat16)
    if case.wrapped == "PeftModel":
        torch.manual_seed(case.number)
        given = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        return {"assistant_model": given, "onlinespec": case.settings}
    return {"assistant_model": model, "onlinespec": case.settings}


def _checksum(model: PreTrainedModel) -> float:
    return sum(float(p.detach().double().sum()) for p in model.parameters())
