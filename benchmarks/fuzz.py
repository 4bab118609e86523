"""Random calls of `generate(onlinespec=...)` beside plain `generate`: target × draft × settings × arguments × cache × failures.

    python benchmarks/fuzz.py --cases 10000 --seed 1
    python benchmarks/fuzz.py --seed 1 --start 4711 --cases 1     # one case alone, as it was

A case is drawn from (seed, number) alone: tiny models, settings, and two or three requests that a draft or the memory serves.
Its clock is drawn too, so that a case decides the same on any machine. Each request is answered by plain `generate` and by ours:

equal     the same tokens, streamed tokens, scores, calls of processors and criteria; sampled: a text that plain could have written
tie       they part where plain's two best scores are closer than 1e-4: rounding decides there
refused   an OnlineSpecError that the case gives reason for, see REFUSALS
raised    both raise the same
anything else is printed with its number, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import random
import string
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    QuantizedCache,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, OnlineSpecError, online_draft, online_memory
from hf_onlinespec.adapters import GatedLora
from hf_onlinespec.guard import Guard
from hf_onlinespec.learners import HEDGES, LEARNERS
from hf_onlinespec.learning import Learning
from hf_onlinespec.losses import LOSSES
from hf_onlinespec.recall import Recall
from hf_onlinespec.replay import SAMPLING, Replay

LETTERS = string.ascii_letters + string.digits + "+/"  # what the tokens stand for
VOCAB = len(LETTERS)
PADDED = 72  # the same vocabulary with rows that no token uses
TIE = 1e-4  # of two best scores: float32 differs by about 1e-5 from one shape of a forward to another
CLOSE = 1e-3  # scores of the same token in two forwards

# Beside BASE. Windows, tables and ropes end within the lengths of the requests, 4 to 60 tokens.
BASE: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.4)
LLAMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
LLAMA |= dict(head_dim=8, max_position_embeddings=128)
GPT2 = dict(n_embd=16, n_layer=1, n_head=2, n_positions=40)
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, two layers": ("llama", LLAMA | {"num_hidden_layers": 2}),
    "llama, padded vocabulary": ("llama", LLAMA | {"vocab_size": PADDED}),
    "llama, dynamic rope": (
        "llama",
        LLAMA
        | {
            "max_position_embeddings": 20,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral, window": ("mistral", LLAMA | {"sliding_window": 8}),
    "gemma3, mixed windows": (
        "gemma3_text",
        LLAMA | {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4, chunks": (
        "llama4_text",
        LLAMA
        | {
            "num_hidden_layers": 2,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
        },
    ),
    "phi3, long rope": (
        "phi3",
        LLAMA | {"max_position_embeddings": 64, "original_max_position_embeddings": 20, "rope_parameters": LONG},
    ),
    "qwen3, experts": ("qwen3_moe", LLAMA | MOE),
    "gpt2": ("gpt2", GPT2),
    "gpt2, padded vocabulary": ("gpt2", GPT2 | {"vocab_size": PADDED}),
    "gpt_neox": ("gpt_neox", dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)),
    "opt": (
        "opt",
        dict(
            hidden_size=16,
            ffn_dim=32,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            init_std=0.4,
        ),
    ),
    "bloom, alibi": ("bloom", dict(hidden_size=16, n_layer=2, n_head=2)),
    "lfm2, convolutions": (
        "lfm2",
        LLAMA | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "mamba": ("mamba", dict(hidden_size=16, num_hidden_layers=1, state_size=4)),
}
TARGETS = [name for name in MODELS if name != "mamba"] + ["llama"] * 3 + ["gpt2", "mistral, window"]
DRAFTS = [name for name in MODELS if name not in ("mamba", "lfm2, convolutions")]


@cache
def _model(name: str, seed: int) -> PreTrainedModel:
    model_type, arguments = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**BASE | arguments)).float().eval()
    model.generation_config.pad_token_id = 0
    return model


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Of one letter a token, for `stop_strings`."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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
    """Leaves plain `generate` one choice: the tokens of another text."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self._tokens, self._start = tokens, start
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = self._start + self.calls
        self.calls += 1
        if place >= len(self._tokens):
            return scores
        only = torch.full_like(scores, -torch.inf)
        token = int(self._tokens[place])
        only[:, token] = scores[:, token]
        return only


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
    ("num_return_sequences=", ("sequences",)),
    ("guidance_scale=", ("guidance",)),
    ("prompt_lookup_num_tokens=", ("lookup",)),
    ("output_hidden_states=", ("outputs",)),
    ("A batch of", ("batch",)),
    ("use_cache=False", ("no cache",)),
    ("cache", ("static cache", "quantized cache")),
    ("recurrent state", ("stateful",)),
    ("memory_tokens=0 without", ("nothing drafts",)),
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
    if not draft and not settings.memory_tokens:
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
        arguments["past_key_values"] = Fresh(DynamicCache)
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
        arguments["tokenizer"] = _tokenizer()


def _refused(rng: random.Random, request: Request, target: str) -> None:
    """What ours refuses and plain does not."""
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
    if name in ("beams", "sequences", "lookup"):
        arguments.pop("streamer", None)
    if name in ("static cache", "quantized cache", "no cache"):
        arguments.pop("past_key_values", None)
        request.turn = ""
    if name == "quantized cache":
        arguments.pop("cache_implementation", None)
        arguments["past_key_values"] = Fresh(lambda: QuantizedCache("fp8", _model(target, 1).config))
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
    "learning": (Learning, "segment"),
    "guard": (Guard, "watch"),
    "replay": (Replay, "sample"),
    "remembering": (Replay, "add"),
    "folding": (GatedLora, "fold"),
    "memory": (Recall, "remember"),
    "backward": None,
    "not finite": None,
    "draft": None,
}
RAISED = {"memory": torch.OutOfMemoryError, "runtime": RuntimeError, "value": ValueError}


CALLERS = (ZeroDivisionError, KeyboardInterrupt)  # raised by the caller's own processors and streamers

# Running


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
        return f"a refusal without reason: {_name(ours.error)}"
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
        return f"plain: {_name(plain.error)}; ours: {_name(ours.error)}"
    if request.arguments["do_sample"]:
        return _could_be(request, case, target, ours)
    for row, other in zip(plain.tokens, ours.tokens, strict=True):
        for i, (a, b) in enumerate(zip(row, other, strict=False)):
            if a != b:
                gap = _gap(request, case, target, i - plain.start)
                return "tie" if gap < TIE else f"token {i} of {len(row)}: {a} became {b}, gap {gap:.2g}"
        if len(row) != len(other):
            return f"{len(other)} tokens instead of {len(row)}"
    for name in ("heard", "calls", "cached"):
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


def _name(error: BaseException | None) -> str:
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
    for i, row in enumerate(ours.scores or []):
        if not torch.isfinite(row[0, ours.tokens[0][ours.start + i]]):
            return f"sampled token {i} has probability 0"
    followed = copy.copy(request)
    given = request.arguments.get("logits_processor")
    tokens = torch.tensor(ours.tokens[0])
    first = [] if given is None else given.make()
    followed.arguments = request.arguments | {"logits_processor": Fresh(lambda: [*first, Follow(tokens, ours.start)])}
    plain = ask(target, followed, case)
    if plain.error is not None:
        return f"plain cannot write the sampled text: {_name(plain.error)}"
    return (
        "equal"
        if plain.tokens == ours.tokens
        else f"sampled {len(tokens)} tokens; plain stops it at {len(plain.tokens[0])}"
    )


def run_case(seed: int, number: int) -> tuple[Case, list[str]]:
    """A case and how each of its requests went."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths that cannot be, and of failures: both are asked for
        return _run(draw_case(seed, number))


def _run(case: Case) -> tuple[Case, list[str]]:
    # The memory hangs on the target, and what is learned on the draft: copies, so that a case stands alone.
    target = copy.deepcopy(_model(case.target, 1))
    found: list[str] = []
    ours: dict[str, Any] = {}
    model: PreTrainedModel | None = None
    checksum = 0.0
    try:
        if case.draft:
            model = copy.deepcopy(_model(case.target, 1) if case.draft == "copy" else _model(case.draft, 2))
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


@dataclass
class Report:
    """What came of many cases."""

    outcomes: Counter[str] = field(default_factory=Counter)  # of requests
    counts: Counter[str] = field(default_factory=Counter)  # of tokens, gradient steps and failures
    unexplained: list[str] = field(default_factory=list)
    cases: int = 0


def fuzz(cases: int, seed: int, start: int = 0, say: Callable[[str], None] = print) -> Report:
    """Runs that many cases and says what is not explained, as it comes up."""
    report = Report()
    for number in range(start, start + cases):
        try:
            case, found = run_case(seed, number)
        except Exception as error:
            found = [f"the fuzzer itself: {_name(error)}"]
            case = draw_case(seed, number)
        report.cases += 1
        report.counts += case.counts
        for i, outcome in enumerate(found):
            good = outcome in ("equal", "tie") or outcome.startswith(("refused: ", "raised: "))
            report.outcomes[outcome if good else "unexplained"] += 1
            if not good:
                request = case.requests[i] if i < len(case.requests) else None
                report.unexplained.append(f"case {number}, request {i + 1}: {outcome}")
                say(f"{report.unexplained[-1]}\n    {describe(case, request)}")
        if report.cases % 500 == 0:
            say(f"{report.cases} cases: {dict(report.outcomes)}")
    return report


def describe(case: Case, request: Request | None) -> str:
    default = OnlineSpecConfig().to_dict()
    settings = {k: v for k, v in case.settings.to_dict().items() if v != default[k]}
    words = f"target {case.target}; draft {case.draft or 'none'} {case.wrapped}; failure {case.failure}; {settings}"
    if request is None:
        return words
    how = {k: "…" if isinstance(v, Fresh) else v for k, v in request.arguments.items()}
    flags = [request.turn, "inference_mode" * request.inference_mode, "as_config" * request.as_config, request.through]
    return f"{words}\n    prompt {request.prompt.tolist()} {how} {' '.join(filter(None, flags))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    quiet()
    started = time.perf_counter()
    report = fuzz(args.cases, args.seed, args.start, lambda words: print(words, flush=True))
    seconds = time.perf_counter() - started
    print(f"{report.cases} cases in {seconds:.0f} s, {sum(report.outcomes.values())} requests")
    for outcome, n in report.outcomes.most_common():
        print(f"{n:7d}  {outcome}")
    print(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report.counts.items()))
    return 1 if report.unexplained else 0


def quiet() -> None:
    """One thread, and no words about what is asked for on purpose."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_onlinespec").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
