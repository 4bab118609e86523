"""What a head's parameters are called in files, in each of the forms that heads are written in.

eagle3       EAGLE's repository, SpecForge, SGLang: the first layer is `midlayer`
speculators  vLLM's project of this name: it is `layers.0`, as it is here
eagle1       EAGLE's repository
hydra        Hydra's repository: modules by their places in an nn.Sequential, in which "prefix-mlp" has dropouts
"""

from __future__ import annotations

import re

from .config import HeadConfig, HydraConfig

EAGLE3, SPECULATORS, EAGLE1, HYDRA = "eagle3", "speculators", "eagle1", "hydra"
# The map between vocabularies: offsets from the draft's ids to the target's, and which of the target's ids the draft has.
D2T, T2D = "d2t", "t2d"
_PREFIX = "prefix_embeding_layer."  # as Hydra spells it
# Tensors that belong to the target, or can be computed: files of one version or another carry them.
_LEFT_OUT = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|verifier_(lm_head|norm)\.weight|input_embed_fn\.weight|prefix_embeding_layer\.embed_tokens\.weight"
)
_HYDRA_MLP = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.(.+)")
_HYDRA_LM_HEAD = re.compile(r"hydra_lm_head\.(\d+)\.(?:1\.)?(weight|bias)")


def is_left_out(name: str) -> bool:
    """Whether a tensor of a file is none of the head's own numbers."""
    return _LEFT_OUT.fullmatch(name) is not None


def our_name(name: str, form: str, prefix: bool = False) -> str:
    """What a tensor of a file is called in the module; a name that is not known stays as it is.

    Args:
        prefix: of Hydra, whether the head is a "prefix-mlp".
    """
    if form != HYDRA:
        return re.sub(r"^midlayer\.", "layers.0.", name.removeprefix("model."))
    mlp, lm_head = _HYDRA_MLP.fullmatch(name), _HYDRA_LM_HEAD.fullmatch(name)
    if mlp is not None:
        block = int(mlp[2]) // 2 if prefix else int(mlp[2])
        return f"mlps.{mlp[1]}.{'further' if block else 'first'}.{mlp[3]}"
    if lm_head is not None:
        return f"lm_heads.{lm_head[1]}.{lm_head[2]}"
    if name == f"{_PREFIX}norm.weight":
        return "prefix_norm.weight"
    return name.replace(f"{_PREFIX}layers.0.", "prefix.", 1)


def file_names(name: str, form: str, config: HeadConfig) -> list[str]:
    """Under which names a parameter of the module stands in a file: several for a Hydra block that is used several times."""
    if form == EAGLE3:
        return [re.sub(r"^layers\.0\.", "midlayer.", name)]
    if form != HYDRA:
        return [name]
    assert isinstance(config, HydraConfig)
    kind, _, rest = name.partition(".")
    if kind == "mlps":
        index, block, parameter = rest.split(".", 2)
        blocks = range(1) if block == "first" else range(1, config.num_blocks)
        places = [2 * b + 1 if config.prefix else b for b in blocks]
        return [f"hydra_mlp.{index}.{place}.{parameter}" for place in places]
    if kind == "lm_heads":
        index, parameter = rest.split(".")
        return [f"hydra_lm_head.{index}.1.{parameter}" if config.prefix else f"hydra_lm_head.{index}.{parameter}"]
    return [f"{_PREFIX}norm.{rest}" if kind == "prefix_norm" else f"{_PREFIX}layers.0.{rest}"]
