"""The table of recycled tokens: what it holds, and how the best tokens are found."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from hf_onlinespec import MemoryDraft, OnlineSpecConfig
from hf_onlinespec.commit.recycling import KEPT, RecyclingTable, best_tokens
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.govern.governor import Governor
from tests.conftest import tiny_llama

ROW = list(range(20, 20 + KEPT))


def test_the_last_best_tokens_behind_a_token_are_kept_best_first() -> None:
    table = RecyclingTable()
    table.update([3, 5], [ROW, ROW[::-1]], 64)
    assert list(table.successors(3)) == ROW and list(table.successors(5)) == ROW[::-1]
    assert not table.successors(4)  # was not read yet
    table.update([5, 7, 5], [ROW[::-1], ROW, [*ROW[1:], 2]], 64)
    assert list(table.successors(5)) == [*ROW[1:], 2], "of a token that comes twice the last one counts"
    assert list(table.successors(3)) == ROW


def test_it_takes_32_bytes_per_token_from_the_first_update_on() -> None:
    table = RecyclingTable()
    assert table.nbytes == 0 and not table.successors(3)
    for token in range(64):
        table.update([token], [ROW], 64)
        assert table.nbytes == 32 * 64


def test_another_vocabulary_begins_anew() -> None:
    table = RecyclingTable()
    table.update([3], [ROW], 64)
    table.update([4], [ROW], 48)
    assert table.vocabulary == 48 and table.nbytes == 32 * 48
    assert not table.successors(3) and list(table.successors(4)) == ROW


@pytest.mark.parametrize("token", [-1, 64, 10**6])
def test_tokens_outside_of_the_vocabulary_are_neither_kept_nor_found(token: int) -> None:
    table = RecyclingTable()
    table.update([3, 63, token, 0], [ROW] * 4, 64)
    assert not table.successors(token) and not table.successors(62)
    assert all(list(table.successors(one)) == ROW for one in (0, 3, 63))
    assert table.nbytes == 32 * 64


def test_a_vocabulary_of_fewer_tokens_has_fewer_of_them() -> None:
    table = RecyclingTable()
    table.update([1, 4], best_tokens(torch.tensor([[0.0, 4, 2, 3, 1], [4, 3, 2, 1, 0.0]])).tolist(), 5)
    assert list(table.successors(1)) == [1, 3, 2, 4, 0] and list(table.successors(4)) == [0, 1, 2, 3, 4]


SIZES = (1, 5, 8, 127, 128, 1023, 1024, 1025, 1151, 1152, 4096, 5000, 49_152)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("rows", [1, 17])
def test_the_best_tokens_are_those_of_topk(vocab: int, rows: int) -> None:
    for seed in range(3):
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(best_tokens(logits), logits.topk(min(KEPT, vocab), dim=-1).indices)
        # The largest in one piece, in the last piece, and behind the last whole one.
        for start in (0, max(0, vocab - 128), max(0, vocab - 3)):
            shifted = logits.clone()
            shifted[:, start : start + 8] += 20
            assert torch.equal(best_tokens(shifted), shifted.topk(min(KEPT, vocab), dim=-1).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [32, 1024, 4999])
def test_of_equal_logits_any_are_the_best(vocab: int, dtype: torch.dtype) -> None:
    """Few values, and so ties within pieces and across them: n different tokens, whose logits are the n largest."""
    logits = torch.randint(0, 4, (9, vocab), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0], logits[1, :-1] = 1.0, -2.0
    found = best_tokens(logits)
    assert all(len(set(row)) == KEPT for row in found.tolist())
    assert torch.equal(logits.gather(1, found), logits.topk(KEPT, dim=-1).values)


@pytest.mark.parametrize("vocab", [32, 1024, 4999])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_logits_that_are_not_finite_give_tokens_of_the_vocabulary(vocab: int, value: float) -> None:
    """Masked tokens are the last to be found; what the largest of logits without order are is topk's own matter."""
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(2))
    logits[0, ::3], logits[1, 5:], logits[2] = value, value, value
    found, expected = best_tokens(logits), logits.topk(KEPT, dim=-1)
    assert found.shape == (4, KEPT) and int(found.min()) >= 0 and int(found.max()) < vocab
    assert torch.equal(found[3], expected.indices[3])
    assert all(len(set(row)) == KEPT for row in found.tolist())
    values = logits.gather(1, found)
    assert torch.equal(values.nan_to_num(nan=7.0), expected.values.nan_to_num(nan=7.0))


def test_fewer_may_be_asked_for() -> None:
    logits = torch.randn(3, 2048, generator=torch.Generator().manual_seed(3))
    assert torch.equal(best_tokens(logits, 3), logits.topk(3, dim=-1).indices)


# Through a target.

GREEDY = {"do_sample": False, "max_new_tokens": 48, "pad_token_id": 0}
ALONE = {"memory_tokens": 0}  # recycled tokens guess, and nobody else


@pytest.fixture
def guesses_pay(monkeypatch) -> Callable[[int], None]:
    """Whatever the clock says of it here: so many guesses are verified in every round."""

    def set_number(n: int) -> None:
        monkeypatch.setattr(Governor, "guess_pays", lambda self, plan, candidates, chance: candidates < n)

    return set_number


def held(draft: MemoryDraft, vocab: int) -> dict[int, list[int]]:
    """All that the table holds."""
    assert draft.recycled is not None
    return {token: list(found) for token in range(vocab) if (found := draft.recycled.successors(token))}


def test_a_row_is_filled_only_from_what_was_fed_to_the_target(target, prompt) -> None:
    """One plain round: the last token of the prompt was fed, and shows what follows it. The token that is new was not."""
    draft = MemoryDraft(**ALONE)
    out = target.generate(prompt, do_sample=False, max_new_tokens=1, assistant_model=draft)
    with torch.no_grad():
        logits = target(prompt).logits[0, -1]
    assert held(draft, 32) == {int(prompt[0, -1]): logits.topk(KEPT).indices.tolist()}
    assert int(out[0, -1]) == held(draft, 32)[int(prompt[0, -1])][0] != int(prompt[0, -1])


def test_everything_that_was_verified_is_read_and_the_last_new_token_never_is(target, prompt, guesses_pay) -> None:
    """Of a whole request: each row is that of a place behind this token in what was kept, or behind a rejected guess."""
    guesses_pay(3)
    draft = MemoryDraft(**ALONE)
    out = target.generate(prompt, do_sample=False, max_new_tokens=24, assistant_model=draft)[0]
    start = prompt.shape[1]
    with torch.no_grad():
        best = target(out[None]).logits[0].topk(KEPT).indices.tolist()
    rows = held(draft, 32)
    last = {
        int(out[i]): best[i] for i in range(start - 1, len(out) - 1)
    }  # the last place of each token, if nothing was rejected
    assert rows.keys() >= last.keys() and draft.metrics.last.drafted_tokens > draft.metrics.last.accepted_tokens
    unread = set(range(32)) - set(out[start - 1 : -1].tolist())
    rejected = draft.metrics.last.drafted_tokens - draft.metrics.last.accepted_tokens
    assert 0 < len(rows) <= 32 - len(unread) + rejected
    assert sum(rows[token] == row for token, row in last.items()) > len(last) // 2


def test_rejected_branches_are_read_too(target, prompt, guesses_pay) -> None:
    """Their logits are known, and were computed behind the branch itself."""
    guesses_pay(1)
    draft = MemoryDraft(**ALONE)
    assert draft.recycled is not None
    right = target.generate(prompt, do_sample=False, max_new_tokens=2)[0]
    wrong = (int(right[-2]) + 1) % 32
    draft.recycled.update([int(prompt[0, -1])], [[wrong] * KEPT], 32)
    target.generate(prompt, do_sample=False, max_new_tokens=2, assistant_model=draft)
    with torch.no_grad():
        logits = target(torch.cat([prompt, torch.tensor([[wrong]])], dim=-1)).logits[0, -1]
    assert draft.metrics.last.drafted_tokens == 1 and draft.metrics.last.accepted_tokens == 0
    assert held(draft, 32)[wrong] == logits.topk(KEPT).indices.tolist()


@pytest.mark.parametrize("guesses", [4, 24])
def test_recycled_tokens_alone_make_a_second_request_shorter(pair: EmbeddedPair, guesses_pay, guesses: int) -> None:
    """And the first one, once it repeats itself; both say what the target says."""
    ids = pair.tokenizer(prompts("sql")[0], return_tensors="pt").input_ids
    plain = pair.target.generate(ids, **GREEDY)
    guesses_pay(guesses)
    draft, lengths = MemoryDraft(**ALONE), []
    for _ in range(2):
        assert torch.equal(pair.target.generate(ids, assistant_model=draft, **GREEDY), plain)
        lengths.append(draft.metrics.last.acceptance_length)
    assert lengths[1] > 1.3 and lengths[1] > lengths[0] > 1.0
    vocab = pair.target.config.vocab_size
    assert draft.recycled is not None and draft.recycled.nbytes == 32 * vocab


def test_more_guesses_keep_more_tokens(pair: EmbeddedPair, guesses_pay) -> None:
    """Of a tree of 24, more than of one of 4."""
    ids = pair.tokenizer(prompts("sql")[0], return_tensors="pt").input_ids
    lengths = []
    for n in (4, 24):
        guesses_pay(n)
        draft = MemoryDraft(**ALONE)
        for _ in range(2):
            pair.target.generate(ids, assistant_model=draft, **GREEDY)
        lengths.append(draft.metrics.last.acceptance_length)
    assert lengths[1] > lengths[0]


def test_a_number_of_tokens_asks_for_no_recycled_ones(target, prompt) -> None:
    draft = MemoryDraft(OnlineSpecConfig(lookahead=4, **ALONE))
    for _ in range(2):
        target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft)
    assert draft.metrics.drafted_tokens == 0 and draft.recycled is not None and draft.recycled.nbytes == 0


def test_without_recycling_there_is_no_table(target, prompt) -> None:
    draft = MemoryDraft(recycle=False, **ALONE)
    for _ in range(2):
        target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft)
    assert draft.recycled is None and draft.metrics.drafted_tokens == 0


def test_a_request_that_is_only_drafted_leaves_nothing_in_the_table(target, prompt) -> None:
    draft = MemoryDraft()
    target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft, onlinespec=False)
    assert draft.recycled is not None and draft.recycled.nbytes == 0
    target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft)
    before = held(draft, 32)
    target.generate((prompt + 7) % 32, do_sample=False, max_new_tokens=12, assistant_model=draft, onlinespec=False)
    assert held(draft, 32) == before and before


def test_nothing_of_the_table_is_saved(target, prompt) -> None:
    states = []
    for recycle in (True, False):
        draft = MemoryDraft(recycle=recycle)
        for _ in range(2):
            target.generate(prompt, do_sample=False, max_new_tokens=12, assistant_model=draft)
        states.append(draft.state())
    again = MemoryDraft()
    again.resume(states[0])
    assert not states[0].tensors and states[0].values.keys() == states[1].values.keys()
    assert again.recycled is not None and again.recycled.nbytes == 0


@pytest.mark.parametrize("sample", [False, True])
def test_a_target_of_five_tokens_is_guessed_for(sample: bool, guesses_pay) -> None:
    guesses_pay(6)
    target, draft = tiny_llama(1, vocab=5, layers=2), MemoryDraft(**ALONE)
    asked = torch.tensor([[1, 2, 3]])
    out = target.generate(asked, do_sample=sample, max_new_tokens=24, assistant_model=draft)
    assert draft.metrics.accepted_tokens > 0 and draft.metrics.failed_drafts == 0
    if not sample:
        assert torch.equal(out, target.generate(asked, do_sample=False, max_new_tokens=24))
