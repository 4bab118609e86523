"""A draft head with an adapter: it reads the target's hidden states, and drafts from what it said last.

Row t of a head is made of the target's features at token t and of token t + 1, and says what token t + 2 is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import NoReturn, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.caches import copied_prefix
from .._compat.hidden_states import hidden_states, hidden_states_inputs
from .._compat.rollback import crop, record_past
from ..adapt.experts import Experts
from ..adapt.gated_lora import GatedLora
from ..adapt.trainable import Prefix
from ..errors import UnsupportedError
from ..heads.base import Head
from ..heads.places import digits
from ..heads.unrolling import Unroll
from ..models.encoders import inputs_without_source
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from ..runtime.forks import Lock
from .draft_model import Branch, DraftModel, KnownRow, Reader, TreeReader
from .draft_trees import seen_by
from .head_rows import HeadRows
from .row_features import RowFeatures

AT_ONCE = 4  # least drafted steps that are learned by a head which says all of them in one forward; chosen


@final
class HeadModel(DraftModel):
    """A draft head and its adapter, from call to call.

    Args:
        head: that the adapter was made for.
    """

    def __init__(self, head: Head, adapter: GatedLora, experts: Experts, lock: Lock, steps: Lock) -> None:
        size = head.config.vocab_size
        super().__init__(adapter, experts, Vocabulary(size, size, "vocab_size of the head"), lock, steps)
        self.reads, self.most, self.reads_places = head.reads, head.most, head.reads_places
        self._least_steps = AT_ONCE if head.at_once else 1
        self.ids = None if head.draft_ids is None else head.draft_ids.to(self.device)
        self._target: weakref.ref[PreTrainedModel] | None = None

    def belongs_to(self, target: PreTrainedModel) -> None:
        """Notes, weakly, the target that is asked for the features of a text that comes without any."""
        self._target = weakref.ref(target)

    def readable_source(self, source: Source | None) -> None:
        """See `DraftModel`: what the target has read of it is in the features."""
        return None

    def reader(self, mask: Tensor | None, features: RowFeatures | None, source: Source | None = None) -> HeadReader:
        assert features is not None
        return HeadReader(self, features)

    def shared_reader(self, rows: Mapping[int, KnownRow]) -> HeadRows:
        return HeadRows(self, rows)

    def of_all_ids(self, logits: Tensor) -> Tensor:
        """Logits (n, ids) as those of the target's ids."""
        if self.ids is None:
            return logits
        scores = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        scores[:, self.ids] = logits
        return scores

    def prompt_log_ratio(self, tokens: Tensor, mask: Tensor | None, most: int) -> tuple[float, Mapping[bool, Reader]]:
        """See `DraftModel`. Before the target has read the prompt a head can say nothing about it."""
        return 0.0, {}

    def prompt_log_ratios(self, tokens: Tensor, mask: Tensor | None, most: int) -> list[float]:
        """See `DraftModel`: as above."""
        return [0.0] * len(tokens)

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        n: int,
        base: bool = False,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.logits`: (rows, n, ids)."""
        tokens = tokens.to(self.device)
        features = self.features(tokens[:, :-1], mask) if features is None else features.to(self.device)
        length, known = tokens.shape[1], features.shape[1]
        tokens, mask = tokens[:, -known:], _mask_of(mask, length - 1 - known, length - 1)
        with self.serving(base) as model:
            logits = model(tokens=tokens, features=features, attention_mask=mask, logits_to_keep=n).logits
        return _with_unread(logits, n)

    def training_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        sources: Sequence[Source | None] | None = None,
    ) -> Tensor:
        """See `Trainable.training_logits`. What no row says, as the second token of a text, has logits of 0 and no gradient."""
        return self.unrolled_logits(tokens, n, mask, gates, prefix, base, features)[0]

    def unrolled_logits(
        self,
        tokens: Tensor,
        n: int,
        mask: Tensor | None = None,
        gates: Tensor | None = None,
        prefix: Prefix | None = None,
        base: bool = False,
        features: Tensor | None = None,
        steps: int = 1,
        sources: Sequence[Source | None] | None = None,
    ) -> list[Tensor]:
        """See `Trainable.unrolled_logits`. Step k says token j from row j - 2 - k; what no row says has logits of 0 and no gradient."""
        steps = max(steps, self._least_steps)
        steps = steps if self.most is None else min(steps, self.most)
        features = self.features(tokens[:, :-1], mask) if features is None else features
        rows, copies, length = tokens.shape[0], 1 if gates is None else gates.shape[0], tokens.shape[1]
        start, cache = length - 1 - features.shape[1], DynamicCache() if steps > 1 else None
        if prefix is not None and prefix.first + prefix.length >= start:  # of one row, whose features hold no padding
            assert isinstance(prefix.cache, Cache)
            # A later step goes on from rows before those whose first step says the last n tokens: they are read anew.
            start, mask = max(start, prefix.first, prefix.first + prefix.length + 1 - steps), None
            cache = copied_prefix(prefix.cache, start - prefix.first, self.config)
        # The features of the last token but one belong to what comes behind the text.
        features = features[:, start + 1 - length : -1].repeat(copies, 1, 1)
        tokens = tokens[:, start + 1 : -1].repeat(copies, 1)
        mask = _mask_of(mask, start, length - 2)
        mask = None if mask is None else mask.repeat(copies, 1)
        drafting = min(n + steps - 1, tokens.shape[1])
        if base:
            said = Unroll(self.adapter.tree, drafting, mask, cache).teacher_forced(tokens, features, steps, n)
        else:
            own = None if gates is None else gates.repeat_interleave(rows, dim=0)
            with self.adapter.gated(own) as model:
                said = Unroll(model, drafting, mask, cache).teacher_forced(tokens, features, steps, n)
        said += [said[0][:, :0]] * (steps - len(said))  # of a text that is too short for them
        return [_with_unread(logits, n).unflatten(0, (copies, rows)) for logits in said]

    def logits_with(self, adapter: Mapping[str, Tensor], **inputs: Tensor) -> NoReturn:
        """See `DraftModel`. Raises UnsupportedError."""
        raise UnsupportedError(
            "warm_start trains draft models: a draft head reads hidden states of its target. Train one with hf-onlinespec head, or let it learn while it serves."
        )

    @torch.no_grad()
    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `DraftModel`. Of an encoder–decoder as if it had read nothing: the text alone does not say what it was written from."""
        target = None if self._target is None else self._target()
        if target is None:
            raise UnsupportedError(
                "A draft head reads hidden states of its target, which is not at hand: load the head with target=, or let it serve."
            )
        inputs = inputs_without_source(target, tokens.to(target.device))
        own = _mask_of(mask, 0, tokens.shape[1])
        places = torch.arange(tokens.shape[1], device=target.device)[None]
        if own is not None:
            own = own.to(target.device)
            places = (own.long().cumsum(-1) - 1).clamp_min(0)
            if target.config.is_encoder_decoder:
                inputs["decoder_attention_mask"] = own
            else:
                inputs |= {"attention_mask": own, "position_ids": places}
        outputs = target(**inputs, **hidden_states_inputs(self.reads), use_cache=False, return_dict=True)
        features = hidden_states(outputs, self.reads, tokens.shape[1])
        if features is None:
            raise UnsupportedError(f"The target {type(target).__name__} hands out no hidden states.")
        if self.reads_places:
            features = torch.cat([features, digits(places).to(features).expand(len(tokens), -1, -1)], dim=-1)
        return features.to(self.device)


def _mask_of(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    """Of the rows of a head from `start` to `end` whether they stand at padding: (rows, end − start).

    Args:
        mask: (rows, prompt) of tokens that go on behind the prompt; None: no padding.
    """
    return None if mask is None else F.pad(mask, (0, max(0, end - mask.shape[1])), value=1)[:, start:end]


def _with_unread(logits: Tensor, n: int) -> Tensor:
    """The last n of logits (rows, m, ids); those that are missing in front are 0."""
    missing = n - logits.shape[1]
    return F.pad(logits, (0, 0, missing, 0)) if missing > 0 else logits[:, -n:]


@final
class HeadReader(TreeReader):
    """The KV cache of a head in one row. Rows of true features stay in it; those of drafted tokens are of one round."""

    def __init__(self, model: HeadModel, features: RowFeatures) -> None:
        self._model, self._features = model, features
        self._begin()

    def _begin(self) -> None:
        self._past = DynamicCache(config=self._model.config)
        record_past(self._past)
        self._first = self._end = self._features.start  # of the tokens whose features were read
        self._drafted = 0  # rows of drafted tokens behind them
        # Of the row itself (-1) and of the candidates that were read in this round: place in the cache, and (1, 1, width).
        self._read: dict[int, tuple[int, Tensor]] = {}
        self._above: dict[int, int] = {}  # what a candidate follows
        self._logits: Tensor | None = None  # (1, ids) behind the last row
        self._hidden: Tensor | None = None  # (1, 1, width) of the last row
        self._kept: tuple[Tensor | None, Tensor | None] = None, None  # the same, of the last row of true features

    @property
    def shared(self) -> None:
        return None

    @property
    def source(self) -> None:
        return None

    @property
    def length(self) -> int:
        return self._end + 1 if self._end > self._first else 0

    def can_draft(self, length: int) -> bool:
        known = self._features
        return known.end == length - 1 and known.end > known.start

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        known = self._features
        if self._end < known.start:  # what lies between is not held any more
            self._begin()
        if self._end < known.end:
            tokens = prefix[:, self._end + 1 : known.end + 1]
            self._step(served, tokens, features=known.rows(self._end, known.end))
            self._end, self._kept = known.end, (self._logits, self._hidden)
            self._note(-1, -1)
        for at in range(self._end + 1 + self._drafted, prefix.shape[1]):
            self._step(served, prefix[:, at : at + 1], hidden=self._hidden)
            self._note(self._drafted, self._drafted - 1)
            self._drafted += 1
        assert self._logits is not None
        return self._model.of_all_ids(self._logits)

    @property
    def _cached(self) -> int:
        return int(self._past.get_seq_length())

    def _note(self, node: int, parent: int) -> None:
        assert self._hidden is not None
        self._read[node], self._above[node] = (self._cached - 1, self._hidden), parent

    @property
    def reads_trees(self) -> bool:
        return self._model.most is None

    def can_branch(self, parent: int, depth: int) -> bool:
        return parent in self._read

    def branch(self, served: PreTrainedModel, branches: Sequence[Branch]) -> Tensor:
        rows, cached = self._end - self._first, self._cached
        device = self._model.device
        read = {node: (place, self._above[node]) for node, (place, _) in self._read.items()}
        seen = seen_by(branches, read, rows, cached)
        out = served(
            tokens=torch.tensor([[branch.token for branch in branches]], device=device),
            hidden=torch.cat([self._read[branch.parent][1] for branch in branches], dim=1),
            attention_mask=seen[None, None].to(device),
            position_ids=torch.tensor([[rows + branch.depth for branch in branches]], device=device),
            past_key_values=self._past,
            use_cache=True,
        )
        for i, branch in enumerate(branches):
            self._read[branch.node] = cached + i, out.hidden[:, i : i + 1]
            self._above[branch.node] = branch.parent
        return self._model.of_all_ids(out.logits[0])

    def _step(self, served: PreTrainedModel, tokens: Tensor, **read: Tensor | None) -> None:
        out = served(
            tokens=tokens.to(self._model.device), **read, past_key_values=self._past, use_cache=True, logits_to_keep=1
        )
        self._logits, self._hidden = out.logits[:, -1], out.hidden[:, -1:]

    def rewind(self, length: int, same: int | None = None) -> None:
        """Rolls back to the rows of true features: the tokens that were drafted are read again, with theirs."""
        crop(self._past, max(0, self._cached - (self._end - self._first)))
        self._drafted, (self._logits, self._hidden) = 0, self._kept
        self._read, self._above = {}, {}
        if self._hidden is not None:
            self._note(-1, -1)

    def leave(self) -> None:
        pass

    def prefix(self, most: int) -> Prefix | None:
        length = min(self._end, most - 1) - self._first
        return Prefix(self._past, length, self._first) if length > 0 else None
