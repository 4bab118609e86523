"""Where a new EAGLE-3 head starts: its shape and draft vocabulary, and the weights that it takes from its target."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.hidden_states import hidden_states, hidden_states_inputs, takes_hidden_states
from .._compat.models import max_positions, writing_config
from ..models.encoders import encoder_of, inputs_without_source, writing_embedding
from ..models.vocabulary import rows
from .config import Eagle3Config
from .eagle3 import Eagle3Head

# Parts of a head's layer that take a target's layer as it is, by how their names end in Llama-like models.
COPIED = (
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
ON_HIDDEN = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
RENAMED = {"hidden_norm.weight": "input_layernorm.weight"}  # of the head, and of the target
HEAD_WIDTH = 64  # of one attention head, for a target that has none; chosen
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
NORM = re.compile(r"(?:.*\.)?norm\.weight")  # the target's last norm
DECODER_NORM = re.compile(r"final_layer_norm\.weight")  # that of T5's decoder


def special_tokens(target: PreTrainedModel) -> list[int]:
    """The tokens that begin, end or pad a text of the target."""
    config = target.config.get_text_config(decoder=True)
    named = [vars(config).get(name) for name in ("bos_token_id", "pad_token_id")]
    return [token for token in named if isinstance(token, int) and token >= 0] + ends_of(target)


def ends_of(target: PreTrainedModel) -> list[int]:
    """The tokens that end an answer of the target."""
    ends = target.generation_config.eos_token_id if target.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def default_reads(layers: int) -> tuple[int, ...]:
    """EAGLE-3's three hidden states of a target with this many layers: near its input, its middle and its output."""
    return tuple(sorted({min(2, layers - 1), layers // 2, max(layers - 3, 0)}))


def new_config(target: PreTrainedModel, draft_vocab_size: int, **changes: Any) -> Eagle3Config:
    """A head with the widths of one layer of the target.

    Args:
        changes: fields of Eagle3Config that are another.
    """
    text = writing_config(target.config)
    # What a configuration states for each layer (Gemma-3n's MLPs) is that of the last one, from whose weights a head starts.
    said = {name: value[-1] if isinstance(value, list) and value else value for name, value in text.to_dict().items()}
    width = int(text.hidden_size)
    stated = said.get(text.attribute_map.get("num_attention_heads", "num_attention_heads"))
    heads = int(stated or max(1, width // HEAD_WIDTH))  # a target without attention (Mamba-2) states none
    head_dim = said.get(text.attribute_map.get("head_dim", "head_dim")) or width // heads
    table = rows(writing_embedding(target))
    vocab_size = int(text.vocab_size) if table is None else min(int(text.vocab_size), table)
    rope = said.get("rope_parameters") or {}
    fields: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": said.get("intermediate_size") or 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("num_key_value_heads") or heads,
        "head_dim": head_dim + head_dim % 2,  # rotary embeddings turn pairs of numbers
        "rms_norm_eps": said.get("rms_norm_eps") or 1e-5,
        "max_position_embeddings": max_positions(target.config),
        # A target whose layers rotate differently (Gemma-3) names a rope for each kind of layer: then it is Llama's default.
        "rope_parameters": rope if "rope_type" in rope else {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": vocab_size,
        "draft_vocab_size": min(draft_vocab_size, vocab_size),
        "reads": default_reads(int(text.num_hidden_layers)),
    }
    return Eagle3Config(**(fields | changes))


def draft_tokens(head: Eagle3Head) -> Tensor:
    """(Vd,) the target ids of a head's logits."""
    return head.draft_ids if head.draft_ids is not None else torch.arange(head.config.vocab_size)


@torch.no_grad()
def start_from_target(head: Eagle3Head, target: PreTrainedModel, source: int = -1) -> list[str]:
    """Sets a head's weights from its target's, where shapes fit; returns the names of the weights that were set.

    The projection passes the last of the features on, attention and MLP are those of one layer of the target and read the hidden
    state, not the token yet; the vocabulary head's rows and the norm before it are the target's. An encoder–decoder's parts are those
    of its decoder.

    Args:
        source: the target's layer.
    """
    own, found = head.state_dict(), []
    decodes = encoder_of(target) is not None
    given_to = (target.get_decoder() if decodes else target).state_dict()
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in given_to.items():
        match = LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    layer = layers[sorted(layers)[source]] if layers else {}
    for name in (*COPIED, *RENAMED):
        found += _set(own, f"layers.0.{name}", layer.get(RENAMED.get(name, name)))
    width = head.config.hidden_size
    for name in ON_HIDDEN:
        mine, given = own[f"layers.0.{name}"], layer.get(name)
        if given is not None and given.shape == mine[:, width:].shape:
            mine[:, width:] = given
            found.append(f"layers.0.{name}")
    if head.config.target_hidden_size == width:
        own["fc.weight"].zero_()
        own["fc.weight"][:, -width:] = torch.eye(width)
        found.append("fc.weight")
    lm_head = target.get_output_embeddings()
    if isinstance(lm_head, nn.Module):
        weight = dict(lm_head.named_parameters(recurse=False)).get("weight")
        ids = draft_tokens(head)
        found += _set(own, "lm_head.weight", None if weight is None else weight[ids.to(weight.device)])
        if "lm_head.weight" in found:
            own["lm_head.weight"].mul_(_logits_scale(target))
    norm = DECODER_NORM if decodes else NORM
    norms: Sequence[Tensor] = [tensor for name, tensor in given_to.items() if norm.fullmatch(name)]
    found += _set(own, "norm.weight", norms[-1] if norms else None)
    return found


@torch.no_grad()
def _logits_scale(target: PreTrainedModel) -> float:
    """What a target multiplies its last hidden state or its logits by around its vocabulary head (T5, Cohere), tried on three tokens.

    Of four digits, so that it is the same in every precision of the computer; 1: by nothing, or it hands out no hidden states.
    """
    if not takes_hidden_states(target):
        return 1.0
    tokens = torch.arange(1, 4, device=target.device)[None]
    last = writing_config(target.config).num_hidden_layers
    outputs = target(
        **inputs_without_source(target, tokens), **hidden_states_inputs((last,)), use_cache=False, return_dict=True
    )
    hidden, lm_head = hidden_states(outputs, (last,), tokens.shape[1]), target.get_output_embeddings()
    if hidden is None or lm_head is None or isinstance(lm_head, nn.Embedding):  # FSMT's is the embedding itself
        return 1.0
    said, logits = lm_head(hidden).float(), outputs.logits.float()
    scale = float((said * logits).sum() / said.square().sum())
    return float(f"{scale:.4g}") if 0 < scale < math.inf else 1.0


def _set(own: dict[str, Tensor], name: str, given: Tensor | None) -> list[str]:
    """Copies a tensor into a head's weight of the same shape; the name, if it did."""
    if given is None or given.shape != own[name].shape:
        return []
    own[name].copy_(given)
    return [name]
