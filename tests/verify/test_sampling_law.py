"""Sampling is exact: the law over all three-token outputs is the target's, while the adapter moves between rounds.

All sequences are enumerated, their exact probabilities computed from the target alone, and compared with generated ones by a χ²
test with fixed seeds. What acceptance itself does is held far more sharply by `test_accept.py`; here the whole call is run.
"""

import itertools
import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.govern.acceptance import RequestStats
from hf_onlinespec.govern.budget import LearningBudget
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.govern.planner import Plan
from hf_onlinespec.govern.routing import AdapterRouter
from tests.chi_square import THOUSAND, follows
from tests.tiny_models import tiny_llama

VOCAB, NEW = 6, 3
PROMPT = torch.tensor([[1, 4]])
DRAWS = 1500

LAWS = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "temperature": {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 3, "top_p": 1.0},
    "top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.8},
    "all": {"temperature": 0.8, "top_k": 4, "top_p": 0.9},
}


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Target and draft, flat enough for every cell to be visited."""
    flat = {"vocab": VOCAB, "initializer_range": 0.2}
    return tiny_llama(1, layers=2, **flat), tiny_llama(2, **flat)


@torch.no_grad()
def exact_law(target: PreTrainedModel, settings: dict[str, float]) -> torch.Tensor:
    """Probabilities of all VOCAB**NEW continuations, in lexicographic order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings["temperature"]))])
    if settings["top_k"]:
        warpers.append(TopKLogitsWarper(int(settings["top_k"])))
    if settings["top_p"] < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=NEW)))
    tokens = torch.cat([PROMPT.expand(len(sequences), -1), sequences], dim=-1)
    logits = target(tokens).logits
    law = torch.ones(len(sequences), dtype=torch.float64)
    for i in range(NEW):
        position = PROMPT.shape[1] + i
        p = warpers(tokens[:, :position], logits[:, position - 1]).double().softmax(-1)
        law *= p.gather(-1, sequences[:, i : i + 1]).squeeze(-1)
    return law


def counted(target: PreTrainedModel, settings: dict[str, float], **how: object) -> torch.Tensor:
    """How often each of the VOCAB**NEW continuations was generated in DRAWS calls."""
    counts = torch.zeros(VOCAB**NEW, dtype=torch.long)
    place = torch.tensor([VOCAB**i for i in reversed(range(NEW))])
    for _ in range(DRAWS):
        out = target.generate(PROMPT, do_sample=True, max_new_tokens=NEW, **settings, **how)
        counts[(out[0, PROMPT.shape[1] :] * place).sum()] += 1
    return counts


def test_generated_sequences_follow_the_target_while_the_draft_learns() -> None:
    settings = LAWS["all"]
    target, model = models()
    law = exact_law(target, settings)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
    config = OnlineSpecConfig(
        lookahead=4, update_when="round", update_every=1, memory_tokens=0, rank=2, alpha=2.0, lr=3e-3, replay_passes=0
    )
    draft = OnlineDraft(model, config)
    start = draft(PROMPT).logits.detach()
    torch.manual_seed(11)
    assert follows(counted(target, settings, assistant_model=draft), law, THOUSAND)
    assert draft.metrics.updates >= DRAWS  # the adapter moved all the while
    assert (draft(PROMPT).logits.detach() - start).abs().max() > 0.05


class Whims(Governor):
    """Stops early and changes its source at random, and by how likely what was drafted is to be kept."""

    whim = random.Random(3)

    def takes_part(self) -> bool:
        return True

    def plan(self, drafts: bool = True, seen: RequestStats | None = None, room: int = 0, unread: int = 0) -> Plan:
        return Plan(self.whim.randrange(4) if drafts else 0, 1.0, 0.0)

    def model_pays(self, plan: Plan, position: int, survival: float, begun: bool = True) -> bool:
        return position < plan.lookahead and survival > self.whim.uniform(0.0, 0.6)

    def guess_pays(self, plan: Plan, candidates: int, chance: float) -> bool:
        return candidates < 6 and self.whim.random() < 0.6

    def guess_beats_model(self, plan: Plan, position: int, survival: float, chance: float, begun: bool = False) -> bool:
        return position < 4 and self.whim.random() < 0.6

    def decide_prompt_scoring(self, tokens: int = 0, room: int = 0, router: object = None) -> bool:
        return self.whim.random() < 0.5


class Tastes(AdapterRouter):
    """Changes its mind about the draft at random."""

    def use_base(self, log_ratio: float | None = None) -> bool:
        return Whims.whim.random() < 0.3


class Generous(LearningBudget):
    """Learns from every request."""

    def affordable_steps(self) -> int:
        return 1


@pytest.mark.parametrize("chains", ["", "of a test"], ids=["trees", "chains"])
def test_generated_sequences_follow_the_target_whatever_drafts_and_how_far(monkeypatch, chains) -> None:
    """Whatever decides from the prefix and from q before the draw: here a memory that grows, a draft, and a governor of whims."""
    settings = LAWS["plain"]
    if chains:
        monkeypatch.setattr("hf_onlinespec.verify.loop.why_chains", lambda *args: chains)
    target, model = models()
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Whims)
    monkeypatch.setattr("hf_onlinespec.govern.governor.LearningBudget", Generous)
    monkeypatch.setattr("hf_onlinespec.govern.governor.AdapterRouter", Tastes)
    monkeypatch.setattr(Whims, "whim", random.Random(3))
    draft = OnlineDraft(model, OnlineSpecConfig(memory_tokens=200, rank=2, alpha=2.0, lr=3e-3, replay_passes=0))
    torch.manual_seed(12)
    assert follows(counted(target, settings, assistant_model=draft), exact_law(target, settings), THOUSAND)
    rounds = draft.metrics.decisions.rounds
    assert all(rounds[kind] > DRAWS / 20 for kind in ("plain", "model", "memory", "memory+model")), rounds
    assert draft.metrics.updates > DRAWS / 2


def test_the_test_can_fail() -> None:
    """The same χ² rejects a law that leans a quarter of the way to the draft's."""
    target, model = models()
    law, wrong = (exact_law(m, LAWS["plain"]) for m in (target, model))
    mixed = 0.75 * law + 0.25 * wrong
    counts = torch.bincount(
        torch.multinomial(mixed, DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)),
        minlength=len(law),
    )
    assert not follows(counts, law, THOUSAND)


def test_identical_draft_is_always_accepted_whatever_the_warpers() -> None:
    """The warpers are applied once to the draft, as to the target."""
    target = tiny_llama(1, vocab=VOCAB, layers=2)
    draft = OnlineDraft(
        tiny_llama(1, vocab=VOCAB, layers=2), OnlineSpecConfig(lookahead=5, memory_tokens=0, recycle=False)
    )
    for settings in LAWS.values():
        target.generate(PROMPT, assistant_model=draft, onlinespec=False, do_sample=True, max_new_tokens=24, **settings)
        last = draft.metrics.last
        assert last.accepted_tokens == last.drafted_tokens
        assert last.acceptance_rate == pytest.approx(1.0, abs=1e-5)
