"""Folders of draft heads with random numbers, as the projects that train them write them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

V, T, LAYERS = 64, 24, 4  # the target: tokens, width, decoder layers
LAYER = dict(hidden_size=T, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LLAMA = dict(
    model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500.0, rope_scaling=None, vocab_size=V,
    max_position_embeddings=16, tie_word_embeddings=False, torch_dtype="float32",
)  # fmt: skip
DRAFT_IDS = [*range(0, 40, 2), 41, 63]  # of a reduced vocabulary


def target_config(**settings: Any) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    given = LAYER | dict(vocab_size=V, num_hidden_layers=LAYERS, rms_norm_eps=1e-5, rope_parameters=rope) | settings
    return LlamaConfig(**given)


def target(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(target_config(**settings)).eval()


@dataclass
class HeadFiles:
    """What a folder holds."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str = "model.safetensors"
    settings: dict[str, Any] = field(default_factory=dict)  # what the references have to know beside the tensors

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".safetensors"):
            save_file(self.tensors, folder / self.file)
        else:
            torch.save(self.tensors, folder / self.file)
        return folder


def numbers(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """Random tensors: norms around 1, weights of a size that keeps what they are multiplied with small."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.3 * noise if "norm" in name else noise / (4 * shape[-1]) ** 0.5
    return found


def layer_shapes(
    name: str, wide: int, bias: bool = False, norms: tuple[str, ...] = (), h: int = T, qk_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """A Llama layer whose attention is `wide`, with the usual norms and these."""
    heads, kv, d, i = 4, 2, 8, 40
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.{norm}.weight": (h,) for norm in ("post_attention_layernorm", *norms)
    }
    rows = {"q": heads * d, "k": kv * d, "v": kv * d}
    for part, n in rows.items():
        shapes[f"{name}.self_attn.{part}_proj.weight"] = (n, wide)
    shapes[f"{name}.self_attn.o_proj.weight"] = (h, heads * d)
    shapes |= {f"{name}.mlp.{part}_proj.weight": (i, h) for part in ("gate", "up")}
    shapes[f"{name}.mlp.down_proj.weight"] = (h, i)
    if bias:
        shapes |= {key.replace("weight", "bias"): (n[0],) for key, n in shapes.items() if "_proj" in key}
    if qk_norm:
        shapes |= {f"{name}.self_attn.{part}_norm.weight": (d,) for part in "qk"}
    return shapes


def vocabulary_map(ids: list[int]) -> dict[str, Tensor]:
    known = torch.zeros(V, dtype=torch.bool)
    known[ids] = True
    return {"d2t": torch.tensor([target - draft for draft, target in enumerate(ids)]), "t2d": known}


def eagle3(
    h: int = T, reads: int = 3, layers: int = 1, reduced: bool = False, own: bool = False, bias: bool = False,
    qk_norm: bool = False, seed: int = 1, **flags: bool,
) -> HeadFiles:  # fmt: skip
    """EAGLE-3 in EAGLE's own form."""
    norms = ("input_layernorm", "hidden_norm")
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (h, reads * T), "norm.weight": (h,)}
    shapes["lm_head.weight"] = (len(DRAFT_IDS) if reduced else V, h)
    shapes |= layer_shapes("midlayer", 2 * h, bias, norms, h, qk_norm)
    for i in range(1, layers):
        shapes |= layer_shapes(f"layers.{i}", h, bias, ("input_layernorm",), h, qk_norm)
    if bias:
        shapes["fc.bias"] = (h,)
    if own:
        shapes["embed_tokens.weight"] = (V, h)
    if flags.get("norm_before_fc"):
        shapes["input_norm.weight"] = (reads * T,)
    if flags.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (T,) for i in range(reads)}
    config = {"architectures": ["LlamaForCausalLMEagle3"]} | LLAMA | LAYER | {"num_hidden_layers": layers} | flags
    config |= {"hidden_size": h, "draft_vocab_size": shapes["lm_head.weight"][0]}
    if h != T:
        config["target_hidden_size"] = T
    tensors = numbers(shapes, seed) | (vocabulary_map(DRAFT_IDS) if reduced else {})
    settings = {"norm_before_residual": False, "norm_output": False} | flags
    return HeadFiles(config, tensors, settings=settings)


def as_speculators(files: HeadFiles, reads: tuple[int, ...]) -> HeadFiles:
    """The same head as speculators writes it."""
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    layer = {key: value for key, value in files.config.items() if key in {*LLAMA, *LAYER, "num_hidden_layers"}}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "draft_vocab_size": files.config["draft_vocab_size"],
        "eagle_aux_hidden_state_layer_ids": list(reads),
        "target_hidden_size": files.config.get("target_hidden_size"),
        "embed_requires_grad": False,
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "some/target"}},
    } | {name: files.config.get(name, False) for name in flags}
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in files.tensors.items()}
    return HeadFiles(config, tensors, settings=files.settings)


def eagle1(layers: int = 1, bias: bool = True, own: bool = False) -> HeadFiles:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (T, 2 * T)}
    for i in range(layers):
        shapes |= layer_shapes(f"layers.{i}", T, norms=("input_layernorm",) if i else ())
    if bias:
        shapes["fc.bias"] = (T,)
    if own:
        shapes["embed_tokens.weight"] = (V, T)
    config = {"architectures": ["LlamaForCausalLM"]} | LLAMA | LAYER | {"num_hidden_layers": layers}
    return HeadFiles(config, numbers(shapes), "pytorch_model.bin")


def hydra(heads: int = 3, blocks: int = 1, prefix: bool = False) -> HeadFiles:
    """Hydra's "mlp" or "prefix-mlp": the latter has a dropout in front of every module, which takes a place of its own."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for j in range(blocks):
            name = f"hydra_mlp.{i}.{2 * j + 1 if prefix else j}"
            wide = T * (i + 2) if j == 0 else T
            shapes |= {f"{name}.linear.weight": (T, wide), f"{name}.linear.bias": (T,)}
            if j == 0:
                shapes |= {f"{name}.res_connection.weight": (T, wide), f"{name}.res_connection.bias": (T,)}
        said = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        shapes |= {f"{said}.weight": (V, T), f"{said}.bias": (V,)}
    if prefix:
        shapes |= layer_shapes("prefix_embeding_layer.layers.0", T, norms=("input_layernorm",))
        shapes["prefix_embeding_layer.norm.weight"] = (T,)
        shapes["prefix_embeding_layer.embed_tokens.weight"] = (V, T)
    tensors = numbers(shapes)
    for i in range(heads):  # the blocks behind the first one are one module
        for j in range(2, blocks):
            for part in ("weight", "bias"):
                first, again = (f"hydra_mlp.{i}.{2 * b + 1 if prefix else b}.linear.{part}" for b in (1, j))
                tensors[again] = tensors[first]
    config = {
        "base_model_name_or_path": "some/target", "grounded_heads": True, "hidden_state_offset": 0,
        "hydra_head_arch": "prefix-mlp" if prefix else "mlp", "hydra_num_heads": heads, "hydra_num_layers": blocks,
    }  # fmt: skip
    return HeadFiles(config, tensors, "hydra_lm_head.pt")
