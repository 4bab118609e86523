"""The configuration of a head, from its folder's config.json, the shapes of its tensors and the configuration of its target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .._compat.models import NO_LIMIT, max_positions
from ..errors import DraftError, brief
from .config import Eagle1Config, Eagle3Config, HeadConfig, HydraConfig
from .names import EAGLE1, HYDRA, SPECULATORS
from .stored import CONFIG

Shapes = Mapping[str, tuple[int, ...]]
IDS = "eagle_aux_hidden_state_layer_ids"
MOST_BLOCKS = 64  # of a Hydra head; public ones have 1 or 4
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Scaled rotary embeddings that start from the length the head was trained for.
SCALED = ("llama3", "yarn", "longrope")
# Fields of a layer that are taken as they stand; where one is missing, transformers' default for the layer holds.
_SIZES = ("hidden_size", "intermediate_size")
_OF_TARGET = (
    *("attention_bias", "head_dim", "hidden_act", "initializer_range", "intermediate_size", "mlp_bias"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
)
_NUMBERS = ("rms_norm_eps", "initializer_range")


def described(
    values: Mapping[str, Any], form: str, shapes: Shapes, target: PretrainedConfig, folder: Path
) -> HeadConfig:
    """The configuration of the head in a folder.

    Args:
        values: its config.json.
        shapes: of its tensors, by our names.
        target: configuration of the target's decoder.

    Raises:
        DraftError: a field has a value that cannot be, or is another target's.
    """
    fields = _Fields(values["transformer_layer_config"] if form == SPECULATORS else values, folder / CONFIG)
    common = _target_fields(target)
    if form == HYDRA:
        return _hydra(fields, common, shapes, target)
    common |= _layer_fields(fields, shapes) | {"own_embeddings": "embed_tokens.weight" in shapes}
    fields.same("vocab_size", common["vocab_size"], "the target has {} tokens")
    if form == EAGLE1:
        fields.same("hidden_size", common["target_hidden_size"], "the target's hidden states are {} wide")
        return Eagle1Config(**common, bias="fc.bias" in shapes)
    return _eagle3(_Fields(values, folder / CONFIG), common, shapes, target)


class _Fields:
    """The fields of a config.json, or of a part of it.

    Args:
        file: named in errors.
    """

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = values, file

    def whole(self, name: str, default: int | None = None, most: int = NO_LIMIT) -> int:
        """A whole number from 1 to `most`. Raises DraftError."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(name, value, f"expected a whole number from 1 to {most:,}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0. Raises DraftError."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.wrong(name, value, "expected a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """Whether a flag is set, here or in `eagle_config`, where some write it. Raises DraftError."""
        nested = self.values.get("eagle_config") or {}
        value = self.values.get(name, nested.get(name)) or False
        if not isinstance(value, bool):
            raise self.wrong(name, value, "expected true or false")
        return value

    def same(self, name: str, expected: int, told: str) -> None:
        """Raises DraftError unless a field has this value. `told`: what it is, with {} for the value."""
        if self.whole(name, expected) != expected:
            raise self.wrong(name, self.values[name], f"{told.format(expected)}, so the head belongs to another one")

    def wrong(self, name: str, value: Any, told: str) -> DraftError:
        return DraftError(f"{self.file} has {name}={brief(value)}: {told}.")


def _target_fields(target: PretrainedConfig) -> dict[str, Any]:
    """What a head's configuration says of its target."""
    longest = max_positions(target)
    return {
        "vocab_size": int(target.vocab_size),
        "target_hidden_size": int(target.hidden_size),
        "target_layers": int(target.num_hidden_layers),
    } | ({} if longest == NO_LIMIT else {"max_position_embeddings": longest})


def _layer_fields(fields: _Fields, shapes: Shapes) -> dict[str, Any]:
    """The layer's; which biases and norms it has is read off its tensors."""
    values = fields.values
    default = (Qwen3Config if values.get("model_type") == "qwen3" else LlamaConfig)().to_dict()
    heads = fields.whole("num_attention_heads", default["num_attention_heads"])
    found: dict[str, Any] = {name: fields.whole(name, default[name]) for name in _SIZES}
    found |= {name: fields.number(name, default[name]) for name in _NUMBERS}
    found["hidden_act"] = values.get("hidden_act") or default["hidden_act"]
    if found["hidden_act"] not in ACT2FN:
        raise fields.wrong("hidden_act", found["hidden_act"], "transformers has no such activation")
    found |= {
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("num_key_value_heads", heads),
        "num_hidden_layers": fields.whole("num_hidden_layers", 1, most=len(shapes)),
        "attention_bias": "layers.0.self_attn.o_proj.bias" in shapes,
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in shapes,
        "qk_norm": "layers.0.self_attn.q_norm.weight" in shapes,
        "mlp_bias": "layers.0.mlp.up_proj.bias" in shapes,
    }
    queries = shapes.get("layers.0.self_attn.q_proj.weight", (found["hidden_size"],))
    found["head_dim"] = fields.whole("head_dim", max(1, queries[0] // heads))
    return found | _rope_fields(fields)


def _rope_fields(fields: _Fields) -> dict[str, Any]:
    values = fields.values
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = dict(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "mrope_section" in rope:  # positions of pictures; those of text are one number
        rope, kind = {key: value for key, value in rope.items() if key == "rope_theta"}, "default"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise fields.wrong("rope_type", kind, f"expected one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    if kind in SCALED:  # its own length, as `max_position_embeddings` will be the target's
        rope.setdefault("original_max_position_embeddings", fields.whole("max_position_embeddings", 2048))
    rope["rope_type"] = kind
    theta = rope.get("rope_theta", values.get("rope_theta"))
    rope["rope_theta"] = _Fields({"rope_theta": theta}, fields.file).number("rope_theta", HeadConfig.default_theta)
    rope.pop("type", None)
    return {"rope_parameters": rope}


def _eagle3(fields: _Fields, common: dict[str, Any], shapes: Shapes, target: PretrainedConfig) -> Eagle3Config:
    said = fields.whole("target_hidden_size", common["hidden_size"])
    if said != target.hidden_size:
        name = "target_hidden_size" if fields.values.get("target_hidden_size") is not None else "hidden_size"
        raise fields.wrong(
            name, said, f"the target's hidden states are {target.hidden_size} wide, so the head belongs to another one"
        )
    size = fields.whole("draft_vocab_size", shapes.get("lm_head.weight", (common["vocab_size"],))[0])
    if size > common["vocab_size"]:
        raise fields.wrong("draft_vocab_size", size, f"the target has {common['vocab_size']} tokens")
    flags: dict[str, Any] = {name: fields.flag(name) for name in FLAGS}
    return Eagle3Config(
        **common,
        **flags,
        reads=_reads(fields, int(target.num_hidden_layers)),
        draft_vocab_size=size,
        bias="fc.bias" in shapes,
    )


def default_reads(layers: int) -> tuple[int, int, int]:
    """Indices in the tuple of a target's `hidden_states` that a head reads where nothing is said, of a target of so many layers."""
    return 2, layers // 2, layers - 3


def stated_reads(values: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    """Indices in the tuple of the target's `hidden_states` that the config.json of an EAGLE-3 head names; (): none. Raises DraftError.

    At the top of a configuration they are such indices (vLLM, speculators); in `eagle_config` they count layers, whose outputs
    are meant (SGLang), and the output of layer j is hidden state j + 1.
    """
    fields = _Fields(values, file)
    nested = (values.get("eagle_config") or {}).get(IDS) or []
    top = values.get(IDS) or []
    for ids in (nested, top):
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise fields.wrong(IDS, ids, "expected a list of whole numbers")
    reads = tuple(top) or tuple(i + 1 for i in nested)
    if top and nested and reads != tuple(i + 1 for i in nested):
        raise fields.wrong(
            IDS, top, f"eagle_config has {nested}, which count layers, and mean {[i + 1 for i in nested]}"
        )
    return reads


def _reads(fields: _Fields, layers: int) -> tuple[int, ...]:
    """The same of a target of so many layers, that has them all. Raises DraftError."""
    reads = stated_reads(fields.values, fields.file) or default_reads(layers)
    if not all(0 <= i <= layers for i in reads):
        told = f"the target has {layers} layers, so that its hidden states are 0 to {layers}"
        raise fields.wrong(IDS, list(reads), told)
    return reads


def _hydra(fields: _Fields, common: dict[str, Any], shapes: Shapes, target: PretrainedConfig) -> HydraConfig:
    """Hydra's says nothing of the layer: "prefix-mlp" has one of the target's."""
    values: dict[str, Any] = {"hidden_size": common["target_hidden_size"]}
    prefix = fields.values.get("hydra_head_arch") == "prefix-mlp"
    if prefix:
        if target.model_type not in ("llama", "mistral"):
            raise fields.wrong(
                "hydra_head_arch",
                "prefix-mlp",
                f"it has a layer of its target, which is no Llama but {target.model_type}",
            )
        values |= {name: value for name, value in target.to_dict().items() if name in _OF_TARGET}
    count = fields.whole("hydra_num_heads", most=len(shapes))
    blocks = fields.whole("hydra_num_layers", 1, most=MOST_BLOCKS)
    return HydraConfig(**common, **values, num_heads=count, num_blocks=blocks, prefix=prefix)
