"""What settings may be, and how it is checked. Each error names the setting, its value and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError, MissingExtraError, brief, require_whole
from ..metrics import Trace

# Names of what other modules define; a test holds them to it. Written here, so that settings stand on nothing that they set.
LEARNERS = ("heavy_ball", "ogd", "optimistic")
HEDGES = ("cumulative", "discounted", "fixed_share", "last_chunk")
LOSSES = ("cross_entropy", "forward_kl", "js", "reverse_kl", "skew_kl", "tv")
REPLAY_SAMPLING = ("loss", "mixed", "near", "recent", "uniform")
UPDATE_WHEN = ("round", "request", "idle")
ENSEMBLE = "ensemble"  # the learner that is many
AUTO = ("lookahead", "update_every")  # settings that may be "auto"
OPTIONAL = ("radius", "hedge_rate", "gradient_cap")  # numbers that may be None
# Whole numbers, from least to most. The upper bounds are chosen: far beyond what helps, and so that settings which somebody else
# wrote cannot take a machine's memory before anything else about them was looked at.
WHOLE = {
    "rank": (1, 16_384),  # above the width of any draft: from there on an adapter is the whole matrix
    "experts": (1, 64),
    "snapshots": (0, 64),  # copies of the adapter in half precision
    "head_steps": (1, 16),
    "lookahead": (0, 4_096),
    "update_every": (1, 10**9),
    "average_every": (1, 10**9),
    "replay_passes": (0, 64),
    "replay_batch": (1, 1_024),
    "replay_tokens": (0, 2**31),  # taken as they come
    "replay_top_k": (1, 2**22),  # above any vocabulary
    "audit_tokens": (0, 2**31),  # taken as they come
    "memory_tokens": (0, 2**25),  # taken at once: 16 to 20 bytes each, 0.7 GB
    "context_tokens": (1, 2**24),
    "resident_adapters": (1, 4_096),
    "seed": (0, 2**63 - 1),
    "top_k": (1, 2**22),
}
OR_NONE = ("average_every", "top_k")  # of these, may be None
MOST_RANK = 16_384  # of all experts together
LEAST, MOST = 1e-30, 1e12  # of the other numbers: their products and powers stay finite
MOST_RATIO = 1e4  # of the step sizes of two experts
MOST_NAMES, LONGEST_NAME = 20_000, 1_000  # of adapted layers
# Where requests can be reported by name, and the package that each needs; None: none.
REPORT_TO = {"tensorboard": "tensorboard", "trackio": "trackio", "jsonl": None}
# Settings of a process. They are not part of a draft: a folder from elsewhere must not say where this machine writes.
REPORTING = ("report_to", "logging_dir", "project", "run_name")
# What transformers and PEFT call the same.
CALLED = {"learning_rate": "lr", "r": "rank", "lora_alpha": "alpha", "num_assistant_tokens": "lookahead"}
# Finite numbers above 0.
POSITIVE = (
    "lr",
    "max_grad_norm",
    "alpha",
    "temperature",
    "update_budget",
    "expert_ratio",
    "radius",
    "hedge_rate",
    "gradient_cap",
)
# Settings that are one of some words.
WORDS = {
    "learner": [*LEARNERS, ENSEMBLE],
    "expert_learner": LEARNERS,
    "hedge": HEDGES,
    "replay_sampling": REPLAY_SAMPLING,
    "loss": LOSSES,
    "update_when": UPDATE_WHEN,
    "preconditioner": ("adam", "none"),
}
ReportTo = str | Trace | Sequence[str | Trace] | None


def check_names(values: Collection[str], known: Collection[str]) -> None:
    """Raises ConfigError on settings that do not exist."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        called = [f"{name} is called {CALLED[name]} here" for name in unknown if name in CALLED]
        hint = f" ({', '.join(called)})" if called else ""
        listed = "" if len(called) == len(unknown) else f" Known settings: {sorted(known)}."
        raise ConfigError(f"Unknown settings {brief(unknown)}{hint}.{listed}")


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ConfigError where a word or a number is none that a setting may have."""
    for name, allowed in WORDS.items():
        if values[name] not in list(allowed):
            raise ConfigError(f"{name}={brief(values[name])}: expected one of {sorted(allowed)}.")
    for name, (least, most) in WHOLE.items():
        if not (name in AUTO and values[name] == "auto") and not (name in OR_NONE and values[name] is None):
            otherwise = ", or 'auto'" if name in AUTO else ", or None" if name in OR_NONE else ""
            require_whole(name, values[name], least, most, otherwise)
    for name in POSITIVE:
        if values[name] is None and name in OPTIONAL:
            continue
        if not _is_number(values[name]) or not LEAST <= values[name] <= MOST:
            raise ConfigError(
                f"{name}={brief(values[name])}: expected a finite number above 0, from {LEAST:g} to {MOST:g}."
            )
    for name in ("recycle", "grow_head"):
        if not isinstance(values[name], bool):
            raise ConfigError(f"{name}={brief(values[name])}: expected True or False.")
    _check_together(values)


def _check_together(values: Mapping[str, Any]) -> None:
    rank, experts = values["rank"], values["experts"]
    if values["learner"] == ENSEMBLE and rank * experts > MOST_RANK:
        raise ConfigError(
            f"experts={experts} of rank={rank}: expected at most {MOST_RANK:,} ranks together. Take fewer or smaller ones."
        )
    if values["expert_ratio"] > MOST_RATIO:
        raise ConfigError(f"expert_ratio={values['expert_ratio']!r}: expected at most {MOST_RATIO:g}.")
    memory = values["hint_memory"]
    if not _is_number(memory) or not 0 <= memory < 1:
        raise ConfigError(f"hint_memory={brief(memory)}: expected a number of at least 0 and below 1.")
    if values["update_budget"] > 1:
        raise ConfigError(
            f"update_budget={values['update_budget']!r}: expected a share of the time, above 0 and at most 1."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked_modules(names: Any) -> tuple[str, ...]:
    """`target_modules` as a tuple. Raises ConfigError."""
    listed = isinstance(names, list | tuple) and 0 < len(names) <= MOST_NAMES
    if not listed or not all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names):
        raise ConfigError(f"target_modules={brief(names)}: expected a non-empty list of layer names, or None.")
    return tuple(names)


def check_places(values: Mapping[str, Any]) -> None:
    """Raises ConfigError where a name or a folder of a report is none."""
    for name in ("logging_dir", "project", "run_name"):
        value = values[name]
        if not (value is None and name != "project") and not (isinstance(value, str) and value):
            raise ConfigError(f"{name}={brief(value)}: expected a name{'' if name == 'project' else ', or None'}.")


def checked_reports(wanted: Any) -> tuple[str | Trace, ...]:
    """`report_to` as names and objects. Raises ConfigError, and MissingExtraError where a package is missing."""
    if wanted is None:
        return ()
    listed = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if listed == ["none"]:
        return ()
    if listed == ["all"]:
        return tuple(name for name, package in REPORT_TO.items() if package is None or find_spec(package))
    for one in listed:
        if not isinstance(one, Trace) and not (isinstance(one, str) and one in REPORT_TO):
            raise ConfigError(
                f"report_to={brief(wanted)}: expected {', '.join(map(repr, REPORT_TO))}, a list of them, 'all', 'none', or an object "
                "of a class that extends hf_onlinespec.Trace."
            )
        package = REPORT_TO[one] if isinstance(one, str) else None
        if package is not None and find_spec(package) is None:
            raise MissingExtraError(
                f'report_to={one!r} needs the package {package}: pip install "hf_onlinespec[report]", or pip install {package}.'
            )
    return tuple(one for n, one in enumerate(listed) if one not in listed[:n])
