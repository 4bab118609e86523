"""Several rows read by a draft in one forward: each is told what it would be told alone, whatever the others read and lose."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.commit.batch_reader import BatchReader, reads_rows
from hf_onlinespec.commit.draft_model import DraftModel, Reader
from hf_onlinespec.commit.row_features import RowFeatures
from hf_onlinespec.metrics import Counts
from tests.drafts import move
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_windowed

VOCAB = 32


@dataclass
class Row:
    """A row as the draft reads it, padded on the left."""

    tokens: Tensor
    padding: int
    features: RowFeatures | None = None


def rows_of(rng: random.Random, lengths: list[int]) -> dict[int, Row]:
    longest = max(lengths)
    found = {}
    for i, length in enumerate(lengths):
        tokens = [rng.randrange(1, VOCAB) for _ in range(length)]
        found[i] = Row(torch.tensor([[0] * (longest - length) + tokens]), longest - length)
    return found


@torch.no_grad()
def alone(model: PreTrainedModel, prefix: Tensor, padding: int) -> Tensor:
    logits: Tensor = model(input_ids=prefix[:, padding:], use_cache=False).logits[:, -1]
    return logits


def check_prefix(draft: DraftModel, reader: Reader, row: Row) -> None:
    """Learning computes on what was read what it computes on the whole row."""
    tokens, mask = row.tokens, torch.tensor([[0] * row.padding + [1]])
    prefix = reader.prefix(tokens.shape[1] - 3)
    if prefix is not None and tokens.shape[1] - row.padding > 3:
        assert prefix.length > row.padding
        whole, rest = (draft.training_logits(tokens, 2, mask, prefix=one) for one in (None, prefix))
        assert torch.allclose(whole, rest, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@torch.no_grad()
def test_each_row_is_told_what_it_is_told_alone(make) -> None:
    """Rows of any lengths that draft more or less than others, or nothing, lose some of it, and leave."""
    model, rng = make(2), random.Random(1)
    draft = OnlineDraft(model, OnlineSpecConfig(rank=2)).trainable
    checked = 0
    for _ in range(4):
        rows = rows_of(rng, [rng.randrange(1, 12) for _ in range(5)])
        reader = draft.shared_reader(rows)
        assert reader is not None
        views = {i: reader.row(i) for i in rows}
        with draft.serving() as served:
            for step in range(6):
                if step == 3:  # others join, which have read their prompts
                    more = {i + 5: row for i, row in rows_of(rng, [rng.randrange(1, 20) for _ in range(2)]).items()}
                    others = draft.shared_reader(more)
                    assert others is not None
                    others.scores(served, {i: row.tokens for i, row in more.items()})
                    for i, row in more.items():
                        others.row(i).rewind(row.tokens.shape[1])
                    reader.join(others)
                    views |= {i: reader.row(i) for i in more}
                    rows |= more
                wanted = {i: rng.randrange(4) for i in rows}
                prefixes = {i: row.tokens for i, row in rows.items()}
                for depth in range(max(wanted.values())):
                    asked = [i for i in rows if wanted[i] > depth]
                    rng.shuffle(asked)
                    found = reader.scores(served, {i: prefixes[i] for i in asked})
                    for i, said in zip(asked, found, strict=True):
                        assert torch.allclose(said, alone(served, prefixes[i], rows[i].padding)[0], atol=1e-4)
                        checked += 1
                        drafted = torch.tensor([[rng.randrange(1, VOCAB)]])
                        prefixes[i] = torch.cat([prefixes[i], drafted], dim=1)
                for i, row in rows.items():
                    kept = rng.randint(row.tokens.shape[1], prefixes[i].shape[1])
                    own = torch.tensor([[rng.randrange(1, VOCAB)]])
                    row.tokens = torch.cat([prefixes[i][:, :kept], own], dim=1)
                    if views[i].length:
                        views[i].rewind(row.tokens.shape[1], kept)
                    check_prefix(draft, views[i], row)
                if len(rows) > 2 and views[min(rows)].length and rng.random() < 0.3:
                    views[min(rows)].leave()
                    del rows[min(rows)]
    assert checked > 60


@torch.no_grad()
def test_what_follows_a_sibling_is_read_anew() -> None:
    """A path that leaves the chain has as many tokens, and others: in one row and in several."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(rank=2)).trainable
    rows = {i: Row(torch.tensor([[3 + i, 9, 4]]), 0) for i in range(2)}
    chain, kept = torch.tensor([[11, 12]]), torch.tensor([[21, 5]])
    shared = draft.shared_reader(rows)
    assert shared is not None
    with draft.serving() as served:
        for reader in (draft.reader(None, None), shared.row(0)):
            reader.scores(served, torch.cat([rows[0].tokens, chain], dim=1))
            reader.rewind(5, 3)
            now = torch.cat([rows[0].tokens, kept], dim=1)
            assert torch.allclose(reader.scores(served, now), alone(served, now, 0), atol=1e-5)


def test_holes_are_closed_before_they_are_half_of_the_cache() -> None:
    model, places = tiny_llama(2), list[int]()
    rows = rows_of(random.Random(2), [6, 6])
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: places.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    reader = BatchReader(model.config, torch.device("cpu"), 256, {}, rows)
    with torch.no_grad():
        for step in range(40):  # one row keeps what it reads, the other one loses it, in turns
            reader.scores(model, {i: torch.cat([row.tokens, torch.tensor([[1, 2, 3]])], 1) for i, row in rows.items()})
            for i, row in rows.items():
                kept = torch.tensor([[1, 2, 3, 4]]) if i == step % 2 else torch.tensor([[4]])
                row.tokens = torch.cat([row.tokens, kept], dim=1)
                reader.rewind(i, row.tokens.shape[1])
    hook.remove()
    most = max(row.tokens.shape[1] for row in rows.values())
    assert most < places[-1] + 4 and max(places) < 1.5 * most


def test_drafts_whose_rows_cannot_be_read_together_are_known() -> None:
    rows = rows_of(random.Random(1), [3, 4])
    assert OnlineDraft(tiny_windowed(3), rank=2).trainable.shared_reader(rows) is None
    model = tiny_llama(1)
    assert reads_rows(model, {})
    forward = model.forward

    def blind(*args: object, attention_mask: Tensor, **kwargs: object) -> object:
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    model.forward = blind  # type: ignore[method-assign]
    assert not reads_rows(model, {})


def test_prompts_that_are_scored_together_say_what_each_says_alone() -> None:
    draft = OnlineDraft(tiny_llama(2), rank=2)
    rows, model = rows_of(random.Random(3), [5, 9, 2, 7]), draft.trainable
    tokens = torch.cat([row.tokens for row in rows.values()])
    mask = torch.tensor([[0] * row.padding + [1] * (9 - row.padding) for row in rows.values()])
    assert model.prompt_log_ratios(tokens, mask, 128) == [0.0] * 4  # nothing was learned
    draft.learning.learn_segment(
        Segment(tokens[1:2], [Teacher.from_logits(torch.randn(4, VOCAB))], None, 1.0), Counts()
    )
    move(draft)
    for most in (128, 6):
        found = model.prompt_log_ratios(tokens, mask, most)
        for row, ratio in zip(rows.values(), found, strict=True):
            alone = model.prompt_log_ratio(row.tokens[:, row.padding :], None, most)[0]
            assert ratio == pytest.approx(alone, abs=1e-4)
    assert len({round(ratio, 3) for ratio in found}) == 4
