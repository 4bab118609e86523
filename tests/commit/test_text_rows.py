"""A draft sees the text of a prompt with a picture in it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_onlinespec import MemoryDraft, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.text_rows import TextRows
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from tests.conftest import tiny_llama
from tests.fakes import PlainDraft, ScriptedProposer
from tests.verify.test_target import IMAGE, gemma3, llava, text


class Watching(ScriptedProposer):
    """Notes what it is shown."""

    def __init__(self, script: Tensor) -> None:
        super().__init__(script)
        self.shown = list[Rows]()

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        self.shown.append(rows)
        return super().propose(rows, room, trees)

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        self.shown.append(rows)

    def observe(self, verdict: Verdict) -> None:
        self.shown.append(verdict.rows)


def test_a_proposer_is_shown_the_text_alone() -> None:
    target, inputs = llava()
    tokens = inputs["input_ids"]
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=12)
    text = torch.cat([tokens[:, :2], plain[:, 6:]], dim=-1)
    proposer = Watching(text)  # what is right, at the places of the text alone
    draft = PlainDraft(proposer)
    assert torch.equal(target.generate(**inputs, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    assert draft.metrics.accepted_tokens > 6
    for rows in proposer.shown:
        assert torch.equal(rows.tokens, text[:, : rows.lengths[0]]) and rows.tokens.shape[1] == rows.lengths[0]
    assert proposer.shown[0].lengths == (tokens.shape[1] - 4,) and proposer.shown[-1].lengths == (text.shape[1],)


def test_placeholders_do_not_enter_the_memory() -> None:
    target, inputs = llava()
    draft = MemoryDraft(OnlineSpecConfig(lookahead=4))
    for _ in range(2):
        target.generate(**inputs, do_sample=False, max_new_tokens=12, assistant_model=draft)
    assert draft.memory is not None and draft.memory.continuation([IMAGE]) is None
    before, behind = inputs["input_ids"][0, :2].tolist(), int(inputs["input_ids"][0, 6])
    found = draft.memory.continuation(before)
    assert found is not None and found.tokens == (behind,)  # the text goes on behind the picture


def test_a_draft_of_text_learns_from_prompts_with_pictures() -> None:
    target, inputs = gemma3()
    tokens = inputs["input_ids"]
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=12)
    config = OnlineSpecConfig(lookahead=4, update_every=2, update_when="round", memory_tokens=0, lr=1e-2)
    draft = OnlineDraft(tiny_llama(3, vocab=64), config)
    before = embedding(draft)
    for _ in range(3):
        ours = target.generate(**inputs, do_sample=False, max_new_tokens=12, assistant_model=draft)
        assert torch.equal(ours, plain)
    assert draft.metrics.updates > 0 and draft.metrics.failed_updates == 0
    moved = (embedding(draft) != before).any(0)  # (vocab,) of what it has read while it learned
    assert bool(moved[tokens[0, -1]]) and not bool(moved[IMAGE])


def embedding(draft: OnlineDraft) -> Tensor:
    """(rank, vocab) the adapter's part of the embedding."""
    return next(tensor for name, tensor in draft.state().tensors.items() if "lora_embedding_A" in name)


def test_a_picture_in_front_of_padding_between_tokens_is_left_out() -> None:
    """As a second turn has it behind an answer that was padded: both views of the prompt are taken, one after the other."""
    target, inputs = llava()
    tokens = torch.cat([inputs["input_ids"], torch.zeros(1, 2, dtype=torch.long), text(3)], dim=-1)
    mask = torch.ones_like(tokens)
    mask[0, -5:-3] = 0
    call = inputs | dict(input_ids=tokens, attention_mask=mask)
    plain = target.generate(**call, do_sample=False, max_new_tokens=12)
    draft = MemoryDraft(OnlineSpecConfig(lookahead=4))
    for _ in range(2):
        assert torch.equal(target.generate(**call, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    assert draft.metrics.accepted_tokens > 6 and draft.metrics.failed_drafts == 0
    assert draft.memory is not None and draft.memory.continuation([IMAGE]) is None
    found = draft.memory.continuation(tokens[0, 6:-5].tolist())
    assert found is not None and found.tokens == (int(tokens[0, -3]),)  # the text goes on behind the padding


def test_several_prompts_with_pictures_are_shown_and_learned_as_text() -> None:
    target, inputs = llava()
    tokens, pictures = inputs["input_ids"], inputs["pixel_values"]
    longer = torch.cat([tokens[:, :6], text(3), tokens[:, 6:]], dim=-1)
    padding = tokens.new_zeros(1, 3)
    both = torch.cat([torch.cat([padding, tokens], dim=-1), longer])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    call = dict(input_ids=both, attention_mask=mask, pixel_values=torch.cat([pictures, pictures / 2]))
    plain = target.generate(**call, do_sample=False, max_new_tokens=12)
    memory = MemoryDraft(OnlineSpecConfig(lookahead=4))
    learned = OnlineDraft(tiny_llama(3, vocab=64), lookahead=4, update_when="request", update_every=1, lr=1e-2)
    before = embedding(learned)
    for draft in (memory, learned):
        for _ in range(2):
            assert torch.equal(
                target.generate(**call, do_sample=False, max_new_tokens=12, assistant_model=draft), plain
            )
        assert draft.metrics.accepted_tokens > 6 and draft.metrics.failed_drafts == 0
    assert memory.memory is not None and memory.memory.continuation([IMAGE]) is None
    found = memory.memory.continuation(tokens[0, :2].tolist())
    assert found is not None and set(found.tokens) <= {int(tokens[0, 6]), int(longer[0, 6])}  # behind the picture
    assert learned.metrics.updates > 0 and learned.metrics.failed_updates == 0
    moved = (embedding(learned) != before).any(0)
    assert bool(moved[tokens[0, -1]]) and not bool(moved[IMAGE])


@pytest.mark.parametrize(
    ("fed", "left"), [(6, [0, 3, 4, 5]), (3, [3, 4, 5]), (2, [4, 5])], ids=["the prompt", "its end", "a later round"]
)
def test_hidden_states_at_placeholders_are_left_out(fed: int, left: list[int]) -> None:
    """A prompt of five tokens, two of them of a picture, and one candidate."""
    rows = TextRows(torch.tensor([False, True, True, False, False]))
    features = torch.arange(6.0)[None, 6 - fed :, None]
    assert rows.features(features, 6)[0, :, 0].tolist() == left
