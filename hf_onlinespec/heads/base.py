"""Head: what every kind of draft head has. A PreTrainedModel, so that PEFT, saving and our adapters work on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .._compat.hidden_states import Reads
from .._compat.models import writing_config
from ..errors import DraftError
from ..models.encoders import writing_embedding
from ..models.layers import HEAD_INPUT
from ..models.vocabulary import MAX_PADDING, rows
from .config import HeadConfig
from .layer import Context, mask_of, positions_of


@dataclass
class HeadOutput(ModelOutput):
    """What a head says of the token behind each of n rows."""

    logits: Tensor = None  # type: ignore[assignment]  # (B, n or logits_to_keep, draft vocabulary)
    # What the next step is given (B, n, width); at least of the rows that have logits, which are the last ones.
    hidden: Tensor = None  # type: ignore[assignment]
    cache: Cache | None = None


class TargetLayers:
    """The target's layers that a head uses, of an encoder–decoder its decoder's. Not among the head's own modules, and the same in every copy of it."""

    def __init__(self) -> None:
        self.embedding: nn.Module | None = None
        self.lm_head: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetLayers:
        return self


class Head(PreTrainedModel, ABC):
    """A draft head: reads the target's hidden states, and drafts token by token from what it said last.

    Attributes:
        reads: indices of the target's `hidden_states` tuple that are its features, concatenated in this order; -1 is the last one,
            behind the final norm. Types of layers, whose keys and values follow, of an assistant that reads them.
        reads_places: whether features end with where their token stands, see `places.py`.
        at_once: whether the steps behind a row are said in the forward of the first one, whatever is drafted.
        most: tokens that it can draft behind one row of features; None: any number.
        draft_ids: (draft vocabulary,) int64 target ids of its logits, ascending; None: its logits are the target's vocabulary.
    """

    config: HeadConfig
    base_model_prefix = ""
    main_input_name = HEAD_INPUT
    draft_ids: Tensor | None
    embed_tokens: nn.Module | None
    lm_head: nn.Module | None
    rotary_emb: nn.Module | None
    reads_places = False
    at_once = False

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.target_layers = TargetLayers()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.own_embeddings else None
        self.lm_head = None  # one of its own that says all its logits
        self.register_buffer("draft_ids", None)

    @property
    @abstractmethod
    def reads(self) -> Reads: ...

    @property
    @abstractmethod
    def most(self) -> int | None: ...

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> HeadOutput:
        """Reads n rows; exactly one of `features` (a first step) and `hidden` (a later one) is given.

        Args:
            tokens: (B, n) the token behind each row: the features of position t go with token t + 1.
            features: (B, n, features) the target's hidden states, those of `reads` concatenated.
            hidden: (B, n, width) `hidden` of the output before.
            attention_mask: None: causal; (B, cached + n): zeros are padding on the left; (B, 1, n, cached + n): boolean (True: seen)
                or added to the scores.
            position_ids: (1 or B, n); None: they continue behind the cache, padding not counted.
            past_key_values: entries of this forward are appended, those of later steps too: the caller crops.
            logits_to_keep: as in transformers: the last rows that have logits, or their indices; 0: all.
        """

    def share(self, target: PreTrainedModel) -> None:
        """Uses the target's embedding, and its vocabulary head, where this head has none of its own. They stay the target's.

        Raises:
            DraftError: the target has another width or vocabulary, or fewer layers than the head reads.
        """
        embedding, lm_head = writing_embedding(target), target.get_output_embeddings()
        config = writing_config(target.config)
        size, width, layers = rows(embedding), config.hidden_size, config.num_hidden_layers
        if width != self.config.target_hidden_size:
            raise DraftError(
                f"The head reads hidden states of width {self.config.target_hidden_size} (target_hidden_size), and those of "
                f"{type(target).__name__} are {width} wide: it belongs to another target."
            )
        if size is not None and size < self.config.vocab_size:
            raise DraftError(
                f"The head is made for {self.config.vocab_size} tokens (vocab_size), and the embedding of {type(target).__name__} "
                f"has {size}: it belongs to another target."
            )
        if size is not None and size - self.config.vocab_size > MAX_PADDING:
            raise DraftError(
                f"The head is made for {self.config.vocab_size} tokens (vocab_size), and the embedding of {type(target).__name__} "
                f"has {size}, over {MAX_PADDING} more: it belongs to a target with another tokenizer."
            )
        if not self.config.own_embeddings and isinstance(embedding, nn.Embedding) and embedding.embedding_dim != width:
            raise DraftError(
                f"The embedding of {type(target).__name__} is {embedding.embedding_dim} wide and its hidden states {width}: the head "
                "cannot read with it. It needs its own, embed_tokens.weight."
            )
        beyond = [index for index in self.reads if isinstance(index, int) and not -layers - 1 <= index <= layers]
        if beyond:
            raise DraftError(
                f"The head reads hidden_states[{beyond[0]}] of its target, and {type(target).__name__} has {layers} layers: it "
                "belongs to another target."
            )
        self.target_layers.embedding, self.target_layers.lm_head = embedding, lm_head

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, n, hidden_size) of tokens (B, n), by the head's own table or the target's.

        Raises:
            DraftError: neither is there.
        """
        if self.embed_tokens is not None:
            own: Tensor = self.embed_tokens(tokens)
            return own
        table = self.target_layers.embedding
        if table is None:
            raise DraftError("This head reads with its target's embedding: call head.share(target) first.")
        with torch.no_grad():  # the target's weights are not the head's to train
            found: Tensor = table(tokens)
        return found

    def said(self, hidden: Tensor) -> Tensor:
        """Logits (B, n, vocabulary) of the target's vocabulary head, which may be of another type of numbers."""
        lm_head = self.target_layers.lm_head
        if lm_head is None:
            raise DraftError("This head speaks with its target's vocabulary head: call head.share(target) first.")
        weights = dict(lm_head.named_parameters())
        numbers = next(iter(weights.values())).dtype
        read = hidden.to(numbers) if numbers.is_floating_point else hidden
        # Gradients flow through it to the head, and none to the target's weights; quantised ones take part as they are.
        frozen = {name: weight.detach() for name, weight in weights.items() if weight.requires_grad}
        logits: Tensor = functional_call(lm_head, frozen, (read,)) if frozen and hidden.requires_grad else lm_head(read)
        return logits.to(hidden)

    def context(
        self,
        rows: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        """Where rows (B, n, width) stand behind what is cached, and what they see."""
        assert self.rotary_emb is not None
        n, past = rows.shape[1], 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = positions_of(attention_mask, n, past, rows.device)
        mask = mask_of(attention_mask, n, past, rows.dtype, rows.device)
        return Context(self.rotary_emb(rows, position_ids), mask, mask is None and past == 0 and n > 1, cache)

    @property
    def features_size(self) -> int:
        """Width of a row of features."""
        assert self.config.target_hidden_size is not None
        return len(self.reads) * self.config.target_hidden_size

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs of a first step: two sequences of three tokens."""
        tokens = torch.arange(1, 7, device=self.device).remainder(self.config.vocab_size).view(2, 3)
        features = torch.linspace(-1, 1, 6 * self.features_size, device=self.device).view(2, 3, -1)
        return {"tokens": tokens, "features": features.to(self.dtype)}

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]  # None, as a head may have none
        """The head's own embedding; None: it reads with the target's."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head's own vocabulary head; None: it says its logits with the target's, or has one for each token."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value


def require_one(features: Tensor | None, hidden: Tensor | None) -> None:
    """Raises DraftError unless exactly one of the two is given."""
    if (features is None) == (hidden is None):
        both = "both are" if features is not None else "neither is"
        raise DraftError(f"A head reads features (a first step) or hidden (a later one): {both} given.")


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The rows of (B, n, width) that have logits, as transformers counts them."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def started(past_key_values: Cache | None, use_cache: bool) -> Cache | None:
    """The cache to write to; None: nothing is cached."""
    return DynamicCache() if past_key_values is None and use_cache else past_key_values
