"""OnlineSpecConfig: every setting of drafting and learning, validated when it is made."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ..errors import ConfigError, brief
from ..metrics import Trace
from ..metrics.summary import html_table
from .allowed import (
    ENSEMBLE,
    HEDGES,
    LEARNERS,
    LOSSES,
    REPLAY_SAMPLING,
    REPORT_TO,
    REPORTING,
    UPDATE_WHEN,
    ReportTo,
    check_names,
    check_places,
    check_values,
    checked_modules,
    checked_reports,
)

T = TypeVar("T")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check_names(values: Collection[str]) -> None:
    check_names(values, [f.name for f in fields(OnlineSpecConfig)])


def _names_checked(cls: type[T]) -> type[T]:
    """A dataclass that meets an unknown argument with a ConfigError, where Python's own error lists no other names."""
    made = vars(cls)["__init__"]

    @functools.wraps(made)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        _check_names(kwargs)
        made(self, *args, **kwargs)

    setattr(cls, "__init__", __init__)  # noqa: B010  # an assignment would be to a method
    return cls


@_names_checked
@dataclass(frozen=True, repr=False)
class OnlineSpecConfig:
    """How the draft drafts and how it learns.

    `lookahead="auto"` and `update_every="auto"` decide from measured times; numbers make a run repeatable. The defaults of learner, lr, rank, replay and schedule were measured with `benchmarks/learning.py` and `benchmarks/studies/tune.py`; see `benchmarks/LOG.md`.
    """

    learner: str = _setting("optimistic", f"online learner, one of {sorted([*LEARNERS, ENSEMBLE])}")
    preconditioner: str = _setting("adam", "'adam': steps in Adam's metric; 'none': plain gradient steps")
    lr: float = _setting(2e-3, "step size of the learner; of an ensemble, the middle of its grid")
    hint_memory: float = _setting(
        0.0, "'optimistic': part of the old hint in the new one; 0: the last step is the hint"
    )
    radius: float | None = _setting(None, "an adapter stays within this distance of its start; None: no bound")
    experts: int = _setting(3, "'ensemble': adapters side by side, with step sizes on a geometric grid")
    expert_ratio: float = _setting(4.0, "'ensemble': step size over the next smaller one")
    expert_learner: str = _setting("ogd", f"'ensemble': what each of them runs, one of {sorted(LEARNERS)}")
    hedge: str = _setting("fixed_share", f"'ensemble': how their weights follow their losses, one of {sorted(HEDGES)}")
    hedge_rate: float | None = _setting(None, "'ensemble': step size of the weights; None: from theory")
    snapshots: int = _setting(
        2, "earlier states of the adapter, the latest included, kept for a stream that comes back; 0: none"
    )
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm")
    gradient_cap: float | None = _setting(
        3.0, "a gradient is at most so many times as long as the median of those before it; None: any length"
    )
    rank: int = _setting(32, "rank of the adapter on every adapted layer")
    alpha: float = _setting(32.0, "LoRA alpha: the adapter's output is scaled by alpha / rank")
    target_modules: tuple[str, ...] | None = _setting(
        None,
        "names of the adapted layers; None: every linear layer, the token embedding and the head, of an encoder–decoder its decoder's, "
        "T5's position bias included",
    )
    loss: str = _setting("forward_kl", f"divergence between target and draft, one of {sorted(LOSSES)}")
    temperature: float = _setting(1.0, "softens target and draft inside the loss")
    head_steps: int = _setting(
        1,
        "drafted steps behind each position that a draft head learns from, of Hydra no more than it has heads; an ordinary draft has "
        "no such steps",
    )
    top_k: int | None = _setting(
        None, "keep only this many target probabilities per position, the rest as one tail mass; None: all of them"
    )
    lookahead: int | str = _setting(
        "auto",
        "draft tokens proposed in one round; 'auto': as many as are expected to pay, none where none do, unless "
        "the draft's generation_config has num_assistant_tokens; that of a call goes before",
    )
    update_when: str = _setting(
        "request",
        f"when the draft learns, one of {UPDATE_WHEN}: also inside a request, at its end, or after `generate` has returned",
    )
    update_every: int | str = _setting(
        "auto",
        "rounds between two updates, with update_when='round'; 'auto': learn while it pays, within update_budget",
    )
    update_budget: float = _setting(
        0.1,
        "largest share of the time spent on learning, with update_every='auto', and 0.02 until the draft has paid; what is learned when idle is free",
    )
    average_every: int | None = _setting(
        8,
        "under torch.distributed: gradient steps between two averages with the other processes, which learn the same adapter from "
        "requests of their own; None: each process learns alone",
    )
    replay_passes: int = _setting(2, "gradient steps on remembered requests after each request; the most with 'auto'")
    replay_batch: int = _setting(4, "remembered requests in one such step")
    replay_sampling: str = _setting(
        "uniform", f"which remembered requests are rehearsed, one of {sorted(REPLAY_SAMPLING)}"
    )
    replay_tokens: int = _setting(
        16_384,
        "most tokens (prompts included) that the replay remembers, fewer where the hidden states that a draft head reads would take "
        "over 256 MB; 0: no replay",
    )
    replay_top_k: int = _setting(64, "target probabilities kept per remembered position")
    memory_tokens: int = _setting(
        65_536, "tokens of prompts and outputs that the suffix memory holds, 16 to 20 bytes each; 0: no suffix memory"
    )
    recycle: bool = _setting(
        True,
        "whether the target's best next tokens behind each token are kept and guessed again, 32 bytes per token of the vocabulary, "
        "never saved",
    )
    grow_head: bool = _setting(
        False,
        "without a draft: an EAGLE-3 head for the target grows from its weights, learns from what is served, and drafts once that "
        "pays",
    )
    audit_tokens: int = _setting(
        131_072,
        "tokens of what was learned from that stay in the process, 4 bytes each and never saved, so that a public push can be "
        "judged; 0: none, and it is refused",
    )
    context_tokens: int = _setting(512, "most prompt tokens kept with a request for learning")
    resident_adapters: int = _setting(
        8,
        "adapters with names that are in the process at once; the others are on its disk until they are asked for, but for what their "
        "replay remembers",
    )
    seed: int = _setting(0, "seed of the adapter's first values and of the replay's choices")
    report_to: ReportTo = _setting(  # noqa: RUF009  # it is a field
        (),
        f"where every request is reported: {', '.join(map(repr, REPORT_TO))}, several of them, 'all' that are installed, 'none', or "
        "an object of your own, a Trace; not saved with a draft",
    )
    logging_dir: str | None = _setting(
        None,
        "folder of 'tensorboard' and 'jsonl'; None: TENSORBOARD_LOGGING_DIR, or a new folder under runs/; not saved with a draft",
    )
    project: str = _setting("huggingface", "project of 'trackio'; not saved with a draft")
    run_name: str | None = _setting(None, "name of the run for 'trackio'; None: it makes one; not saved with a draft")

    @property
    def guesses(self) -> bool:
        """Whether anything drafts without a model: the suffix memory, or recycled tokens, which a fixed lookahead leaves out."""
        return self.memory_tokens > 0 or (self.recycle and self.lookahead == "auto")

    def __post_init__(self) -> None:
        check_values(vars(self))
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", checked_modules(self.target_modules))
        object.__setattr__(self, "report_to", checked_reports(self.report_to))
        if isinstance(self.logging_dir, os.PathLike):
            object.__setattr__(self, "logging_dir", os.fspath(self.logging_dir))
        check_places(vars(self))

    @property
    def blocks(self) -> int:
        """How many adapters of this rank stand side by side."""
        return self.experts if self.learner == ENSEMBLE else 1

    @property
    def traces(self) -> tuple[str | Trace, ...]:
        """`report_to`, by names and objects."""
        return tuple(self.report_to)  # type: ignore[arg-type]  # a tuple since __post_init__

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; of those that say where a process reports, what is set. Objects are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.target_modules is not None:
            values["target_modules"] = list(self.target_modules)
        values["report_to"] = [name for name in self.traces if isinstance(name, str)]
        defaults = {f.name: f.default for f in fields(self)} | {"report_to": []}
        return {k: value for k, value in values.items() if k not in REPORTING or value != defaults[k]}

    def of_draft(self) -> OnlineSpecConfig:
        """The settings that belong to a draft, without those that say where this process reports."""
        default = OnlineSpecConfig()
        return replace(self, **{name: getattr(default, name) for name in REPORTING})

    def to_saved(self) -> dict[str, Any]:
        """The settings as a saved draft and a generation config hold them: `of_draft` as JSON values."""
        return {name: value for name, value in self.to_dict().items() if name not in REPORTING}

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> OnlineSpecConfig:
        """The inverse of `to_saved`. Raises ConfigError, also where the file says where this process should report."""
        reporting = sorted(set(REPORTING) & set(values)) if isinstance(values, dict) else []
        if reporting:
            raise ConfigError(
                f"Saved settings with {reporting[0]}={brief(values[reporting[0]])}: where a process reports is not taken from files. "
                "Pass OnlineSpecConfig(report_to=...), or call draft.report_to(...)."
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OnlineSpecConfig:
        """The inverse of `to_dict`. Raises ConfigError on keys that do not exist."""
        if not isinstance(values, dict):
            raise ConfigError(f"Settings of {brief(values)}: expected a JSON object.")
        _check_names(values)
        return cls(**values)

    def __repr__(self) -> str:
        """Only what differs from the default."""
        changed = ", ".join(
            f"{name}={value!r}" for name, (value, default) in self._values().items() if value != default
        )
        return f"{type(self).__name__}({changed})"

    def _repr_html_(self) -> str:
        rows = [
            (name, brief(value), "" if value == default else brief(default), _help(name))
            for name, (value, default) in self._values().items()
        ]
        return html_table(type(self).__name__, ("setting", "value", "default, where it differs", "what it is"), rows)

    def _values(self) -> dict[str, tuple[Any, Any]]:
        """Every setting with its default."""
        return {f.name: (getattr(self, f.name), f.default) for f in fields(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> OnlineSpecConfig:
        """The inverse of `to_json`. Raises ConfigError."""
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"Settings that are no JSON ({error}).") from error


def _help(name: str) -> str:
    return str(OnlineSpecConfig.__dataclass_fields__[name].metadata["help"])


def _documented() -> str:
    """The class's docstring with its settings, as `help(OnlineSpecConfig)` and `OnlineSpecConfig?` show them."""
    lines = [f"    {f.name} ({f.type}, default {f.default!r}): {_help(f.name)}." for f in fields(OnlineSpecConfig)]
    return "\n".join([(OnlineSpecConfig.__doc__ or "").rstrip(), "", "Args:", *lines])


OnlineSpecConfig.__doc__ = inspect.cleandoc(OnlineSpecConfig.__doc__ or "")
OnlineSpecConfig.__doc__ = _documented()


def as_config(config: Any, **settings: Any) -> OnlineSpecConfig | None:
    """Settings as they may be given: an OnlineSpecConfig, a dict of them, or names and values; None: no word of them.

    Args:
        settings: go before those of `config`.

    Raises:
        ConfigError: it is something else, or a setting does not exist.
    """
    if config is None and not settings:
        return None
    if config is None or isinstance(config, dict):
        return OnlineSpecConfig.from_dict((config or {}) | settings)
    if not isinstance(config, OnlineSpecConfig):
        raise ConfigError(f"config={brief(config)}: expected an OnlineSpecConfig, or a dict of its settings.")
    _check_names(settings)
    return replace(config, **settings)


def one_expert(settings: OnlineSpecConfig) -> OnlineSpecConfig:
    """Settings under which what an ensemble serves is learned on as one adapter; those of a single learner stay as they are."""
    if settings.learner != ENSEMBLE:
        return settings
    rank, alpha = settings.blocks * settings.rank, settings.blocks * settings.alpha
    return replace(settings, learner=settings.expert_learner, rank=rank, alpha=alpha)
