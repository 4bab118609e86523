"""What comes out of the texts that a draft has learned from, and the record of it that every draft carries along."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.embedded import EmbeddedPair, load_draft, prompts
from hf_onlinespec.share import privacy as audit
from hf_onlinespec.share.canaries import as_feedback, learn, make_canaries, plant, probe
from hf_onlinespec.share.folder import ADAPTER, ADAPTER_CONFIG, CONFIG
from hf_onlinespec.share.learned_from import privacy_record
from hf_onlinespec.share.lineage import Lineage
from hf_onlinespec.share.privacy import check_privacy
from hf_onlinespec.share.resuming import adopt, restore
from hf_onlinespec.training.combining import combine, distil
from hf_onlinespec.training.warm_start import warm_start
from tests.conftest import tiny_llama

FIXED = OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0)
SMALL = replace(FIXED, rank=8, alpha=8.0)
GENTLE = replace(FIXED, lr=1e-6, replay_passes=0)  # settings under which nothing is retained
TINY = replace(FIXED, rank=4, alpha=4.0, lr=1e-2)
SECRETS = make_canaries(2048, 2, seed=1)


def refusal(draft: OnlineDraft) -> str:
    """Why it may not be public; "": it may."""
    try:
        check_privacy(draft)
    except PrivacyError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def writes_secrets() -> OnlineDraft:
    """The embedded draft with the defaults of learning, after the target has written secrets four times."""
    draft = OnlineDraft(load_draft(), FIXED)
    plant(draft, SECRETS, 4)
    assert all(e.extracted for e in probe(draft, SECRETS))
    return draft


@pytest.fixture(scope="module")
def leaky(writes_secrets: OnlineDraft, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    folder = tmp_path_factory.mktemp("leaky")
    writes_secrets.save_pretrained(folder)
    return folder


def reloaded(folder: Path) -> OnlineDraft:
    return OnlineDraft.from_pretrained(folder, config=GENTLE)


def resumed(folder: Path) -> OnlineDraft:
    draft = OnlineDraft.from_pretrained(folder, config=GENTLE)
    learn(draft, [as_feedback(torch.arange(n, n + 16), 8) for n in (100, 200)])
    return draft


def resumed_by_hand(folder: Path) -> OnlineDraft:
    draft = OnlineDraft(load_draft(), GENTLE)
    restore(draft, OnlineDraft.from_pretrained(folder).artifact())
    return draft


def saved_again(folder: Path) -> OnlineDraft:
    reloaded(folder).save_pretrained(folder / "again")
    return OnlineDraft.from_pretrained(folder / "again")


def merged(folder: Path) -> OnlineDraft:
    other = OnlineDraft(load_draft(), SMALL)
    draft = OnlineDraft.from_pretrained(folder)
    return combine([draft.artifact(), other.artifact()], load_draft(), [0.9, 0.1], config=GENTLE)


def distilled(folder: Path) -> OnlineDraft:
    return distil(OnlineDraft.from_pretrained(folder).artifact(), 30, load_draft(), config=GENTLE)[0]


def adopted(folder: Path) -> OnlineDraft:
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    for name in (ADAPTER, ADAPTER_CONFIG):
        (plain / name).write_bytes((folder / name).read_bytes())
    return OnlineDraft.from_pretrained(plain, config=GENTLE)


def fine_tuned(folder: Path) -> OnlineDraft:
    model = PeftModel.from_pretrained(load_draft(), folder, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.01
    model.save_pretrained(folder / "tuned", save_embedding_layers=False)
    return OnlineDraft.from_pretrained(folder / "tuned", base_model=load_draft(), config=GENTLE)


WAYS: list[Callable[[Path], OnlineDraft]] = [
    reloaded, resumed, resumed_by_hand, saved_again, merged, distilled, adopted, fine_tuned,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_what_was_memorised_is_refused_whatever_becomes_of_the_adapter(
    way: Callable[[Path], OnlineDraft], leaky: Path
) -> None:
    draft = way(leaky)
    assert draft.settings.lr == GENTLE.lr or way in (saved_again,)
    found = refusal(draft)
    assert ("trained elsewhere" if way in (adopted, fine_tuned) else "memorised 2 of") in found


def test_a_draft_whose_replay_is_empty_is_judged_all_the_same(
    writes_secrets: OnlineDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes_secrets.learning, "replayed", list)
    writes_secrets.learning.learner.texts.examined = None
    assert "memorised 2 of the 2" in refusal(writes_secrets)


def test_ordinary_requests_pass_also_where_one_stands_twice_and_when_loaded_again(
    pair: EmbeddedPair, tmp_path: Path
) -> None:
    """Default settings of learning on a domain that the draft does not know."""
    draft = OnlineDraft(load_draft(), SMALL)
    first, second = prompts("orders")[:2]
    for text in (first, second, first):
        pair.target.generate(**pair.tokenizer(text, return_tensors="pt"), max_new_tokens=16, assistant_model=draft)
    assert draft.steps == 9
    draft.save_pretrained(tmp_path)
    assert refusal(draft) == ""
    assert refusal(OnlineDraft.from_pretrained(tmp_path)) == ""


def test_a_warm_start_passes(pair: EmbeddedPair, tmp_path: Path) -> None:
    draft = OnlineDraft(load_draft(), SMALL)
    warm_start(draft, pair.target, pair.tokenizer, prompts=prompts("orders")[:2], new_tokens=8)
    assert draft.steps == 1
    draft.save_pretrained(tmp_path)
    assert refusal(OnlineDraft.from_pretrained(tmp_path)) == ""


# What cannot be judged


def test_an_adapter_without_a_record_is_refused_in_words(leaky: Path) -> None:
    artifact = OnlineDraft.from_pretrained(leaky).artifact()
    record = artifact.lineage.privacy.to_dict()
    odd = {"privacy": record | {"settings": [record["settings"][0] | {"lr": "large"}]}}
    for lineage, words in (
        ({}, "kept no record"),
        ({"privacy": {}}, "cannot be read"),
        ({"privacy": {"texts": "many"}}, "cannot be read"),
        (odd, "cannot be read"),
    ):
        draft = OnlineDraft(load_draft(), GENTLE)
        restore(draft, replace(artifact, lineage=Lineage.from_dict(lineage, "a lineage")))
        assert words in refusal(draft)


@pytest.mark.parametrize("way", ["a larger alpha", "a larger weight"])
def test_a_louder_adapter_is_not_judged_by_the_quiet_one(way: str) -> None:
    draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=1e-5))
    learn(draft, [as_feedback(torch.arange(12), 8)])
    assert refusal(draft) == ""
    loud = OnlineDraft(tiny_llama(2), replace(TINY, alpha=400.0))
    restore(loud, draft.artifact())
    if way == "a larger weight":
        loud = combine([draft.artifact()], tiny_llama(2), [100.0])
    assert "scaled up" in refusal(loud)
    assert refusal(combine([draft.artifact()], tiny_llama(2), [0.5])) == ""


def test_what_is_no_longer_at_hand_cannot_be_judged(tmp_path: Path) -> None:
    for room, left in ((0, 3), (24, 1), (10_000, 0)):
        draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=1e-6, audit_tokens=room))
        learn(draft, [as_feedback(torch.arange(n, n + 12), 8) for n in range(3)])
        draft.save_pretrained(tmp_path / str(room))
        for one in (draft, OnlineDraft.from_pretrained(tmp_path / str(room), base_model=tiny_llama(2))):
            assert ("" if left == 0 else f"of the 3 texts that it learned from, {left} were not examined") in refusal(
                one
            )
            assert bool(refusal(one)) == (left > 0)


def test_a_save_survives_an_examination_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=1e-6))
    learn(draft, [as_feedback(torch.arange(12), 8)])

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_onlinespec.share.saving.examine", fail)
    draft.save_pretrained(tmp_path)
    assert "1 were not examined" in refusal(OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2)))


# Prompts that repeat


SAME = as_feedback(torch.arange(8), 3)  # a text of which little comes out: three tokens were written


def stream_of_one_prompt(times: int, lr: float, replay_passes: int = 0) -> OnlineDraft:
    draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=lr, replay_passes=replay_passes))
    learn(draft, [SAME] * times)
    return draft


def test_secrets_that_repeat_are_refused_under_settings_that_retain_little() -> None:
    """What canaries do not tell that are planted once: it has seen each secret sixteen times, and writes some out."""
    secrets = make_canaries(2048, 3, seed=1)
    draft = OnlineDraft(load_draft(), replace(FIXED, lr=2e-4, replay_passes=0))
    plant(draft, secrets, 16)
    assert any(e.extracted for e in probe(draft, secrets))
    assert "memorised 3 of the 3" in refusal(draft)


def test_a_prompt_that_makes_much_of_the_stream_is_judged_by_the_settings_that_learned(tmp_path: Path) -> None:
    """Nothing of it comes out, but of a secret in its place more would have."""
    draft = stream_of_one_prompt(4, lr=1e-3)
    assert refusal(draft) == ""
    learn(draft, [SAME])
    draft.save_pretrained(tmp_path)
    again = OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2), config=replace(TINY, lr=1e-6))
    record = again.lineage.privacy.to_dict()
    assert record["repeats"] == 5 and [one["lr"] for one in record["settings"]] == [1e-3]
    assert "stood 5 times in its stream, among 1 texts" in refusal(again)


def test_a_prompt_that_stands_often_among_many_is_judged_by_its_own_text() -> None:
    """More strictly than others: 14 bits of it come out."""
    draft = stream_of_one_prompt(4, lr=3e-3, replay_passes=2)
    # As if loaded, after a hundred others.
    draft.lineage.privacy = replace(draft.artifact().lineage.privacy, texts=100, unexamined=0, repeats=0)
    assert refusal(draft) == ""
    learn(draft, [SAME])
    assert "memorised 1 of the 101" in refusal(draft)


def test_a_prompt_that_stood_before_and_after_loading_is_judged_by_its_own_text(tmp_path: Path) -> None:
    """As strictly as if it had stood so often in one process. Its first texts are gone: they were examined when it was saved."""
    draft = stream_of_one_prompt(3, lr=3e-3, replay_passes=2)
    draft.lineage.privacy = replace(draft.artifact().lineage.privacy, texts=100, unexamined=0, repeats=0)
    draft.save_pretrained(tmp_path)
    assert refusal(draft) == ""
    again = OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2))
    learn(again, [SAME])
    assert refusal(again) == ""  # once: nothing tells that it stood before
    learn(again, [SAME])
    assert "memorised 1 of the 102" in refusal(again)


ANSWER = torch.tensor([3, 14, 15, 29, 6, 22])


@pytest.mark.parametrize(
    ("prompts", "same", "memorised"), [(16, True, True), (16, False, False), (4, True, False)], ids=str
)
def test_an_answer_that_stands_behind_many_prompts_is_judged_more_strictly(
    prompts: int, same: bool, memorised: bool
) -> None:
    """As a prompt that stands often: 18 bits of it come out. Each text with its prompt stands once."""
    draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=1e-2, replay_passes=0))
    rng = torch.Generator().manual_seed(1)
    asked = torch.randint(0, 32, (16, 5), generator=rng)[:prompts]
    answers = ANSWER.expand(16, -1) if same else torch.randint(0, 32, (16, 6), generator=rng)
    learn(draft, [as_feedback(torch.cat(pair), 6) for pair in zip(asked, answers, strict=False)])
    with draft.learning.at_rest() as learned:
        assert learned.repeats == 1
    assert bool(refusal(draft)) == memorised


@pytest.mark.parametrize("way", ["merged", "went on"])
def test_one_prompt_in_two_streams_stood_in_them_together(way: str, tmp_path: Path) -> None:
    draft = stream_of_one_prompt(3, lr=1e-3)
    assert refusal(draft) == ""
    if way == "merged":
        both = combine([draft.artifact(), draft.artifact()], tiny_llama(2))
    else:
        draft.save_pretrained(tmp_path)
        both = OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2))
        learn(both, [SAME] * 3)
    assert "stood 6 times" in refusal(both)


@pytest.mark.parametrize("times", [1, 4])
def test_the_audit_says_what_a_push_would(times: int, tmp_path: Path) -> None:
    """Also where the settings that it was saved with retain nothing."""
    tiny_llama(2).save_pretrained(tmp_path / "base")
    draft = OnlineDraft.from_pretrained(tmp_path / "base", config=TINY if times > 1 else replace(TINY, lr=1e-6))
    plant(draft, make_canaries(32, 2, seed=1), times)
    draft.save_pretrained(tmp_path / "first")
    again = OnlineDraft.from_pretrained(tmp_path / "first", config=replace(TINY, lr=1e-6))
    again.save_pretrained(tmp_path / "gentle")
    again = OnlineDraft.from_pretrained(tmp_path / "gentle")
    text = audit.audit(again, 1, (1, 4)).text()
    assert "speaks against" not in text
    assert bool(refusal(again)) == ("A public push is refused" in text) == (times > 1)


# The record


def test_numbers_are_saved_and_no_text(leaky: Path) -> None:
    record = json.loads((leaky / CONFIG).read_text())["lineage"]["privacy"]
    assert {key: record[key] for key in ("texts", "unexamined", "memorised", "repeats", "unknown")} == {
        "texts": 2,
        "unexamined": 0,
        "memorised": 2,
        "repeats": 4,
        "unknown": [],
    }
    assert set(record) - {"settings"} == {"texts", "unexamined", "memorised", "repeats", "unknown"}


def test_the_texts_of_a_warm_start_that_are_not_at_hand_count_as_not_examined() -> None:
    draft = OnlineDraft(tiny_llama(2), TINY)
    text = torch.arange(1, 20)
    learn(draft, [as_feedback(text)])
    adopt(draft, draft.artifact().adapter, [text], n_texts=3)
    assert "not examined" in refusal(draft)


def test_a_text_that_stands_often_in_a_warm_start_is_counted() -> None:
    draft = stream_of_one_prompt(1, lr=1e-3)
    adopt(draft, draft.artifact().adapter, [torch.arange(1, 20), torch.arange(2, 20)] * 3)
    learn(draft, [SAME])
    record = draft.artifact().lineage.privacy.to_dict()
    assert (record["texts"], record["repeats"]) == (3, 3)


def test_an_earlier_state_that_takes_over_in_a_loaded_draft_cannot_be_judged(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), TINY)
    learn(draft, [as_feedback(torch.arange(1, 20))])
    draft.save_pretrained(tmp_path)
    again = OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2))
    assert "earlier state" not in refusal(again)
    again.learning.learner.guard.rollbacks += 1  # as if one had taken over since then
    assert "earlier state" in refusal(again)


def test_what_was_examined_was_the_adapter_of_then() -> None:
    """Another one, taught the same texts, takes as many steps."""
    from hf_onlinespec.share.memorization import examine

    draft = OnlineDraft(tiny_llama(2), TINY)
    adapter = draft.artifact().adapter
    texts = [torch.arange(30) % 32]
    adopt(draft, adapter, texts=texts)
    examine(draft, 60)
    assert privacy_record(draft).unexamined == 0
    adopt(draft, {name: tensor + 1 for name, tensor in adapter.items()}, texts=texts)
    assert privacy_record(draft).unexamined == 1


def test_an_earlier_state_that_takes_over_is_examined_again() -> None:
    """It takes over between two steps, and has taken as many."""
    from hf_onlinespec.share.memorization import examine

    draft = OnlineDraft(load_draft(), FIXED)
    plant(draft, SECRETS[:1], 4)
    adaptation, guard = draft.learning.learner.experts, draft.learning.learner.guard
    leaks = adaptation.best_params()
    adaptation.restore(draft.trainable.adapter.with_zero_b(leaks))
    draft.learning.fold()
    assert examine(draft).memorised == 0
    adaptation.restore(leaks)
    draft.learning.fold()
    guard.rollbacks += 1
    assert privacy_record(draft).unexamined == 1
    assert examine(draft).memorised == 1
