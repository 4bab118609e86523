"""Which folders are draft heads, in which form, and which of them are not served."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import DraftError, brief
from .names import EAGLE1, EAGLE3, HYDRA, SPECULATORS, our_name
from .stored import CONFIG, stored_config, stored_tensors

MEDUSA = "medusa"
SERVED = "EAGLE-3 (original, SGLang and speculators form), EAGLE-1 and -2, Hydra (mlp, prefix-mlp)"
LAYERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # layers that are Llama's, but for biases and norms that the tensors show


def form_of(values: Mapping[str, Any]) -> str | None:
    """The form that a config.json states; None: that of an ordinary model, as EAGLE-1's is, too."""
    named = str(values.get("architectures")).lower()
    if "speculators_model_type" in values:
        return SPECULATORS
    if "hydra_num_heads" in values:
        return HYDRA
    if "medusa_num_heads" in values:
        return MEDUSA
    if "eagle3" in named or "draft_vocab_size" in values or "eagle_config" in values:
        return EAGLE3
    return EAGLE1 if "eagle" in named else None


def is_head_config(values: Mapping[str, Any]) -> bool:
    """Whether a config.json says that it is a draft head's, served or not. EAGLE-1's may say nothing: see `is_head`."""
    return form_of(values) is not None


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds a draft head, served or not. Reads no weights; their names where the configuration leaves it open."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return False
    try:
        values = stored_config(folder)
        layers = values.get("num_hidden_layers")
        return is_head_config(values) or (layers in (1, 2) and _has_fc(stored_tensors(folder)))
    except DraftError:
        return False


def _has_fc(names: Collection[str]) -> bool:
    return any(our_name(name, EAGLE1) == "fc.weight" for name in names)


def served_form(values: Mapping[str, Any], names: Collection[str], folder: Path) -> str:
    """The form of a head that can be served. Raises DraftError: it is none, or of a kind that cannot be; it names the field.

    Args:
        names: of its tensors.
    """
    form = form_of(values) or (EAGLE1 if _has_fc(names) else None)
    if form is None:
        raise DraftError(
            f"{folder} holds no draft head that is known: {CONFIG} names none, and there is no tensor fc.weight."
        )
    field, value, instead = _obstacle(values, form)
    if field:
        raise DraftError(f"{folder / CONFIG} has {field}={brief(value)}: {instead}. Heads that are served: {SERVED}.")
    return form


def _obstacle(values: Mapping[str, Any], form: str) -> tuple[str, Any, str]:
    """The field that keeps a head from being served, its value and what would be; "": none does."""
    if form == MEDUSA:
        return "medusa_num_heads", values["medusa_num_heads"], "Medusa's heads do not read the tokens that they draft"
    if form == HYDRA:
        return _hydra_obstacle(values)
    if form == SPECULATORS and values["speculators_model_type"] != "eagle3":
        return "speculators_model_type", values["speculators_model_type"], "of this form, 'eagle3' alone is served"
    layer = values.get("transformer_layer_config") if form == SPECULATORS else values
    if not isinstance(layer, dict):
        return "transformer_layer_config", layer, "expected the configuration of a Llama layer"
    if "deepseek" in str(values.get("architectures")).lower():
        return "architectures", values["architectures"], "DeepSeek's attention in a draft head is not supported"
    kind = layer.get("model_type", "llama")
    if kind not in LAYERS:
        return "model_type", kind, f"a head's layer is one of {', '.join(LAYERS)}"
    if "sliding_attention" in str(layer.get("layer_types")):
        return "layer_types", layer["layer_types"], "a head's layer has to see every token"
    eagle = values.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        return "eagle_config", eagle, "expected an object"
    if eagle.get("use_aux_hidden_state") is False:
        return "use_aux_hidden_state", False, "an EAGLE-3 head that reads one hidden state is not supported"
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return "rope_scaling", rope, "expected an object"
    partial = layer.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        return "partial_rotary_factor", partial, "a head's rotary embedding turns all of a query"
    if layer.get("logit_scale", 1.0) not in (None, 1.0):
        return "logit_scale", layer["logit_scale"], "logits are not scaled"
    return "", None, ""


def _hydra_obstacle(values: Mapping[str, Any]) -> tuple[str, Any, str]:
    kind = values.get("hydra_head_arch", "mlp")
    if kind not in ("mlp", "prefix-mlp"):
        return "hydra_head_arch", kind, "of Hydra's heads, 'mlp' and 'prefix-mlp' are served"
    if values.get("grounded_heads", False) is not True:
        return (
            "grounded_heads",
            values.get("grounded_heads", False),
            "heads that do not read the tokens they draft are not served",
        )
    if values.get("hidden_state_offset", 0) != 0:
        return "hidden_state_offset", values["hidden_state_offset"], "a head reads the last hidden state"
    return "", None, ""
