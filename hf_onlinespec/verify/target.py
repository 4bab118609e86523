"""The target with its KV cache: fed with what it has not seen, rolled back to what was kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .._compat.caches import CACHE, counts_tokens, held_tokens, move, returned_cache
from .._compat.compiling import COMPILED, compiled_forward
from .._compat.generation import continue_inputs, continues_inputs, generative, hidden_tokens
from .._compat.hidden_states import Reads, hidden_states, hidden_states_inputs, takes_hidden_states
from .._compat.recurrent import RecurrentStates, has_recurrent_state, is_recurrent, restore, saved_states
from .._compat.rollback import compact, crop, feed_limit, quantizes, record_past, rollback_obstacle
from ..errors import UnsupportedError
from ..rounds import Proposal
from .inputs import InputNames, given
from .positions import PositionLimits
from .row_positions import counted_positions
from .trees import MOST_NODES, in_place, tree_mask, tree_positions

# A recurrent state cannot be rolled back to any token, but to a copy that was made before a round. What was kept of the round is read
# once more in the next one, with its candidates, and so on until a round is kept as a whole, or until so many tokens would be read
# again: then a round without candidates reads them, and a new copy is made behind them. By the times that were measured, 8 and 32 bring
# 4 and 2 % less: LOG 2026-11-27 "Recurrent states are drafted for".
MOST_READ_AGAIN = 16


class Verifier:
    """The target with its KV cache: fed with what it has not seen, rolled back to what was kept.

    Args:
        plain_because: why this target is decoded without drafting; "": it need not be.

    Attributes:
        trees_because: why it verifies no trees but chains, see `why_chains`; "": it verifies trees.
        compiled_because: the same, of a target that is compiled; "": it is not.
        features: (batch, fed, width) the hidden states that the draft reads, of all that it was fed in the last round for the first
            time; None: they are not read, or `unread_because` says why there are none.
        caught_up: whether the last round had no candidates, and read tokens once more: plain decoding does not take its time.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        plain_because: str = "",
    ) -> None:
        self._target, self._reads, self._names = target, Reads(), InputNames.of(target)
        self.features: Tensor | None = None
        self.unread_because, self.caught_up = "", False
        self.plain_because = plain_because  # why rounds have no room
        self.trees_because = ""
        self._kwargs = dict(model_kwargs)
        self._hidden = hidden_tokens(input_ids, generation_config, self._kwargs)  # tokens that are in the cache alone
        self.cache = self._kwargs.pop(CACHE)
        self._recurrent = is_recurrent(target)
        self._compiled = compiled_forward(target, self.cache, generation_config)
        self.compiled_because = "" if self._compiled is None else COMPILED.format(name=type(target).__name__)
        if self._recurrent and self._compiled is not None and not plain_because:
            self.plain_because = f"the target {type(target).__name__} is compiled, and keeps a recurrent state"
        # What is decoded plainly is never rolled back, and its cache keeps no more than in plain decoding.
        self._rolls_back = not self.plain_because
        if self._rolls_back:
            record_past(self.cache, self._recurrent)
        self._states: RecurrentStates | None = None  # before the last round with candidates, of a recurrent target
        self._cached = held_tokens(self.cache)
        self._columns: dict[str, Tensor] = {}
        for name in self._names.columns:
            values = self._kwargs.pop(name, None)
            if values is None:
                continue
            if self._hidden and name != self._names.mask and values.shape[-1] == input_ids.shape[1]:
                # The caller counted the new tokens only; what stands for the cached ones is never read.
                values = torch.cat([values.new_zeros((*values.shape[:-1], self._hidden)), values], dim=-1)
            self._columns[name] = values
        # The token that a decoder passes over when it counts positions; None: it counts all of them.
        self._counts_from = None if counted_positions(target) is None else target.config.get_text_config().pad_token_id
        self._limits = PositionLimits.of(target.config)
        length = input_ids.shape[1] + self._hidden
        # Columns that the caller gave beyond the tokens: plain decoding goes on behind them, and takes the last ones.
        self._surplus = {
            name: max(0, values.shape[-1] - length) if not self._cached else 0 for name, values in self._columns.items()
        }
        self._ahead = 0  # how far the given positions are ahead of the tokens counted
        positions = self._columns.get(self._names.positions)
        if positions is not None and self._limits != PositionLimits():
            self._ahead = int(positions[..., -1].max()) + 1 - length
        # A target that keeps more between its forwards reads the prompt alone, as in plain decoding, and so does one that reads
        # more than text, or quantises what it has read. So does one that is compiled for each number of tokens, and one that
        # would have to read its prompt again where a candidate is rejected.
        self._continues = continues_inputs(target)
        extras = given(self._kwargs) - self._names.text
        self._prompt_alone = self._continues or bool(extras) or quantizes(self.cache) or self._compiled is not None
        self._prompt_alone |= self._recurrent
        self._chunk = generation_config.prefill_chunk_size
        self.limited_because = ""  # why the last round had no room, where positions are the reason
        self._first = True  # whether the prompt is still to be read
        self._forwards = 0
        self._unnamed = 0  # places in the cache that no token stands for (GIT's picture)
        self._kept = length
        self._outputs: ModelOutput | None = None  # of the last forward
        self.keep(input_ids)

    def hand_out(self, reads: Reads) -> None:
        """From now on, hands out what is read of the target as `features`; (): nothing."""
        self._reads = reads if takes_hidden_states(self._target) else ()
        self.unread_because = "" if self._reads == reads else unread(self._target)

    def room(self, input_ids: Tensor) -> int:
        """Most tokens that may be drafted behind `input_ids`, so that the target computes what it computes in plain decoding."""
        if self.plain_because or (self._first and self._prompt_alone) or self._again(input_ids) > MOST_READ_AGAIN:
            return 0
        length = input_ids.shape[1] + self._hidden + self._unnamed
        unread = length - self._unnamed - self._cached
        room = self._limits.room((length, length + self._ahead), unread)
        self.limited_because = self._limits.reason() if room == 0 else ""
        limit = feed_limit(self.cache, self._cached + self._unnamed)
        if limit.tokens - unread < room:
            room = max(0, limit.tokens - unread)
            self.limited_because = limit.reason if room == 0 else ""
        return room if self._compiled is None else 2 ** ((room + 1).bit_length() - 1) - 1

    def _again(self, input_ids: Tensor) -> int:
        """Tokens that the next forward reads once more: all that the cache does not hold, but for the last one."""
        return 0 if self._first else input_ids.shape[1] + self._hidden - 1 - self._cached

    @property
    def trees(self) -> bool:
        """Whether the next round may be a tree. The prompt is read with a chain, whatever the target can."""
        at_the_end = self._limits.table - self._kept < MOST_NODES
        return not (self.trees_because or self.plain_because or self._first or at_the_end)

    def verify(self, input_ids: Tensor, proposal: Proposal) -> Tensor:
        """Raw logits (batch, k + 1, vocab) in float32 after `input_ids` and after each of the k candidates, in one forward.

        Args:
            proposal: a chain, or a tree where `trees` says so.

        Raises:
            UnsupportedError: the target's cache cannot be rolled back, or lost what the target had read.
        """
        k = proposal.tokens.shape[1]
        chain = all(proposal.is_chain(row) for row in range(len(proposal.sources)))
        again, surplus = self._again(input_ids), 0
        self.caught_up = again > 0 and k == 0
        if k and self._recurrent and (self._states is None or self._states.tokens != self._cached):
            self._states = saved_states(self.cache, self._cached)
        if self._compiled is not None and k:  # forwards over 2, 4, 8 … tokens, see `room`: few programs are made
            surplus = 2 ** k.bit_length() - 1 - k
        tokens = torch.cat([input_ids, proposal.tokens], dim=-1)
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, surplus)], dim=-1)  # nothing attends to what follows it
        end, k = tokens.shape[1] + self._hidden, k + surplus
        self.features = None
        if self._first and self._chunk:  # a long prompt is read in pieces, and the target is shown one at a time
            tokens = tokens[:, self._cached - end :]
            while tokens.shape[1] - k > self._chunk:
                self._forward(tokens[:, : self._chunk], self._cached + self._chunk, 0)
                tokens = tokens[:, self._chunk :]
        logits = self._in_pieces(tokens, end, k) if chain else self._forward(tokens, end, k, proposal)
        if surplus:
            logits = logits[:, :-surplus]
            self.features = None if self.features is None else self.features[:, :-surplus]
        if again and self.features is not None:  # those were handed out before
            self.features = self.features[:, again:]
        return logits.to(dtype=torch.float32, device=input_ids.device)

    def _in_pieces(self, tokens: Tensor, end: int, k: int) -> Tensor:
        """The last k + 1 logits behind tokens that end at the place `end`: a forward ends behind padding, where plain decoding's would.

        Decoders that count positions by the tokens of a forward (M2M100) pass padding over.
        """
        ends = [k]  # per forward, the candidates up to its end
        if self._counts_from is not None:
            padding = (tokens[0] == self._counts_from).tolist()
            kept = len(padding) - k
            ends = [0] * any(padding[:kept]) + [i + 1 for i in range(k - 1) if padding[kept + i]] + ends
        logits, before = list[Tensor](), -1
        for last in dict.fromkeys(ends):
            left = k - last
            logits.append(self._forward(tokens[:, : tokens.shape[1] - left], end - left, last - before - 1))
            self._first, before = False, last
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _forward(self, tokens: Tensor, end: int, k: int, tree: Proposal | None = None) -> Tensor:
        """One forward over what the target has not seen of `tokens`, up to the place `end`: its last k + 1 logits."""
        inputs = dict(self._kwargs)
        for name, values in self._columns.items():
            place = end + self._surplus[name]
            self._columns[name] = self._names.continued(name, values, place)
            inputs[name] = self._columns[name][..., :place]
        inputs = generative(self._target).prepare_inputs_for_generation(
            tokens,
            next_sequence_length=end - self._cached,
            is_first_iteration=self._first,
            **inputs,
            **{CACHE: self.cache},
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = k + 1
        if tree is not None:
            self._arrange(inputs, tree)
        read = inputs.get(self._names.tokens)
        fed = end - self._cached if read is None else read.shape[1]
        if self._forwards == 1 and counts_tokens(self.cache) and held_tokens(self.cache) + fed < end:
            raise UnsupportedError(
                f"The target {type(self._target).__name__} has {held_tokens(self.cache)} of {end - fed} tokens in its cache after "
                "its first forward: it would go on without them. Call generate without onlinespec."
            )
        forward = self._target if self._first or self._compiled is None else self._compiled
        outputs = forward(**inputs, **hidden_states_inputs(self._reads), return_dict=True)
        self._take(outputs, end, fed)
        if self._reads:
            self._take_features(hidden_states(outputs, self._reads, fed))
        return outputs.logits[:, -k - 1 :]

    def _take_features(self, features: Tensor | None) -> None:
        """Those of one forward (batch, fed, width), behind those of the pieces of the prompt before it."""
        if features is None:
            self._reads, self.unread_because = (), unread(self._target)
            self.features = None
        else:
            self.features = features if self.features is None else torch.cat([self.features, features], dim=1)

    def _arrange(self, inputs: dict[str, Any], tree: Proposal) -> None:
        """Makes the inputs of a forward over a chain those of one over a tree: the last kept token and the candidates."""
        names = self._names
        tokens, positions, shown = inputs[names.tokens], inputs.get(names.positions), self._columns.get(names.mask)
        if positions is None:  # a model that was given none counts
            positions = torch.full_like(tokens[:, :1], self._cached)
        shown = None if shown is None else shown[:, : self._cached]
        inputs[names.positions] = tree_positions(tree, positions[..., :1])
        inputs[names.mask] = tree_mask(tree, self._cached, shown, self._target.dtype, tokens.device)

    def _take(self, outputs: ModelOutput, end: int, fed: int) -> None:
        """Takes over what a forward returned: a target may have begun its cache anew."""
        self._cached, self._forwards = end, self._forwards + 1
        if self._continues:
            self._outputs = outputs
        if CACHE in outputs and outputs[CACHE] is None:
            raise UnsupportedError(
                f"The target {type(self._target).__name__} hands back no cache: plain decoding goes on without one. Call generate "
                "without onlinespec."
            )
        cache = returned_cache(outputs)
        if cache is not None and cache is not self.cache:
            self.cache = cache
            if self._rolls_back:
                record_past(cache, self._recurrent)
        held = held_tokens(self.cache) if counts_tokens(self.cache) else end
        if self._forwards == 1 and self._rolls_back and self._obstacle():
            raise UnsupportedError(
                f"The target {type(self._target).__name__} {self._obstacle()}. Call generate without onlinespec."
            )
        if self._forwards == 1:
            self._unnamed = max(0, held - end)
        if held < end and fed < end:
            self.plain_because = f"the target {type(self._target).__name__} keeps {held} of {end} tokens in its cache"

    def _obstacle(self) -> str:
        """What keeps the cache from being rolled back, said of the target; "": nothing."""
        if has_recurrent_state(self.cache) and not self._recurrent:
            return "keeps a recurrent state, and is not marked as a model that does (_is_stateful)"
        return rollback_obstacle(self.cache)

    def keep(self, input_ids: Tensor, paths: tuple[tuple[int, ...], ...] | None = None) -> None:
        """Rolls the cache back to all kept tokens but the last, as `generate` leaves it.

        Args:
            paths: per row, the candidates of the last round that were kept; None: the first ones.
        """
        length = input_ids.shape[1] + self._hidden
        if paths is not None:
            # One of them may be the last kept token, which ended the row.
            paths = tuple(path[: length - 1 - self._kept] for path in paths)
            stay = in_place(paths)
            if stay < len(paths[0]):
                places = torch.tensor([path[stay:] for path in paths]) + self._kept
                move(self.cache, places, self._kept + stay)
        if self._cached > length - 1 or (self._rolls_back and not self._first):
            self._roll_back(length - 1)
            if self._compiled is not None:
                compact(self.cache)
        self._cached = min(self._cached, length - 1)
        for kept in range(self._kept, length) if self._continues else ():
            # Token by token, as plain decoding does: not all classes that override it heed the number of new tokens.
            columns = {name: values[..., : kept + self._surplus[name]] for name, values in self._columns.items()}
            self._kwargs = continue_inputs(self._target, self._outputs, self._kwargs | columns)
            self._columns = {name: self._kwargs.pop(name) for name in columns if name in self._kwargs}
        self._kept = length

    def _roll_back(self, length: int) -> None:
        """Takes out of the cache what it holds behind so many tokens: a recurrent one goes back to its last copy."""
        if self._states is None or self._cached <= length:
            crop(self.cache, max(0, self._cached - length))
            return
        crop(self.cache, self._cached - self._states.tokens)
        restore(self.cache, self._states)
        self._cached = self._states.tokens

    def take_back(self) -> None:
        """After a failure: takes out of the cache what was read of candidates since tokens were kept last."""
        if self._rolls_back and self._forwards and not self._obstacle():
            self._roll_back(self._kept)

    def catch_up(self, input_ids: Tensor) -> None:
        """Leaves in the cache all kept tokens but the last, as `generate` does: reads what is missing."""
        if self._again(input_ids):
            self._forward(input_ids[:, :-1], input_ids.shape[1] + self._hidden - 1, 0)
            crop(self.cache, 0)


def unread(target: PreTrainedModel) -> str:
    """Why a draft head cannot read what a target says inside."""
    return (
        f"the target {type(target).__name__} hands out no hidden states, one for each token, which the draft head reads"
    )
