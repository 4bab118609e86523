"""transformers' own names for the lookahead hold here too, in one order; what the governor replaces is named once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel, pipeline

from hf_onlinespec import ConfigError, OnlineDraft, OnlineSpecConfig, online_draft, online_memory
from tests.conftest import tiny_llama
from tests.models.test_vocabulary import words

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 21}
PLAIN = {"rank": 4, "alpha": 4.0, "memory_tokens": 0, "update_every": 1, "lr": 1e-12}


def identical() -> OnlineDraft:
    """A draft whose tokens are all accepted: every round but the last has the whole lookahead."""
    return OnlineDraft(tiny_llama(1, layers=2), OnlineSpecConfig(**PLAIN))


def drafted(draft: OnlineDraft) -> float:
    """Drafted tokens per round of the last call."""
    last = draft.metrics.last
    assert last.accepted_tokens == last.drafted_tokens
    return last.drafted_tokens / last.rounds


@pytest.mark.parametrize("n", [2, 6, 20])
@pytest.mark.parametrize("given", ["argument", "generation_config", "target", "draft"])
def test_num_assistant_tokens_is_a_fixed_lookahead(target, prompt, n: int, given: str) -> None:
    """However it is given, and also where it is transformers' default, 20."""
    draft, plain = identical(), target.generate(prompt, **GREEDY)
    call: dict[str, Any] = dict(GREEDY)
    if given == "argument":
        call["num_assistant_tokens"] = n
    elif given == "generation_config":
        call = {"generation_config": GenerationConfig(num_assistant_tokens=n, pad_token_id=0, **GREEDY)}
    else:
        (target if given == "target" else draft).generation_config.num_assistant_tokens = n
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, onlinespec=False, **call))
    assert draft.metrics.last.rounds == -(-21 // (n + 1))
    assert drafted(draft) >= n - 1
    assert draft.metrics.decisions.drafting == f"lookahead={n} was asked for"


def test_without_a_number_the_governor_decides(target, prompt) -> None:
    draft = identical()
    target.generate(prompt, assistant_model=draft, **GREEDY)
    assert "was asked for" not in draft.metrics.decisions.drafting
    target.generate(prompt, assistant_model=draft, num_assistant_tokens=3, **GREEDY)
    target.generate(prompt, assistant_model=draft, **GREEDY)  # of that call alone
    assert "was asked for" not in draft.metrics.decisions.drafting


def test_the_call_goes_before_the_settings_and_these_before_the_draft(target, prompt) -> None:
    draft = OnlineDraft(tiny_llama(1, layers=2), OnlineSpecConfig(lookahead=4, **PLAIN))
    draft.generation_config.num_assistant_tokens = 9
    for call, rounds in (({}, 5), ({"num_assistant_tokens": 2}, 7), ({"num_assistant_tokens": 20}, 1)):
        target.generate(prompt, assistant_model=draft, **GREEDY, **call)
        assert draft.metrics.last.rounds == rounds, call


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("kind", ["model", "peft"])
def test_a_model_s_own_number_is_read_at_every_call(target, prompt, kind: str) -> None:
    model = tiny_llama(1, layers=2)
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    settings = OnlineSpecConfig(**PLAIN)
    for n, rounds in ((2, 7), (6, 3)):
        model.generation_config.num_assistant_tokens = n
        target.generate(prompt, assistant_model=model, onlinespec=settings, **GREEDY)
        assert online_draft(model).metrics.last.rounds == rounds
    model.generation_config = GenerationConfig(num_assistant_tokens=20, pad_token_id=0)  # another one in its place
    target.generate(prompt, assistant_model=model, onlinespec=settings, **GREEDY)
    assert online_draft(model).metrics.last.rounds == 1


def test_a_pipeline_hands_the_number_on() -> None:
    target, draft = tiny_llama(1, layers=2), identical()
    pipe = pipeline("text-generation", model=target, tokenizer=words(32), assistant_model=draft, device="cpu")
    pipe("w3 w14", num_assistant_tokens=2, return_full_text=False, **GREEDY)
    assert draft.metrics.last.rounds == 7 and draft.metrics.last.drafted_tokens == 14


def test_the_memory_alone_keeps_to_it(prompt) -> None:
    target = tiny_llama(1, layers=2)
    for _ in range(3):
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, onlinespec=True, num_assistant_tokens=2, **GREEDY))
    last = online_memory(target).metrics.last
    assert last.drafted_tokens > 0 and last.rounds >= 7  # two tokens and one of the target's own, at most


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "3"])
@pytest.mark.parametrize("given", ["argument", "draft"])
def test_a_number_that_is_none_is_refused_by_name(target, prompt, value: object, given: str) -> None:
    draft = identical()
    if given == "draft":
        draft.generation_config.num_assistant_tokens = value
    call = {"num_assistant_tokens": value} if given == "argument" else {}
    with pytest.raises(ConfigError, match=f"num_assistant_tokens={value!r}".replace(".", r"\.")):
        target.generate(prompt, assistant_model=draft, **GREEDY, **call)
    assert draft.metrics.rounds == 0


def told(target: PreTrainedModel, prompt: torch.Tensor, **call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        target.generate(prompt, **GREEDY, **call)
    return [str(w.message) for w in heard]


@pytest.mark.parametrize("given", ["argument", "draft"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_confidence_threshold", 0.6),
        ("assistant_confidence_threshold", 0.4),
        ("num_assistant_tokens_schedule", "heuristic"),
        ("num_assistant_tokens_schedule", "constant"),
    ],
)
def test_threshold_and_schedule_are_named_once_as_replaced(target, prompt, name, value, given) -> None:
    draft = identical()
    call = {name: value} if given == "argument" else {}
    if given == "draft":
        draft.generation_config.update(**{name: value})
    heard = told(target, prompt, assistant_model=draft, **call)
    assert len(heard) == 1 and f"{name}={value!r}: not used" in heard[0] and "the governor decides" in heard[0]
    assert told(target, prompt, assistant_model=draft, **call) == []


def test_what_changes_nothing_is_not_warned_of(target, prompt) -> None:
    draft = identical()
    assert told(target, prompt, assistant_model=draft) == []
    fixed = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    assert told(target, prompt, assistant_model=draft, assistant_confidence_threshold=0.0, **fixed) == []
    heard = told(target, prompt, assistant_model=draft, assistant_confidence_threshold=0.5, **fixed)
    assert len(heard) == 1 and "3 tokens are drafted in every round" in heard[0]


def test_stock_calls_keep_transformers_defaults(target, prompt) -> None:
    """A call without onlinespec goes its own way, whatever was noted."""
    model = tiny_llama(1, layers=2)
    model.generation_config.num_assistant_tokens = 2
    plain = target.generate(prompt, **GREEDY)
    assert torch.equal(plain, target.generate(prompt, assistant_model=model, num_assistant_tokens=2, **GREEDY))


def test_a_configuration_that_was_prepared_before_asks_for_nothing(target, prompt) -> None:
    """As pipelines of transformers 5.18 pass it: the defaults that were filled in are nobody's wish."""
    prepared, _ = target._prepare_generation_config(None, **GREEDY)
    assert prepared.num_assistant_tokens == 20
    draft, other = identical(), identical()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.generate(prompt, generation_config=prepared, assistant_model=draft)
    assert "was asked for" not in draft.metrics.decisions.drafting
    prepared.num_assistant_tokens = 4
    target.generate(prompt, generation_config=prepared, assistant_model=other)
    assert other.metrics.decisions.drafting == "lookahead=4 was asked for"
