"""How a model that reads a source beside its tokens is called: an encoder–decoder, or a decoder that is given encoder outputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from .._compat.models import max_source_positions, weight_of
from ..errors import UnsupportedError
from .source import Source


@dataclass(frozen=True)
class SourceInputs:
    """What the inputs of a model's forward are called."""

    tokens: str  # those that it writes
    states: str  # encoder outputs
    mask: str | None  # over them; None: it takes none
    wrapped: bool  # whether the outputs are handed over as a ModelOutput
    encodes: str | None  # what its own encoder reads; None: it has none

    @classmethod
    def of(cls, model: PreTrainedModel) -> SourceInputs | None:
        """Those of a model; None: it reads no source.

        A decoder reads one where its configuration says so with transformers' own `add_cross_attention`, or where its class is made for
        nothing else: the forward names `encoder_outputs` (WhisperForCausalLM).
        """
        names = inspect.signature(model.forward).parameters
        if model.config.is_encoder_decoder:
            mask = "attention_mask" if "attention_mask" in names else None
            return cls("decoder_input_ids", "encoder_outputs", mask, True, model.main_input_name)
        if "encoder_outputs" in names:
            return cls("input_ids", "encoder_outputs", None, True, None)
        if "encoder_hidden_states" in names and vars(model.config).get("add_cross_attention"):
            return cls("input_ids", "encoder_hidden_states", "encoder_attention_mask", False, None)
        return None

    def of_states(self, states: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Encoder outputs (rows, states, width), and their mask, as inputs."""
        outputs = BaseModelOutput(last_hidden_state=states)
        vars(outputs)["router_logits"] = (
            None  # which encoders of experts hand out (Switch, NLLB-MoE), and their decoders pass on
        )
        found: dict[str, Any] = {self.states: outputs if self.wrapped else states}
        return found if mask is None or self.mask is None else found | {self.mask: mask}


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The encoder of an encoder–decoder; None: it is none."""
    if not model.config.is_encoder_decoder:
        return None
    encoder: nn.Module = model.get_encoder()
    return None if encoder is model else encoder


def writing_embedding(model: PreTrainedModel) -> nn.Module:
    """The embedding of the tokens that a model writes: those of a source may have another one (Marian, FSMT)."""
    writes: nn.Module = model if encoder_of(model) is None else model.get_decoder()
    if isinstance(writes, PreTrainedModel):
        embedding: nn.Module = writes.get_input_embeddings()
        return embedding
    return writes.get_submodule("embed_tokens")  # FSMT's decoder is no model by itself


def check_source(target: PreTrainedModel, tokens: Tensor) -> None:
    """Whether the encoder of a target can read tokens (rows, n), said before it tries.

    Raises:
        UnsupportedError: there are none, or more than it has positions for.
    """
    encoder, longest = encoder_of(target), max_source_positions(target.config)
    if tokens.shape[-1] == 0:
        raise UnsupportedError(
            f"The encoder of the target {type(target).__name__} was given nothing to read: its source has length 0. Pass text or speech."
        )
    # Rotary positions and relative ones have no end, whatever a configuration states.
    positions = None if encoder is None else dict(encoder.named_children()).get("embed_positions")
    if isinstance(positions, nn.Embedding) and tokens.shape[-1] > longest:
        raise UnsupportedError(
            f"The source has {tokens.shape[-1]} tokens, and the encoder of the target {type(target).__name__} reads {longest}. Cut it: "
            "tokenizer(..., truncation=True, max_length=...)."
        )


def known_source_ids(model: PreTrainedModel) -> int:
    """Token ids that the encoder of an encoder–decoder has an embedding for."""
    encoder = encoder_of(model)
    assert encoder is not None
    embedding = encoder.get_input_embeddings() if isinstance(encoder, PreTrainedModel) else model.get_input_embeddings()
    return len(weight_of(embedding))


def readable_source(model: PreTrainedModel, source: Source) -> Source | None:
    """What the own encoder of a model can read of a source of one row; None: what was read is not known, or of another kind.

    Tokens beyond its positions are left out, and id 0 is read in the place of one that it has no embedding for.
    """
    encoder = encoder_of(model)
    if not isinstance(encoder, PreTrainedModel):
        return None
    if model.main_input_name != "input_ids":
        signal = source.signal
        return None if signal is None else Source(None, None, None, signal.to(model.dtype))
    if source.tokens is None:
        return None
    tokens = source.tokens[:, : max_source_positions(model.config)]
    known = known_source_ids(model)
    return Source(torch.where(tokens < known, tokens, 0), None, None)


def encoded(model: PreTrainedModel, source: Source, mask: Tensor | None) -> Tensor:
    """What the own encoder of a model makes of what it can read: (rows, states, width).

    Args:
        mask: (rows, source length) 0 at padding; None: no padding.
    """
    encoder = encoder_of(model)
    assert encoder is not None
    read = source.signal if source.tokens is None else source.tokens
    inputs = {str(model.main_input_name): read} | ({} if mask is None else {"attention_mask": mask})
    states: Tensor = encoder(**inputs)[0]
    return states


def inputs_without_source(model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
    """Inputs of a forward in which a model writes tokens (rows, n): a source of one row of zeros comes with them, if it reads any."""
    names = SourceInputs.of(model)
    if names is None:
        return {"input_ids": tokens}
    width = states_width(model)
    states = torch.zeros(len(tokens), 1, width, device=model.device, dtype=model.dtype)
    return {names.tokens: tokens} | names.of_states(states, None)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty KV cache; of a model that reads a source it holds what that gives once, beside what it writes."""
    if SourceInputs.of(model) is None:
        return DynamicCache(config=model.config)
    own = DynamicCache(config=model.get_decoder().config)  # T5 states another number of layers for the whole model
    return EncoderDecoderCache(own, DynamicCache())


def states_width(model: PreTrainedModel) -> int:
    """How many numbers the encoder outputs have that a model reads or, of an encoder–decoder, makes."""
    encoder = encoder_of(model)
    config = encoder.config if isinstance(encoder, PreTrainedModel) else model.config
    return int(config.hidden_size)


def nothing_read(model: PreTrainedModel) -> Source:
    """The source of a text that comes without one: a row of zeros in the place of encoder outputs."""
    states = torch.zeros(1, 1, states_width(model), device=model.device, dtype=model.dtype)
    return Source(None, None, states)
