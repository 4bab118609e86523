"""Drafts for tests: of a script, and the least that the abstract methods of `Draft` ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_onlinespec.commit.base import Call, Draft, Proposer
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from hf_onlinespec.state import State


class ScriptedProposer(Proposer):
    """Proposes what a script says, at most four candidates a round: a chain, or as trees.

    Args:
        script: (1, L) what is right.
        shape: of the trees. Per candidate its parent and how far its token is from the script's: 0 is right. None: chains.
        vocab: tokens lie below it.
    """

    def __init__(self, script: Tensor, shape: tuple[tuple[int, int], ...] | None = None, vocab: int = 32) -> None:
        self._script, self._shape, self._vocab = script, shape, vocab
        self.trees = 0  # proposed

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        tokens = self._script[:, rows.lengths[0] : rows.lengths[0] + min(room, 4)]
        if trees and self._shape is not None and tokens.shape[1]:
            return self._tree(tokens, self._shape)
        return Proposal(tokens, None, (tuple(TokenSource("model", i, (0,)) for i in range(tokens.shape[1])),))

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        pass

    def _tree(self, right: Tensor, shape: tuple[tuple[int, int], ...]) -> Proposal:
        self.trees += 1
        depths: list[int] = []
        for parent, _ in shape:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        fits = [i for i, depth in enumerate(depths) if depth < right.shape[1]]
        place = {-1: -1} | {candidate: i for i, candidate in enumerate(fits)}
        tokens = torch.stack([(right[:, depths[i]] + shape[i][1]) % self._vocab for i in fits], dim=-1)
        sources = tuple(TokenSource("model", depths[i], (0,)) for i in fits)
        return Proposal(tokens, None, (sources,), parents=(tuple(place[shape[i][0]] for i in fits),))

    def observe(self, verdict: Verdict) -> None:
        pass

    def reset(self) -> None:
        pass

    def leave(self, rows: Rows) -> bool:
        return False

    def finish(self) -> bool:
        return False


class PlainDraft(Draft):
    """A draft that needs nothing from call to call but its proposer."""

    model: PeftModel | None = None
    generation_config: GenerationConfig | None = None

    def __init__(self, proposer: Proposer) -> None:
        super().__init__()
        self._proposer = proposer

    def proposer(self, call: Call) -> Proposer:
        return self._proposer

    def state(self) -> State:
        return State()

    def resume(self, state: State) -> None:
        pass

    def generating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def serves(self, target: PreTrainedModel, own_tokens: bool = True) -> None:
        pass

    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        pass

    def _title(self) -> str:
        return "a draft of a test"

    def _rows(self) -> list[tuple[str, str]]:
        return []
