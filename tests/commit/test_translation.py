"""Drafts with another tokenizer: nothing changes in what the target says, and the draft learns all the same."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_onlinespec
from hf_onlinespec import DraftError, OnlineDraft
from hf_onlinespec.embedded import load_seq2seq_pair, questions
from tests.chi_square import THOUSAND, follows
from tests.conftest import answered
from tests.drafts import flat_params
from tests.tiny_models import tiny_llama
from tests.tokenizers import SENTENCES, Slow, byte_level, lowercasing, sentencepiece, strings, word_pieces

TARGET, DRAFT = byte_level(500), sentencepiece(400)
PROMPT = "The little dog ran, Ça va 中😀?\nSELECT"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}


def target(**settings: Any) -> PreTrainedModel:
    return tiny_llama(1, vocab=500, layers=2, **settings)


def draft(model: PreTrainedModel | None = None, **settings: Any) -> OnlineDraft:
    """A draft that learns from every request."""
    fixed: dict[str, Any] = dict(lookahead=4, update_when="request", update_every=1, replay_passes=1, memory_tokens=0)
    model = tiny_llama(2, vocab=400) if model is None else model
    return OnlineDraft(model, rank=4, alpha=4.0, recycle=False, **(fixed | settings))


BOTH: dict[str, Any] = {"tokenizer": TARGET, "assistant_tokenizer": DRAFT}


def tokens(*texts: str, tokenizer: PreTrainedTokenizerBase = TARGET) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "left"
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True))


# Exact


@pytest.mark.parametrize(
    "settings", [{}, {"learner": "ensemble"}, {"update_when": "round", "update_every": 3}], ids=str
)
def test_greedy_text_is_plain_text_while_the_draft_learns(settings: dict[str, Any]) -> None:
    own, model = target(), tiny_llama(2, vocab=400)
    before, online = copy.deepcopy(model.state_dict()), draft(model, **settings)
    for text in (PROMPT, SENTENCES[0], SENTENCES[2]):
        inputs = tokens(text)
        plain = own.generate(**inputs, **GREEDY)
        with answered():
            ours = own.generate(**inputs, assistant_model=online, **GREEDY, **BOTH)
        assert torch.equal(plain, ours)
    metrics = online.metrics
    assert metrics.updates >= 3 and metrics.skipped_updates == 0 and metrics.drafted_tokens > metrics.rounds
    assert model.state_dict().keys() == before.keys()  # nothing is pruned or wrapped
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "other", [sentencepiece(400), byte_level(330), byte_level(400, chat=True)], ids=["spm", "bytes", "chat"]
)
def test_a_target_that_writes_pieces_of_characters_writes_the_same(other: PreTrainedTokenizerBase) -> None:
    """A random target ends many rounds in the middle of a character."""
    online = draft(tiny_llama(2, vocab=len(other)), memory_tokens=500)
    for seed in range(4):
        own = tiny_llama(seed, vocab=300)  # bytes, mostly
        inputs = tokens(PROMPT, tokenizer=byte_level(300))
        plain = own.generate(**inputs, **GREEDY)
        both = {"tokenizer": byte_level(300), "assistant_tokenizer": other}
        with answered():
            assert torch.equal(plain, own.generate(**inputs, assistant_model=online, **GREEDY, **both))
    assert online.metrics.drafted_tokens > 0 and online.metrics.updates > 0


@pytest.mark.parametrize("other", [byte_level(400), sentencepiece(400)], ids=["nothing in front", "a token in front"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_that_begins_with_no_token_of_the_draft_s(other: PreTrainedTokenizerBase, rows: int) -> None:
    """As every text of an encoder–decoder does: the token that it begins with is none of the draft's."""
    pair = load_seq2seq_pair()
    online = draft(tiny_llama(2, vocab=len(other)))
    both = {"tokenizer": pair.tokenizer, "assistant_tokenizer": other}
    inputs = pair.tokenizer(questions("advising")[:rows], return_tensors="pt", padding=True)
    plain = pair.target.generate(**inputs, **GREEDY)
    for _ in range(2):
        with answered():
            assert torch.equal(plain, pair.target.generate(**inputs, assistant_model=online, **GREEDY, **both))
    metrics = online.metrics
    assert metrics.failed_updates == metrics.failed_drafts == metrics.skipped_updates == 0
    assert metrics.updates >= 2 and metrics.drafted_tokens > metrics.rounds


def test_a_prompt_of_which_the_draft_has_no_token() -> None:
    own, online = target(), draft(tiny_llama(2, vocab=400))
    tokenizer = byte_level(500, chat=True)
    mark = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_start|>")]])
    inputs = {"input_ids": mark, "attention_mask": torch.ones_like(mark)}
    both = {"tokenizer": tokenizer, "assistant_tokenizer": byte_level(400)}
    plain = own.generate(**inputs, **GREEDY)
    for _ in range(2):
        with answered():
            assert torch.equal(plain, own.generate(**inputs, assistant_model=online, **GREEDY, **both))
    assert online.metrics.failed_updates == online.metrics.failed_drafts == 0 and online.metrics.updates >= 2


def test_batches_are_what_each_row_is_alone() -> None:
    own, online = target(), draft()
    inputs = tokens(PROMPT, "a", SENTENCES[1])
    plain = own.generate(**inputs, **GREEDY)
    for _ in range(2):
        with answered():
            ours = own.generate(**inputs, assistant_model=online, **GREEDY, **BOTH)
        assert torch.equal(plain, ours)
    assert online.metrics.drafted_tokens > 0 and online.metrics.updates > 0


def test_memory_governor_and_trees_work_as_with_any_draft() -> None:
    """All that is decided by times, while the memory guesses beside the draft, and learning is held against it."""
    own, model = target(), tiny_llama(2, vocab=400)
    online = OnlineDraft(model, rank=4, memory_tokens=2000, update_when="round")
    for text in (PROMPT, SENTENCES[2], PROMPT, SENTENCES[2]):
        inputs = tokens(text)
        plain = own.generate(**inputs, **(GREEDY | {"max_new_tokens": 40}))
        with answered():
            ours = own.generate(**inputs, assistant_model=online, **(GREEDY | {"max_new_tokens": 40}), **BOTH)
        assert torch.equal(plain, ours)
    metrics = online.metrics
    assert metrics.failed_updates == metrics.failed_drafts == 0 and metrics.requests == 4


SHARED = strings("a", "b", "c", "ab", "ca", "bb"), strings("c", "a", "b", "cc", "ab", "ba")


def shared_models() -> tuple[PreTrainedModel, OnlineDraft]:
    """Both flat enough for every sequence to be drawn; four of six strings are common, and each spells the others' with single ones."""
    flat = {"vocab": 6, "initializer_range": 0.25}
    online = draft(tiny_llama(2, **flat), lookahead=2, lr=3e-3, replay_passes=0)
    return tiny_llama(1, layers=2, **flat), online


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_sequences_follow_the_target_s_law_while_the_draft_learns(temperature: float) -> None:
    own, online = shared_models()
    prompt = torch.tensor([[3, 1, 5, 3]])
    sequences = torch.tensor(list(itertools.product(range(6), repeat=2)))
    with torch.no_grad():
        logits = own(torch.cat([prompt.expand(36, -1), sequences], dim=-1)).logits[:, 3:5] / temperature
    law = logits.double().softmax(-1).gather(-1, sequences[..., None]).squeeze(-1).prod(-1)
    torch.manual_seed(17)
    counts, settings = torch.zeros(36, dtype=torch.long), {"top_k": 0, "temperature": temperature}
    both = dict(zip(BOTH, SHARED, strict=True))
    for _ in range(120):
        with answered():
            out = own.generate(prompt, assistant_model=online, do_sample=True, max_new_tokens=2, **settings, **both)
        counts[out[0, 4] * 6 + out[0, 5]] += 1
    assert follows(counts, law, THOUSAND)
    metrics = online.metrics
    assert metrics.updates >= 40 and metrics.skipped_updates == 0 and metrics.accepted_tokens > 20


# Learning


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"update_when": "idle"}, {"learner": "ensemble"}], ids=str)
def test_the_draft_learns_the_law_on_the_common_tokens(settings: dict[str, Any]) -> None:
    own, online = shared_models()
    online = draft(tiny_llama(2, vocab=6, initializer_range=0.25), lr=1e-2, **settings)
    prompt, both = torch.tensor([[3, 1, 5, 3]]), dict(zip(BOTH, SHARED, strict=True))
    common = [0, 1, 2, 3], [1, 2, 0, 4]  # a, b, c, ab
    read = torch.tensor([[4, 2, 2, 2, 4]])  # ab b b|b ab
    with torch.no_grad():
        wanted = own(prompt).logits[0, -1, common[0]].softmax(-1)
        before = online(read).logits[0, -1, common[1]].softmax(-1)
        for _ in range(8):
            with answered():
                own.generate(prompt, assistant_model=online, do_sample=True, max_new_tokens=4, top_k=0, **both)
            assert online.catch_up(60)
        after = online(read).logits[0, -1, common[1]].softmax(-1)
    assert torch.minimum(wanted, after).sum() > torch.minimum(wanted, before).sum() + 0.05


def test_a_resumed_draft_learns_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"replay_tokens": 0, "replay_passes": 0}
    model = tiny_llama(2, vocab=400)
    own, whole, first = target(), draft(model, **settings), draft(copy.deepcopy(model), **settings)
    texts = (PROMPT, SENTENCES[0], SENTENCES[1], SENTENCES[2])
    for i, text in enumerate(texts):
        for online in (whole, first):
            torch.manual_seed(i)
            own.generate(**tokens(text), assistant_model=online, do_sample=True, max_new_tokens=12, **BOTH)
        if i == 1:
            first.save_pretrained(tmp_path)
            first = OnlineDraft.from_pretrained(tmp_path, base_model=model)
    assert torch.equal(flat_params(whole), flat_params(first))
    assert whole.metrics.updates == first.metrics.updates > 0


def test_adapters_with_names_learn_apart() -> None:
    own, online = target(), draft()
    inputs = tokens(PROMPT, SENTENCES[0])
    plain = own.generate(**inputs, **GREEDY)
    with answered():
        ours = own.generate(**inputs, assistant_model=online, adapter=["one", "two"], **GREEDY, **BOTH)
    assert torch.equal(plain, ours)
    assert [online.adapters[name].steps > 0 for name in ("one", "two")] == [True, True] and online.steps == 0


# The ways in


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_tokenizers_come_from_the_models_folders(tmp_path: Path) -> None:
    own = saved(tmp_path / "target", target(), TARGET)
    online = draft(saved(tmp_path / "draft", tiny_llama(2, vocab=400), DRAFT))
    inputs = tokens(PROMPT)
    plain = own.generate(**inputs, **GREEDY)
    with answered():
        assert torch.equal(plain, own.generate(**inputs, assistant_model=online, **GREEDY))
    drafted = online.metrics.drafted_tokens
    with hf_onlinespec.attached(own, online), answered():
        assert torch.equal(plain, own.generate(**inputs, **GREEDY))
    assert online.metrics.drafted_tokens > drafted > 0
    answers = hf_onlinespec.generate_stream(
        own, [PROMPT, "a"], tokenizer=TARGET, batch_size=2, assistant_model=online, onlinespec=True, **GREEDY
    )
    assert torch.equal(next(iter(answers)).tokens, plain[0, inputs["input_ids"].shape[1] :])
    out = own.generate(**inputs, custom_generate=online.generate_fn(tokenizer=TARGET), **GREEDY)
    assert torch.equal(out, plain)


def test_vocabularies_of_one_size_may_be_two() -> None:
    own, online = tiny_llama(1, vocab=400, layers=2), draft()
    inputs = tokens(PROMPT, tokenizer=byte_level(400))
    both = {"tokenizer": byte_level(400), "assistant_tokenizer": DRAFT}
    with answered():
        ours = own.generate(**inputs, assistant_model=online, onlinespec=True, **GREEDY, **both)
    assert torch.equal(ours, own.generate(**inputs, **GREEDY)) and online.metrics.drafted_tokens > 0


def test_names_of_special_tokens_are_no_other_tokenizer() -> None:
    """An instructed model may rename what its base has reserved."""
    own, online = tiny_llama(1, vocab=400, layers=2), draft()
    renamed = byte_level(400, chat=True)
    other = copy.deepcopy(renamed)
    other.add_special_tokens({"pad_token": "<|pad|>"})
    inputs = tokens(PROMPT, tokenizer=renamed)
    both = {"tokenizer": renamed, "assistant_tokenizer": other}
    ours = own.generate(**inputs, assistant_model=online, onlinespec=True, **GREEDY, **both)
    assert torch.equal(ours, own.generate(**inputs, **GREEDY))
    assert online.targets.at_hand is own  # it could read what is learned from


def test_what_cannot_be_drafted_with_is_refused_before_any_work() -> None:
    own, online = target(), draft()
    inputs = tokens(PROMPT)
    for given, words in (
        ({}, "400"),
        ({"tokenizer": TARGET, "assistant_tokenizer": strings("§", "¶")}, "no token in common"),
        ({"tokenizer": TARGET, "assistant_tokenizer": Slow()}, "The draft's tokenizer Slow is a slow one"),
        ({"tokenizer": Slow(), "assistant_tokenizer": DRAFT}, "The target's tokenizer Slow is a slow one"),
        ({"tokenizer": TARGET, "assistant_tokenizer": word_pieces()}, "decodes with WordPiece"),
    ):
        model = online if given else draft(tiny_llama(2, vocab=2000))
        with pytest.raises(DraftError, match=words if given else "the tokenizer of the target is not at hand"):
            own.generate(**inputs, assistant_model=model, max_new_tokens=2, **given)
        assert model.metrics.requests == 0


def test_tokenizers_in_each_other_s_place_are_refused_where_their_sizes_tell() -> None:
    own, inputs = target(), tokens(PROMPT)
    exact, wider = draft(tiny_llama(2, vocab=len(DRAFT))), draft()  # the wider one has room for the target's tokens
    swapped = {"tokenizer": DRAFT, "assistant_tokenizer": TARGET}
    with pytest.raises(DraftError, match=r"the other model's\. Pass the target's as tokenizer="):
        own.generate(**inputs, assistant_model=exact, **GREEDY, **swapped)
    plain = own.generate(**inputs, **GREEDY)
    for model, both in ((exact, BOTH), (wider, swapped)):
        assert torch.equal(plain, own.generate(**inputs, assistant_model=model, **GREEDY, **both))
    assert exact.metrics.requests == 1


def test_a_text_that_the_draft_cannot_spell_is_decoded_plainly_and_the_reason_told() -> None:
    own, online = target(), draft(tiny_llama(2, vocab=4))
    inputs = tokens("ab ab")
    both = {"tokenizer": TARGET, "assistant_tokenizer": strings("a", "b", " ", "ab", merges=(("a", "b"),))}
    plain = own.generate(**inputs, **GREEDY)
    with answered():
        assert torch.equal(plain, own.generate(**inputs, assistant_model=online, **GREEDY, **both))
    inputs = tokens(SENTENCES[2])
    plain = own.generate(**inputs, **GREEDY)
    drafted = online.metrics.drafted_tokens
    with answered():
        assert torch.equal(plain, own.generate(**inputs, assistant_model=online, **GREEDY, **both))
    assert online.metrics.drafted_tokens == drafted
    assert "the draft's tokenizer has no tokens for this text" in online.metrics.decisions.drafting


def test_a_text_that_the_draft_s_tokenizer_changes_is_decoded_plainly_and_the_reason_told() -> None:
    """Capitals are small letters to the draft: it would go on with another text."""
    own, online = target(), draft(tiny_llama(2, vocab=330))
    both = {"tokenizer": TARGET, "assistant_tokenizer": lowercasing(330)}
    prompt = tokens(" COUNT WHERE GROUP BY" * 4)
    plain = own.generate(**prompt, **GREEDY)
    with answered():
        assert torch.equal(plain, own.generate(**prompt, assistant_model=online, **GREEDY, **both))
    assert online.metrics.drafted_tokens == 0
    assert "the draft's tokenizer has no tokens for this text" in online.metrics.decisions.drafting
    prompt = tokens("the dogs ran to the houses")
    plain = own.generate(**prompt, **GREEDY)
    with answered():
        assert torch.equal(plain, own.generate(**prompt, assistant_model=online, **GREEDY, **both))
    assert online.metrics.drafted_tokens > 0
