"""Random heads for tiny targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.config import Eagle1Config, Eagle3Config, HydraConfig
from hf_onlinespec.heads.eagle1 import Eagle1Head
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.hydra import HydraHead


def _layer(target: PreTrainedModel) -> dict[str, Any]:
    config = target.config.get_text_config(decoder=True)
    width = config.hidden_size
    return dict(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=config.vocab_size, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip


def tiny_eagle3(
    target: PreTrainedModel,
    ids: Sequence[int] | None = None,
    reads: Sequence[int] = (1, 0, -1),
    seed: int = 3,
    **settings: Any,
) -> Eagle3Head:
    """An EAGLE-3 head for a target; ids: the tokens that it can say, None: all."""
    torch.manual_seed(seed)
    known = None if ids is None else torch.tensor(sorted(ids))
    size = None if known is None else len(known)
    config = Eagle3Config(**(_layer(target) | dict(reads=tuple(reads), draft_vocab_size=size) | settings))
    return Eagle3Head(config, known).eval()


def tiny_head(kind: str, target: PreTrainedModel, seed: int = 3) -> Head:
    """A head of a kind: "EAGLE-3" says every second token."""
    if kind == "EAGLE-3":
        return tiny_eagle3(target, range(0, target.config.get_text_config(decoder=True).vocab_size, 2), seed=seed)
    torch.manual_seed(seed)
    if kind == "EAGLE-1":
        # Its layer has no norm in front: wide weights would make rounding grow from step to step.
        return Eagle1Head(Eagle1Config(**_layer(target) | dict(initializer_range=0.1))).eval()
    return HydraHead(HydraConfig(**_layer(target), num_heads=3, prefix=kind == "Hydra prefix-mlp")).eval()


KINDS = ("EAGLE-3", "EAGLE-1", "Hydra mlp", "Hydra prefix-mlp")
