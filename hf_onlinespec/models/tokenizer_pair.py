"""Two models and their tokenizers: whether it is one tokenizer, and what the draft reads and says where it is not."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from peft import PeftModel
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.models import commit_hash, model_name
from ..errors import DraftError
from .common_strings import CommonStrings
from .identity import tokenizer_file
from .retokenizing import Retokenizer
from .spelling import Spelling
from .vocabulary import MAX_PADDING, Vocabulary

Model: TypeAlias = PreTrainedModel | PeftModel | PretrainedConfig
# Where the tokens of an id range can be looked up: a tokenizer, or the file of one.
VocabularySource: TypeAlias = PreTrainedTokenizerBase | Path


def retokenizer_of(
    target: Model, draft: Model, tokenizer: object = None, draft_tokenizer: object = None
) -> Retokenizer | None:
    """What a draft with another tokenizer than the target's reads and says; None: they have one tokenizer.

    The tokenizers are those given, or lie beside the models. Where they agree at every id below the smaller vocabulary's size, but for
    tokens that were added, they are one. Without them, vocabularies of one size are taken for the same, and sizes may differ
    by `MAX_PADDING`.

    Args:
        tokenizer, draft_tokenizer: as `generate` takes them; None: not given.

    Raises:
        DraftError: the sizes are those of two tokenizers which are not both at hand; each was given in the other one's place; they
            have no token in common; or what their tokens spell cannot be read.
    """
    own, other = Vocabulary.of(target), Vocabulary.of(draft)
    given = [t if isinstance(t, PreTrainedTokenizerBase) else None for t in (tokenizer, draft_tokenizer)]
    source, other_source = (t or _file(model) for t, model in zip(given, (target, draft), strict=True))
    if source is None or other_source is None:
        if abs(own.size - other.size) > MAX_PADDING:
            raise DraftError(
                f"{_sizes(own, other)}: more than {MAX_PADDING} apart, and the tokenizer of "
                f"{'the target' if source is None else 'the draft'} is not at hand. Use a draft with the target's own tokenizer; with "
                "another one, pass both to generate, as tokenizer= and assistant_tokenizer=, or load the models from folders that hold theirs."
            )
        return None
    stamps = _stamp(source), _stamp(other_source)
    agree = _agree(source, other_source, min(own.size, other.size), *stamps)
    if agree is None:
        agree = abs(own.size - other.size) <= MAX_PADDING
    if agree:
        return None
    return _retokenizer(source, other_source, (own.size, other.size), *stamps)


def check_vocabularies(target: Model, draft: Model, tokenizer: object = None, draft_tokenizer: object = None) -> None:
    """Refuses a draft with another tokenizer, where only one of the target's own can be served; arguments are those of `retokenizer_of`.

    Raises:
        DraftError: names both sizes, where they come from, and what differs.
    """
    if retokenizer_of(target, draft, tokenizer, draft_tokenizer) is not None:
        own, other = Vocabulary.of(target), Vocabulary.of(draft)
        raise DraftError(
            f"{_sizes(own, other)}, and their tokenizers differ. Such a draft learns in generate, and is not trained or measured from files "
            "yet: use one with the target's own tokenizer."
        )


def _sizes(own: Vocabulary, other: Vocabulary) -> str:
    return (
        f"The target has {own.size} tokens in its vocabulary ({own.source}) and the draft {other.size} ({other.source})"
    )


def _file(model: Model) -> Path | None:
    config = model if isinstance(model, PretrainedConfig) else model.config
    return tokenizer_file(model_name(config), commit_hash(config))


def _stamp(source: VocabularySource) -> int:
    """Changes when a tokenizer gets more tokens, or its file is written again."""
    return source.stat().st_mtime_ns if isinstance(source, Path) else len(source)


@functools.lru_cache(maxsize=8)  # reading two large vocabularies takes seconds, and every call asks
def _retokenizer(
    target: VocabularySource, draft: VocabularySource, sizes: tuple[int, int], target_stamp: int, draft_stamp: int
) -> Retokenizer:
    if isinstance(target, PreTrainedTokenizerBase) and isinstance(draft, PreTrainedTokenizerBase):
        _check_order(target, draft, sizes)
    own, other = (Spelling(_loaded(source, name), name) for source, name in ((target, "target"), (draft, "draft")))
    return Retokenizer(CommonStrings(own, other, sizes))


def _check_order(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, sizes: tuple[int, int]) -> None:
    """Refuses two tokenizers of which one has tokens beyond its model's vocabulary, and none has beyond the other model's.

    Tokens that were added do not count: a model may lack them. Raises DraftError.
    """
    ends = [1 + max(_tokens(one) or {}, default=-1) for one in (target, draft)]
    fit = ends[0] <= sizes[0] and ends[1] <= sizes[1]
    if not fit and ends[1] <= sizes[0] and ends[0] <= sizes[1]:
        raise DraftError(
            f"tokenizer= has {ends[0]} tokens and assistant_tokenizer= {ends[1]}, in vocabularies of {sizes[0]} (the target's) and {sizes[1]} "
            "(the draft's): each is the other model's. Pass the target's as tokenizer=, and the draft's as assistant_tokenizer=."
        )


def _loaded(source: VocabularySource, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a file belongs to. Raises DraftError."""
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, local_files_only=True)
    except Exception as error:  # files from elsewhere may make the library raise anything
        raise DraftError(
            f"The {name}'s tokenizer in {source.parent} cannot be loaded ({type(error).__name__}: {error}). Pass both to generate, as "
            "tokenizer= and assistant_tokenizer=."
        ) from error
    return tokenizer


@functools.lru_cache(maxsize=8)  # see above
def _agree(
    target: VocabularySource, draft: VocabularySource, size: int, target_stamp: int, draft_stamp: int
) -> bool | None:
    """Whether two tokenizers have the same tokens below `size`; None: one of the two cannot be read.

    An id that one of them lacks is no difference, and tokens that were added (special ones, mostly) may have other names. Where that
    leaves no id to compare, they are two.
    """
    if isinstance(target, Path) and isinstance(draft, Path) and target.read_bytes() == draft.read_bytes():
        return True
    own, other = _tokens(target), _tokens(draft)
    if own is None or other is None:
        return None
    in_both = [i for i in own if i < size and i in other]
    return bool(in_both) and all(own[i] == other[i] for i in in_both)


def _tokens(source: VocabularySource) -> dict[int, str] | None:
    """Tokens by id, but for those that were added; None: a file that cannot be read without its library (tokenizer.model)."""
    if isinstance(source, PreTrainedTokenizerBase):
        own = source.added_tokens_decoder
        return {i: token for token, i in source.get_vocab().items() if i not in own}
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
        added = {int(one["id"]) for one in found.get("added_tokens", [])}
        return {i: token for i, token in tokens.items() if i not in added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
