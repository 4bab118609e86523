"""The target with the KV cache of several rows, of which each keeps as many tokens of a round as it accepts.

Rejected places stay in the cache as far as another row has kept some there: holes, to which nothing attends. Positions are given
for each token, so that holes count nowhere. Where too many places are holes, all rows are moved together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.attention import takes_positions
from .._compat.caches import (
    CACHE,
    fresh_cache,
    held_tokens,
    join_rows,
    move,
    narrowest_window,
    rearrange,
    select_rows,
    shallow_copy,
    take_over,
    without_windows,
)
from .._compat.generation import generative, hidden_tokens
from .._compat.hidden_states import Reads, hidden_states, hidden_states_inputs, takes_hidden_states
from .._compat.rollback import crop
from ..models.holes import close_holes
from ..rounds import Proposal, Rows, Verdict
from .inputs import InputNames, given
from .positions import PositionLimits
from .row_positions import RowPositions, with_row_positions
from .target import unread
from .trees import MOST_NODES, tree_mask, tree_positions


class RaggedVerifier:
    """The target with its KV cache of several rows. The cache is its own: it goes on from what the caller's holds of an earlier
    turn, and leaves that as it is.

    Args:
        input_ids: (batch, prompt), padded where the attention mask says so, the end of the rows.

    Attributes:
        shown: (batch, prompt) 0 where there is padding, of all tokens that the rows begin with, those included that are in the
            caller's cache alone.
        features: (batch, fed, width) the hidden states that the draft reads, of all that it was fed in the last round; None: none
            are read, or `unread_because` says why there are none.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        reads: Reads = (),
    ) -> None:
        self._target, self._reads = target, reads if takes_hidden_states(target) else ()
        self.features: Tensor | None = None
        self.unread_because = "" if self._reads == reads else unread(target)
        self._names = names = InputNames.of(target)
        own = {*names.columns, CACHE}
        self._kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        self._once = given(self._kwargs) - names.text  # pictures and sounds, which are read with the prompts alone
        # (batch, n) what kind of token each is, beside mask and positions; behind the prompts the last one, which goes on.
        self._types = {
            name: model_kwargs[name].expand(len(input_ids), -1)
            for name in (names.columns.keys() - {names.mask, names.positions}) & given(model_kwargs)
        }
        self._takes_positions = takes_positions(target, names.positions)  # whether each token is given its position
        self._counting: RowPositions | None = None  # what counts the positions of each row; None: nothing does
        if not self._takes_positions:
            self._target, self._counting = with_row_positions(target)
        # What counts positions passes padding of the prompt over, in the prompt's own forward alone.
        padded = self._counting is not None and self._counting.has_padding(input_ids)
        self._prompt_alone = padded or bool(self._once)
        # A target that knows its tokens by the distance of their places (T5): all rows have to end at the same one.
        self._aligned = not self._takes_positions and self._counting is None
        # Beyond a window, places are not what a row's tokens see: rows are moved together before, as before a table of positions ends.
        table, window = PositionLimits.of(target.config).table, narrowest_window(target.config)
        self._table = table if window is None else min(table, window)
        self._hidden = hidden_tokens(input_ids, config, model_kwargs)  # of each row, that are in the cache alone
        batch, length = input_ids.shape[0], input_ids.shape[1] + self._hidden
        mask = model_kwargs.get(names.mask)
        self.shown = input_ids.new_ones(batch, length) if mask is None else mask.to(input_ids).expand(batch, length)
        # What of the cache is kept tokens, and of the tokens that are not in it yet, which come next: (batch, places), 0 at holes.
        self._seen = self.shown
        self._held = self._seen.sum(-1).tolist()  # per row, of these
        held = held_tokens(model_kwargs[CACHE])
        self._cached = min(held, length - 1)  # places in the cache
        self._cache = without_windows(model_kwargs[CACHE] if held else fresh_cache(target.config))
        crop(self._cache, held - self._cached)  # the last token is read anew
        counted, fed = model_kwargs.get(names.positions), length - self._cached
        if counted is None:
            counted = (self._seen.cumsum(-1) - 1).clamp_min(0)
        # The positions of the tokens that come next: (batch, unread), or of several kinds (kinds, batch, unread).
        self._unread = counted[..., -fed:].expand(*counted.shape[:-2], batch, fed)
        self.first = True  # whether the prompts are still to be read

    def room(self) -> int:
        """Most tokens that may be drafted behind every row."""
        if self.first and self._prompt_alone:
            return 0
        return max(0, self._table - self._seen.shape[1])

    @property
    def trees(self) -> bool:
        """Whether the next round may be of trees. The prompts are read with chains."""
        return self._takes_positions and not self.first and self._table - self._seen.shape[1] >= MOST_NODES

    def verify(self, rows: Rows, proposal: Proposal) -> Tensor:
        """Raw logits (batch, n + 1, vocab) in float32 behind the rows and behind each of their candidates, in one forward."""
        n, fed = proposal.tokens.shape[1], self._unread.shape[-1]
        if self.first:
            tokens = rows.tokens[:, -fed:]
        else:
            ends = torch.tensor(rows.lengths, device=rows.tokens.device)[:, None] - 1
            tokens = rows.tokens.gather(1, ends)
        seen, positions = self._seen, self._unread
        if n:  # most rounds of a large batch have no candidates
            tokens = torch.cat([tokens, proposal.tokens], dim=-1)
            steps = torch.arange(1, n + 1, device=tokens.device)
            has = steps <= torch.tensor(proposal.lengths, device=tokens.device)[:, None]  # (batch, n)
            seen = torch.cat([seen, has.to(seen)], dim=-1)
            positions = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        columns = {self._names.mask: seen}
        for name, values in self._types.items():
            columns[name] = self._names.continued(name, values, values.shape[-1] + n)
        if self._takes_positions:
            columns[self._names.positions] = positions
        if self._counting is not None:
            self._counting.begin([length + self._hidden - fed for length in rows.lengths])
        inputs = generative(self._target).prepare_inputs_for_generation(
            tokens,
            next_sequence_length=tokens.shape[1],
            is_first_iteration=self.first,
            **columns,
            **self._kwargs,
            **{CACHE: self._cache},
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = n + 1
        if n and not all(proposal.is_chain(row) for row in range(len(rows.lengths))):
            shown = self._seen[:, : self._cached]
            inputs[self._names.positions] = tree_positions(proposal, self._unread)
            inputs[self._names.mask] = tree_mask(proposal, self._cached, shown, self._target.dtype, tokens.device)
        outputs = self._target(**inputs, **hidden_states_inputs(self._reads), return_dict=True)
        if self.first:
            self._kwargs = {name: value for name, value in self._kwargs.items() if name not in self._once}
            self._types = {
                name: self._names.continued(name, values, values.shape[-1] + 1)[..., -1:]
                for name, values in self._types.items()
            }
        self._cached, self.first = self._cached + fed, False
        self.features = hidden_states(outputs, self._reads, tokens.shape[1]) if self._reads else None
        if self._reads and self.features is None:
            self._reads, self.unread_because = (), unread(self._target)
        return outputs.logits[:, -n - 1 :].to(dtype=torch.float32, device=rows.tokens.device)

    def keep(self, verdict: Verdict) -> None:
        """Keeps in the cache what the rows have kept, all tokens of a row but the last."""
        paths, device = verdict.paths, self._seen.device
        most, one = max(map(len, paths)), torch.ones_like(self._seen[:, :1])
        if any(path != tuple(range(len(path))) for path in paths):
            places = torch.tensor([[*path, *range(len(path), most)] for path in paths])
            move(self._cache, places + self._cached, self._cached)
        crop(self._cache, verdict.proposal.tokens.shape[1] - most)
        self._unread = self._unread[..., -1:] + 1
        if most:
            kept = torch.tensor(list(map(len, paths)), device=device)[:, None]
            own = torch.arange(most, device=device) < kept  # (batch, most)
            self._cached += most
            self._seen = torch.cat([self._seen, own.to(self._seen), one], dim=-1)
            self._unread = self._unread + kept
        else:
            self._seen = torch.cat([self._seen, one], dim=-1)
        self._held = [held + len(path) + 1 for held, path in zip(self._held, paths, strict=True)]
        self._close_holes()

    def leave(self, going_on: Sequence[int]) -> None:
        """Keeps some of the rows alone, in this order."""
        index = torch.tensor(going_on, device=self._seen.device)
        select_rows(self._cache, index)
        self._kwargs = self._names.of_rows(self._kwargs, list(going_on))
        self._types = {name: values[index] for name, values in self._types.items()}
        self._seen, self._unread = self._seen[index], self._unread[..., index, :]
        self._held = [self._held[row] for row in going_on]
        self._close_holes()

    def split(self, rows: Sequence[int]) -> RaggedVerifier:
        """Takes some of the rows out, not all of them, as a verifier of their own."""
        taken, going_on = copy.copy(self), sorted(set(range(len(self._held))) - set(rows))
        taken._cache = shallow_copy(self._cache)
        taken.leave(rows)
        self.leave(going_on)
        return taken

    def join(self, others: RaggedVerifier) -> None:
        """Rows that have read their prompts go on behind these ones; the other verifier is used up."""
        device, places = self._seen.device, max(self._cached, others._cached)
        join_rows(self._cache, others._cache, places)
        self._seen = torch.cat(
            [F.pad(one, (places + 1 - one.shape[1], 0)) for one in (self._seen, others._seen.to(device))]
        )
        self._unread = torch.cat([self._unread, others._unread.to(device)], dim=-2)
        self._types = {name: torch.cat([values, others._types[name]]) for name, values in self._types.items()}
        self._kwargs = self._names.joined(self._kwargs, others._kwargs)
        self._held += others._held
        self._cached = places
        self._close_holes()

    def read_of(self) -> list[int]:
        """Per row, tokens that are in the cache."""
        return [int(read) for read in self._seen[:, : self._cached].sum(dim=1)]

    def lay_out(self, columns: Sequence[Sequence[int]], places: int, cache: Cache) -> None:
        """Leaves in `cache` so many places, with the first tokens of each row at these columns; this verifier is used up.

        What is at the other places means nothing: it is not to be attended to.
        """
        order = torch.zeros(len(columns), places, dtype=torch.long)
        for row, own in enumerate(columns):
            held = torch.nonzero(self._seen[row, : self._cached].cpu())[: len(own), 0]
            order[row, torch.tensor(own, dtype=torch.long)] = held
        rearrange(self._cache, order)
        take_over(cache, self._cache)

    def _close_holes(self) -> None:
        """Moves the rows together where that is worth it, or where a table of positions may count places."""
        # The last column is of the token that is not in the cache yet: it is the last one of every row.
        full = self._seen.shape[1] + MOST_NODES > self._table
        seen = self._seen[:, :-1]
        cached = close_holes(self._cache, seen, max(self._held) - 1, full, self._aligned)
        if cached is not seen:
            self._seen = torch.cat([cached, self._seen[:, -1:]], dim=-1)
            self._cached = cached.shape[1]
