"""Which options of a PEFT adapter we serve as PEFT does: those that change nothing, those that we read, and no others.

Every field of peft 0.21.2's LoraConfig is in one of the two lists here, or has to be empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import MOST, MOST_RANK
from ..errors import ArtifactError, brief

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
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")  # under others PEFT wraps the model in another head
# First values of A and B alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take their part out of the base's weights, too.
FIRST_VALUES = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def check_options(about: dict[str, Any], path: Path) -> None:
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
        raise _refused(path, f"task_type={brief(about['task_type'])}", "a draft is a causal language model")
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


def _is_empty(value: Any) -> bool:
    """Whether an option is off. A number is not: layer 0 is a layer."""
    return value is None or value is False or value in ("", [], {})


def _refused(path: Path, option: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: an adapter with {option}: {why}. Expected plain LoRA with a list of target_modules: merge it into the base with "
        "merge_and_unload, and begin a new draft with that."
    )
