"""The language model that a draft is made from: an adapter merged, and what cannot draft refused."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraModel, PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._compat.adapters import LoraLayer, base_of
from .._compat.assistants import lives_in_target
from .._compat.caches import CACHE, rolls_back
from .._compat.models import is_offloaded, takes_cache, uncompiled, weight_of
from .._compat.recurrent import is_recurrent
from ..errors import DraftError, brief
from .borrow import copy_modules
from .encoders import inputs_without_source, new_cache


def no_model(model: object) -> DraftError:
    """What is raised where something else was given as a draft."""
    if isinstance(model, str | Path):
        load = f"OnlineDraft.from_pretrained({str(model)!r})"
        return DraftError(
            f"{brief(str(model))} is a name: expected a loaded model as draft. {load} loads one; pass what it returns."
        )
    return DraftError(
        f"assistant_model is a {type(model).__name__}: expected a transformers model, a PeftModel or an OnlineDraft."
    )


def check_drafts_alone(model: PreTrainedModel) -> None:
    """Refuses transformers' drafts that read the inside of their target (Gemma-4 assistants, DFlash) where no target is at hand."""
    reads = lives_in_target(model)
    if reads:
        raise DraftError(
            f"The draft {type(model).__name__} reads {reads}, and no target is given. Pass it to generate, as assistant_model= with "
            "onlinespec=True, to attach(target, draft), or its name to OnlineDraft.from_pretrained(NAME, target=target)."
        )


def plain_draft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The language model to adapt, causal or encoder–decoder; refuses what cannot draft."""
    if isinstance(model, nn.Module):
        model = uncompiled(model)
    if isinstance(model, PeftModel):
        model = _merged(model)
    if not isinstance(model, PreTrainedModel):
        raise no_model(model)
    check_drafts_alone(model)
    name = type(model).__name__
    if is_recurrent(model):
        raise DraftError(
            f"The draft {name} keeps a recurrent state that cannot be rolled back. Use an attention-only draft."
        )
    if not rolls_back(model.config):
        raise DraftError(f"The draft {name} keeps more than keys and values in its cache. Use an attention-only draft.")
    if not takes_cache(model):
        raise DraftError(f"The draft {name} takes no {CACHE}: without a KV cache it cannot draft. Use another one.")
    _check_place(model)
    if model.get_output_embeddings() is None:
        raise DraftError(f"The draft {name} has no language-modelling head. Load it with AutoModelForCausalLM.")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise DraftError(
            f"The draft {name} carries adapters from add_adapter(). Pass it as a PeftModel, or merge them first."
        )
    return model


def _check_place(model: PreTrainedModel) -> None:
    """Refuses a draft whose weights are not all on one device."""
    name = type(model).__name__
    if is_offloaded(model):
        raise DraftError(
            f"The draft {name} is offloaded by accelerate, and learning has to hold its weights. "
            "Load it onto one device, with device_map={'': 0} or without device_map."
        )
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if "meta" in devices:
        raise DraftError(
            f"The draft {name} has weights on the device 'meta', which holds no numbers. Load its weights."
        )
    if len(devices) > 1:
        raise DraftError(
            f"The draft {name} is spread over {', '.join(devices)}: a draft has to fit on one device. "
            "Load it with device_map={'': 0}, or use a smaller one."
        )


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Refuses a draft that does not draft from a KV cache, tried on three tokens."""
    name, cache = type(model).__name__, new_cache(model)
    tokens = torch.ones(1, 3, dtype=torch.long, device=model.device)
    try:
        for part in (tokens[:, :1], tokens[:, 1:]):
            model(**inputs_without_source(model, part), **{CACHE: cache}, use_cache=True)
    except torch.OutOfMemoryError as error:
        raise DraftError(
            f"There is too little memory for the draft {name} beside the target ({error}). Free some, or use a smaller draft."
        ) from error
    except Exception as error:  # whatever a forward may raise here, it would raise at every request
        raise DraftError(
            f"The draft {name} cannot read two tokens behind its KV cache: {type(error).__name__}: {error}. "
            "Use another draft."
        ) from error
    if cache.get_seq_length() != 3:
        raise DraftError(
            f"The draft {name} has {cache.get_seq_length()} entries in its KV cache after 3 tokens. "
            "Use a draft that keeps one for every token."
        )


def _merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the model with its adapter merged into the weights."""
    if not isinstance(model.base_model, LoraModel):
        raise DraftError(
            f"The draft's {model.peft_type} adapter cannot be merged. Use a LoRA adapter, or merge it yourself."
        )
    # Weights of its own, because merging writes into them.
    model = copy_modules(model, {id(parameter): copy.deepcopy(parameter) for parameter in model.parameters()})
    base = base_of(model)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is embedding.weight:
        # Merged while tied, the two adapters would be added to one matrix.
        inner = head.get_base_layer() if isinstance(head, LoraLayer) else head
        inner.weight = nn.Parameter(weight_of(inner).detach().clone())
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()
