"""write_head: a draft head as an ordinary folder, which the engines that serve such heads load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from .._compat.models import model_name
from ..errors import DraftError, brief
from ..models.borrow import is_plain
from .assistant_folder import write_assistant
from .base import Head
from .config import Eagle1Config, Eagle3Config, HeadConfig, HydraConfig
from .described import FLAGS, IDS, default_reads
from .dflash import DFlashHead
from .eagle1 import Eagle1Head
from .eagle3 import Eagle3Head
from .gemma_assistant import GemmaAssistantHead
from .mtp import MtpHead
from .names import D2T, EAGLE1, EAGLE3, HYDRA, SPECULATORS, T2D, file_names
from .stored import CONFIG, HYDRA_WEIGHTS

SPECULATORS_VERSION = "0.9.0"  # whose form is written
PROPOSED = 3  # tokens that a server drafts where it is told nothing: the default of speculators


def write_head(
    head: Head,
    folder: str | Path,
    form: str | None = None,
    *,
    target_config: PretrainedConfig | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a head's folder: config.json, and model.safetensors or Hydra's hydra_lm_head.pt. Read again, it is equal in every bit. One of
    transformers' assistants is written as transformers reads it.

    Args:
        form: "eagle3" (EAGLE, SGLang, vLLM) or "speculators" (vLLM) for an EAGLE-3 head; None: as it was read, or the head's only one.
        target_config: of its target, which configurations name; the package speculators loads no head without that name.
        weights: instead of the head's own, by their names, as `GatedLora.merged_weights` has them.

    Raises:
        DraftError: the form is not one of this head's, or has no place for what the head is.
    """
    if isinstance(head, MtpHead):
        raise DraftError(
            "An MTP layer has no folder of its own: it lies in its target's checkpoint. save_pretrained keeps what it learned."
        )
    held = dict(head.state_dict() if weights is None else weights)
    folder = Path(folder)
    if isinstance(head, GemmaAssistantHead | DFlashHead):
        if form is not None:
            raise DraftError(f"form={brief(form)}: {type(head).__name__} is written as transformers reads it alone.")
        write_assistant(head, folder, held)
        return
    own = _own_form(head)
    form = form or own
    if form not in ((EAGLE3, SPECULATORS) if isinstance(head, Eagle3Head) else (own,)):
        raise DraftError(f"form={brief(form)}: {type(head).__name__} is written as {own!r}.")
    held.pop("draft_ids", None)
    dtype = next(iter(held.values())).dtype
    config = _config(head.config, form, dtype, target_config)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for key, tensor in held.items()
        for name in file_names(key, form, head.config)
    }
    if form == SPECULATORS:
        tensors = _embedding(head, dtype) | tensors
    if head.draft_ids is not None:
        tensors |= _vocabulary_map(head.draft_ids.cpu(), head.config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    if form == HYDRA:
        torch.save(tensors, folder / HYDRA_WEIGHTS)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _own_form(head: Head) -> str:
    if isinstance(head, Eagle3Head):
        return head.form
    return EAGLE1 if isinstance(head, Eagle1Head) else HYDRA


def _embedding(head: Head, dtype: torch.dtype) -> dict[str, Tensor]:
    """The embedding of the target that the head shares: files of speculators hold it, and that package fills no gap reliably (0.9.0)."""
    table = head.target_layers.embedding
    if not isinstance(table, nn.Embedding) or not is_plain(table.weight):
        return {}
    weight = table.weight.detach()[: head.config.vocab_size]
    return {"embed_tokens.weight": weight.to("cpu", dtype, copy=True)}


def _vocabulary_map(ids: Tensor, size: int) -> dict[str, Tensor]:
    """Offsets from draft ids to the target's, and which of the target's `size` ids are among them."""
    known = torch.zeros(size, dtype=torch.bool)
    known[ids] = True
    return {D2T: ids - torch.arange(len(ids)), T2D: known}


def _config(config: HeadConfig, form: str, dtype: torch.dtype, target: PretrainedConfig | None) -> dict[str, Any]:
    if isinstance(config, HydraConfig):
        return _hydra(config, target)
    if isinstance(config, Eagle1Config):
        return {"architectures": ["LlamaForCausalLM"]} | _layer(config, dtype, target) | {"bias": config.bias}
    assert isinstance(config, Eagle3Config)
    return (_speculators if form == SPECULATORS else _eagle3)(config, dtype, target)


def _layer(config: HeadConfig, dtype: torch.dtype, target: PretrainedConfig | None) -> dict[str, Any]:
    """The fields of a Llama layer, as every form has them."""
    same = (
        *("attention_bias", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
        *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
        *("rms_norm_eps", "vocab_size"),
    )
    values = config.to_dict()
    rope = dict(values["rope_parameters"])
    theta = rope.pop("rope_theta")
    marks = {} if target is None else {name: vars(target).get(name) for name in ("bos_token_id", "eos_token_id")}
    biased = {"mlp_bias": True} if config.mlp_bias else {}
    return {name: values[name] for name in same} | {
        **marks,
        **biased,
        "attention_dropout": 0.0,
        "model_type": "qwen3" if config.qk_norm else "llama",
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _eagle3(config: Eagle3Config, dtype: torch.dtype, target: PretrainedConfig | None) -> dict[str, Any]:
    """EAGLE's and SGLang's. Which hidden states are read is said where it is not the default, once in SGLang's way and once in vLLM's."""
    if config.qk_norm:
        raise DraftError(
            f"form={EAGLE3!r} has no place for the norms on queries and keys that this head has: write {SPECULATORS!r}."
        )
    values = {"architectures": ["LlamaForCausalLMEagle3"]} | _layer(config, dtype, target)
    values["draft_vocab_size"] = config.draft_vocab_size
    values |= {name: True for name in FLAGS if config.to_dict()[name]}
    if config.bias:
        values["bias"] = True
    if config.target_hidden_size != config.hidden_size:
        values["target_hidden_size"] = config.target_hidden_size
    reads = list(config.reads)
    if config.target_layers is None or tuple(reads) != default_reads(config.target_layers):
        if min(reads) < 1:
            raise DraftError(
                f"form={EAGLE3!r} cannot say that hidden state {min(reads)} is read: write {SPECULATORS!r}."
            )
        values["eagle_config"] = {IDS: [i - 1 for i in reads], "use_aux_hidden_state": True}
        values[IDS] = reads
    return values


def _speculators(config: Eagle3Config, dtype: torch.dtype, target: PretrainedConfig | None) -> dict[str, Any]:
    verifier: dict[str, Any] = {"name_or_path": None, "architectures": []}
    if target is not None:
        verifier = {"name_or_path": model_name(target) or None, "architectures": target.architectures or []}
    narrow = config.target_hidden_size == config.hidden_size
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        **{name: config.to_dict()[name] for name in FLAGS},
        IDS: list(config.reads),
        "embed_requires_grad": False,
        "target_hidden_size": None if narrow else config.target_hidden_size,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": PROPOSED}],
            "verifier": verifier,
        },
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformer_layer_config": _layer(config, dtype, target),
    }


def _hydra(config: HydraConfig, target: PretrainedConfig | None) -> dict[str, Any]:
    return {
        "base_model_name_or_path": "" if target is None else model_name(target),
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hydra_head_arch": "prefix-mlp" if config.prefix else "mlp",
        "hydra_num_heads": config.num_heads,
        "hydra_num_layers": config.num_blocks,
    }
