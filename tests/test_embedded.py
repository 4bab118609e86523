"""The embedded pair: it loads offline, stays within its limits, decodes losslessly while learning, and learning pays."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
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
GREEDY = {"do_sample": False, "max_new_tokens": 24}
# Prompts in a usual run, and in `pytest -m all_prompts`.
FEW, ALL = 60, 300


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


@dataclass(frozen=True)
class Plain:
    """Prompts with what plain `generate` writes to them, greedily."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    outputs: dict[str, torch.Tensor]  # per prompt: tokens (1, L)

    @classmethod
    def of(cls, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Plain:
        asked = {text: tokenizer(text, return_tensors="pt") for text in texts}
        outputs = {text: target.generate(**inputs, **GREEDY) for text, inputs in asked.items()}
        return cls(target, tokenizer, outputs)

    def differences(self, **how: object) -> tuple[list[str], int]:
        """Prompts whose greedy output differs from plain `generate`, and how many of all were kernel ties."""
        wrong, ties = [], 0
        for text, plain in self.outputs.items():
            ours = self.target.generate(**self.tokenizer(text, return_tensors="pt"), **GREEDY, **how)
            if torch.equal(plain, ours):
                continue
            if plain.shape == ours.shape and is_tie(self.target, plain, ours):
                ties += 1
            else:
                wrong.append(text)
        return wrong, ties


@pytest.fixture(scope="module")
def plain(pair: EmbeddedPair) -> Plain:
    """Of the first prompts of every domain: read only."""
    texts = [prompts(domain)[i] for i in range(FEW // len(DOMAINS)) for domain in DOMAINS]
    return Plain.of(pair.target, pair.tokenizer, texts)


@pytest.fixture(scope="module")
def all_plain(pair: EmbeddedPair) -> Plain:
    texts = [prompts(domain)[i] for i in range(ALL // len(DOMAINS)) for domain in DOMAINS]
    return Plain.of(pair.target, pair.tokenizer, texts)


@pytest.mark.parametrize("which", ["plain", pytest.param("all_plain", marks=pytest.mark.all_prompts)])
def test_lossless_while_the_adapter_moves_every_round(which: str, request: pytest.FixtureRequest) -> None:
    plain: Plain = request.getfixturevalue(which)
    draft = OnlineDraft(load_draft(), EVERY_ROUND)
    wrong, ties = plain.differences(assistant_model=draft)
    print(f"{len(plain.outputs)} prompts: {len(wrong)} different, {ties} kernel ties")
    assert wrong == [] and ties <= max(1, len(plain.outputs) // 100)
    assert draft.metrics.updates >= draft.metrics.rounds and draft.metrics.skipped_updates == 0


@pytest.mark.parametrize("drafted", [True, False], ids=["draft and memory", "memory alone"])
def test_lossless_as_it_comes(plain: Plain, drafted: bool) -> None:
    """With the defaults: a governor that looks at clocks, a memory, and learning when it pays."""
    draft = OnlineDraft(load_draft()) if drafted else None
    assert plain.differences(assistant_model=draft, onlinespec=True)[0] == []
    rounds = (draft or online_memory(plain.target)).metrics.decisions.rounds
    assert rounds["memory"] > 0 and sum(rounds.values()) < len(plain.outputs) * GREEDY["max_new_tokens"]


@pytest.mark.parametrize("number", [FEW, pytest.param(ALL, marks=pytest.mark.all_prompts)])
def test_lossless_on_models_by_others(data_folder: Path, number: int) -> None:
    target, model = (
        AutoModelForCausalLM.from_pretrained(data_folder / "models" / name).eval()
        for name in ("stories260k", "salty281k")
    )
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "models" / "stories260k")
    stories = (data_folder / "corpora" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    plain = Plain.of(target, tokenizer, [story.strip()[:60] for story in stories if len(story) > 200][:number])
    draft = OnlineDraft(model, EVERY_ROUND)
    wrong, ties = plain.differences(assistant_model=draft)
    print(f"{number} prompts: {len(wrong)} different, {ties} kernel ties")
    assert wrong == [] and ties <= max(1, number // 100)
    assert draft.metrics.updates >= draft.metrics.rounds


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_learning_pays_on_an_unseen_domain(pair: EmbeddedPair, sample: bool) -> None:
    """The last 6 of 16 requests: many more tokens per target forward than the base draft on the same prompts."""
    first, last = 10, 16
    lengths = {}
    for learn in (False, True):
        draft = OnlineDraft(load_draft(), FIXED)
        tokens, rounds = 0, 0
        # A draft that does not learn answers a request as if there had been none before.
        for i in range(0 if learn else first, last):
            inputs = pair.tokenizer(prompts("orders")[i], return_tensors="pt")
            torch.manual_seed(i)
            how = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sample else {"do_sample": False}
            pair.target.generate(**inputs, **how, max_new_tokens=48, assistant_model=draft, onlinespec=learn)
            if i >= first:
                tokens += draft.metrics.last.new_tokens
                rounds += draft.metrics.last.rounds
        lengths[learn] = tokens / rounds
    assert lengths[True] >= 1.5 * lengths[False], lengths
