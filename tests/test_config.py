"""Settings are validated when made, travel through JSON, and refuse what does not exist."""

import dataclasses
import inspect

import pytest

from hf_onlinespec import ConfigError, OnlineSpecConfig, OnlineSpecError
from hf_onlinespec.adapt.learners import HEDGES, LEARNERS
from hf_onlinespec.adapt.losses import LOSSES
from hf_onlinespec.adapt.replay import SAMPLING
from hf_onlinespec.config import allowed


def test_json_round_trip() -> None:
    config = OnlineSpecConfig(lr=2e-3, target_modules=["q_proj", "lm_head"], top_k=16)
    assert OnlineSpecConfig.from_json(config.to_json()) == config


def test_frozen_and_every_field_explained() -> None:
    config = OnlineSpecConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    assert all(f.metadata["help"] for f in dataclasses.fields(config))


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        OnlineSpecConfig.from_dict({"learning_rate": 1e-3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lookahead", "automatic"),
        ("rank", "auto"),
        ("update_when", "later"),
        ("update_budget", 0.0),
        ("update_budget", 1.5),
        ("memory_tokens", -1),
        ("learner", "hydra"),
        ("expert_learner", "ensemble"),
        ("experts", 0),
        ("experts", 1.5),
        ("expert_ratio", 0.0),
        ("hedge", "softmax"),
        ("hedge_rate", -1.0),
        ("radius", 0.0),
        ("radius", "wide"),
        ("hint_memory", 1.0),
        ("hint_memory", None),
        ("replay_sampling", "all"),
        ("snapshots", -1),
        ("loss", "l2"),
        ("preconditioner", "muon"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", True),
        ("rank", 0),
        ("rank", 2.5),
        ("lookahead", -1),
        ("update_every", 0),
        ("replay_tokens", -1),
        ("temperature", "warm"),
        ("target_modules", []),
        ("target_modules", "q_proj"),
        ("top_k", 0),
        # What somebody else's settings may not ask for.
        ("rank", 10**6),
        ("experts", 10**6),
        ("snapshots", 10**9),
        ("replay_tokens", 2**70),
        ("memory_tokens", 10**12),
        ("context_tokens", 10**12),
        ("lookahead", 10**9),
        ("seed", 2**64),
        ("lr", 1e300),
        ("alpha", 5e-324),
        ("expert_ratio", 1e9),
        ("target_modules", 5),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        OnlineSpecConfig(**{name: value})
    assert isinstance(caught.value, OnlineSpecError) and isinstance(caught.value, ValueError)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ["rank", "lr", "seed", "hint_memory", "learner", "target_modules"])
def test_numbers_of_many_digits_are_told_shortly(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        OnlineSpecConfig(**{name: 10**5000})
    assert len(str(caught.value)) < 1000


def test_experts_are_bounded_together() -> None:
    with pytest.raises(ConfigError, match="experts=64"):
        OnlineSpecConfig(learner="ensemble", experts=64, rank=1024)
    assert OnlineSpecConfig(learner="ensemble", experts=64, rank=128).experts == 64


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_settings_that_are_no_object(text: str) -> None:
    with pytest.raises(ConfigError):
        OnlineSpecConfig.from_json(text)


def test_a_name_of_transformers_or_peft_is_told_what_it_is_called_here() -> None:
    for name, ours in {"learning_rate": "lr", "lora_alpha": "alpha", "num_assistant_tokens": "lookahead"}.items():
        for make in (lambda values: OnlineSpecConfig(**values), OnlineSpecConfig.from_dict):
            with pytest.raises(ValueError, match=f"{name} is called {ours} here") as caught:
                make({name: 1, "rank": 4})
            assert isinstance(caught.value, ConfigError)
            assert "Known settings" not in str(caught.value)
    with pytest.raises(ValueError, match=r"learning_rate is called lr here\)\. Known settings: \['alpha'"):
        OnlineSpecConfig(learning_rate=1, no_such=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"Unknown settings \['no_such'\]. Known settings: \['alpha'"):
        OnlineSpecConfig(no_such=1)  # type: ignore[call-arg]
    assert list(inspect.signature(OnlineSpecConfig).parameters) == [
        f.name for f in dataclasses.fields(OnlineSpecConfig)
    ]


def test_the_names_that_settings_may_have_are_those_that_exist() -> None:
    assert sorted(LEARNERS) == sorted(allowed.LEARNERS)
    assert sorted(HEDGES) == sorted(allowed.HEDGES)
    assert sorted(LOSSES) == sorted(allowed.LOSSES)
    assert sorted(SAMPLING) == sorted(allowed.REPLAY_SAMPLING)
