"""The fuzzer's drafts: how one is made for a target and handed over, and one that follows a script."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from fuzz_cases import HEADS, SCRIPTED, Case
from fuzz_models import EXITS, PAIRS, SOME, VOCAB, model_of, tokenizer_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec.commit.base import Proposer
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from tests.fakes import PlainDraft
from tests.heads.tiny import tiny_head

KNOWS = 0.8  # chance of a scripted draft to know the next token


class Scripted(Proposer):
    """Proposes for each row what it will say, now and then something else, with wrong tokens beside it where trees can be verified.

    Args:
        answers: per row of the call all of its tokens.
    """

    def __init__(self, answers: list[list[int]], seed: int) -> None:
        self._answers, self._rng = answers, random.Random(seed)

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        found = []
        for length, row in zip(rows.lengths, rows.of_call, strict=True):
            known = self._answers[row][length:] if row < len(self._answers) else []
            found.append(self._of_row(known, self._rng.randrange(min(room, 6) + 1), trees))
        return Proposal.joined(found)

    def _of_row(self, known: list[int], reach: int, trees: bool) -> Proposal:
        nodes: list[tuple[int, int]] = []  # token and parent
        depths: list[int] = []
        last = -1
        for depth in range(reach):
            right = depth < len(known) and self._rng.random() < KNOWS
            wanted = [(known[depth] if right else self._rng.randrange(3, VOCAB), last)]
            for _ in range(self._rng.randrange(3) if trees and self._rng.random() < 0.5 else 0):
                parent = self._rng.randrange(-1, len(nodes))
                if parent < 0 or depths[parent] < reach - 1:
                    wanted.insert(self._rng.randrange(2), (self._rng.randrange(3, VOCAB), parent))
            for node in wanted:
                if node not in nodes:
                    nodes.append(node)
                    depths.append(0 if node[1] < 0 else depths[node[1]] + 1)
            last = nodes.index(wanted[-1] if wanted[-1][1] == last else wanted[0])
        sources = tuple(TokenSource("memory", depth) for depth in depths)
        tokens = torch.tensor([[token for token, _ in nodes]], dtype=torch.long)
        return Proposal(tokens, None, (sources,), parents=(tuple(parent for _, parent in nodes),))

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        pass

    def observe(self, verdict: Verdict) -> None:
        pass

    def reset(self) -> None:
        pass

    def leave(self, rows: Rows) -> bool:
        return False

    def finish(self) -> bool:
        return False


def scripted(answers: list[list[int]], seed: int) -> dict[str, Any]:
    return {"assistant_model": PlainDraft(Scripted(answers, seed))}


def draft_model(case: Case, target: PreTrainedModel) -> nn.Module | None:
    """A copy of the model that drafts; None: there is none beside the target."""
    if case.draft in ("", SCRIPTED, EXITS):
        return None
    if case.draft in HEADS:
        return tiny_head(case.draft, target, seed=2)
    return copy.deepcopy(model_of(case.target, 1) if case.draft == "copy" else model_of(case.draft, 2))


def handed_over(case: Case, model: nn.Module | None) -> dict[str, Any]:
    """The arguments that make a call ours."""
    if model is None:
        return {"onlinespec": case.settings} | ({"assistant_early_exit": 1} if case.draft == EXITS else {})
    both: dict[str, Any] = {}
    if case.draft in (PAIRS, SOME):
        both = {"tokenizer": tokenizer_of(), "assistant_tokenizer": tokenizer_of(case.draft)}
    if case.wrapped == "OnlineDraft":
        return {"assistant_model": OnlineDraft(model, case.settings)} | both
    if case.wrapped == "bfloat16":
        model.to(torch.bfloat16)
    if case.wrapped == "PeftModel":
        torch.manual_seed(case.number)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora)
    return {"assistant_model": model, "onlinespec": case.settings} | both


def checksums(model: nn.Module) -> dict[str, float]:
    """Of every weight, by name."""
    return {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}
