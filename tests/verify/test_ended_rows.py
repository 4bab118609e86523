"""A batch that goes on in the cache of an earlier turn, plain decoding's or our own; and the cache that it leaves."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError, online_memory
from tests.chi_square import THOUSAND, follows
from tests.fakes import PlainDraft
from tests.heads.tiny import tiny_head
from tests.tiny_models import CACHE, tiny_gpt2, tiny_llama
from tests.verify.test_batches import Scripted, padded, prompts

STOPS = [5, 9, 21]
CALL: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 14,
    "eos_token_id": STOPS,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
}
FIXED = OnlineSpecConfig(lookahead=3, update_every=1, rank=2, alpha=2.0)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


@dataclass
class Turn:
    """What `generate` is given."""

    tokens: Tensor
    mask: Tensor
    new_only: bool = False

    def next(self, sequences: Tensor, seed: int) -> Turn:
        """The turn after this one was answered: more tokens of each row, as many as a random number says, padded on the left."""
        answers = sequences[:, self.tokens.shape[1] :]
        stops = torch.isin(answers, torch.tensor(STOPS)).long()
        said = ((stops.cumsum(1) - stops) == 0).long()  # a stop is the last token that was said
        rng = random.Random(seed)
        more = padded(prompts(tuple(rng.randrange(1, 7) for _ in sequences), seed + 100))
        return Turn(
            torch.cat([sequences, more["input_ids"]], dim=1),
            torch.cat([self.mask, said, more["attention_mask"]], dim=1),
            self.new_only,
        )

    def inputs(self, cache: Any) -> dict[str, Any]:
        held = cache.get_seq_length() if self.new_only else 0
        return {"input_ids": self.tokens[:, held:], "attention_mask": self.mask, CACHE: copy.deepcopy(cache)}

    def whole(self, out: Tensor) -> Tensor:
        """All tokens of a result, where it has but the new ones of a turn."""
        return torch.cat([self.tokens, out[:, -(out.shape[1] - self.tokens.shape[1]) :]], dim=1)

    def row(self, i: int) -> Tensor:
        return self.tokens[i : i + 1, self.mask[i] == 1]


def first_turn(seed: int) -> Turn:
    rng = random.Random(seed)
    inputs = padded(prompts(tuple(rng.randrange(1, 20) for _ in range(rng.randrange(2, 6))), seed))
    return Turn(inputs["input_ids"], inputs["attention_mask"])


def scripted(target: PreTrainedModel, turn: Turn, cache: Any, seed: int, trees: bool) -> Any:
    """What a scripted draft makes of a turn: right in some rows, wrong in others."""
    plain = target.generate(**turn.inputs(cache), **CALL)
    rng = random.Random(seed)
    proposer = Scripted(plain.sequences, [rng.random() < 0.6 for _ in turn.tokens], seed, trees)
    return target.generate(**turn.inputs(cache), assistant_model=PlainDraft(proposer), **CALL)


@pytest.mark.parametrize("new_only", [False, True], ids=["all tokens passed", "only the new tokens passed"])
def test_three_turns_are_those_of_plain_batches_in_either_s_cache(target, new_only) -> None:
    """Rows of different lengths, some of which ended earlier than others; and each row is its own solo run."""
    ragged = 0
    for seed in range(5):
        turn, ours, theirs = first_turn(seed), DynamicCache(config=target.config), DynamicCache(config=target.config)
        turn.new_only = new_only
        for number in range(3):
            plain = target.generate(**turn.inputs(theirs), **CALL)
            drafted = [scripted(target, turn, cache, seed, number != 1) for cache in (ours, theirs)]
            in_ours = target.generate(**turn.inputs(ours), **CALL)
            for found in (*drafted, in_ours):
                assert torch.equal(found.sequences, plain.sequences), (seed, number)
                assert found[CACHE].get_seq_length() == plain[CACHE].get_seq_length()
            whole = plain.sequences
            if new_only and number:
                whole = torch.cat([turn.tokens[:, : theirs.get_seq_length()], whole], dim=1)
            row = seed % len(turn.tokens)
            alone = target.generate(turn.row(row), **CALL).sequences[0, turn.row(row).shape[1] :]
            assert torch.equal(alone, whole[row, turn.tokens.shape[1] :][: len(alone)])
            ours, theirs = drafted[number % 2][CACHE], plain[CACHE]
            turn = turn.next(whole, seed + number)
            ragged += not bool((turn.mask[:, 1:] >= turn.mask[:, :-1]).all())
    assert ragged > 5


def test_a_cache_that_was_passed_is_filled_without_being_asked_for_in_the_result(target) -> None:
    turn, call = first_turn(3), CALL | {"return_dict_in_generate": False}
    cache, theirs = DynamicCache(), DynamicCache()
    for _ in range(2):
        plain = target.generate(turn.tokens, attention_mask=turn.mask, **{CACHE: theirs}, **call)
        ours = target.generate(turn.tokens, attention_mask=turn.mask, **{CACHE: cache}, onlinespec=True, **call)
        assert torch.equal(plain, ours) and cache.get_seq_length() == theirs.get_seq_length() > 0
        turn = turn.next(plain, 5)


def test_a_cache_that_holds_the_whole_prompts(target) -> None:
    """Their last tokens are read again, as of one row."""
    turn, cache = first_turn(1), DynamicCache(config=target.config)
    plain = target.generate(turn.tokens, attention_mask=turn.mask, **CALL)
    with torch.no_grad():
        positions = (turn.mask.cumsum(1) - 1).clamp_min(0)
        target(turn.tokens, attention_mask=turn.mask, position_ids=positions, **{CACHE: cache})
    assert torch.equal(plain.sequences, target.generate(**turn.inputs(cache), onlinespec=True, **CALL).sequences)


def test_a_table_of_positions_in_a_later_turn() -> None:
    target = tiny_gpt2(4)
    turn = first_turn(4)
    first = target.generate(turn.tokens, attention_mask=turn.mask, assistant_model=OnlineDraft(tiny_gpt2(4)), **CALL)
    turn = turn.next(first.sequences, 1)
    plain = target.generate(**turn.inputs(first[CACHE]), **CALL)
    ours = target.generate(**turn.inputs(first[CACHE]), onlinespec=True, **CALL)
    assert torch.equal(plain.sequences, ours.sequences)


@pytest.mark.parametrize("who", ["model", "memory", "EAGLE-3", "Hydra mlp"])
def test_what_drafts_goes_on_in_a_later_turn_and_learns(target, who) -> None:
    """It is shown the padding behind earlier answers on the left: a good draft's tokens are accepted as in any turn."""
    turn = first_turn(2)
    first = target.generate(turn.tokens, attention_mask=turn.mask, **CALL)
    turn, call = turn.next(first.sequences, 2), CALL | {"max_new_tokens": 24, "eos_token_id": 31}
    assert not bool((turn.mask[:, 1:] >= turn.mask[:, :-1]).all())
    plain = target.generate(**turn.inputs(first[CACHE]), **call)
    if who == "memory":
        draft: Any = online_memory(target, FIXED, anew=True)
        how: dict[str, Any] = {"onlinespec": True}
    else:
        draft = OnlineDraft(tiny_llama(1, layers=2) if who == "model" else tiny_head(who, target), FIXED)
        how = {"assistant_model": draft}
    for _ in range(2):
        ours = target.generate(**turn.inputs(first[CACHE]), **how, **call)
        assert torch.equal(plain.sequences, ours.sequences)
    metrics = draft.metrics
    assert not metrics.failed_drafts and not metrics.failed_updates and metrics.requests == 2
    assert metrics.accepted_tokens > 20
    if who == "model":
        assert metrics.acceptance_length > 2.5
    if who != "memory":
        texts = {tuple(feedback.tokens.tolist()) for feedback in draft.learning.replayed()}
        rows = len(turn.tokens)
        assert metrics.updates > 0 and len(texts) >= 1
        if who == "model":  # what is kept of a row has no padding
            said = [plain.sequences[i, turn.tokens.shape[1] :].tolist() for i in range(rows)]
            whole = {
                (*turn.row(i)[0].tolist(), *said[i][: said[i].index(31) + 1 if 31 in said[i] else None])
                for i in range(rows)
            }
            assert texts == whole


class RaisesLater(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._length:
            raise RuntimeError("of a test")
        return scores


def test_a_call_that_fails_leaves_the_cache_as_it_was(target) -> None:
    turn = first_turn(6)
    first = target.generate(turn.tokens, attention_mask=turn.mask, **CALL)
    turn, cache = turn.next(first.sequences, 3), first[CACHE]
    plain, inputs = target.generate(**turn.inputs(cache), **CALL), turn.inputs(cache) | {CACHE: cache}
    raises = LogitsProcessorList([RaisesLater(turn.tokens.shape[1] + 4)])
    with pytest.raises(RuntimeError, match="of a test"):
        target.generate(**inputs, onlinespec=True, logits_processor=raises, **(CALL | {"eos_token_id": 31}))
    assert torch.equal(plain.sequences, target.generate(**inputs, onlinespec=True, **CALL).sequences)


def test_a_cache_of_other_rows_is_refused_by_name_before_any_work(target) -> None:
    first = target.generate(torch.tensor([[3, 4, 5]]), **CALL)
    two = first.sequences.repeat(2, 1)
    for tokens, more in ((two, {}), (first.sequences, {"num_return_sequences": 2, "do_sample": True})):
        with pytest.raises(UnsupportedError, match="tokens of 1 rows, and 2 are to be generated"):
            target.generate(tokens, **{CACHE: first[CACHE]}, onlinespec=True, **(CALL | more))


NEW, WORDS, CALLS, ROWS = 2, 6, 40, 32


def test_every_row_follows_the_target_s_law_in_a_later_turn() -> None:
    flat: dict[str, Any] = {"vocab": WORDS, "initializer_range": 0.2}
    target, model = tiny_llama(1, layers=2, **flat), tiny_llama(2, **flat)
    draft = OnlineDraft(
        model,
        OnlineSpecConfig(
            lookahead=3, update_every=1, rank=2, alpha=2.0, lr=3e-3, replay_passes=0, update_when="request"
        ),
    )
    call = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
    rows = [[1, 4], [2, 3, 5, 1]]
    inputs = {name: value.repeat(ROWS // 2, 1) for name, value in padded(rows).items()}
    torch.manual_seed(5)
    first = target.generate(**inputs, max_new_tokens=3, assistant_model=draft, return_dict_in_generate=True, **call)
    # Of the first prompt's rows the second token of the answer counts as padding, and another one follows in all of them.
    said = first.sequences[:1, 4:].repeat(ROWS, 1)
    first = target.generate(
        torch.cat([inputs["input_ids"], said], dim=1), max_new_tokens=1, return_dict_in_generate=True, onlinespec=True,
        attention_mask=torch.cat([inputs["attention_mask"], torch.tensor([[1, 0, 0], [1, 1, 1]]).repeat(ROWS // 2, 1)], dim=1), **call,
    )  # fmt: skip
    turn = torch.cat([first.sequences[:, :7], torch.tensor([[2, 3]]).repeat(ROWS, 1)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 0, 0, 1, 1], [1] * 5]).repeat(ROWS // 2, 1)], dim=1)
    counts = torch.zeros(2, WORDS**NEW, dtype=torch.long)
    place = torch.tensor([WORDS**i for i in reversed(range(NEW))])
    for _ in range(CALLS):
        cache = copy.deepcopy(first[CACHE])
        out = target.generate(
            turn, attention_mask=mask, **{CACHE: cache}, assistant_model=draft, max_new_tokens=NEW, **call
        )
        for i, row in enumerate(out[:, -NEW:]):
            counts[i % 2, (row * place).sum()] += 1
    sequences = torch.tensor(list(itertools.product(range(WORDS), repeat=NEW)))
    for row in range(2):
        tokens = torch.cat([turn[row : row + 1, mask[row] == 1].expand(len(sequences), -1), sequences], dim=1)
        with torch.no_grad():
            p = target(tokens).logits.double().softmax(-1)[:, -NEW - 1 : -1]
        assert follows(counts[row], p.gather(-1, sequences[..., None]).squeeze(-1).prod(-1), THOUSAND)
    assert draft.metrics.accepted_tokens > 100
