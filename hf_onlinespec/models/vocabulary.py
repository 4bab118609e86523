"""Two vocabularies: how many token ids each model has, which of them are common, and whether these are the same tokens.

Models of one tokenizer may differ in size, because an embedding is padded to a multiple of some number (Qwen2.5: 151,936 and
152,064 ids) or because a few tokens were added. The ids below the smaller size are common. The draft proposes these alone: its distribution q
is 0 on all others, so that speculative sampling stays exact. It learns the target's distribution restricted to them and normalised
again. Where a text has a token that the draft cannot read, it reads another one in its place (`Vocabulary.readable`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.adapters import LoraLayer, base_of
from .._compat.models import commit_hash, model_name, unpadded_size
from ..errors import DraftError
from .encoders import encoder_of
from .identity import tokenizer_file

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
                writes = (
                    model if encoder_of(model) is None else model.get_decoder()
                )  # an encoder may have a vocabulary of its own
                head, embedding = rows(model.get_output_embeddings()), rows(writes.get_input_embeddings())
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


# Where the tokens of an id range can be looked up: a tokenizer, or the file of one.
VocabularySource: TypeAlias = PreTrainedTokenizerBase | Path


def check_vocabularies(
    target: PreTrainedModel | PretrainedConfig,
    draft: PreTrainedModel | PeftModel | PretrainedConfig,
    tokenizer: object = None,
    draft_tokenizer: object = None,
) -> None:
    """Refuses a draft with another tokenizer.

    Vocabularies of one size are taken for the same, unless both tokenizers are given. Of different sizes they have to
    agree at every id below the smaller size, as far as tokenizers are at hand: given, or in files beside the models. Without
    any, sizes may differ by `MAX_PADDING`.

    Args:
        tokenizer, draft_tokenizer: as `generate` takes them; None: not given.

    Raises:
        DraftError: names both sizes, where they come from, and what differs.
    """
    own, other = Vocabulary.of(target), Vocabulary.of(draft)
    given = [t if isinstance(t, PreTrainedTokenizerBase) else None for t in (tokenizer, draft_tokenizer)]
    if own.size == other.size and None in given:
        return
    sizes = (
        f"The target has {own.size} tokens in its vocabulary ({own.source}) and the draft {other.size} ({other.source})"
    )
    source, other_source = (t or _file(_config(model)) for t, model in zip(given, (target, draft), strict=True))
    compared = None
    if source is not None and other_source is not None:
        stamps = _stamp(source), _stamp(other_source)
        compared = _compared(source, other_source, min(own.size, other.size), *stamps)
    if compared is None:
        if abs(own.size - other.size) > MAX_PADDING:
            raise DraftError(
                f"{sizes}: more than {MAX_PADDING} apart, and no two tokenizers are at hand that would agree on the first "
                f"{min(own.size, other.size)}. Use a draft with the target's own tokenizer; if these two have it, pass them to "
                "generate as tokenizer= and assistant_tokenizer=. Other tokenizers are not supported yet."
            )
    elif compared.token is not None:
        raise DraftError(
            f"{sizes}, and their tokenizers differ: id {compared.token} is {compared.target!r} for the target and "
            f"{compared.draft!r} for the draft. Use a draft with the target's own tokenizer: other tokenizers are not supported yet."
        )


def _config(model: PreTrainedModel | PeftModel | PretrainedConfig) -> PretrainedConfig:
    return model if isinstance(model, PretrainedConfig) else model.config


def _file(config: PretrainedConfig) -> Path | None:
    return tokenizer_file(model_name(config), commit_hash(config))


def _stamp(source: VocabularySource) -> int:
    """Changes when a tokenizer gets more tokens, or its file is written again."""
    return source.stat().st_mtime_ns if isinstance(source, Path) else len(source)


@dataclass(frozen=True)
class _Compared:
    """The first id at which two tokenizers differ, and the tokens there; None: they agree."""

    token: int | None = None
    target: str = ""
    draft: str = ""


@functools.lru_cache(maxsize=8)  # reading two large vocabularies takes a second, and every call asks
def _compared(
    target: VocabularySource, draft: VocabularySource, size: int, target_stamp: int, draft_stamp: int
) -> _Compared | None:
    """Compares the tokens below `size`; None: one of the two cannot be read. An id that one of them lacks is no difference."""
    own, other = _tokens(target), _tokens(draft)
    if own is None or other is None:
        return None
    differ = (i for i in range(size) if i in own and i in other and own[i] != other[i])
    token = next(differ, None)
    return _Compared() if token is None else _Compared(token, own[token], other[token])


def _tokens(source: VocabularySource) -> dict[int, str] | None:
    """Tokens by id; None: a file that cannot be read without its library (tokenizer.model)."""
    if isinstance(source, PreTrainedTokenizerBase):
        return {i: token for token, i in source.get_vocab().items()}
    if source.suffix != ".json":
        return None
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
        if "model" not in found:  # vocab.json
            return {int(i): str(token) for token, i in found.items()}
        words = found["model"]["vocab"]
        tokens = (
            {i: str(token) for token, i in words.items()}
            if isinstance(words, Mapping)
            else {i: str(word[0]) for i, word in enumerate(words)}
        )
        return tokens | {int(added["id"]): str(added["content"]) for added in found.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
