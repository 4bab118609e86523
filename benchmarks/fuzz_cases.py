"""The fuzzer's cases: what is drawn from a seed and a number, and for what it may be refused."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_models import (
    DRAFTS,
    ENCODER_DECODERS,
    EXITS,
    HEADED,
    PAIRS,
    RECURRENT,
    SOME,
    TARGETS,
    VOCAB,
    WHISPER_DECODER,
)
from fuzz_requests import Request, draw_request

from hf_onlinespec import OnlineSpecConfig
from hf_onlinespec.adapt.gated_lora import GatedLora
from hf_onlinespec.adapt.guard import Guard
from hf_onlinespec.adapt.learner import Learner
from hf_onlinespec.adapt.learners import HEDGES, LEARNERS
from hf_onlinespec.adapt.losses import LOSSES
from hf_onlinespec.adapt.replay import SAMPLING, Replay
from hf_onlinespec.commit.request_memory import RequestMemory
from tests.heads.tiny import KINDS as HEADS

SCRIPTED = "scripted"


@dataclass
class Case:
    """What was drawn."""

    number: int
    target: str
    draft: str  # a model, "copy" of the target, a kind of head, EXITS, SCRIPTED, or "" for the memory alone
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
    ("of a row alone", ("rows",)),
    ("cannot be copied for each row", ("rows",)),
    ("of the whole batch", ("rows",)),
    ("of each row of a batch", ("rows",)),
    ("use_cache=False", ("no cache",)),
    ("are to be generated", ("cache of fewer rows",)),
    ("cache", ("static cache", "quantized cache")),
    ("does not tell how many tokens it holds", ("uncounted cache",)),
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
    drawn = rng.random()
    target = rng.choice(TARGETS if drawn < 0.83 else list(ENCODER_DECODERS) if drawn < 0.95 else RECURRENT)
    reasons = set()
    draft = _draft(rng, target)
    wrapped = rng.choice(["OnlineDraft", "OnlineDraft", "model", "PeftModel", "bfloat16"])
    if draft in ("", EXITS, SCRIPTED):
        wrapped = ""
    elif draft in HEADS:
        wrapped = "OnlineDraft"
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
    pool = [_prompt(rng) for _ in range(4)]
    requests = []
    for _ in range(rng.choice([2, 2, 3])):
        requests.append(draw_request(rng, pool, target, draft, wrapped))
        requests[-1].reasons |= reasons | ({"uncounted cache"} if requests[-1].turn and target == "mamba" else set())
    clock = 10.0 ** rng.uniform(-5, -2)
    return Case(number, target, draft, settings, wrapped, failure, requests, clock)


def _prompt(rng: random.Random) -> list[int]:
    """Tokens; a short text repeated gives the memory something."""
    n = rng.choice([1, 2, 3, 5, 8, 9, 12, 16])
    tokens = [rng.randrange(3, VOCAB) for _ in range(n)]
    return (tokens * 3)[: max(n, 12)] if rng.random() < 0.4 else tokens


def _draft(rng: random.Random, target: str) -> str:
    """What drafts for a target."""
    if target in ENCODER_DECODERS:
        of_its_own = [WHISPER_DECODER] * 2 if target == "whisper" else [SCRIPTED]
        return rng.choice(["", "copy", target, "llama", *of_its_own])
    kind = rng.choice(["", "copy", "copy", "same", "other", "other", "other tokenizer", SCRIPTED, "head"])
    if kind == "head" and target not in HEADED:
        kind = "other tokenizer"
    if kind in ("copy", "same") and target not in DRAFTS:
        kind = "other"
    if kind == "head":
        return rng.choice([*HEADS, EXITS]) if target == "llama, two layers" else rng.choice(HEADS)
    found = {"other": rng.choice(DRAFTS), "other tokenizer": rng.choice([PAIRS, SOME]), "same": target}
    return found.get(kind, kind)


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
