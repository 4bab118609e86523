"""One target in several processes: what is refused there, in a group of one process. Two that run in step: test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_onlinespec import OnlineDraft, generate_stream
from hf_onlinespec.errors import UnsupportedError
from hf_onlinespec.verify.ragged import RaggedVerifier
from hf_onlinespec.verify.running import RunningBatch
from tests.heads.tiny import tiny_head
from tests.tiny_models import CACHE

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_rows_and_batches_are_decoded_as_without_it(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model)
    for rows in (prompt, torch.cat([prompt, prompt + 1])):
        plain = target.generate(rows, **GREEDY)
        assert torch.equal(plain, target.generate(rows, assistant_model=draft, synced_gpus=True, **GREEDY))
        assert torch.equal(plain, target.generate(rows, onlinespec=True, synced_gpus=True, **GREEDY))
    assert draft.metrics.requests == 2


@pytest.mark.usefixtures("group")
def test_the_forward_that_reads_rows_to_their_end_for_the_next_turn_is_counted_too(target, monkeypatch) -> None:
    """Others wait for each forward: as many are agreed on as are run."""
    inputs = {"input_ids": torch.tensor([[3, 14, 15, 2], [9, 2, 7, 1]])}
    call: dict[str, Any] = GREEDY | {"pad_token_id": 0, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **call).sequences
    stop = next(int(token) for token in plain[0, 4:-1] if token not in plain[1])
    forwards, agreed = list[int](), list[int]()
    reduce, verify = torch.distributed.all_reduce, RaggedVerifier.verify

    def reduced(*arguments: Any, **named: Any) -> Any:
        agreed.append(1)
        return reduce(*arguments, **named)

    def verified(*arguments: Any) -> Any:
        forwards.append(1)
        return verify(*arguments)

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    monkeypatch.setattr(RaggedVerifier, "verify", verified)
    first = target.generate(**inputs, onlinespec=True, eos_token_id=stop, synced_gpus=True, **call)
    assert first[CACHE].get_seq_length() == first.sequences.shape[1] - 1
    assert len(agreed) == len(forwards) + 4  # four before the first forward


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"prefill_chunk_size": 4}, "prefill_chunk_size=4"), ({"synced_gpus": True}, "training mode")],
    ids=["chunks", "training"],
)
def test_forwards_that_other_processes_cannot_match_are_refused(target, draft_model, prompt, arguments, said) -> None:
    draft = OnlineDraft(draft_model)
    target.train("training" in said)
    with pytest.raises(UnsupportedError, match=said):
        target.generate(prompt, assistant_model=draft, **({"synced_gpus": True} | arguments), **GREEDY)
    assert not draft.metrics.requests


@pytest.mark.usefixtures("group")
def test_drafts_of_which_each_process_holds_a_part_are_refused(target, draft_model, prompt) -> None:
    head = OnlineDraft(tiny_head("eagle3", target))
    with pytest.raises(UnsupportedError, match="draft head"):
        target.generate(prompt, assistant_model=head, synced_gpus=True, **GREEDY)
    vars(draft_model)["_is_fsdp_managed_module"] = True  # as FSDP notes it
    with pytest.raises(UnsupportedError, match="holds a part"):
        target.generate(prompt, assistant_model=draft_model, onlinespec=True, synced_gpus=True, **GREEDY)


def test_a_stream_decodes_whole_batches_there(target, monkeypatch) -> None:
    """Rows that join while others go on would begin in other rounds than in another process."""
    prompts = [[3, 14, 15], [9, 2], [6, 5, 3, 5], [8, 9, 7], [9, 3, 2], [3, 8]]
    begun: list[int] = []
    begin = RunningBatch.__init__

    def counted(self: RunningBatch, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        begun.append(1)

    def answers() -> list[list[int]]:
        stream = generate_stream(target, prompts, batch_size=2, onlinespec=True, **GREEDY)
        return [answer.tokens.tolist() for answer in stream if answer.tokens is not None]

    monkeypatch.setattr(RunningBatch, "__init__", counted)
    joined = answers()
    assert len(joined) == len(prompts) and begun
    begun.clear()
    monkeypatch.setattr("hf_onlinespec.verify.running.needs_synced_gpus", lambda model: True)
    assert answers() == joined and not begun
