"""Every way of generating that is compared: name -> a function that makes a fresh arm, with a draft of its own.

| arm | what it is |
|---|---|
| plain | `generate` |
| transformers default | assisted generation as it comes: up to 20 tokens, none after one below 0.4 |
| transformers fixed | the best fixed number of tokens, chosen on spare prompts |
| transformers k=… | the same with another fixed number |
| transformers heuristic | its heuristic schedule: two more after a round that was kept whole, else one less |
| transformers confidence | the best confidence threshold, chosen on spare prompts (moves by itself where scikit-learn is installed) |
| prompt lookup | `prompt_lookup_num_tokens`, the best number, chosen on spare prompts |
| memory | ours without a draft: the suffix memory alone |
| frozen k=… | ours with a draft that never learns, at a fixed lookahead, without memory |
| learning | ours learning without memory |
| learning, random draft | the same with a draft of random weights, which is of no use to anybody |
| ours | ours whole, as it comes |
| ours, random draft | the same with a draft of random weights |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_sklearn_available

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft
from hf_onlinespec.measure.bench import ASSISTANT_TOKENS, Arm, Runner, best, stock_draft
from hf_onlinespec.measure.records import PLAIN, Prompt

CONFIDENCES = (0.2, 0.4, 0.6, 0.8)
LOOKUP_TOKENS = (1, 2, 3, 5, 10)
LOOKAHEADS = (1, 2, 3, 5, 8)
OURS, LEARNING, RANDOM, OURS_RANDOM = "ours", "learning", "learning, random draft", "ours, random draft"
SUBJECTS = (OURS, OURS_RANDOM, LEARNING, RANDOM)  # what the others are held against
SAME_LOOKAHEAD = {f"frozen k={k}": f"transformers k={k}" for k in LOOKAHEADS}
STATIC = (PLAIN, "prompt lookup", *(f"frozen k={k}" for k in LOOKAHEADS))  # what could be chosen once and for all


@dataclass(frozen=True)
class Settings:
    """The settings of transformers' arms, and the tokens/s on spare prompts that they were chosen by."""

    assistant_tokens: int = 5
    confidence: float = 0.4
    lookup_tokens: int = 10
    tokens_per_s: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"confidence_moves": is_sklearn_available()}


def calibrate(runner: Runner, prompts: Sequence[Prompt]) -> Settings:
    """Chooses the settings of transformers' arms by their net speed."""
    tokens = runner.speeds(prompts, {k: {"assistant_model": stock_draft(k)} for k in ASSISTANT_TOKENS})
    confidences = runner.speeds(prompts, {p: {"assistant_model": confident_draft(p)} for p in CONFIDENCES})
    lookups = runner.speeds(prompts, {k: {"prompt_lookup_num_tokens": k} for k in LOOKUP_TOKENS})
    found = {"assistant_tokens": tokens, "confidence": confidences, "lookup_tokens": lookups}
    speeds = {name: {str(value): speed for value, speed in some.items()} for name, some in found.items()}
    return Settings(best(tokens), best(confidences), best(lookups), speeds)


MODEL_ALONE: dict[str, Any] = {"memory_tokens": 0, "recycle": False}  # nothing guesses beside the draft model


def arms(settings: Settings, seed: int) -> dict[str, Callable[[], Arm]]:
    """All arms. Nothing is loaded before an arm is made.

    Args:
        seed: of the first values of the adapters that learn.
    """

    def draft(**values: Any) -> OnlineDraft:
        return OnlineDraft(load_draft(), OnlineSpecConfig(seed=seed, **values))

    def frozen(k: int) -> Callable[[], Arm]:
        return lambda: {"assistant_model": draft(lookahead=k, **MODEL_ALONE), "onlinespec": False}

    def stock(k: int) -> Callable[[], Arm]:
        return lambda: {"assistant_model": stock_draft(k)}

    return {
        PLAIN: dict,
        "transformers default": lambda: {"assistant_model": load_draft()},
        "transformers fixed": lambda: {"assistant_model": stock_draft(settings.assistant_tokens)},
        **{f"transformers k={k}": stock(k) for k in LOOKAHEADS},
        "transformers heuristic": lambda: {"assistant_model": heuristic_draft()},
        "transformers confidence": lambda: {"assistant_model": confident_draft(settings.confidence)},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": settings.lookup_tokens},
        "memory": lambda: {"onlinespec": True},
        **{f"frozen k={k}": frozen(k) for k in LOOKAHEADS},
        LEARNING: lambda: {"assistant_model": draft(**MODEL_ALONE)},
        RANDOM: lambda: {"assistant_model": OnlineDraft(random_draft(), OnlineSpecConfig(seed=seed, **MODEL_ALONE))},
        OURS: lambda: {"assistant_model": draft()},
        OURS_RANDOM: lambda: {"assistant_model": OnlineDraft(random_draft(), OnlineSpecConfig(seed=seed))},
    }


def random_draft() -> PreTrainedModel:
    """A draft of the embedded one's size that was never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(load_draft().config).eval()


def heuristic_draft() -> PreTrainedModel:
    """A draft that transformers asks for more tokens after a success and for fewer after a failure, from 5 on."""
    draft = stock_draft(5)
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    return draft


def confident_draft(threshold: float) -> PreTrainedModel:
    """A draft that transformers lets draft until it is less sure than this."""
    draft = load_draft()
    draft.generation_config.assistant_confidence_threshold = threshold
    return draft
