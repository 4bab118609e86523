"""The fuzzer's cases: what is drawn from a seed and a number, and for what it may be refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_models import DRAFTS, LETTERS, TARGETS, VOCAB, letters_tokenizer, model_of
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, QuantizedCache, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineSpecConfig
from hf_onlinespec._compat.caches import CACHE
from hf_onlinespec.adapt.gated_lora import GatedLora
from hf_onlinespec.adapt.guard import Guard
from hf_onlinespec.adapt.learner import Learner
from hf_onlinespec.adapt.learners import HEDGES, LEARNERS
from hf_onlinespec.adapt.losses import LOSSES
from hf_onlinespec.adapt.replay import SAMPLING, Replay
from hf_onlinespec.commit.request_memory import RequestMemory

# What a caller may hand over beside numbers. Each notes how it was called: that has to be as in plain `generate`.


class Nudge(LogitsProcessor):
    """Prefers another token at every call: wrong from there on where it was called once too often."""

    def __init__(self, fails_at: int | None) -> None:
        self.calls: list[int] = []
        self._fails_at = fails_at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.shape[1])
        if len(self.calls) == self._fails_at:
            raise ZeroDivisionError("a processor of the caller's")
        scores = scores.clone()
        scores[:, (7 * len(self.calls)) % VOCAB] += 1.5
        return scores


class Follow(LogitsProcessor):
    """Leaves plain `generate` one choice: the tokens of other texts (rows, L)."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self._tokens, self._start = tokens, start
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = self._start + self.calls
        self.calls += 1
        if place >= self._tokens.shape[1]:
            return scores
        only = torch.full_like(scores, -torch.inf)
        token = self._tokens[:, place : place + 1]
        return only.scatter(1, token, scores.gather(1, token))


class Stop:
    """A criterion that no configuration knows: at a length, at a multiple of a token, or by the scores that it is shown."""

    def __init__(self, length: int, token: int | None) -> None:
        self.calls: list[tuple[int, bool]] = []
        self._length, self._token = length, token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append((input_ids.shape[1], scores is None))
        return torch.tensor([input_ids.shape[1] >= self._length or int(input_ids[0, -1]) == self._token])


class Listener(BaseStreamer):
    """A streamer that hangs up at the n-th word."""

    def __init__(self, hangs_up_at: int | None) -> None:
        self.heard: list[int] = []
        self.ended = 0
        self._hangs_up_at = hangs_up_at

    def put(self, value: Tensor) -> None:
        self.heard.extend(value.flatten().tolist())
        if self._hangs_up_at is not None and len(self.heard) >= self._hangs_up_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


@dataclass(frozen=True)
class Fresh:
    """An argument that is made anew for every call."""

    make: Callable[[], Any]


@dataclass
class Request:
    """One call of `generate`."""

    prompt: Tensor  # (1, n)
    arguments: dict[str, Any] = field(default_factory=dict)
    turn: str = ""  # "whole" or "new": goes on from a turn before, with all tokens or with those that the cache lacks
    inference_mode: bool = False
    as_config: bool = False  # numbers travel in a GenerationConfig
    through: str = "assistant_model"  # the way in: or "custom_generate"
    reasons: set[str] = field(default_factory=set)  # to refuse it, by the names in REFUSALS

    def call(self) -> dict[str, Any]:
        return {k: v.make() if isinstance(v, Fresh) else v for k, v in self.arguments.items()}


@dataclass
class Case:
    """What was drawn."""

    number: int
    target: str
    draft: str  # a model, "copy", or "" for the memory alone
    settings: OnlineSpecConfig
    wrapped: str  # how the draft is handed over: "OnlineDraft", "model", "PeftModel", "bfloat16"
    failure: tuple[str, int, str] | None  # where, at which call, and what it raises
    requests: list[Request]
    clock: float  # mean seconds between two looks at the clock
    counts: Counter[str] = field(
        default_factory=Counter
    )  # what came to pass, without which equality would show nothing


# Words of each refusal, and what in a request gives reason for it.
REFUSALS = (
    ("num_beams=", ("beams",)),
    ("guidance_scale=", ("guidance",)),
    ("prompt_lookup_num_tokens=", ("lookup",)),
    ("output_hidden_states=", ("outputs",)),
    ("of a row alone", ("batch", "sequences")),
    ("cannot be copied for each row", ("batch", "sequences")),
    ("of the whole batch", ("batch", "sequences")),
    ("of each row of a batch", ("batch", "sequences")),
    ("use_cache=False", ("no cache",)),
    ("cache", ("static cache", "quantized cache")),
    ("recurrent state", ("stateful",)),
    ("memory_tokens=0 and recycle=False without", ("nothing drafts",)),
    # Failures of a draft's forward while it is made; later ones cost no request anything.
    ("cannot read two tokens", ("failing draft",)),
    ("cannot read two sequences", ("failing draft",)),
    ("too little memory for the draft", ("failing draft",)),
)


# Drawing


def draw_case(seed: int, number: int) -> Case:
    """The case of that number: the same on every machine."""
    rng = random.Random(f"{seed} {number}")
    target = rng.choice(TARGETS) if rng.random() < 0.98 else "mamba"
    reasons = {"stateful"} if target == "mamba" else set()
    draft = rng.choice(["", "copy", "copy", "same", "other", "other"])
    if draft in ("copy", "same") and target not in DRAFTS:
        draft = "other"
    if draft == "other":
        draft = rng.choice(DRAFTS)
    elif draft == "same":
        draft = target
    wrapped = rng.choice(["OnlineDraft", "OnlineDraft", "model", "PeftModel", "bfloat16"]) if draft else ""
    settings = _settings(rng)
    if not draft and not settings.guesses:
        reasons.add("nothing drafts")
    failure = None
    if draft and rng.random() < 0.35:
        failure = (
            rng.choice(list(FAILURES)),
            rng.choice([1, 1, 2, 3, 5, 8]),
            rng.choice(["memory", "runtime", "value"]),
        )
        if failure[0] == "draft":
            reasons.add("failing draft")
    prompts = [_prompt(rng) for _ in range(2)]
    requests = []
    for _ in range(rng.choice([2, 2, 3])):
        prompt = rng.choice(prompts)
        requests.append(_request(rng, prompt, target, draft, wrapped))
        requests[-1].reasons |= reasons
    clock = 10.0 ** rng.uniform(-5, -2)
    return Case(number, target, draft, settings, wrapped, failure, requests, clock)


def _settings(rng: random.Random) -> OnlineSpecConfig:
    """Every field has a chance to differ from its default."""

    def some(default: Any, *others: Any) -> Any:
        return one(*others) if rng.random() < 0.4 else default

    def one(*values: Any) -> Any:
        return rng.choice(values)

    return OnlineSpecConfig(
        learner=some("optimistic", *LEARNERS, "ensemble", "ensemble"),
        preconditioner=some("adam", "none"),
        lr=some(2e-3, 1e-4, 2e-2, 0.3),
        hint_memory=some(0.0, 0.5),
        radius=some(None, 0.1, 1.0),
        experts=some(2, 1, 3),
        expert_ratio=some(4.0, 2.0),
        expert_learner=some("ogd", *LEARNERS),
        hedge=some("fixed_share", *HEDGES),
        hedge_rate=some(None, 0.5),
        snapshots=some(2, 0, 1, 3),
        max_grad_norm=some(1.0, 0.01, 100.0),
        gradient_cap=some(3.0, None, 1.0),
        rank=some(4, 1, 8),
        alpha=some(8.0, 1.0, 32.0),
        loss=one(*LOSSES),
        temperature=some(1.0, 0.5, 2.0),
        top_k=some(None, 1, 4, VOCAB),
        lookahead=one("auto", 0, 1, 2, 4, 4, 9),
        update_when=one("round", "request", "request", some("round", "idle")),
        update_every=one("auto", 1, 1, 2, 3),
        update_budget=some(0.1, 0.01, 1.0),
        replay_passes=some(1, 0, 2),
        replay_batch=some(2, 1, 4),
        replay_sampling=some("uniform", *SAMPLING),
        replay_tokens=some(16_384, 0, 30, 200),
        replay_top_k=some(64, 1, 4),
        memory_tokens=some(65_536, 0, 0, 40),
        recycle=some(True, True, False),
        context_tokens=some(512, 1, 5, 16),
        seed=rng.randrange(3),
    )


def _prompt(rng: random.Random) -> Tensor:
    """(1, n) tokens; a short one repeated gives the memory something."""
    n = rng.choice([1, 2, 3, 5, 8, 9, 12, 16])
    tokens = [rng.randrange(3, VOCAB) for _ in range(n)]
    if rng.random() < 0.4:
        tokens = (tokens * 3)[: max(n, 12)]
    return torch.tensor([tokens])


def _request(rng: random.Random, prompt: Tensor, target: str, draft: str, wrapped: str) -> Request:
    request = Request(prompt)
    arguments = request.arguments
    length = prompt.shape[1]
    arguments["do_sample"] = rng.random() < 0.2
    new = rng.choice([1, 2, 4, 6, 8, 12, 16])
    arguments.update({"max_length": length + new} if rng.random() < 0.15 else {"max_new_tokens": new})
    if rng.random() < 0.15:
        request.turn = rng.choice(["whole", "new"])
        arguments.pop("max_length", None)
        arguments["max_new_tokens"] = new
    for name, value in _numbers(rng, arguments["do_sample"]).items():
        arguments[name] = value
    _inputs(rng, request, target)
    _objects(rng, request, length + new)
    _refused(rng, request, target)
    request.inference_mode = rng.random() < 0.15
    request.as_config = rng.random() < 0.15
    if draft and wrapped == "OnlineDraft" and rng.random() < 0.12:
        request.through = "custom_generate"
    return request


def _numbers(rng: random.Random, sample: bool) -> dict[str, Any]:
    """Arguments that a GenerationConfig may hold."""
    tokens = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]  # noqa: E731
    choices: list[tuple[float, dict[str, Any]]] = [
        (0.25, {"eos_token_id": rng.choice([tokens(1)[0], tokens(3), tokens(12)])}),
        (0.10, {"min_new_tokens": rng.choice([1, 4, 30])}),
        (0.05, {"min_length": rng.choice([3, 10, 20])}),
        (0.10, {"repetition_penalty": rng.choice([0.8, 1.3])}),
        (0.08, {"no_repeat_ngram_size": rng.choice([1, 2, 3])}),
        (0.05, {"bad_words_ids": [tokens(1), tokens(2)]}),
        (0.05, {"sequence_bias": [[tokens(1), 2.0], [tokens(2), 1.5]]}),
        (0.05, {"suppress_tokens": tokens(5)}),
        (0.05, {"begin_suppress_tokens": tokens(20)}),
        (0.04, {"forced_eos_token_id": tokens(1)[0]}),
        (0.04, {"exponential_decay_length_penalty": (2, 1.2), "eos_token_id": tokens(1)[0]}),
        (0.04, {"encoder_repetition_penalty": 1.3}),
        (0.04, {"renormalize_logits": True}),
        (0.04, {"remove_invalid_values": True}),
        (0.03, {"watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="lefthash")}),
        (0.05, {"num_assistant_tokens": rng.choice([1, 3, 7])}),
        (0.03, {"num_assistant_tokens_schedule": rng.choice(["constant", "heuristic"])}),
        (0.04, {"cache_implementation": "dynamic"}),
        (0.15, {"return_dict_in_generate": True}),
        (0.20, {"return_dict_in_generate": True, "output_scores": True, "output_logits": rng.random() < 0.5}),
    ]
    if sample:
        choices += [
            (0.5, {"temperature": rng.choice([0.3, 0.9, 1.7])}),
            (0.3, {"top_k": rng.choice([1, 3, 20])}),
            (0.3, {"top_p": rng.choice([0.3, 0.9])}),
            (0.2, {"min_p": rng.choice([0.05, 0.3])}),
            (0.1, {"typical_p": 0.7}),
            (0.1, {"epsilon_cutoff": 0.01}),
            (0.1, {"eta_cutoff": 0.01}),
        ]
    found: dict[str, Any] = {}
    for chance, arguments in choices:
        if rng.random() < chance:
            found |= arguments
    return found


def _inputs(rng: random.Random, request: Request, target: str) -> None:
    """Padding, masks, positions, token types and caches."""
    prompt, arguments = request.prompt, request.arguments
    n = prompt.shape[1]
    if request.turn:
        arguments.pop("cache_implementation", None)  # transformers takes one of the two
        return
    drawn = rng.random()
    if drawn < 0.15 and n > 1:
        pads = rng.randrange(1, n)
        mask = torch.ones_like(prompt)
        mask[:, :pads] = 0
        request.prompt = prompt.masked_fill(mask == 0, 0)
        arguments["attention_mask"] = mask
    elif drawn < 0.25:
        arguments["attention_mask"] = torch.ones_like(prompt)
    if rng.random() < 0.05 and "cache_implementation" not in arguments:
        arguments[CACHE] = Fresh(DynamicCache)
    if target.startswith("gpt2") and rng.random() < 0.15:
        arguments["token_type_ids"] = torch.tensor([[rng.randrange(2) for _ in range(n)]])
    elif target.startswith("gpt2") and rng.random() < 0.05 and "attention_mask" not in arguments:
        arguments["position_ids"] = torch.arange(n)[None] + rng.randrange(3)


def _objects(rng: random.Random, request: Request, most: int) -> None:
    """Processors, criteria and streamers of the caller's own, and stop strings."""
    arguments = request.arguments
    if rng.random() < 0.15:
        fails_at = rng.choice([None, None, None, 2, 6])
        arguments["logits_processor"] = Fresh(lambda: [Nudge(fails_at)])
    if rng.random() < 0.15:
        length, token = rng.randrange(2, most + 2), rng.choice([None, rng.randrange(VOCAB)])
        arguments["stopping_criteria"] = Fresh(lambda: [Stop(length, token)])
    if rng.random() < 0.2:
        hangs_up_at = rng.choice([None, None, None, request.prompt.shape[1] + rng.choice([1, 2, 6])])
        arguments["streamer"] = Fresh(lambda: Listener(hangs_up_at))
    if rng.random() < 0.05:
        arguments["stop_strings"] = ["".join(rng.choice(LETTERS) for _ in range(k)) for k in (1, 2)]
        arguments["tokenizer"] = letters_tokenizer()


def _refused(rng: random.Random, request: Request, target: str) -> None:
    """What ours refuses and plain does not, and several rows."""
    arguments, prompt = request.arguments, request.prompt
    if rng.random() > 0.06:
        return
    name = rng.choice(sorted(REFUSED))
    arguments.update(REFUSED[name])
    if name == "batch":
        request.prompt = prompt.repeat(2, 1)
        for key in ("attention_mask", "token_type_ids", "position_ids"):
            if key in arguments:
                arguments[key] = arguments[key].repeat(2, 1)
        arguments.pop("streamer", None)
        request.turn = ""  # the cache of a batch is handed back empty: the new tokens alone would be another text
    if name in ("beams", "sequences", "lookup"):
        arguments.pop("streamer", None)
    if name in ("static cache", "quantized cache", "no cache"):
        arguments.pop(CACHE, None)
        request.turn = ""
    if name == "quantized cache":
        arguments.pop("cache_implementation", None)
        arguments[CACHE] = Fresh(lambda: QuantizedCache("fp8", model_of(target, 1).config))
    request.reasons.add(name)


REFUSED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "guidance": {"guidance_scale": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "outputs": {"return_dict_in_generate": True, "output_hidden_states": True},
    "batch": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {},
    "sequences": {"num_return_sequences": 2},
}

# Where a failure strikes: parts of learning and of the draft, none of which may cost the caller an answer.
FAILURES: dict[str, tuple[Any, str] | None] = {
    "learning": (Learner, "segment"),
    "guard": (Guard, "observe"),
    "replay": (Replay, "sample"),
    "remembering": (Replay, "add"),
    "folding": (GatedLora, "fold"),
    "memory": (RequestMemory, "commit"),
    "backward": None,
    "not finite": None,
    "draft": None,
}
RAISED = {"memory": torch.OutOfMemoryError, "runtime": RuntimeError, "value": ValueError}
