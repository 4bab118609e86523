"""Which options of a PEFT adapter we serve as PEFT does: those that change nothing, those that we read, and no others.

Every field of peft 0.21.2's LoraConfig is in one of the two lists here, or has to be empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MOST, MOST_RANK
from ..errors import ArtifactError, brief

RANK, ALPHA, LAYERS, BASE, REVISION = "r", "lora_alpha", "target_modules", "base_model_name_or_path", "revision"
# Where it comes from, how it was trained or first filled, and how a layout that PEFT sets by the layer's type was stored.
WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    )
)
READ = frozenset(("bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules", "task_type"))
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")  # under others PEFT wraps the model in another head
# First values of A and B alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take their part out of the base's weights, too.
FIRST_VALUES = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class LoraOptions:
    """What adapter_config.json holds."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_name: str | None  # a folder of the machine that made it, or a name
    revision: str | None  # of the base
    other: Mapping[str, object]  # all other options, by PEFT's names

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> LoraOptions:
        """From what `LoraConfig.to_dict` gives, or from JSON that was checked."""
        return cls(
            rank=values[RANK],
            alpha=values[ALPHA],
            target_modules=tuple(values[LAYERS]),
            base_name=None if values.get(BASE) is None else str(values[BASE]),
            revision=None if values.get(REVISION) is None else str(values[REVISION]),
            other={name: v for name, v in values.items() if name not in (RANK, ALPHA, LAYERS, BASE, REVISION)},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, object], path: Path) -> LoraOptions:
        """From JSON. Raises as `check_options`."""
        check_options(values, path)
        return cls.of(values)

    def to_dict(self) -> dict[str, object]:
        """By PEFT's names."""
        return {
            **self.other,
            RANK: self.rank,
            ALPHA: self.alpha,
            LAYERS: list(self.target_modules),
            BASE: self.base_name,
            REVISION: self.revision,
        }

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / self.rank


def check_options(about: Mapping[str, object], path: Path) -> None:
    """Raises ArtifactError for an adapter that PEFT would serve as another model than we do, and names the option.

    Args:
        about: what adapter_config.json holds.
    """
    kind, rank, alpha = about.get("peft_type"), about.get("r"), about.get("lora_alpha")
    names, first = about.get("target_modules"), about.get("init_lora_weights")
    if kind != "LORA":
        raise _refused(path, f"peft_type={brief(kind)}", "only LoRA can be split, folded and learned online")
    if about.get("bias", "none") != "none":
        raise _refused(path, f"bias={brief(about['bias'])}", "it changes the base's biases")
    if (isinstance(first, str) and first.lower() not in FIRST_VALUES) or not isinstance(first, str | bool | None):
        raise _refused(path, f"init_lora_weights={brief(first)}", "it may change the base's weights")
    if about.get("task_type") not in TASKS:
        raise _refused(path, f"task_type={brief(about['task_type'])}", "a draft is a language model")
    for name in sorted(set(about) - WITHOUT_EFFECT - READ):
        if not _is_empty(about[name]):
            raise _refused(
                path, f"{brief(name)[1:-1]}={brief(about[name])}", "a draft adapts nothing else than LoRA does"
            )
    whole = type(rank) is int and 1 <= rank <= MOST_RANK
    if not whole or not isinstance(alpha, int | float) or not MOST >= alpha > 0 or isinstance(alpha, bool):
        raise ArtifactError(
            f"{path}: r={brief(rank)}, lora_alpha={brief(alpha)}: expected the size of a LoRA, a rank of at most {MOST_RANK:,}."
        )
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _refused(path, f"target_modules={brief(names)}", "a list of layers is expected, which no pattern gives")


def _is_empty(value: object) -> bool:
    """Whether an option is off. A number is not: layer 0 is a layer."""
    return value is None or value is False or value in ("", [], {})


def _refused(path: Path, option: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: an adapter with {option}: {why}. Expected plain LoRA with a list of target_modules: merge it into the base with "
        "merge_and_unload, and begin a new draft with that."
    )
