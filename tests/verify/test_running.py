"""Rows that join a batch that runs: each says what it says alone, with every kind of draft, and is learned when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import Answer, OnlineDraft, OnlineSpecConfig, UnsupportedError, generate_stream, online_memory
from hf_onlinespec.commit.batch_reader import BatchReader
from hf_onlinespec.rounds import Proposal, Rows
from hf_onlinespec.verify.ragged import RaggedVerifier
from tests.generation.test_stream import END, GREEDY, alone, prompts, said, target
from tests.heads.tiny import tiny_head
from tests.tiny_models import tiny_gpt2, tiny_llama


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of each forward of the target; several calls count their rows anew."""
    found: list[tuple[int, ...]] = []
    verify = RaggedVerifier.verify

    def watched(self: RaggedVerifier, rows: Rows, proposal: Proposal) -> Tensor:
        found.append(rows.of_call)
        return verify(self, rows, proposal)

    monkeypatch.setattr(RaggedVerifier, "verify", watched)
    return found


def streamed(model: Any, asked: list[list[int]], size: int = 4, **kwargs: Any) -> list[Answer]:
    return list(generate_stream(model, asked, size, **(GREEDY | kwargs)))


def test_rows_that_end_make_room_for_others(forwards: list[tuple[int, ...]]) -> None:
    model, asked = target(), prompts(8)
    lengths = [len(alone(model, prompt)) for prompt in asked]
    answers = streamed(model, asked, onlinespec=True)
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt) for prompt in asked]
    assert {row for rows in forwards for row in rows} == set(range(8)), "one call for two batches"
    assert max(map(len, forwards)) == 4
    first = [rows[0] for rows in forwards if rows[0] not in (0, 1, 2, 3)]
    mixed = [rows for rows in forwards if min(rows) < 4 <= max(rows)]
    assert first and mixed, "later rows were read by themselves, and joined earlier ones"
    assert len(set(lengths)) > 2


CASES: dict[str, dict[str, Any]] = {
    "chains": dict(lookahead=3, update_every=1),
    "governed": dict(lookahead="auto", update_every="auto"),
    "every round": dict(lookahead=3, update_every=1, update_when="round"),
}


@pytest.mark.parametrize(
    "kind, case",
    [
        ("same", "chains"),
        ("same", "every round"),
        ("eagle3", "chains"),
        ("eagle3", "every round"),
        ("hydra", "governed"),
        ("model", "governed"),
    ],
)
def test_every_kind_of_draft_serves_rows_that_join(kind: str, case: str) -> None:
    model, asked = target(), prompts(10, seed=5)
    base = {"model": tiny_llama(7), "same": tiny_llama(1)}.get(kind) or tiny_head(kind, model)
    draft = OnlineDraft(base, rank=2, alpha=2.0, replay_passes=0, **CASES[case])
    answers = streamed(model, asked, 3, assistant_model=draft)
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt) for prompt in asked]
    metrics = draft.metrics
    assert metrics.new_tokens == sum(len(said(answer.tokens)) for answer in answers)
    if case == "chains":
        least = metrics.new_tokens - (0 if kind == "same" else len(asked))  # of some first ones a head learns nothing
        assert metrics.drafted_tokens > 0 and least <= metrics.learned_tokens <= metrics.new_tokens
    if kind == "same" and case == "chains":
        assert metrics.acceptance_length > 2, "its cache holds what the row has read"


def test_rows_that_join_are_drafted_in_the_forwards_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, read = BatchReader.scores, list[tuple[int, ...]]()

    def watched(self: BatchReader, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        read.append(tuple(prefixes))
        return scores(self, served, prefixes)

    monkeypatch.setattr(BatchReader, "scores", watched)
    draft = OnlineDraft(tiny_llama(1), rank=2, lookahead=3, update_every=1)
    asked = prompts(10, seed=5)
    answers = streamed(target(), asked, 3, assistant_model=draft)
    assert [said(answer.tokens) for answer in answers] == [alone(target(), prompt) for prompt in asked]
    assert {row for rows in read for row in rows} >= set(range(6)), "each row of a call, also one that begins by itself"
    assert sum(min(rows) < 3 <= max(rows) for rows in read) > 3, "rows that have joined, with others"
    assert not draft.metrics.failed_drafts and not draft.metrics.failed_updates


def test_a_row_is_learned_when_it_has_ended_and_not_when_all_have() -> None:
    model, steps = target(), []
    draft = OnlineDraft(tiny_llama(7), rank=2, update_every=1, lookahead=3, replay_passes=0)
    for _ in generate_stream(model, prompts(16), 2, ordered=False, assistant_model=draft, **GREEDY):
        steps.append(draft.steps)
    assert steps == sorted(steps) and len(set(steps)) > 6 and steps[3] >= 1


def test_what_an_ended_row_said_is_remembered_while_others_run() -> None:
    """Two batches are one call: rows of the second one find what those of the first have said."""
    model, config = target(), OnlineSpecConfig(lookahead=4)
    model.generation_config.eos_token_id = None
    once = streamed(model, [[8, 9, 10]] * 2, 2, onlinespec=config)
    first = online_memory(model).metrics.accepted_tokens
    again = target()
    again.generation_config.eos_token_id = None
    found = streamed(again, [[8, 9, 10]] * 4, 2, onlinespec=config)
    assert [said(answer.tokens) for answer in found] == [said(once[0].tokens)] * 4
    assert online_memory(again).metrics.requests == 1
    assert online_memory(again).metrics.accepted_tokens >= first + 2 * 6, "of twelve tokens each"


def test_an_adapter_with_a_name_learns_from_a_stream() -> None:
    model, asked = target(), prompts(9)
    draft = OnlineDraft(tiny_llama(7), rank=2, update_every=1, lookahead=3)
    answers = streamed(model, asked, 2, assistant_model=draft, adapter="sql")
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt) for prompt in asked]
    assert draft.adapters is not None and "sql" in draft.adapters
    assert draft.steps == 0 and draft.metrics.updates >= len(asked)


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"do_sample": True, "top_k": 1},
        {"max_new_tokens": 1},
        {"max_new_tokens": 40, "eos_token_id": [END, 9, 21]},
    ],
)
def test_arguments_of_generate_say_of_a_row_what_they_say_of_it_alone(arguments: dict[str, Any]) -> None:
    if "repetition_penalty" in arguments and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"transformers {transformers.__version__} penalises the padding of a batch, in plain decoding too")
    model, asked = target(), prompts(11, seed=2)
    answers = streamed(model, asked, 3, onlinespec=True, **arguments)
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt, **arguments) for prompt in asked]


def test_positions_with_a_table_hold_for_rows_that_join() -> None:
    model, asked = tiny_gpt2(3), prompts(9, seed=4)
    model.generation_config.eos_token_id = 3
    answers = streamed(model, asked, 2, onlinespec=True, max_new_tokens=50)
    assert all(answer.error is None for answer in answers)
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt, max_new_tokens=50) for prompt in asked]


def test_rows_joined_behind_others_have_left_and_have_other_lengths() -> None:
    one, two = (
        Rows(torch.tensor([[1, 2, 3]]), (2,), (5,)),
        Rows(torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]), (4, 2), (1, 7)),
    )
    both = one.joined(two)
    assert both.lengths == (2, 4, 2) and both.of_call == (5, 1, 7)
    assert [both.row(i)[0].tolist() for i in range(3)] == [[1, 2], [4, 5, 6, 7], [8, 9]]


def test_an_empty_batch_is_refused_by_name_and_a_row_of_padding_alone_is_what_it_is_without_us() -> None:
    model, mask = target(), torch.tensor([[0, 0, 0], [1, 1, 1]])
    with pytest.raises(UnsupportedError, match="The batch is empty"):
        model.generate(torch.empty(0, 3, dtype=torch.long), onlinespec=True, **GREEDY)
    padded = {"input_ids": torch.tensor([[0, 0, 0], [8, 9, 10]]), "attention_mask": mask}
    assert torch.equal(model.generate(**padded, onlinespec=True, **GREEDY), model.generate(**padded, **GREEDY))
