"""How far a round may reach in the target's positions, so that it computes what plain decoding computes.

Most targets have no limit: a rotary model goes on past `max_position_embeddings`, as it does in plain decoding. Four kinds do:

- a table of absolute positions (GPT-2, OPT, GPT-J) ends: a forward beyond it fails,
- long RoPE (Phi-3) takes other frequencies for every position of a forward that reaches beyond the length that it was first
  trained with, and reads everything anew: drafted tokens must not reach there before a kept one does,
- dynamic RoPE takes frequencies from the length of each forward, beyond the length that it was trained with,
- sparse attention (DeepSeek-V3.2) of transformers selects its keys otherwise in a forward over several tokens, once there are
  more of them than it selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .._compat.models import NO_LIMIT, max_positions


@dataclass(frozen=True)
class PositionLimits:
    """What a target's configuration says about its positions; lengths in tokens."""

    table: int = NO_LIMIT  # rows of its table of positions
    switches: tuple[int, ...] = ()  # a forward that reaches beyond one of these takes other frequencies
    trained: int = NO_LIMIT  # from here on, each forward takes frequencies of its own
    selected: int = NO_LIMIT  # beyond so many keys, a forward over several tokens attends to other keys

    @classmethod
    def of(cls, config: PretrainedConfig) -> PositionLimits:
        """Reads a model's configuration; of a model with several parts, the text decoder's."""
        text = config.get_text_config(decoder=True)
        selected = _selected(text)
        rope = vars(text).get("rope_parameters")
        if not rope:
            return cls(table=max_positions(text), selected=selected)
        # One set of parameters, or one for each type of layer (Gemma-3).
        kinds: list[Mapping[str, Any]] = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
        trained = NO_LIMIT
        # Phi-3 drops its cache at the length that its configuration states, whatever its RoPE.
        stated = [vars(text).get("original_max_position_embeddings")]
        for kind in kinds:
            name = str(kind.get("rope_type"))
            if "dynamic" in name:
                trained = max_positions(text)
            elif name == "longrope":
                stated.append(kind.get("original_max_position_embeddings"))
        switches = {int(length) for length in stated if length}
        return cls(switches=tuple(sorted(switches)), trained=trained, selected=selected)

    def room(self, lengths: tuple[int, ...], unread: int) -> int:
        """Most tokens that may be drafted in the next round.

        Args:
            lengths: tokens that plain decoding's next forward would reach to: counted, and by the positions given.
            unread: tokens of these that are not in the cache yet.
        """
        room = NO_LIMIT
        for length in lengths:
            room = min(room, self.table - length, self.selected - length)
            for switch in self.switches:
                if length <= switch:
                    room = min(room, switch - length)
                elif length - unread <= switch:
                    room = 0  # this forward crosses: as plain decoding does it
            # A forward below the trained length forgets the frequencies of an earlier, longer request; one of this length does not.
            room = min(room, self.trained - 1 - length)
        return max(0, room)

    @property
    def by_length(self) -> bool:
        """Whether what a forward computes depends on how many tokens it reaches to."""
        return bool(self.switches) or self.trained < NO_LIMIT or self.selected < NO_LIMIT

    def reason(self) -> str:
        """Why a round had no room."""
        if self.switches:
            return f"the target's positions change at {self.switches[0]} tokens: no round crosses that"
        if self.trained < NO_LIMIT:
            return f"the target's dynamic RoPE depends on the length of each forward beyond {self.trained} tokens"
        if self.selected < NO_LIMIT:
            return f"the target's attention selects keys beyond {self.selected} tokens, otherwise in a forward over several"
        return f"the target's table of positions ends at {self.table} tokens"


def _selected(config: PretrainedConfig) -> int:
    """Keys up to which attention is dense, or, for Moshi, as far as transformers' windows agree for any number of tokens."""
    name = "sliding_window" if config.model_type == "moshi" else "index_topk"
    return int(vars(config).get(name) or NO_LIMIT)
