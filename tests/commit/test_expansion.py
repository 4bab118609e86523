"""A head goes on behind several candidates at once: it says there what it says behind each alone, and nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec.commit.draft_model import Branch
from hf_onlinespec.commit.draft_trees import reads_trees
from hf_onlinespec.commit.head import HeadModel
from hf_onlinespec.commit.row_features import RowFeatures
from hf_onlinespec.govern.acceptance import RequestStats, TokenSource
from hf_onlinespec.govern.governor import Governor
from hf_onlinespec.govern.planner import Plan
from hf_onlinespec.heads.config import Eagle3Config
from hf_onlinespec.heads.eagle3 import Eagle3Head
from tests.tiny_models import tiny_gpt2, tiny_llama

VOCABULARY, READS = 32, (1, 2, 3)


def tiny_bloom(seed: int) -> PreTrainedModel:
    """It knows its positions by ALiBi."""
    torch.manual_seed(seed)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)).eval()


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(0, vocab=VOCABULARY, layers=4)


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> Eagle3Head:
    torch.manual_seed(1)
    config = Eagle3Config(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        draft_vocab_size=20,
        reads=READS,
        max_position_embeddings=64,
    )
    found = Eagle3Head(config, torch.randperm(VOCABULARY)[:20].sort().values).eval()
    found.share(target)
    return found


def alone(head: Eagle3Head, tokens: Tensor, features: Tensor, path: list[int]) -> Tensor:
    """What a head says behind a text and a path of drafted tokens, token by token: logits (ids,)."""
    cache = DynamicCache()
    out = head(tokens=tokens[:, 1:], features=features, past_key_values=cache, use_cache=True)
    for token in path:
        out = head(tokens=torch.tensor([[token]]), hidden=out.hidden[:, -1:], past_key_values=cache, use_cache=True)
    found = torch.full((VOCABULARY,), -torch.inf)
    assert head.draft_ids is not None
    found[head.draft_ids] = out.logits[0, -1]
    return found


@torch.no_grad()
def test_behind_each_candidate_it_says_what_it_says_behind_that_path_alone(
    target: PreTrainedModel, head: Eagle3Head
) -> None:
    model = OnlineDraft(head).trainable
    assert isinstance(model, HeadModel)
    tokens = torch.tensor([[3, 9, 4, 7, 2]])
    states = target(tokens[:, :-1], output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in READS], dim=-1)
    held = RowFeatures()
    reader = model.reader(None, held)
    held.take(features)
    held.keep(4, 0, ())
    with model.serving() as served:
        for _ in range(2):  # once more from the same rows, after a rollback
            chain = [11, 12, 13]
            for n in range(len(chain)):  # the last candidate is not read
                said = reader.scores(served, torch.cat([tokens, torch.tensor([chain[:n]]).long()], dim=-1))
                assert torch.allclose(said[0], alone(head, tokens, features, chain[:n]), atol=1e-5)
            assert reader.can_branch(-1, 0) and reader.can_branch(1, 2) and not reader.can_branch(2, 3)
            first = [Branch(3, -1, 0, 21), Branch(4, 0, 1, 22), Branch(5, 1, 2, 23)]
            paths = [[21], [11, 22], [11, 12, 23]]
            for row, path in zip(reader.branch(served, first), paths, strict=True):
                assert torch.allclose(row, alone(head, tokens, features, path), atol=1e-5), path
            second = [Branch(6, 3, 1, 24), Branch(7, 4, 2, 25)]
            for row, path in zip(reader.branch(served, second), [[21, 24], [11, 22, 25]], strict=True):
                assert torch.allclose(row, alone(head, tokens, features, path), atol=1e-5), path
            reader.rewind(5)
            assert not reader.can_branch(0, 1)


@torch.no_grad()
def test_a_draft_model_says_behind_each_candidate_what_it_says_behind_that_path_alone(target: PreTrainedModel) -> None:
    model = OnlineDraft(target).trainable
    reader = model.reader(None, None)
    tokens, chain = torch.tensor([[3, 9, 4, 7, 2]]), [11, 12, 13]

    def alone(path: list[int]) -> Tensor:
        logits: Tensor = target(torch.cat([tokens, torch.tensor([path]).long()], dim=-1)).logits[0, -1]
        return logits

    with model.serving() as served:
        reader.scores(served, tokens[:, :3])  # an earlier round
        for _ in range(2):
            reader.rewind(5)
            for n in range(len(chain)):  # the last candidate is not read
                reader.scores(served, torch.cat([tokens, torch.tensor([chain[:n]]).long()], dim=-1))
            assert reader.can_branch(-1, 0) and reader.can_branch(1, 2) and not reader.can_branch(2, 3)
            first = [Branch(3, -1, 0, 21), Branch(4, 0, 1, 22), Branch(5, 1, 2, 23)]
            paths = [[21], [11, 22], [11, 12, 23]]
            for row, path in zip(reader.branch(served, first), paths, strict=True):
                assert torch.allclose(row, alone(path), atol=1e-5), path
            second = [Branch(6, 3, 1, 24), Branch(7, 4, 2, 25)]
            for row, path in zip(reader.branch(served, second), [[21, 24], [11, 22, 25]], strict=True):
                assert torch.allclose(row, alone(path), atol=1e-5), path
            prefix = reader.prefix(4)
            assert prefix is not None and prefix.length == 4  # learning builds on the row, whatever was read beside it


@pytest.mark.parametrize(("make", "reads"), [(tiny_llama, True), (tiny_gpt2, True), (tiny_bloom, False)])
def test_a_draft_model_that_reads_no_trees_is_told_from_one_that_does(
    make: Callable[..., PreTrainedModel], reads: bool
) -> None:
    assert reads_trees(make(0)) is reads


class Whims(Governor):
    """Drafts, guesses and goes on behind candidates at random."""

    whim = random.Random(3)

    def takes_part(self) -> bool:
        return True

    def plan(self, drafts: bool = True, seen: RequestStats | None = None, room: int = 0, unread: int = 0) -> Plan:
        return Plan(self.whim.randrange(4) if drafts else 0, 1.0, 0.0)

    def model_pays(self, plan: Plan, position: int, survival: float, begun: bool = True) -> bool:
        return position < plan.lookahead

    def guess_pays(self, plan: Plan, candidates: int, chance: float) -> bool:
        return candidates < 16 and self.whim.random() < 0.8

    def leaves_to_expand(self, plan: Plan, chances: list[float], candidates: int) -> int:
        return self.whim.randrange(4)


@pytest.mark.parametrize("kind", ["head", "draft model"])
def test_trees_of_a_draft_that_learns_are_lossless(
    target: PreTrainedModel, head: Eagle3Head, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Whims)
    monkeypatch.setattr(Whims, "whim", random.Random(3))
    model = head if kind == "head" else tiny_llama(3, vocab=VOCABULARY)
    draft = OnlineDraft(model, update_every=1, update_when="round")
    torch.manual_seed(5)
    for _ in range(12):
        prompt = torch.randint(VOCABULARY, (1, 6))
        options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
        found = target.generate(prompt, assistant_model=draft, **options)
        assert torch.equal(found, target.generate(prompt, **options))
    assert draft.metrics.failed_drafts == draft.metrics.failed_updates == 0
    said = draft.metrics.candidates.by_source()["model"]
    assert said["verified"] > 50  # beside and behind its chain, too


def test_a_leaf_is_read_where_that_pays() -> None:
    """One step of the draft is a tenth of the target's; on a machine on which further positions are free, more of them pay."""
    chosen = {}
    for slope in (0.0, 0.05, 0.5):
        governor = Governor(0.1, 2)
        for _ in range(40):
            governor.observe([], [], 0.0, 1.0)
            for k in (1, 2, 4, 8):
                drafted = [TokenSource("model", i, (4,)) for i in range(k)]
                governor.observe(drafted, [(one, 0.7) for one in drafted], 0.1 * k, 1.0 + slope * k)
        plan = Plan(4, 1.5, 0.0, acceptance=0.7)
        chosen[slope] = [governor.leaves_to_expand(plan, chances, 4) for chances in ([0.05], [0.6], [0.6, 0.4, 0.3])]
        assert governor.leaves_to_expand(Plan(0, 1.5, 0.0, acceptance=0.7), [0.6], 4) == 0  # no model drafts
    assert chosen == {0.0: [0, 1, 3], 0.05: [0, 1, 3], 0.5: [0, 0, 0]}
