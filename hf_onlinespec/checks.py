"""What the loop does not take, refused before any work: each error names the value seen and the way out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraModel, PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ._compat import (
    CACHE,
    SAMPLING_MODES,
    LoraLayer,
    adds_virtual_tokens,
    drops_cache,
    forgets,
    held_tokens,
    is_offloaded,
    is_stateful,
    known_continuation,
    mask_length,
    own_loop,
    rollback_obstacle,
    rolls_back,
    takes_cache,
    uncompiled,
)
from .errors import DraftError, UnsupportedError, brief
from .tree import copy_modules
from .vocabulary import check_vocabularies

PICTURES = (
    "mm_encoder_outputs",
    "pixel_values",
    "input_features",
    "input_values",
)  # and how the names of their like begin


def check_mode(generation_config: GenerationConfig, mode: Any) -> None:
    """Refuses every way of decoding but greedy and sampling."""
    if generation_config.num_beams not in (None, 1):
        raise UnsupportedError(
            f"num_beams={generation_config.num_beams}: a learning draft serves greedy decoding and sampling. Use num_beams=1."
        )
    if mode not in SAMPLING_MODES:
        raise UnsupportedError(f"Generation mode {mode}: a learning draft serves greedy decoding and sampling only.")


def check_call(
    target: PreTrainedModel,
    draft: PreTrainedModel | PeftModel | None,
    generation_config: GenerationConfig,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
) -> None:
    """Refuses, before any work, what the loop does not take. Each error names the value and the way out.

    Args:
        draft: the model that drafts; None: the suffix memory drafts alone.
        tokenizer, assistant_tokenizer: of target and draft, where `generate` was given them.
    """
    check_mode(generation_config, generation_config.get_generation_mode(draft))
    check_target(target)
    name, config = type(target).__name__, generation_config
    if drops_cache(target):
        raise UnsupportedError(
            f"The target {name} is in training mode with gradient checkpointing, under which transformers drops the KV cache. "
            "Call model.eval() first, or switch gradient checkpointing off."
        )
    if adds_virtual_tokens(target):
        raise UnsupportedError(
            f"The target {name} runs with prompt learning, whose virtual tokens are not supported yet. "
            "Call generate without onlinespec."
        )
    if draft is not None:
        check_vocabularies(target, draft, tokenizer, assistant_tokenizer)
    if config.num_return_sequences not in (None, 1):
        raise UnsupportedError(
            f"num_return_sequences={config.num_return_sequences}: not supported yet. Call generate once per sequence."
        )
    if config.guidance_scale not in (None, 1, 1.0):
        raise UnsupportedError(
            f"guidance_scale={config.guidance_scale}: classifier-free guidance is not supported yet. Leave it out."
        )
    weight = vars(config).get("assistant_ensemble_weight")
    if weight is not None:
        raise UnsupportedError(
            f"assistant_ensemble_weight={weight}: it would let the draft change what the model says. Leave it out."
        )
    for other in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type"):
        value = vars(config).get(other)
        if value:
            raise UnsupportedError(
                f"{other}={value}: another source of drafts beside the learning one. Use one of the two."
            )
    for output in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and vars(config).get(output):
            raise UnsupportedError(
                f"{output}=True is not supported with a learning draft. Run a forward on the result instead."
            )


def check_target(target: PreTrainedModel) -> None:
    """Refuses targets that the loop can never serve."""
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise UnsupportedError(
            f"The target {name} is an encoder–decoder, which is not supported yet. Call generate without onlinespec."
        )
    if is_stateful(target):
        raise UnsupportedError(
            f"The target {name} keeps a recurrent state that cannot be rolled back. Call generate without onlinespec."
        )
    if not known_continuation(target):
        raise UnsupportedError(
            f"The target {name} carries a state of its own from token to token (_update_model_kwargs_for_generation), which a "
            "forward over several tokens does not give. Call generate without onlinespec."
        )
    own = own_loop(target)
    if own:
        raise UnsupportedError(
            f"The target {name} decodes in a way of its own ({own}), which our loop would replace. "
            "Call generate without onlinespec."
        )


def check_synced_gpus(synced_gpus: bool) -> None:
    """Refuses one model in several processes: each would have to run as many forwards as the longest of them."""
    if synced_gpus:
        raise UnsupportedError(
            "synced_gpus=True: under DeepSpeed ZeRO-3 or FSDP all processes have to run equally many forwards, and how many a "
            "learning draft needs depends on its text. Call generate without onlinespec."
        )


def check_inputs(
    target: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Refuses inputs that the loop does not take."""
    if input_ids.shape[0] != 1:
        raise UnsupportedError(
            f"A batch of {input_ids.shape[0]} sequences is not supported yet. Call generate once per sequence."
        )
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError("inputs_embeds are not supported: the draft needs tokens. Pass input_ids alone.")
    cache = model_kwargs.get(CACHE)
    name = type(target).__name__
    if not model_kwargs.get("use_cache", True):
        raise UnsupportedError(
            f"use_cache=False ({_source_of_use_cache(target)}): a round is rolled back in the KV cache."
        )
    if cache is None:
        raise UnsupportedError(
            f"The target {name} keeps a state of its own instead of a transformers Cache, which cannot be rolled back. "
            "Call generate without onlinespec."
        )
    obstacle = rollback_obstacle(cache)
    if obstacle:
        asked = generation_config.cache_implementation
        said = CACHE if asked is None else f"cache_implementation={asked!r}"
        raise UnsupportedError(f"{said}: the target {name} {obstacle}. Leave it out: the default cache can be.")
    size = generation_config.prefill_chunk_size
    pictures = [key for key, value in model_kwargs.items() if key.startswith(PICTURES) and value is not None]
    if size and pictures and input_ids.shape[1] > size:
        raise UnsupportedError(
            f"prefill_chunk_size={size}: {', '.join(pictures)} cannot be read in pieces. Leave prefill_chunk_size out."
        )
    # A cache may hold the whole prompt. Its last token is read again then.
    held = held_tokens(cache)
    mask = model_kwargs.get("attention_mask")
    covered = mask_length(generation_config) if mask is None else mask.shape[1]
    surplus = held + 1 - (input_ids.shape[1] if covered == input_ids.shape[1] else held + input_ids.shape[1])
    if surplus > 0 and forgets(cache, surplus):
        raise UnsupportedError(
            f"{CACHE} holds {held} tokens, and {surplus} of them cannot be taken back: its sliding window has dropped "
            "what came before. Pass a cache of the earlier tokens alone."
        )


def _source_of_use_cache(target: PreTrainedModel) -> str:
    """Where use_cache=False came from, and the way out."""
    if target.generation_config is not None and target.generation_config.use_cache is False:
        return (
            "from the model's generation_config, as it was saved. Pass use_cache=True, or set "
            "model.generation_config.use_cache = True"
        )
    if vars(target.config.get_text_config(decoder=True)).get("use_cache") is False:
        return "from the model's configuration, as it was saved. Pass use_cache=True"
    return "from this call. Use use_cache=True"


def no_model(model: Any) -> DraftError:
    """What is raised where something else was given as a draft."""
    if isinstance(model, str | Path):
        load = f"OnlineDraft.from_pretrained({str(model)!r})"
        return DraftError(
            f"{brief(str(model))} is a name: expected a loaded model as draft. {load} loads one; pass what it returns."
        )
    return DraftError(
        f"assistant_model is a {type(model).__name__}: expected a transformers model, a PeftModel or an OnlineDraft."
    )


def plain_draft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model to adapt; refuses what cannot draft."""
    if isinstance(model, nn.Module):
        model = uncompiled(model)
    if isinstance(model, PeftModel):
        model = _merged(model)
    if not isinstance(model, PreTrainedModel):
        raise no_model(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise DraftError(
            f"The draft {name} is an encoder–decoder, which is not supported yet. Use a causal language model."
        )
    if is_stateful(model):
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
    name, cache = type(model).__name__, DynamicCache(config=model.config)
    tokens = torch.ones(1, 3, dtype=torch.long, device=model.device)
    try:
        for part in (tokens[:, :1], tokens[:, 1:]):
            model(input_ids=part, **{CACHE: cache}, use_cache=True)
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
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        # Merged while tied, the two adapters would be added to one matrix.
        inner = head.get_base_layer() if isinstance(head, LoraLayer) else head
        inner.weight = nn.Parameter(inner.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()
