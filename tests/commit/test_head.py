"""A draft head serves: it reads true features of every kept token and nothing else, whatever was proposed and rejected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec._compat.hidden_states import hidden_states_inputs
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.commit.draft_model import Branch, Reader, SharedReader, TreeReader
from hf_onlinespec.commit.head import HeadModel
from hf_onlinespec.commit.row_features import RowFeatures
from hf_onlinespec.govern.planner import Plan
from hf_onlinespec.heads.base import Head
from hf_onlinespec.models.source import Source
from tests.heads.tiny import KINDS, tiny_head
from tests.tiny_models import CACHE, tiny_llama
from tests.verify.test_sampling_law import Whims

CLOSE = dict(rtol=1e-5, atol=1e-5)
WILD = dict(do_sample=True, temperature=4.0, top_k=0)  # what is drawn is kept about every second time
ALONE = dict(memory_tokens=0, recycle=False)


class Recorded(TreeReader):
    """A reader that notes what was asked of it and what it said."""

    def __init__(self, reader: Reader, found: list[tuple[int, Tensor, Tensor]]) -> None:
        self._reader, self._found, self._row = reader, found, 0
        self._paths: dict[int, Tensor] = {}  # by candidate of this round that was read: the tokens up to it

    @property
    def source(self) -> Source | None:
        return self._reader.source

    @property
    def length(self) -> int:
        return self._reader.length

    def can_draft(self, length: int) -> bool:
        self._row, self._paths = length, {}
        return self._reader.can_draft(length)

    def scores(self, served: PreTrainedModel, prefix: Tensor) -> Tensor:
        scores = self._reader.scores(served, prefix)
        self._found.append((self._row, prefix.clone(), scores.clone()))
        self._paths |= {at - self._row - 1: prefix[:, :at].clone() for at in range(self._row, prefix.shape[1] + 1)}
        return scores

    @property
    def reads_trees(self) -> bool:
        return self._reader.reads_trees

    def can_branch(self, parent: int, depth: int) -> bool:
        return self._reader.can_branch(parent, depth)

    def branch(self, served: PreTrainedModel, branches: Sequence[Branch]) -> Tensor:
        scores = self._reader.branch(served, branches)
        for branch, own in zip(branches, scores, strict=True):
            assert branch.depth == self._paths[branch.parent].shape[1] - self._row
            path = torch.cat([self._paths[branch.parent], torch.tensor([[branch.token]])], dim=1)
            self._paths[branch.node] = path
            self._found.append((self._row, path, own[None].clone()))
        return scores

    def rewind(self, length: int, same: int | None = None) -> None:
        self._reader.rewind(length, same)

    @property
    def shared(self) -> SharedReader | None:
        return self._reader.shared

    def leave(self) -> None:
        self._reader.leave()

    def prefix(self, most: int) -> Prefix | None:
        return self._reader.prefix(most)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor]]:
    """Of every token that a head drafts: tokens of the row, these and those drafted before (1, L), and its scores (1, ids)."""
    found: list[tuple[int, Tensor, Tensor]] = []
    plain = HeadModel.reader

    def reader(self: HeadModel, mask: Tensor | None, features: RowFeatures | None, source: Source | None) -> Reader:
        return Recorded(plain(self, mask, features, source), found)

    monkeypatch.setattr(HeadModel, "reader", reader)
    return found


@torch.no_grad()
def said(head: Head, target: PreTrainedModel, row: int, tokens: Tensor, before: int = 0, unread: int = 0) -> Tensor:
    """What a head says behind `tokens` (1, L), of which the first `row` are the row's: over the true features of all of it, at once.

    Args:
        before: tokens in front of the row that the target alone has read; padding is taken away before.
        unread: tokens of the row whose features the head is not given.
    """
    read = target(tokens[:, : before + row], **hidden_states_inputs(head.reads)).hidden_states
    features = torch.cat([read[i] for i in head.reads], dim=-1)[:, before + unread : -1]
    out = head(tokens[:, before + unread + 1 : before + row], features=features, use_cache=True)
    for at in range(before + row, tokens.shape[1]):
        out = head(tokens[:, at : at + 1], hidden=out.hidden[:, -1:], past_key_values=out.cache, use_cache=True)
    scores = out.logits[:, -1]
    if head.draft_ids is None:
        return scores
    return torch.full((1, head.config.vocab_size), -torch.inf).index_copy(1, head.draft_ids, scores)


def check(found: list[tuple[int, Tensor, Tensor]], head: Head, target: PreTrainedModel, **where: int) -> None:
    """Everything that was recorded is what the head says when it reads the whole text at once."""
    assert found
    for row, tokens, scores in found:
        torch.testing.assert_close(scores, said(head, target, row, tokens, **where), **CLOSE)


def target_of(kind: str = "", **settings: Any) -> PreTrainedModel:
    return tiny_llama(1, vocab=24, layers=3, initializer_range=0.3, **settings)


def lengths(found: list[tuple[int, Tensor, Tensor]]) -> tuple[set[int], set[int]]:
    """How many tokens were drafted in a round, and how many a round kept."""
    drafted: dict[int, int] = {}
    for row, tokens, _ in found:
        drafted[row] = tokens.shape[1] - row + 1
    rows = sorted(drafted)
    return set(drafted.values()), {b - a for a, b in pairwise(rows)}


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_drafted_tokens_are_read_from_true_features_after_every_rejection(kind: str, length: int, recorded) -> None:
    target = target_of()
    head = tiny_head(kind, target)
    draft = OnlineDraft(head, lookahead=4, **ALONE)
    target.generate(
        torch.arange(1, length + 1)[None], assistant_model=draft, onlinespec=False, max_new_tokens=60, **WILD
    )
    check(recorded, head, target)
    drafted, kept = lengths(recorded)
    assert max(drafted) == (4 if head.most is None else 3) and 1 in kept and len(kept) > 2


class Branching(Whims):
    """Goes on behind some of the leaves."""

    def leaves_to_expand(self, plan: Plan, chances: Sequence[float], candidates: int) -> int:
        return self.whim.randrange(len(chances) + 1) if candidates < 8 else 0


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_inside_of_the_chain_and_trees_leave_no_trace(kind: str, recorded, monkeypatch) -> None:
    target = target_of()
    head = tiny_head(kind, target)
    monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Branching)
    monkeypatch.setattr(Whims, "whim", random.Random(5))
    draft = OnlineDraft(head, lr=1e-30)  # it remembers, and learns nothing
    for seed in range(3):
        torch.manual_seed(seed)
        prompt = torch.tensor([[3, 14, 15, 9, 2, 6]])
        target.generate(prompt, assistant_model=draft, max_new_tokens=60, **WILD | {"temperature": 1.5})
    check(recorded, head, target)
    rounds = draft.metrics.decisions.rounds
    branches = sum(
        len({tuple(tokens[0].tolist()) for at, tokens, _ in recorded if at == row}) > 4 for row, *_ in recorded
    )
    assert branches > 5 or head.most is not None
    assert all(rounds[kind] > 5 for kind in ("plain", "model", "memory", "memory+model")), rounds


def test_a_prompt_that_is_padded_on_the_left_is_read_without_its_padding(recorded) -> None:
    target = target_of()
    head = tiny_head("EAGLE-3", target)
    draft = OnlineDraft(head, lookahead=3, **ALONE)
    prompt, mask = torch.tensor([[0, 0, 0, 5, 7, 11, 2]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    how = dict(assistant_model=draft, onlinespec=False, attention_mask=mask, max_new_tokens=30)
    target.generate(prompt, **how, **WILD)
    check([(row - 3, tokens[:, 3:], scores) for row, tokens, scores in recorded], head, target)


@pytest.mark.parametrize("kind", ["EAGLE-3", "EAGLE-1"])
def test_a_prompt_that_is_read_in_pieces(kind: str, recorded) -> None:
    target = target_of()
    head = tiny_head(kind, target)
    draft = OnlineDraft(head, lookahead=3, **ALONE)
    how = dict(assistant_model=draft, onlinespec=False, prefill_chunk_size=4, max_new_tokens=20)
    target.generate(torch.arange(1, 12)[None], **how, **WILD)
    check(recorded, head, target)


@pytest.mark.parametrize("held", [5, 8])
@pytest.mark.parametrize("given", ["all tokens", "new tokens"])
def test_behind_the_cache_of_an_earlier_turn_the_new_tokens_are_read(given: str, held: int, recorded) -> None:
    target = target_of()
    head = tiny_head("EAGLE-3", target)
    draft = OnlineDraft(head, lookahead=3, **ALONE)
    text, cache = torch.arange(1, 10)[None], DynamicCache(config=target.config)
    with torch.no_grad():
        target(text[:, :held], **{CACHE: cache}, use_cache=True)
    how = dict(assistant_model=draft, onlinespec=False, max_new_tokens=30)
    if given == "all tokens":
        target.generate(text, **{CACHE: cache}, **how, **WILD)
        check(recorded, head, target, unread=held)
        return
    mask = torch.ones_like(text)
    target.generate(text[:, held:], **{CACHE: cache}, attention_mask=mask, **how, **WILD)
    whole = [(row, torch.cat([text[:, :held], tokens], dim=1), scores) for row, tokens, scores in recorded]
    check(whole, head, target, before=held)


def test_of_a_long_prompt_the_newest_tokens_are_read(recorded, monkeypatch) -> None:
    """And of a long answer, everything: what was read is in the head's own cache."""
    monkeypatch.setattr("hf_onlinespec.commit.row_model.MOST_HELD", 6)
    target = target_of()
    head = tiny_head("EAGLE-3", target)
    draft = OnlineDraft(head, lookahead=3, **ALONE)
    target.generate(torch.arange(1, 17)[None], assistant_model=draft, onlinespec=False, max_new_tokens=40, **WILD)
    check(recorded, head, target, unread=10)
