"""The embedded pair: it loads offline, stays within its limits, decodes losslessly while learning, and learning pays."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec.embedded import DOMAINS, FOLDER, EmbeddedPair, load_draft, load_pair, prompts

FIXED = OnlineSpecConfig(lookahead=5, update_every=1, memory_tokens=0)
EVERY_ROUND = OnlineSpecConfig(
    lookahead=5,
    update_when="round",
    update_every=1,
    memory_tokens=0,
    rank=8,
    alpha=8.0,
    replay_passes=1,
    replay_batch=1,
)
TIE_GAP = 1e-4


def test_loads_without_a_network(monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the embedded pair opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pair = load_pair()
    text = "SELECT a FROM b WHERE c = 12 ;"
    assert pair.tokenizer.decode(pair.tokenizer(text).input_ids) == text
    assert pair.target.config.vocab_size == pair.draft.config.vocab_size == len(pair.tokenizer) <= 4096


def test_sizes(pair: EmbeddedPair) -> None:
    target, draft = pair.target.num_parameters(), pair.draft.num_parameters()
    assert 8e6 <= target <= 15e6 and draft <= target / 8
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 25e6


def test_prompts_are_many_and_different() -> None:
    for domain in DOMAINS:
        assert len(set(prompts(domain))) >= 150
    with pytest.raises(ValueError, match="poetry"):
        prompts("poetry")


def test_where_it_comes_from_is_recorded() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert all(len(digest) == 64 for digest in record["sources"].values()) and len(record["sources"]) == 3
    assert record["target_held_out_loss"].keys() == set(DOMAINS)
    # The draft knows its home domain only; the target knows all three better.
    for domain in DOMAINS:
        assert record["target_held_out_loss"][domain] < record["draft_held_out_loss"][domain]


@torch.no_grad()
def is_tie(target: PreTrainedModel, plain: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether the target's two best logits where the outputs part are too close for two kernels to agree on."""
    shared = min(plain.shape[1], ours.shape[1])
    at = int((plain[0, :shared] != ours[0, :shared]).nonzero()[0])
    best = target(plain[:, :at]).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < TIE_GAP)


def differences(
    target: PreTrainedModel, draft: OnlineDraft, tokenizer: PreTrainedTokenizerBase, texts: list[str], new_tokens: int
) -> tuple[list[str], int]:
    """Prompts whose greedy output differs from plain `generate`, and how many of all were kernel ties."""
    wrong, ties = [], 0
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        plain = target.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        ours = target.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, assistant_model=draft)
        if torch.equal(plain, ours):
            continue
        if plain.shape == ours.shape and is_tie(target, plain, ours):
            ties += 1
        else:
            wrong.append(text)
    return wrong, ties


def test_lossless_on_300_prompts_while_the_adapter_moves_every_round(pair: EmbeddedPair) -> None:
    draft = OnlineDraft(load_draft(), EVERY_ROUND)
    texts = [prompts(domain)[i] for i in range(100) for domain in DOMAINS]
    wrong, ties = differences(pair.target, draft, pair.tokenizer, texts, new_tokens=24)
    print(f"300 prompts: {len(wrong)} different, {ties} kernel ties")
    assert wrong == [] and ties <= 3
    assert draft.metrics.updates >= draft.metrics.rounds and draft.metrics.skipped_updates == 0


@pytest.mark.parametrize("drafted", [True, False], ids=["draft and memory", "memory alone"])
def test_lossless_as_it_comes(pair: EmbeddedPair, drafted: bool) -> None:
    """With the defaults: a governor that looks at clocks, a memory, and learning when it pays."""
    draft = OnlineDraft(load_draft()) if drafted else None
    for i in range(20):
        for domain in DOMAINS:
            inputs = pair.tokenizer(prompts(domain)[i], return_tensors="pt")
            plain = pair.target.generate(**inputs, do_sample=False, max_new_tokens=24)
            ours = pair.target.generate(
                **inputs, do_sample=False, max_new_tokens=24, assistant_model=draft, onlinespec=True
            )
            assert torch.equal(plain, ours) or is_tie(pair.target, plain, ours), (domain, i)
    rounds = (draft or online_memory(pair.target)).metrics.decisions.rounds
    assert rounds["memory"] > 0 and sum(rounds.values()) < 60 * 24


def test_lossless_on_models_by_others(data_folder: Path) -> None:
    target, model = (
        AutoModelForCausalLM.from_pretrained(data_folder / "models" / name).eval()
        for name in ("stories260k", "salty281k")
    )
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "models" / "stories260k")
    stories = (data_folder / "corpora" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    texts = [story.strip()[:60] for story in stories if len(story) > 200][:300]
    assert len(texts) == 300
    draft = OnlineDraft(model, EVERY_ROUND)
    wrong, ties = differences(target, draft, tokenizer, texts, new_tokens=24)
    print(f"300 prompts: {len(wrong)} different, {ties} kernel ties")
    assert wrong == [] and ties <= 3
    assert draft.metrics.updates >= draft.metrics.rounds


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_learning_pays_on_an_unseen_domain(pair: EmbeddedPair, sample: bool) -> None:
    """The last 15 of 45 requests: many more tokens per target forward than the frozen draft on the same prompts."""
    lengths = {}
    for learn in (False, True):
        draft = OnlineDraft(load_draft(), FIXED)
        late = [0, 0]
        for i, text in enumerate(prompts("orders")[:45]):
            inputs = pair.tokenizer(text, return_tensors="pt")
            torch.manual_seed(i)
            how = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sample else {"do_sample": False}
            pair.target.generate(**inputs, **how, max_new_tokens=48, assistant_model=draft, onlinespec=learn)
            if i >= 30:
                late[0] += draft.metrics.last.new_tokens
                late[1] += draft.metrics.last.rounds
        lengths[learn] = late[0] / late[1]
    assert lengths[True] >= 1.5 * lengths[False], lengths
