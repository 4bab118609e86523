"""What the loop does not take, refused before any work: each error names the value seen and the way out."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .._compat.adapters import adds_virtual_tokens, base_of
from .._compat.assistants import is_dflash, lives_in_target
from .._compat.caches import CACHE, counts_tokens, held_rows, held_tokens, other_state
from .._compat.generation import (
    SAMPLING_MODES,
    VECTORS,
    GenerationMode,
    asks_mtp,
    early_exit_of,
    hidden_tokens,
    is_sharded,
    known_continuation,
    own_loop,
)
from .._compat.models import drops_cache
from .._compat.recurrent import has_recurrent_state, is_recurrent, keeps_state_in_cache
from .._compat.rollback import forgets, rollback_obstacle
from ..commit.base import Draft
from ..config.adapters import AUTO, MOST_ADAPTERS
from ..errors import ConfigError, DraftError, UnsupportedError, brief
from ..heads.assistants import check_assistant
from ..heads.base import Head
from ..heads.dflash import DFlashHead
from ..heads.mtp import MtpHead
from ..models.encoders import SourceInputs, check_source, states_width
from ..models.placeholders import has_unnamed_pictures
from ..models.retokenizing import Retokenizer
from ..models.tokenizer_pair import retokenizer_of
from .inputs import given

PICTURES = (
    "mm_encoder_outputs",
    "pixel_values",
    "image_pixel_values",
    "flattened_patches",
    "input_features",
    "audio_input_features",
    "input_values",
    VECTORS,
)  # and how the names of their like begin


def check_mode(generation_config: GenerationConfig, mode: GenerationMode) -> None:
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
    tokenizer: object = None,
    assistant_tokenizer: object = None,
    exit_layers: int | None = None,
    mtp: bool = False,
) -> None:
    """Refuses, before any work, what the loop does not take. Each error names the value and the way out.

    Args:
        draft: the model that drafts; None: the suffix memory drafts alone.
        tokenizer, assistant_tokenizer: of target and draft, where `generate` was given them.
        exit_layers: of the target's own layers how many draft, as `assistant_early_exit` may say too; None: none do.
        mtp: whether the target's MTP layers draft, as `use_mtp` may say too; an MTP head as `draft` says it.
    """
    # It asks only whether there is one.
    check_mode(generation_config, generation_config.get_generation_mode(draft))  # type: ignore[arg-type]
    check_target(target)
    name, config = type(target).__name__, generation_config
    if adds_virtual_tokens(target):
        raise UnsupportedError(
            f"The target {name} runs with prompt learning, whose virtual tokens are not supported yet. "
            "Call generate without onlinespec."
        )
    if draft is not None:
        check_draft(target, draft, tokenizer, assistant_tokenizer)
    if config.guidance_scale not in (None, 1, 1.0):
        raise UnsupportedError(
            f"guidance_scale={config.guidance_scale}: classifier-free guidance is not supported yet. Leave it out."
        )
    weight = vars(config).get("assistant_ensemble_weight")
    if weight is not None:
        raise UnsupportedError(
            f"assistant_ensemble_weight={weight}: it would let the draft change what the model says. Leave it out."
        )
    head = base_of(draft) if isinstance(draft, PeftModel) else draft
    blocks = isinstance(head, DFlashHead) or (isinstance(head, PreTrainedModel) and is_dflash(head.config))
    drafting = {
        "assistant_early_exit": exit_layers,
        "use_mtp": mtp or isinstance(head, MtpHead),
        "speculation_type": "dflash" if blocks else None,
    }
    for other in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type"):
        value = vars(config).get(other)
        if value and value != drafting.get(other):
            raise UnsupportedError(
                f"{other}={value}: another source of drafts beside the learning one. Use one of the two."
            )
    for output in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and vars(config).get(output):
            way = "Run a forward on the result instead."
            if target.main_input_name == "input_features" and output == "output_attentions":
                way = (
                    'It is what the times of words and tokens are found by (return_timestamps="word", return_token_timestamps): attach the '
                    "draft, hf_onlinespec.attach(model, draft), and such calls run without it."
                )
            raise UnsupportedError(f"{output}=True is not supported with a learning draft. {way}")


def check_draft(
    target: PreTrainedModel,
    draft: PreTrainedModel | PeftModel,
    tokenizer: object = None,
    assistant_tokenizer: object = None,
) -> None:
    """Refuses a model that has no token in common with the target or reads another source, and a head of another target, whose embedding it
    shares from here on.

    Args:
        tokenizer, assistant_tokenizer: as `generate` takes them; None: not given.

    Raises:
        DraftError: names what differs.
    """
    head = base_of(draft) if isinstance(draft, PeftModel) else draft
    if isinstance(head, Head):
        head.share(target)
    elif lives_in_target(head):
        if isinstance(draft, PeftModel):
            raise DraftError(
                f"The draft is a PeftModel around {type(head).__name__}, which is made into a head for its target. Merge the adapter "
                "into it (merge_and_unload), or pass the model itself."
            )
        check_assistant(head, target)
    else:
        _check_source(target, head)
        if (
            retokenizer_of(target, draft, tokenizer, assistant_tokenizer) is not None
            and SourceInputs.of(head) is not None
        ):
            raise DraftError(
                f"The draft {type(head).__name__} has another tokenizer than the target {type(target).__name__} and reads a source beside the "
                "text: the source's tokens are the target's. Use one with its tokenizer, or a causal language model."
            )


def retokenizer_for(
    target: PreTrainedModel, draft: Draft, tokenizer: object = None, assistant_tokenizer: object = None
) -> Retokenizer | None:
    """What a draft with another tokenizer reads and says, see `retokenizer_of`; None: it has the target's, as memories, heads and its own layers do."""
    if draft.model is None or draft.reads or draft.exit_layers is not None:
        return None
    return retokenizer_of(target, draft.model, tokenizer, assistant_tokenizer)


def _check_source(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Refuses a draft that reads a source where the target has none, or encoder outputs of another width. Raises DraftError."""
    name, inputs = type(draft).__name__, SourceInputs.of(draft)
    if inputs is None:
        return
    if inputs.encodes is not None and not target.config.is_encoder_decoder:
        raise DraftError(
            f"The draft {name} is an encoder–decoder and reads a source, which the target {type(target).__name__} does not have. "
            "Use a causal language model as draft."
        )
    if inputs.encodes is None and target.config.is_encoder_decoder and states_width(draft) != states_width(target):
        raise DraftError(
            f"The draft {name} reads encoder outputs of {states_width(draft)} numbers, and those of the target {type(target).__name__} have "
            f"{states_width(target)}. Use a draft that was made for this encoder, or one with an encoder of its own."
        )


def check_adapters(draft: Draft, names: tuple[str | None, ...], learns: bool) -> tuple[str | None, ...]:
    """The names of the adapters of all rows, as they were given: each one is there, or learning makes it.

    Raises:
        ConfigError: the draft has no named adapters, or a call that learns nothing asks for one that does not exist.
    """
    if not any(names):
        return names
    if draft.adapters is None:
        raise ConfigError(
            f"adapter={brief(next(filter(None, names)))}: this {type(draft).__name__} has no adapters with names. Pass a draft model as "
            "assistant_model, or leave adapter out."
        )
    unknown = sorted({name for name in names if name} - {AUTO, *draft.adapters})
    if unknown and not learns:
        raise ConfigError(
            f"adapter={brief(unknown[0])}: this draft has no such adapter, and onlinespec=False makes none. There are: "
            f"{', '.join(sorted(draft.adapters)) or 'none'}."
        )
    if len(draft.adapters) + len(unknown) > MOST_ADAPTERS:
        raise ConfigError(
            f"adapter={brief(unknown[0])}: this draft has {len(draft.adapters)} adapters with names, and may have {MOST_ADAPTERS}."
        )
    return names


def check_target(target: PreTrainedModel) -> None:
    """Refuses targets that the loop can never serve."""
    name = type(target).__name__
    if is_recurrent(target) and not keeps_state_in_cache(target):
        raise UnsupportedError(
            f"The target {name} keeps a recurrent state outside of a transformers Cache, where it cannot be put back. Call generate "
            "without onlinespec."
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


def check_synced_gpus(
    synced_gpus: bool,
    target: PreTrainedModel,
    draft: PreTrainedModel | PeftModel | None,
    generation_config: GenerationConfig,
) -> None:
    """Refuses what would run a forward of a target that several processes hold in one of them alone, see lockstep.py.

    Args:
        draft: the model that drafts; None: there is none.
    """
    if not synced_gpus:
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise UnsupportedError("synced_gpus=True: there is but one process. Leave it out, or start several.")
    if target.training:
        raise UnsupportedError(
            f"synced_gpus=True with the target {type(target).__name__} in training mode: it may be random, and would have to be tried by "
            "all processes together. Call model.eval() first."
        )
    if draft is None and asks_mtp(generation_config):
        raise UnsupportedError(
            "synced_gpus=True with use_mtp=True: the MTP layers read with the target's embedding, of which under DeepSpeed ZeRO-3 or FSDP "
            "each process holds a part. Draft with a small model, or without one (onlinespec=True)."
        )
    if draft is None and early_exit_of(generation_config) is not None:
        raise UnsupportedError(
            f"synced_gpus=True with assistant_early_exit={early_exit_of(generation_config)}: under DeepSpeed ZeRO-3 or FSDP each process "
            "holds a part of the layers. Draft with a small model, or without one (onlinespec=True)."
        )
    base = base_of(draft) if isinstance(draft, PeftModel) else draft
    if isinstance(base, Head):
        raise UnsupportedError(
            f"synced_gpus=True with the draft head {type(base).__name__}, which reads with the target's own embedding: under DeepSpeed "
            "ZeRO-3 or FSDP each process holds a part of it. Draft with a small model, or without one (onlinespec=True)."
        )
    if base is not None and is_sharded(base):
        raise UnsupportedError(
            f"synced_gpus=True with the draft {type(base).__name__}, of which each process holds a part: how often it runs depends on "
            "the text. Load the draft outside of ZeRO-3 and FSDP, whole in every process."
        )
    if generation_config.prefill_chunk_size:
        raise UnsupportedError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} with synced_gpus=True: longer prompts would take more forwards "
            "than shorter ones in other processes. Leave it out."
        )


def check_attached_synced(synced_gpus: bool) -> None:
    """Refuses what is attached where several processes hold the target."""
    if synced_gpus:
        raise UnsupportedError(
            "synced_gpus=True: under DeepSpeed ZeRO-3 or FSDP all processes have to decode alike, and what is attached decides that in "
            "each of them. Pass assistant_model= or onlinespec= in the call, in all processes."
        )


def check_prompt(target: PreTrainedModel, prompt: object) -> None:
    """Refuses what is no batch of tokens, where `generate` would fail on it without a word about the reason.

    Args:
        prompt: the inputs of a call of `generate`, if any were given.

    Raises:
        ConfigError: it is a list, such as prompts of different lengths, or one row without its batch.
        UnsupportedError: an encoder is given nothing, or more than it has positions for.
    """
    if target.main_input_name != "input_ids" or prompt is None:
        return
    if not isinstance(prompt, Tensor):
        raise ConfigError(
            f"The prompts are given as a {type(prompt).__name__}: generate takes a tensor of tokens (batch, length). Prompts of different "
            'lengths are padded on the left: tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").'
        )
    if prompt.dim() < 2:
        raise ConfigError(
            f"The prompt has the shape {tuple(prompt.shape)}: generate takes tokens (batch, length). Pass prompt[None] for one row."
        )
    if target.config.is_encoder_decoder:
        check_source(target, prompt)


def check_inputs(
    target: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Refuses inputs that the loop does not take."""
    name = type(target).__name__
    states = model_kwargs.get("encoder_outputs")
    if target.config.is_encoder_decoder and states is not None and states[0].shape[1] == 0:
        raise UnsupportedError(
            f"The encoder of the target {name} was given nothing to read: its source has length 0. Pass text or speech."
        )
    for key in ("input_features", "input_values"):
        sound = model_kwargs.get(key)
        if isinstance(sound, Tensor) and sound.numel() == 0:
            raise UnsupportedError(
                f"{key} of shape {tuple(sound.shape)}: a sound of no length, which the target {name} cannot read. Leave it out."
            )
    if drops_cache(target):
        raise UnsupportedError(
            f"The target {name} is in training mode with gradient checkpointing, under which transformers drops the KV cache. "
            "Call model.eval() first, or switch gradient checkpointing off."
        )
    if input_ids.shape[0] == 0:
        raise UnsupportedError("The batch is empty: there is nothing to generate. Pass at least one prompt.")
    vectors = model_kwargs.get(VECTORS)
    if vectors is not None and not target.config.is_encoder_decoder and vectors.shape[1] != input_ids.shape[1]:
        raise UnsupportedError(
            f"{VECTORS} of {vectors.shape[1]} places with {input_ids.shape[1]} tokens: the draft reads tokens. Pass input_ids with one "
            "for each of them, or alone."
        )
    if input_ids.shape[1] == 0:
        raise UnsupportedError(
            "The prompts have no tokens: nothing is there to go on from. Pass one at least, such as the one that begins a text."
        )
    cache = model_kwargs.get(CACHE)
    if not model_kwargs.get("use_cache", True):
        raise UnsupportedError(
            f"use_cache=False ({_source_of_use_cache(target)}): a round is rolled back in the KV cache."
        )
    if cache is None:
        raise UnsupportedError(
            f"The target {name} keeps a state of its own instead of a transformers Cache, which cannot be rolled back. "
            "Call generate without onlinespec."
        )
    state = other_state(model_kwargs)
    if state:
        raise UnsupportedError(
            f"The target {name} keeps {state} beside its KV cache, a state of its own that cannot be rolled back. Call generate without "
            "onlinespec."
        )
    obstacle = rollback_obstacle(cache)
    if obstacle:
        asked = generation_config.cache_implementation
        said = CACHE if asked is None else f"cache_implementation={asked!r}"
        raise UnsupportedError(f"{said}: the target {name} {obstacle}. Leave it out: the default cache can be.")
    size = generation_config.prefill_chunk_size
    pictures = sorted(key for key in given(model_kwargs) if key.startswith(PICTURES))
    if size and pictures and input_ids.shape[1] > size:
        raise UnsupportedError(
            f"prefill_chunk_size={size}: {', '.join(pictures)} cannot be read in pieces. Leave prefill_chunk_size out."
        )
    if not counts_tokens(cache) and has_recurrent_state(cache):
        raise UnsupportedError(
            f"{CACHE}: the target {name} has a cache that does not tell how many tokens it holds. Leave it out, and pass all tokens."
        )
    # A cache may hold the whole prompt. Its last token is read again then.
    held = held_tokens(cache)
    rows = held_rows(cache)
    if rows is not None and rows != input_ids.shape[0]:
        raise UnsupportedError(
            f"{CACHE} holds {held} tokens of {rows} rows, and {input_ids.shape[0]} are to be generated (batch size times "
            "num_return_sequences). Pass a cache of the same rows, or leave it out."
        )
    surplus = held + 1 - input_ids.shape[1] - hidden_tokens(input_ids, generation_config, model_kwargs)
    if surplus > 1 and has_unnamed_pictures(target.config):
        raise UnsupportedError(
            f"{CACHE} holds {held} places for {input_ids.shape[1]} tokens, those of a picture among them, which no token stands for: the "
            f"target {name} cannot go on in it, with a draft or without one. Pass the picture and the whole text without it."
        )
    lost = forgets(cache, surplus) if surplus > 0 else ""
    if lost:
        raise UnsupportedError(
            f"{CACHE} holds {held} tokens, and {surplus} of them cannot be taken back: {lost}. Pass a cache of the earlier tokens alone."
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
