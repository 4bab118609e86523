"""Two vocabularies: how many token ids each model has, which of them are common, and whether these are the same tokens.

Models of one tokenizer may differ in size, because an embedding is padded to a multiple of some number (Qwen2.5: 151,936 and
152,064 ids) or because a few tokens were added. The ids below the smaller size are common. The draft proposes these alone: its distribution q
is 0 on all others, so that speculative sampling stays exact. It learns the target's distribution restricted to them and normalised
again. Where a text has a token that the draft cannot read, it reads another one in its place (`Vocabulary.readable`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .._compat.adapters import LoraLayer, base_of
from .._compat.models import unpadded_size
from .encoders import writing_embedding

# Without tokenizers, sizes that differ by more are taken for those of two tokenizers. Chosen, with room: the models of one
# family differ by its padding (128 ids in Qwen2.5) and by tokens that were added.
MAX_PADDING = 1024


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of one model, from 0 on, as its modules have them: a configuration may say something else."""

    said: int  # ids that its head has a logit for
    read: int  # ids that its embedding has a row for
    source: str  # where the smaller number comes from
    replacement: int = 0  # the id that is read in the place of one that is not among `size`

    @property
    def size(self) -> int:
        """Ids that are both read and said."""
        return min(self.said, self.read)

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel | PretrainedConfig) -> Vocabulary:
        """That of a model, or the one that a configuration promises."""
        if isinstance(model, PeftModel):
            model = base_of(model)
        config = model if isinstance(model, PretrainedConfig) else model.config
        text = config.get_text_config(decoder=True)
        stated = int(text.vocab_size)
        said, read, source = unpadded_size(text) or stated, stated, "config.vocab_size"
        if isinstance(model, PreTrainedModel):
            try:
                head, embedding = rows(model.get_output_embeddings()), rows(writing_embedding(model))
            except (NotImplementedError, AttributeError):  # transformers does not find them in this class
                head = embedding = None
            read = read if embedding is None else embedding
            said = said if head is None else min(head, unpadded_size(text) or head)
            if min(said, read) != stated:
                source = f"the rows of its {'head' if said <= read else 'embedding'}; config.vocab_size={stated}"
        return cls(said, read, source, _end(vars(text).get("eos_token_id"), min(said, read)))

    def readable(self, tokens: Tensor) -> Tensor:
        """`tokens` with `replacement` in the place of those that the model cannot both read and say."""
        return torch.where(tokens < self.size, tokens, self.replacement)


def rows(layer: nn.Module | None) -> int | None:
    """Ids of an embedding or a head; None: it is neither, or hides its size."""
    if isinstance(layer, LoraLayer):
        layer = layer.get_base_layer()
    weight = None if layer is None else dict(layer.named_parameters(recurse=False)).get("weight")
    # Quantised weights are packed, partitioned ones empty: there the layer says what it was made for.
    if type(weight) is nn.Parameter and weight.dim() == 2 and isinstance(layer, nn.Linear | nn.Embedding):
        return weight.shape[0]
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.num_embeddings if isinstance(layer, nn.Embedding) else None


def _end(eos: int | list[int] | None, size: int) -> int:
    """The end of a text stands where an unknown token is read (chosen): what is unknown is mostly a mark between two parts."""
    ends = [eos] if isinstance(eos, int) else eos or []
    return next((token for token in ends if 0 <= token < size), 0)


def widened(scores: Tensor, size: int, value: float) -> Tensor:
    """`scores` (..., V) over at least `size` ids, with `value` at those behind the V."""
    missing = size - scores.shape[-1]
    return F.pad(scores, (0, missing), value=value) if missing > 0 else scores
