"""Several rows read by a draft head in one forward: each is told what a reader of its own is told."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft
from hf_onlinespec.commit.draft_model import DraftModel, Reader, SharedReader
from hf_onlinespec.commit.row_features import RowFeatures
from tests.heads.tiny import KINDS, tiny_head
from tests.tiny_models import tiny_llama

VOCAB = 32


@dataclass
class Row:
    """A row as a draft reads it, with the target's features of its tokens but the last."""

    tokens: Tensor
    padding: int
    features: RowFeatures
    alone: Reader

    def grow(self, drafted: Tensor, kept: int, own: int, width: int) -> None:
        """The target has kept some of the drafted tokens (1, n), and says one of its own."""
        length, n = self.tokens.shape[1], drafted.shape[1]
        self.features.take(torch.randn(1, length - self.features.end + n, width))
        self.features.keep(length, n, tuple(range(kept)))
        self.tokens = torch.cat([self.tokens, drafted[:, :kept], torch.tensor([[own]])], dim=1)


class Case:
    """Rows that are read together, and each by itself."""

    def __init__(self, kind: str, seed: int) -> None:
        self.target = target = tiny_llama(1, layers=2)
        head = tiny_head(kind, target)
        head.share(target)
        self.draft: DraftModel = OnlineDraft(head, rank=2).trainable
        self.most = self.draft.most or 4
        self.width = len(self.draft.reads) * target.config.hidden_size
        self.rng, self.rows, self.numbers = random.Random(seed), dict[int, Row](), itertools.count()
        torch.manual_seed(seed)

    def token(self) -> int:
        return self.rng.randrange(1, VOCAB)

    def begin(self, lengths: list[int]) -> dict[int, Row]:
        """Prompts, which the target has read."""
        found: dict[int, Row] = {}
        longest = max(lengths)
        for length in lengths:
            tokens = torch.tensor([[0] * (longest - length) + [self.token() for _ in range(length)]])
            features = RowFeatures(longest - length)
            row = Row(tokens, longest - length, features, self.draft.reader(None, features))
            row.grow(tokens[:, :0], 0, self.token(), self.width)
            found[next(self.numbers)] = row
        return found

    def drafted(self, served: PreTrainedModel, shared: SharedReader) -> tuple[dict[int, Tensor], int]:
        """A round in which rows draft more or less than others, or nothing: what was drafted, and how often they were told the same."""
        lengths = {i: row.tokens.shape[1] for i, row in self.rows.items()}
        wanted = {i: self.rng.randrange(self.most + 1) for i in self.rows}
        prefixes, told = {i: row.tokens for i, row in self.rows.items()}, 0
        while asked := [i for i in self.rows if prefixes[i].shape[1] - lengths[i] < wanted[i]]:
            self.rng.shuffle(asked)
            found = shared.scores(served, {i: prefixes[i] for i in asked})
            for i, said in zip(asked, found, strict=True):
                expected = self.rows[i].alone.scores(served, prefixes[i])[0]
                assert torch.allclose(said, expected, atol=1e-4)
                told += 1
                guesses = [self.token() for _ in range(self.rng.randint(1, 2))]  # a second one comes from elsewhere
                prefixes[i] = torch.cat([prefixes[i], torch.tensor([guesses])], dim=1)
        return {i: prefix[:, lengths[i] :] for i, prefix in prefixes.items()}, told


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_is_told_what_a_reader_of_its_own_is_told(kind) -> None:
    """Rows of any lengths lose some of what was drafted, join and leave; of one the target's prefix is not known any more."""
    case = Case(kind, 3)
    case.rows = case.begin([3, 9, 5, 1])
    shared = case.draft.shared_reader(case.rows)
    assert shared is not None and shared.size == 4
    views, told = {i: shared.row(i) for i in case.rows}, 0
    with case.draft.serving() as served:
        for step in range(12):
            if step == 4:  # others join, which have read their prompts
                more = case.begin([2, 11])
                others = case.draft.shared_reader(more)
                assert others is not None
                others.scores(served, {i: row.tokens for i, row in more.items()})
                shared.join(others)
                case.rows |= more
                views |= {i: shared.row(i) for i in more}
            if step == 8:
                row = case.rows[1]
                row.tokens = torch.cat([row.tokens, torch.ones(1, 5, dtype=torch.long)], dim=1)
                row.features.take(torch.randn(1, 2, case.width))
                row.features.keep(row.tokens.shape[1] - 1, 0, ())
            drafted, same = case.drafted(served, shared)
            told += same
            for i, row in case.rows.items():
                row.grow(drafted[i], case.rng.randint(0, drafted[i].shape[1]), case.token(), case.width)
                for reader in (views[i], row.alone):
                    if reader.length:
                        reader.rewind(row.tokens.shape[1])
                assert views[i].can_draft(row.tokens.shape[1]) and not views[i].can_draft(row.tokens.shape[1] + 1)
            if step in (2, 9, 10):
                gone = max(case.rows) if step > 8 else 0
                read = views[gone].length
                views[gone].leave()
                assert views[gone].length == read, "learning asks after the end"
                del case.rows[gone]
    assert told > 50 and len(case.rows) == 3
