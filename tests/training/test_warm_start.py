"""A warm start learns the target's law at the right tokens, touches nothing else, and refuses what it cannot take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, TrainingArguments

from hf_onlinespec import ConfigError, DraftError, Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.losses import LOSSES
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.manifest import Manifest
from hf_onlinespec.share.resuming import adopt
from hf_onlinespec.training.corpus import read_corpus
from hf_onlinespec.training.passages import Passage, collate, continuations, pieces
from hf_onlinespec.training.student import Student
from hf_onlinespec.training.warm_start import warm_start
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params, learn_segment

TEXTS = ["the quick brown fox jumps", "over the lazy dog", "pack my box with five dozen jugs"]


def tokenizer(text: str) -> Any:
    """One token of 32 for every character."""
    return SimpleNamespace(input_ids=[ord(c) % 32 for c in text])


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    quiet = dict(save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True)
    quiet |= dict(per_device_train_batch_size=2, learning_rate=1e-2, num_train_epochs=4)
    return TrainingArguments(output_dir=str(folder), **(quiet | settings))


CONFIG = LlamaConfig(bos_token_id=None)


def make(seed: int = 2, **settings: Any) -> OnlineDraft:
    return OnlineDraft(tiny_llama(seed), OnlineSpecConfig(rank=4, alpha=4.0, **settings))


@torch.no_grad()
def law(target: Any, tokens: list[int], temperature: float = 1.0) -> Teacher:
    return Teacher.from_logits(target(torch.tensor([tokens])).logits[0, :-1], temperature)


def greedy(target: Any, prompt: list[int], n: int) -> list[int]:
    tokens = torch.tensor([prompt])
    out = target.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n)
    return out[0].tolist()


# What is learned


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("top_k", [None, 5])
def test_student_has_the_loss_and_the_gradient_of_online_learning(target, loss, top_k) -> None:
    # Steps of plain gradient descent: they are the gradient.
    plain = dict(learner="ogd", preconditioner="none", lr=1.0, max_grad_norm=1e9, gradient_cap=None, replay_passes=0)
    draft = make(loss=loss, temperature=1.5, top_k=top_k, **plain)
    tokens = tokenizer(TEXTS[0]).input_ids
    draft.learning.learn_request(Feedback(torch.tensor(tokens), law(target, tokens, 1.5)))  # B is not zero now
    student = Student(draft, target)
    for passage in (Passage(tokens, 1), Passage(tokens, 9)):
        teacher = law(target, tokens, 1.5)
        said = Teacher(teacher.log_probs[passage.start - 1 :])
        feedback = Feedback(torch.tensor(tokens), said if top_k is None else said.top(top_k))
        student.zero_grad()
        found = student(**collate([passage]))["loss"]
        found.backward()
        start = draft.learning.adapter_params()
        counts, after = draft.learning.learn_request(feedback), draft.learning.adapter_params()
        adopt(draft, start)
        assert counts.updates == 1 and counts.mean_loss == pytest.approx(float(found.detach()), rel=1e-4)
        for part, name in zip(student.parts, start, strict=True):
            torch.testing.assert_close(part.grad, start[name] - after[name], rtol=1e-4, atol=1e-6)


def test_padding_counts_for_nothing(target) -> None:
    student = Student(make(), target)
    passages = [Passage(tokenizer(TEXTS[0]).input_ids, 3), Passage(tokenizer(TEXTS[1]).input_ids, 6)]
    n = [len(p.tokens) - p.start for p in passages]
    with torch.no_grad():
        both = student(**collate(passages))["loss"]
        each = [student(**collate([p]))["loss"] for p in passages]
    assert n[0] != n[1]
    torch.testing.assert_close(both * sum(n), each[0] * n[0] + each[1] * n[1])


def test_a_draft_that_is_the_target_has_nothing_to_learn(target) -> None:
    draft = OnlineDraft(copy.deepcopy(target))
    with torch.no_grad():
        assert Student(draft, target)(**collate([Passage(tokenizer(TEXTS[0]).input_ids, 1)]))["loss"] < 1e-5


def test_warm_start_brings_the_draft_to_the_target_and_it_learns_on(target, tmp_path) -> None:
    model = tiny_llama(2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    draft = OnlineDraft(model, OnlineSpecConfig(rank=8, alpha=8.0))
    tokens = torch.tensor([tokenizer(TEXTS[0]).input_ids])

    def distance() -> float:
        teacher = law(target, tokens[0].tolist())
        return float(LOSSES["forward_kl"](*teacher.compare(draft(tokens).logits[0, :-1])).mean())

    cold = distance()
    assert warm_start(draft, target, tokenizer, TEXTS, training_args=arguments(tmp_path, num_train_epochs=20)) is draft
    warm = distance()
    assert warm < 0.6 * cold
    # The user's model is as it was, and the adapter speaks in the draft alone.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    counts = Counts()
    for _ in range(10):
        learn_segment(draft, tokens, [law(target, tokens[0].tolist())], counts)
    assert counts.updates == 10
    assert distance() < warm


def test_prompts_are_written_on_by_the_target_in_batches_as_one_by_one(tmp_path) -> None:
    target = tiny_llama(1, layers=2)
    prompts = [tokenizer(text[:n]).input_ids for text, n in zip(TEXTS, (9, 4, 6), strict=True)]
    alone = [greedy(target, prompt, 12) for prompt in prompts]
    end = alone[1][len(prompts[1]) + 2]  # the second one stops early, inside of a batch
    target.generation_config.eos_token_id = end
    alone = [greedy(target, prompt, 12) for prompt in prompts]
    state = torch.random.get_rng_state()
    found = list(continuations(target, prompts, 12, 0.0, arguments(tmp_path)))
    assert found == [Passage(tokens, len(prompt)) for tokens, prompt in zip(alone, prompts, strict=True)]
    assert len(found[1].tokens) - found[1].start <= 3 < len(found[0].tokens) - found[0].start
    sampled = [list(continuations(target, prompts, 12, 1.0, arguments(tmp_path, seed=seed))) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_long_texts_are_read_in_pieces() -> None:
    assert pieces(list(range(7)), 3, CONFIG) == [Passage([0, 1, 2], 1), Passage([3, 4, 5], 1)]
    assert pieces([5], 3, CONFIG) == []


def test_every_piece_opens_as_its_text_does() -> None:
    """With the token that opens all texts of a model, if this text has it."""
    opens = LlamaConfig(bos_token_id=9)
    assert pieces([9, 1, 2, 3, 4], 3, opens) == [Passage([9, 1, 2], 1), Passage([9, 3, 4], 1)]
    assert pieces([9, 1, 2], 3, opens) == [Passage([9, 1, 2], 1)]
    assert pieces([5, 1, 2, 3, 4], 3, opens) == [Passage([5, 1, 2], 1), Passage([3, 4], 1)]


def test_the_target_tells_a_piece_what_it_says_behind_the_opening(tmp_path) -> None:
    seen: list[list[int]] = []
    target = tiny_llama(1, layers=2)
    target.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    draft = OnlineDraft(tiny_llama(2, bos_token_id=1), OnlineSpecConfig(rank=4, alpha=4.0))
    args = arguments(tmp_path, num_train_epochs=1)
    warm_start(draft, target, tokenizer, ["abcdefghijkl"], max_length=6, training_args=args)
    assert len(seen) == 3 and all(row[0] == 1 for row in seen)


def test_pieces_are_no_longer_than_the_models_take(tmp_path) -> None:
    draft = OnlineDraft(tiny_gpt2(2), OnlineSpecConfig(rank=2, alpha=2.0))  # 64 positions
    args = arguments(tmp_path, max_steps=1)
    warm_start(draft, tiny_llama(1), tokenizer, ["abc" * 50], training_args=args)
    assert draft.lineage.warm_start.tokens == 63 + 63 + 21


def test_a_draft_that_had_learned_goes_on_with_a_new_state(target, tmp_path) -> None:
    """What it learned before is where training begins, and its moments are not those of the new weights."""
    tokens = tokenizer(TEXTS[0]).input_ids
    request = Feedback(torch.tensor(tokens), law(target, tokens))
    old, new = make(replay_passes=0), make(replay_passes=0)
    for _ in range(5):
        old.learning.learn_request(request)
    before = flat_params(old)
    warm_start(old, target, tokenizer, TEXTS, training_args=arguments(tmp_path, learning_rate=0.0))
    assert torch.equal(flat_params(old), before)
    adopt(new, old.learning.adapter_params())
    for draft in (old, new):
        draft.learning.learn_request(request)
    assert torch.equal(flat_params(old), flat_params(new))


@pytest.mark.parametrize("training", [False, True])
def test_the_target_is_left_as_it_was(target, tmp_path, training) -> None:
    before = copy.deepcopy(target.state_dict())
    target.train(training)
    warm_start(make(), target, tokenizer, TEXTS, prompts=["abc"], new_tokens=4, training_args=arguments(tmp_path))
    assert target.training is training
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_training_arguments_are_those_of_the_user(target, tmp_path) -> None:
    draft = make()
    start = flat_params(draft)
    warm_start(draft, target, tokenizer, TEXTS, training_args=arguments(tmp_path, learning_rate=0.0))
    assert torch.equal(flat_params(draft), start)
    warm_start(draft, target, tokenizer, TEXTS, training_args=arguments(tmp_path, max_steps=1))
    assert not torch.equal(flat_params(draft), start)


def test_default_arguments_are_quiet_repeatable_and_leave_no_file(target, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    drafts = [make(), make()]
    for draft in drafts:
        warm_start(draft, target, tokenizer, TEXTS)
    assert torch.equal(flat_params(drafts[0]), flat_params(drafts[1]))
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_artifact_is_that_of_an_evolved_draft_without_any_text(target, tmp_path) -> None:
    model = tiny_llama(2)
    draft = OnlineDraft(model, OnlineSpecConfig(rank=4, alpha=4.0))
    warm_start(draft, target, tokenizer, TEXTS, prompts=["secret"], new_tokens=4)
    draft.save_pretrained(tmp_path / "warm")
    learned = sum(len(text) - 1 for text in TEXTS) + 4
    assert Manifest.read(tmp_path / "warm").lineage.warm_start.to_dict() == {
        "target": None,
        "texts": 3,
        "prompts": 1,
        "tokens": learned,
    }
    for file in (tmp_path / "warm").iterdir():
        assert not any(text.encode() in file.read_bytes() for text in [*TEXTS, "secret"])
    again = OnlineDraft.from_pretrained(tmp_path / "warm", base_model=model)
    tokens = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    assert torch.equal(again(tokens).logits, draft(tokens).logits)
    assert not torch.equal(again(tokens).logits, model(tokens).logits)


# What is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "Neither texts nor prompts"),
        ({"texts": "one text"}, "texts is one text"),
        ({"prompts": "one prompt"}, "prompts is one text"),
        ({"texts": ["a", ""]}, "None of 2 texts has two tokens"),
        ({"prompts": ["abc", ""]}, r"prompts\[1\] has 0 tokens"),
        ({"prompts": ["abc" * 80], "new_tokens": 30}, r"prompts\[0\] has 240 tokens: expected 1 to 226"),
    ],
)
def test_input_that_teaches_nothing_is_refused(target, tmp_path, given, says) -> None:
    draft = make()
    with pytest.raises(ConfigError, match=says):
        warm_start(draft, target, tokenizer, training_args=arguments(tmp_path), **given)
    assert draft.lineage.warm_start is None


def test_ensembles_and_other_vocabularies_are_refused(target) -> None:
    with pytest.raises(ConfigError, match="learner='ensemble'"):
        warm_start(make(learner="ensemble"), target, tokenizer, TEXTS)
    with pytest.raises(DraftError, match=r"2048 tokens in its vocabulary \(config.vocab_size\) and the draft 32"):
        warm_start(make(), tiny_llama(1, vocab=2048), tokenizer, TEXTS)


def test_several_accelerators_are_refused(target, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="2 accelerators"):
        warm_start(make(), target, tokenizer, TEXTS, training_args=arguments(tmp_path))


def test_training_that_fails_leaves_the_draft_as_it_was(target, tmp_path) -> None:
    draft = make()
    start = flat_params(draft)
    with pytest.raises(ConfigError, match=r"learning_rate=1e\+30: take less"):
        warm_start(draft, target, tokenizer, TEXTS, training_args=arguments(tmp_path, learning_rate=1e30))
    assert torch.equal(flat_params(draft), start)
    assert draft.lineage.warm_start is None


# Files


def test_text_files_hold_documents_between_empty_lines(tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\n\none\ntwo\r\n \nthree\n\n\n")
    assert read_corpus(path) == (["one\ntwo", "three"], [])


def test_json_lines_hold_texts_and_prompts(tmp_path) -> None:
    path = tmp_path / "mixed.jsonl"
    items = [{"text": "one\u2028two"}, {"prompt": "three", "domain": "x"}, {"text": "four"}]
    path.write_text("\n\n".join(json.dumps(item, ensure_ascii=False) for item in items), encoding="utf-8")
    assert read_corpus(str(path)) == (["one\u2028two", "four"], ["three"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.csv", b"text", "expected a .txt or a .jsonl file"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: expected .* it is no JSON"),
        ("a.jsonl", b'\n{"story": "a"}', 'line 2: expected .* found {"story": "a"}'),
        ("a.jsonl", b'{"text": "a", "prompt": "b"}', "line 1: expected"),
        ("a.jsonl", b'{"prompt": ""}', "line 1: expected"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected"),
        ("a.jsonl", b'["text"]', "line 1: expected"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, content, says) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_corpus(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_corpus(tmp_path / "missing" / "a.txt")
