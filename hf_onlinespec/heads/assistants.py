"""transformers' drafts that read the inside of their target, made into draft heads for one target."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._compat.assistants import is_dflash, is_gemma_assistant, read_layers, shared_layers
from .._compat.attention import take_boolean_masks
from .._compat.models import max_positions
from ..errors import DraftError
from ..models.borrow import copy_modules
from ..models.vocabulary import Vocabulary, rows
from .base import Head
from .config import DFlashConfig, GemmaAssistantConfig
from .dflash import DFlashHead
from .gemma_assistant import GemmaAssistantHead

INSTEAD = "Draft with a small model, a draft head, or without one (onlinespec=True)."


def check_assistant(model: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raises DraftError where a Gemma-4 assistant or a DFlash draft is not one for this target; it names what differs."""
    name, said = type(model).__name__, type(target).__name__
    if target.device.type != "meta" and model.device != target.device:
        raise DraftError(
            f"The draft {name} is on {model.device}, and the target {said}, with whose embedding it reads, on {target.device}. Move it there."
        )
    if is_gemma_assistant(model.config):
        held, read = shared_layers(target.config), read_layers(model)
        if not held:
            raise DraftError(
                f"The draft {name} reads keys and values of a Gemma 4 target, and the target {said} hands out none. {INSTEAD}"
            )
        odd = [kind for kind, part in read.items() if held.get(kind) != part]
        if odd:
            raise DraftError(
                f"The draft {name} reads {tuple(read[odd[0]])} heads and numbers of each in layers of {odd[0]!r}, and the target {said} has "
                f"{held.get(odd[0])}: it belongs to another target. {INSTEAD}"
            )
        return
    if not is_dflash(model.config):
        raise DraftError(
            f"The draft {name} reads hidden states of its target in a way that is not known: its configuration states no block_size, "
            f"mask_token_id and target_layer_ids, as DFlash's does. {INSTEAD}"
        )
    size, mask = rows(target.get_input_embeddings()), vars(model.config)["mask_token_id"]
    if size is not None and not 0 <= mask < size:
        raise DraftError(
            f"The draft {name} fills its blocks with the token {mask} (mask_token_id), and the embedding of the target {said} has {size} "
            f"tokens: it belongs to another target. {INSTEAD}"
        )
    if vars(model.config)["block_size"] < 2:
        raise DraftError(
            f"The draft {name} has block_size={vars(model.config)['block_size']}: it says no token. {INSTEAD}"
        )


def assistant_head(model: PreTrainedModel, target: PreTrainedModel) -> Head:
    """The head that a Gemma-4 assistant or a DFlash draft is for this target, over its weights; the model itself is not touched.

    Raises:
        DraftError: it is not one for this target.
    """
    check_assistant(model, target)
    own = copy_modules(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    head = _gemma(own, target) if is_gemma_assistant(model.config) else _dflash(own, target)
    head.config.name_or_path = model.config.name_or_path
    head.share(target)
    return head.eval()


def _of_target(target: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the target."""
    text = target.config.get_text_config(decoder=True)
    return {
        "vocab_size": Vocabulary.of(target).size,
        "target_hidden_size": text.hidden_size,
        "target_layers": text.num_hidden_layers,
        "max_position_embeddings": max_positions(target.config),
    }


def _gemma(assistant: Any, target: PreTrainedModel) -> GemmaAssistantHead:
    said, text = assistant.config, assistant.config.get_text_config()
    take_boolean_masks(assistant.model.config)
    assistant.model.embed_tokens = nn.Identity()
    if said.use_ordered_embeddings:  # only its rows are looked up: an adapter on it would never be asked
        size, width = assistant.lm_head.weight.shape
        table = nn.Embedding(size, width, device="meta")
        table.weight, assistant.lm_head = assistant.lm_head.weight, table
    read = read_layers(assistant)
    own = GemmaAssistantConfig(
        hidden_size=said.backbone_hidden_size,
        num_hidden_layers=len(read) + 1,
        num_attention_heads=text.num_attention_heads,
        shared={kind: list(part) for kind, part in read.items()},
        window=text.sliding_window,
        ordered=said.use_ordered_embeddings,
        **_of_target(target),
    )
    return GemmaAssistantHead(own, assistant)


def _dflash(model: Any, target: PreTrainedModel) -> DFlashHead:
    said = model.config
    take_boolean_masks(said)
    own = DFlashConfig(
        hidden_size=said.hidden_size,
        num_hidden_layers=said.num_hidden_layers,
        num_attention_heads=said.num_attention_heads,
        reads=[index + 1 for index in said.target_layer_ids],
        block_size=said.block_size,
        mask_token_id=said.mask_token_id,
        window=said.sliding_window,
        **_of_target(target),
    )
    return DFlashHead(own, model)
