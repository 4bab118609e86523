"""The fuzzer's answers: a request is put to plain `generate` or to ours, and the two answers are held against each other."""

from __future__ import annotations

import contextlib
import copy
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_cases import REFUSALS
from fuzz_objects import Follow, Fresh
from fuzz_requests import Request
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_onlinespec import OnlineSpecError

TIE = 1e-4  # of two best scores: float32 differs by about 1e-5 from one shape of a forward to another
CLOSE = 1e-3  # scores of the same token in two forwards
# Of several rows, plain decoding goes on reading the padding of those that have ended, past a table of positions too: ours does not.
PLAIN_ALONE = "raised by plain alone: IndexError"
CALLERS = (ZeroDivisionError, KeyboardInterrupt)  # raised by the caller's own processors and streamers


@dataclass
class Answer:
    """What one call gave, as far as the two ways may be compared."""

    tokens: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] | None = None  # (rows, vocab) for every new token
    logits: list[Tensor] | None = None
    heard: tuple[list[int], int] | None = None
    calls: tuple[Any, ...] = ()  # of the caller's processors and criteria
    cached: int | None = None  # tokens in the cache that was handed back
    error: BaseException | None = None
    start: int = 0  # tokens that were there before


def ask(target: PreTrainedModel, request: Request, **ours: Any) -> Answer:
    """One call; with `ours`, what makes it ours."""
    prompt = request.prompt
    answer = Answer(start=prompt.shape[1])
    try:
        arguments = request.call()
        if request.turn:
            arguments, prompt = _next_turn(target, request, arguments, ours)
            answer.start = prompt.shape[1]
        seen = [*arguments.get("logits_processor", []), *arguments.get("stopping_criteria", [])]
        streamer = arguments.get("streamer")
        if ours and request.through == "custom_generate":
            draft = ours.pop("assistant_model")
            arguments.pop("streamer", None)
            tokenizer = arguments.pop("tokenizer", None)
            ours = {"custom_generate": draft.generate_fn(streamer, tokenizer)}
        if ours and request.adapter is not None:
            ours["adapter"] = request.adapter
        arguments |= ours
        if request.as_config:
            arguments = _in_config(arguments)
        with torch.inference_mode() if request.inference_mode else contextlib.nullcontext():
            out = target.generate(*([] if target.config.is_encoder_decoder else [prompt]), **arguments)
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


def _next_turn(
    target: PreTrainedModel, request: Request, arguments: dict[str, Any], ours: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Arguments and tokens of a turn that follows one of five tokens: the prompt is said again behind its answer."""
    mask = arguments.get("attention_mask", torch.ones_like(request.prompt))
    first = target.generate(
        request.prompt,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=5,
        return_dict_in_generate=True,
        pad_token_id=0,
        **ours,
    )
    whole = torch.cat([first.sequences, request.prompt], dim=-1)
    answered = torch.ones_like(first.sequences[:, mask.shape[1] :])
    arguments["past_key_values"] = first.past_key_values
    arguments["attention_mask"] = torch.cat([mask, answered, mask], dim=-1)
    held = first.past_key_values.get_seq_length()
    return arguments, whole[:, held:] if request.turn == "new" else whole


def _in_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with everything that a GenerationConfig may hold in one."""
    known = {name for name in (*GenerationConfig().to_dict(), "onlinespec", "adapter") if name in arguments}
    if "custom_generate" in arguments:
        known -= {"adapter", "stop_strings"}  # generate would want the tokenizer that it does not hand over
    config = GenerationConfig(**({"pad_token_id": 0} | {name: arguments[name] for name in known}))
    return {k: v for k, v in arguments.items() if k not in known} | {"generation_config": config}


def differ(request: Request, target: PreTrainedModel, plain: Answer, ours: Answer) -> str:
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
        return _could_be(request, target, ours)
    if request.rows > 1 and isinstance(plain.error, IndexError) and ours.error is None:
        return PLAIN_ALONE
    # Two things of the caller's fail: processors see all tokens of a round before the streamer is given the first.
    if isinstance(plain.error, CALLERS) and isinstance(ours.error, CALLERS):
        return f"raised: {type(ours.error).__name__}"
    if plain.error is not None or ours.error is not None:
        if type(plain.error) is type(ours.error):
            return f"raised: {type(ours.error).__name__}"
        return f"plain: {named(plain.error)}; ours: {named(ours.error)}"
    if request.arguments["do_sample"]:
        return _could_be(request, target, ours)
    return _same_tokens(request, target, plain, ours) or _same_rest(request, plain, ours) or "equal"


def _same_tokens(request: Request, target: PreTrainedModel, plain: Answer, ours: Answer) -> str:
    """ "tie", in what the tokens differ, or "": in nothing."""
    tie = False
    for i, (row, other) in enumerate(zip(plain.tokens, ours.tokens, strict=True)):
        for place, (a, b) in enumerate(zip(row, other, strict=False)):
            if a != b:
                gap = _gap(request, target, i, place - plain.start)
                if gap >= TIE:
                    return f"row {i}, token {place} of {len(row)}: {a} became {b}, gap {gap:.2g}"
                tie = True
                break
        else:
            if len(row) != len(other) and not tie:
                return f"{len(other)} tokens instead of {len(row)}"
    return "tie" if tie else ""


def _same_rest(request: Request, plain: Answer, ours: Answer) -> str:
    """In what that differs which is handed out beside the tokens."""
    # Of several rows each has its own copies of what the caller gave.
    for name in ("heard", "calls", "cached") if len(ours.tokens) == 1 else ("heard", "cached"):
        if getattr(plain, name) != getattr(ours, name):
            return f"{name}: {getattr(plain, name)} became {getattr(ours, name)}"
    for name in ("scores", "logits"):
        a, b = getattr(plain, name), getattr(ours, name)
        if (a is None) != (b is None) or (a is not None and len(a) != len(b)):
            return f"{name}: other lengths"
        for i, (x, y) in enumerate(zip(a or [], b or [], strict=True)):
            for row in range(len(x)):
                if _has_ended(request, ours, row, i) and not y[row].any():
                    continue  # plain decoding reads the padding too
                if not torch.allclose(x[row].float(), y[row].float(), CLOSE, CLOSE, equal_nan=True):
                    return f"{name} of token {i} in row {row} differ"
    return ""


def _has_ended(request: Request, ours: Answer, row: int, new: int) -> bool:
    """Whether a row of several is padding from a new token on."""
    return len(ours.tokens) > 1 and set(ours.tokens[row][ours.start + new :]) == {request.pad}


def named(error: BaseException | None) -> str:
    if error is None:
        return "answers"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "hf_onlinespec" in f.filename]
    where = f" @ {frames[-1].filename.split('/')[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:160]}{where}"


def _gap(request: Request, target: PreTrainedModel, row: int, place: int) -> float:
    """Between the two best processed scores of plain `generate` at a new token."""
    scored = copy.copy(request)
    scored.arguments = request.arguments | {"return_dict_in_generate": True, "output_scores": True}
    scores = ask(target, scored).scores
    assert scores is not None
    best = scores[place][row].topk(2).values
    return float(best[0] - best[1])


def _could_be(request: Request, target: PreTrainedModel, ours: Answer) -> str:
    """Whether plain `generate`, left no other choice, writes the same text: in its support, and of its length."""
    for i, scores in enumerate(ours.scores or []):
        for row, own in enumerate(scores):
            # Decoded plainly, a row that has ended has scores of its own behind its end, and padding whatever they say.
            if not _has_ended(request, ours, row, i) and not torch.isfinite(own[ours.tokens[row][ours.start + i]]):
                return f"sampled token {i} of row {row} has probability 0"
    followed = copy.copy(request)
    given = request.arguments.get("logits_processor")
    tokens = torch.tensor(ours.tokens)
    first = [] if given is None else given.make()
    followed.arguments = request.arguments | {
        "logits_processor": Fresh(lambda: [*first, Follow(tokens, ours.start, request.pad)])
    }
    plain = ask(target, followed)
    if request.rows > 1 and isinstance(plain.error, IndexError):
        return PLAIN_ALONE
    if plain.error is not None:
        return f"plain cannot write the sampled text: {named(plain.error)}"
    return (
        "equal"
        if plain.tokens == ours.tokens
        else f"sampled {tokens.shape[1]} tokens; plain stops it at {len(plain.tokens[0])}"
    )
