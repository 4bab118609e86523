"""One target in several processes: what is refused there, in a group of one process. Two that run in step: test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_onlinespec import OnlineDraft, generate_stream
from hf_onlinespec.errors import UnsupportedError
from hf_onlinespec.verify.running import RunningBatch
from tests.heads.tiny import tiny_head

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
