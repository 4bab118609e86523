"""Drafts for tests: of a script, and the least that the abstract methods of `Draft` ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_onlinespec.commit.base import Call, Draft, Proposer
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from hf_onlinespec.state import State


class ScriptedProposer(Proposer):
    """Proposes what a script says, at most four candidates a round."""

    def __init__(self, script: Tensor) -> None:
        self._script = script  # (1, L)

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        tokens = self._script[:, rows.lengths[0] : rows.lengths[0] + min(room, 4)]
        return Proposal(tokens, None, (tuple(TokenSource("model", i, (0,)) for i in range(tokens.shape[1])),))

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor) -> None:
        pass

    def observe(self, verdict: Verdict) -> None:
        pass

    def reset(self) -> None:
        pass

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

    def serves(self, target: PreTrainedModel) -> None:
        pass

    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        pass

    def _title(self) -> str:
        return "a draft of a test"

    def _rows(self) -> list[tuple[str, str]]:
        return []
