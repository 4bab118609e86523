"""A draft that is kept aligned learns the target's own logits of the training batches; the training is the same to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_onlinespec import ConfigError, DraftError, OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.losses import LOSSES
from hf_onlinespec.share.lineage import Alignment
from hf_onlinespec.share.manifest import Manifest
from hf_onlinespec.share.privacy import check_privacy
from hf_onlinespec.training.alignment import DraftAlignment
from tests.conftest import tiny_llama


def data(n: int = 24, length: int = 12) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 32, (n, length), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def fine_tune(target: PreTrainedModel, folder: Path, callbacks: list[Any], texts: int = 24, **settings: Any) -> None:
    quiet: dict[str, Any] = dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    quiet |= dict(dataloader_pin_memory=False, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=6)
    args = TrainingArguments(output_dir=str(folder), **(quiet | settings))
    Trainer(target, args, train_dataset=data(texts), eval_dataset=data(8), callbacks=callbacks).train()


def make(**settings: Any) -> OnlineDraft:
    return OnlineDraft(tiny_llama(2), OnlineSpecConfig(rank=8, alpha=8.0, **settings))


def hear(alignment: DraftAlignment, model: nn.Module, **inputs: torch.Tensor) -> list[Any]:
    """What a callback would let its draft learn from one training forward."""
    args, state, control = TrainingArguments(use_cpu=True), TrainerState(), TrainerControl()
    heard: list[Any] = []
    with patch.object(alignment.draft.learning, "learn", lambda requests, counts: heard.extend(requests)):
        alignment.on_train_begin(args, state, control, model=model)
        alignment.on_step_begin(args, state, control)
        model(**inputs)
        alignment.on_step_end(args, state, control)
        alignment.on_train_end(args, state, control)
    return heard


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
def test_the_target_is_trained_to_the_same_bit(tmp_path, learner) -> None:
    start = tiny_llama(1, layers=2, attention_dropout=0.2)  # what draws random numbers would be seen
    settings = dict(eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=2)
    trained = []
    for aligned in (False, True):
        target, alignment = copy.deepcopy(start), DraftAlignment(make(learner=learner))
        fine_tune(target, tmp_path, [alignment] if aligned else [], **settings)
        trained.append(target.state_dict())
    assert alignment.updates == 6 and alignment.time_s > 0
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert not torch.equal(trained[0]["lm_head.weight"], start.lm_head.weight)


@pytest.mark.failures
def test_a_step_of_the_draft_that_fails_does_not_end_the_training(target, tmp_path, monkeypatch) -> None:
    draft = make()
    alignment, failed = DraftAlignment(draft), []
    learn = draft.learning.learn

    def fails_at_first(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("simulated")
        return learn(*arguments)

    monkeypatch.setattr(draft.learning, "learn", fails_at_first)
    try:
        fine_tune(target, tmp_path, [alignment], max_steps=6)
    except torch.OutOfMemoryError as error:
        pytest.fail(f"the training ended with {error!r}")
    assert failed and alignment.updates == 4, "one step fails, one is left out"


def test_an_aligned_draft_follows_the_target(target, tmp_path) -> None:
    drafts = {"aligned": make(), "alone": make()}
    fine_tune(target, tmp_path, [DraftAlignment(drafts["aligned"])], max_steps=60)
    target.eval()
    tokens = torch.stack([row["input_ids"] for row in data()])
    with torch.no_grad():
        law = Teacher.from_logits(target(tokens).logits.flatten(0, 1))
    distance = {
        name: float(LOSSES["forward_kl"](*law.compare(draft(tokens).logits.flatten(0, 1))).mean())
        for name, draft in drafts.items()
    }
    assert distance["aligned"] < 0.6 * distance["alone"]


@pytest.mark.parametrize(("every", "updates"), [(1, 6), (2, 3), (4, 1), (7, 0)])
def test_it_learns_every_so_many_steps_and_never_from_evaluation(target, tmp_path, every, updates) -> None:
    draft = make()
    alignment = DraftAlignment(draft, every)
    fine_tune(target, tmp_path, [alignment], eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2)
    assert alignment.updates == updates == draft.steps
    assert alignment.tokens == updates * 4 * 11  # of the first batch of a step alone
    assert draft.lineage.alignment == Alignment(None, updates, updates * 44)
    assert not target._forward_hooks


def test_evaluation_is_not_heard(target) -> None:
    tokens = data(1)[0]["input_ids"][None]
    assert hear(DraftAlignment(make()), target.eval(), input_ids=tokens) == []
    assert len(hear(DraftAlignment(make()), target.train(), input_ids=tokens)) == 1


def test_what_is_heard_is_the_law_at_the_tokens_that_are_trained_on(target) -> None:
    """Row by row: padded on the right; padded on the left; a prompt without labels; nothing to learn."""
    tokens = torch.stack([row["input_ids"] for row in data(4)])
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[0, 9:], mask[1, :4] = 0, 0
    labels[mask == 0] = -100
    labels[2, :5], labels[2, 10:], labels[3] = -100, -100, -100
    target.train()
    with torch.no_grad():
        log_p = target(tokens, attention_mask=mask).logits.log_softmax(-1)
    found = hear(DraftAlignment(make()), target, input_ids=tokens, attention_mask=mask, labels=labels)
    wanted = [(tokens[0, :9], log_p[0, :8]), (tokens[1, 4:], log_p[1, 4:11]), (tokens[2, :10], log_p[2, 4:9])]
    assert len(found) == 3
    for feedback, (text, law) in zip(found, wanted, strict=True):
        assert torch.equal(feedback.tokens, text)
        assert torch.equal(feedback.teacher.log_probs, law)


def test_it_reads_no_more_tokens_than_it_was_told(target) -> None:
    tokens = torch.stack([row["input_ids"] for row in data(4)])  # rows of twelve
    target.train()
    lengths = {
        most: [len(f.tokens) for f in hear(DraftAlignment(make(), max_tokens=most), target, input_ids=tokens)]
        for most in (48, 47, 24, 5)
    }
    assert lengths == {48: [12] * 4, 47: [12] * 3, 24: [12] * 2, 5: [5]}
    (cut,) = hear(DraftAlignment(make(), max_tokens=5), target, input_ids=tokens[:1])
    assert torch.equal(cut.tokens, tokens[0, 7:]) and len(cut.teacher) == 4


def test_a_target_that_was_trained_on_a_text_is_no_excuse_for_the_draft_that_learned_it(target, tmp_path) -> None:
    """Both say it by heart; a target that never saw it would not."""
    draft = make()
    fine_tune(target, tmp_path, [DraftAlignment(draft)], texts=4, max_steps=60)
    text = data(4)[0]["input_ids"][None]
    with torch.no_grad():
        assert float(target(input_ids=text, labels=text).loss) < 0.5, "the target has learned it by heart"
    with pytest.raises(PrivacyError, match="memorised 4 of the 4"):  # two, if the target were an excuse
        check_privacy(draft)


def test_the_draft_lies_beside_every_checkpoint(target, tmp_path) -> None:
    model = tiny_llama(2)
    draft = OnlineDraft(model, OnlineSpecConfig(rank=4, alpha=4.0))
    fine_tune(target, tmp_path, [DraftAlignment(draft)], save_strategy="steps", save_steps=3)
    updates = [Manifest.read(tmp_path / f"checkpoint-{n}" / "draft").lineage.alignment.updates for n in (3, 6)]
    assert updates == [3, 6]
    again = OnlineDraft.from_pretrained(tmp_path / "checkpoint-6" / "draft", base_model=model)
    tokens = data(1)[0]["input_ids"][None]
    assert torch.equal(again(tokens).logits, draft(tokens).logits)


def test_what_cannot_be_learned_from_is_refused(target, tmp_path) -> None:
    for name in ("every", "max_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0: expected a whole number"):
            DraftAlignment(make(), **{name: 0})
    message = r"2048 tokens in its vocabulary \(config.vocab_size\) and the draft 32"
    with pytest.raises(DraftError, match=message):
        fine_tune(tiny_llama(1, vocab=2048), tmp_path, [DraftAlignment(make())])
    tokens = torch.stack([row["input_ids"] for row in data(4)])
    with pytest.raises(DraftError, match=r"logits \(4, 2, 32\) in training: expected \(batch, length, 32\)"):
        hear(DraftAlignment(make()), target.train(), input_ids=tokens, logits_to_keep=2)


def test_several_processes_are_refused(target, tmp_path, monkeypatch) -> None:
    """Each would teach its own draft, and only the first one's would be saved."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match="2 processes"):
        DraftAlignment(make()).on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl(), model=target
        )
