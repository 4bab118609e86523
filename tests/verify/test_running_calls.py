"""Calls that are decoded together: each says what it says alone, by its own settings, and fails alone; some join while others run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError
from hf_onlinespec.commit.base import Draft
from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.commit.suffix_memory import SuffixMemory
from hf_onlinespec.verify.custom_generate import Prepare, PreparedCall
from hf_onlinespec.verify.running_calls import RunningCall, RunningCalls, check_joins
from tests.chi_square import THOUSAND, follows
from tests.heads.tiny import tiny_head
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.tokenizers import SENTENCES, byte_level, sentencepiece


def prepared(target: PreTrainedModel, prompt: list[int], **settings: Any) -> PreparedCall:
    prepare = Prepare(None)
    target.generate(torch.tensor([prompt]), custom_generate=prepare, **settings)
    assert prepare.call is not None
    return prepare.call


def plain(target: PreTrainedModel, prompt: list[int], **settings: Any) -> list[int]:
    found: list[int] = target.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return found


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 30, (3 + 5 * i % 11,), generator=numbers).tolist() for i in range(n)]


def run(
    draft: Draft,
    calls: Sequence[PreparedCall],
    at_first: int = 2,
    streamers: Sequence[BaseStreamer | None] = (),
    learn: bool = True,
) -> list[RunningCall]:
    """So many calls at first; another one begins after every other round."""
    rounds, found = RunningCalls(draft), list[RunningCall]()
    for call in calls:
        check_joins(call, draft)
    waiting, step = list(zip(calls, streamers or [None] * len(calls), strict=True)), 0
    while waiting or rounds.running:
        n = at_first if not found else step % 2
        if waiting and n:
            beside = len(rounds.running) + n - 1
            new = [rounds.open(call, learn, None, streamer, beside) for call, streamer in waiting[:n]]
            waiting, found = waiting[n:], found + new
            rounds.begin(new)
        else:
            rounds.step()
        step += 1
    return found


def said(calls: Sequence[RunningCall]) -> list[list[int]]:
    assert not any(one.error for one in calls)
    return [one.tokens[0].tolist() for one in calls]


SETTINGS: list[dict[str, Any]] = [
    dict(max_new_tokens=16),
    dict(max_new_tokens=7),
    dict(max_new_tokens=20, repetition_penalty=1.3),
    dict(max_new_tokens=20, eos_token_id=[4, 9]),
    dict(max_new_tokens=1),
    dict(max_new_tokens=12, bad_words_ids=[[5]], no_repeat_ngram_size=3),
    dict(max_length=24, min_new_tokens=4),
]
CASES: dict[str, dict[str, Any]] = {
    "chains": dict(lookahead=3, update_every=1),
    "governed": dict(lookahead="auto", update_every="auto"),
    "every round": dict(lookahead=3, update_every=1, update_when="round"),
}


@pytest.mark.parametrize(
    "kind, case",
    [
        ("none", "chains"),
        ("none", "governed"),
        ("same", "chains"),
        ("model", "every round"),
        ("model", "governed"),
        ("eagle3", "every round"),
        ("hydra", "chains"),
    ],
)
def test_each_call_says_what_it_says_alone_by_its_own_settings(kind: str, case: str) -> None:
    target = tiny_llama(1)
    asked = list(zip(prompts(7), SETTINGS, strict=True))
    expected = [plain(target, prompt, **settings) for prompt, settings in asked]
    calls = [prepared(target, prompt, **settings) for prompt, settings in asked]
    draft: Draft = MemoryDraft(**CASES[case])
    if kind != "none":
        base = {"model": tiny_llama(7), "same": tiny_llama(1)}.get(kind) or tiny_head(kind, target)
        draft = OnlineDraft(base, rank=2, alpha=2.0, replay_passes=0, **CASES[case])
    found = run(draft, calls)
    assert said(found) == expected
    new = [len(tokens) - len(prompt) for tokens, (prompt, _) in zip(expected, asked, strict=True)]
    assert [one.request.counts.new_tokens for one in found] == new
    metrics = draft.metrics
    assert (metrics.requests, metrics.new_tokens) == (7, sum(new))
    assert not metrics.failed_drafts and not metrics.failed_updates
    assert all(one.own_s > 0 for one in found)
    if case != "governed" and kind != "none":
        assert metrics.drafted_tokens > 0 and metrics.updates > 0
    if kind == "same":
        assert metrics.acceptance_length > 2, "what the draft model has read of each call is what the call has said"


class Ends(StoppingCriteria):
    """At a length."""

    def __init__(self, at: int) -> None:
        self._at = at

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._at)


def test_a_criterion_ends_its_call_where_no_token_does() -> None:
    target, asked = tiny_llama(1), prompts(3, seed=4)
    criteria = [StoppingCriteriaList([Ends(len(prompt) + 5 + 3 * i)]) for i, prompt in enumerate(asked)]
    settings = [dict(max_new_tokens=20, stopping_criteria=one) for one in criteria]
    expected = [plain(target, prompt, **own) for prompt, own in zip(asked, settings, strict=True)]
    calls = [prepared(target, prompt, **own) for prompt, own in zip(asked, settings, strict=True)]
    assert [len(row) - len(prompt) for row, prompt in zip(expected, asked, strict=True)] == [5, 8, 11]
    assert said(run(MemoryDraft(lookahead=6), calls)) == expected


def test_a_target_with_a_table_of_positions_serves_calls_up_to_its_end() -> None:
    target = tiny_gpt2(1)
    asked = [(prompt, dict(max_length=64)) for prompt in prompts(4, seed=3)]
    expected = [plain(target, prompt, **settings) for prompt, settings in asked]
    calls = [prepared(target, prompt, **settings) for prompt, settings in asked]
    assert said(run(MemoryDraft(lookahead=6), calls)) == expected


def test_calls_with_names_of_adapters_teach_these_alone() -> None:
    target = tiny_llama(1)
    draft = OnlineDraft(tiny_llama(7), rank=2, lookahead=3, update_every=1, replay_passes=0)
    rounds, asked = RunningCalls(draft), prompts(3)
    expected = [plain(target, prompt, max_new_tokens=12) for prompt in asked]
    calls = [prepared(target, prompt, max_new_tokens=12) for prompt in asked]
    opened = [rounds.open(call, True, name, None, 2) for call, name in zip(calls, ("sql", "shell", None), strict=True)]
    rounds.begin(opened)
    while rounds.running:
        rounds.step()
    assert said(opened) == expected
    assert {name: one.metrics.requests for name, one in draft.adapters.items()} == {"sql": 1, "shell": 1}
    assert all(one.steps for one in draft.adapters.values()) and draft.steps


def test_a_draft_with_another_tokenizer_drafts_for_calls_beside_each_other(tmp_path: Path) -> None:
    tokenizers, models = (byte_level(500), sentencepiece(400)), list[PreTrainedModel]()
    for seed, tokenizer in enumerate(tokenizers, 1):
        folder = tmp_path / str(seed)
        tiny_llama(seed, vocab=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    target, model = models
    draft = OnlineDraft(model, rank=2, alpha=2.0, lookahead=4, update_every=1, memory_tokens=0, recycle=False)
    asked = [tokenizers[0](text).input_ids for text in SENTENCES]
    settings: dict[str, Any] = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=None)
    expected = [plain(target, prompt, **settings) for prompt in asked]
    found = run(draft, [prepared(target, prompt, **settings) for prompt in asked])
    assert said(found) == expected
    assert draft.metrics.drafted_tokens and draft.metrics.updates and not draft.metrics.failed_drafts


class Fails(LogitsProcessor):
    def __init__(self, at: int) -> None:
        self._at = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self._at:
            raise ValueError("a processor")
        return scores


class Leaves(BaseStreamer):
    """A client that hangs up after so many tokens."""

    def __init__(self, after: int) -> None:
        self._left, self.seen, self.ended = after, list[int](), False

    def put(self, value: Tensor) -> None:
        if value.ndim == 2:
            return
        self._left -= 1
        if self._left < 0:
            raise ConnectionError("gone")
        self.seen += value.tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kind", ["none", "model"])
def test_what_fails_in_one_call_ends_that_one_alone(kind: str) -> None:
    target, asked = tiny_llama(1), prompts(5, seed=2)
    expected = [plain(target, prompt, max_new_tokens=20) for prompt in asked]
    calls = [prepared(target, prompt, max_new_tokens=20) for prompt in asked]
    fails = LogitsProcessorList([Fails(len(asked[1]) + 6)])
    calls[1] = prepared(target, asked[1], max_new_tokens=20, logits_processor=fails)
    streamers = [None, None, Leaves(5), Leaves(99), None]
    config = OnlineSpecConfig(lookahead=3, update_every=1)
    draft = MemoryDraft(config) if kind == "none" else OnlineDraft(tiny_llama(7), config)
    found = run(draft, calls, 3, streamers)
    assert [type(one.error) for one in found] == [type(None), ValueError, ConnectionError, type(None), type(None)]
    assert said([found[i] for i in (0, 3, 4)]) == [expected[i] for i in (0, 3, 4)]
    gone, stayed = streamers[2:4]
    assert gone is not None and gone.seen == expected[2][len(asked[2]) :][:5] and not gone.ended
    assert stayed is not None and stayed.seen == expected[3][len(asked[3]) :] and stayed.ended
    assert draft.metrics.requests == 5 and not draft.metrics.failed_drafts


@pytest.mark.failures
def test_what_fails_beside_decoding_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    target, asked = tiny_llama(1), prompts(4)
    expected = [plain(target, prompt, max_new_tokens=16) for prompt in asked]
    calls = [prepared(target, prompt, max_new_tokens=16) for prompt in asked]
    draft = OnlineDraft(tiny_llama(7), lookahead=3, update_every=1)

    def broken(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(SuffixMemory, "continuation", broken)
    monkeypatch.setattr(draft.trainable, "shared_reader", broken)
    assert said(run(draft, calls)) == expected
    assert draft.metrics.failed_drafts


def test_a_forward_that_fails_ends_those_that_run_and_no_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    target, asked = tiny_llama(1), prompts(3)
    calls = [prepared(target, prompt, max_new_tokens=8) for prompt in asked]
    rounds = RunningCalls(MemoryDraft())
    forward, left = target.forward, [2]

    def fails(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    first = [rounds.open(call, True, None, None, 1) for call in calls[:2]]
    monkeypatch.setattr(target, "forward", fails)
    assert rounds.begin(first) == [] and rounds.step() == first and not rounds.running
    assert [type(one.error) for one in first] == [RuntimeError, RuntimeError]
    monkeypatch.undo()
    assert said(run(MemoryDraft(), calls[2:], 1)) == [plain(target, asked[2], max_new_tokens=8)]


def test_each_call_reads_and_fills_the_memory_that_was_there_when_it_began() -> None:
    target, prompt = tiny_llama(1), prompts(1)[0]
    call = prepared(target, prompt, max_new_tokens=24)
    draft, memories = MemoryDraft(lookahead=6, recycle=False), {name: SuffixMemory(512) for name in "ab"}
    rounds = RunningCalls(draft)

    def ask(names: str) -> list[int]:
        opened = []
        for name in names:
            draft.memory = memories[name]
            opened.append(rounds.open(call, True, None, None, len(names) - 1))
        rounds.begin(opened)
        while rounds.running:
            rounds.step()
        return [one.request.counts.rounds for one in opened]

    first, other = ask("a")[0], ask("ab")
    again = ask("ba")
    assert other[0] < first, "what was said to a before is known to a"
    assert other[1] == first, "and to nobody else, beside whom it is said once more"
    assert again[0] < first and again[1] < first


def test_sampled_calls_beside_greedy_ones_keep_the_law_of_each() -> None:
    """Two tokens, each kind with a temperature and candidates of its own."""
    target, prompt, copies = tiny_llama(1, vocab=8), [3, 5, 1], 40
    kinds: list[dict[str, Any]] = [
        dict(do_sample=True, temperature=1.5, top_k=0),
        dict(do_sample=True, temperature=0.8, top_k=4),
    ]
    draft = OnlineDraft(tiny_llama(7, vocab=8), rank=2, lookahead=2, memory_tokens=0)
    greedy, counts = plain(target, prompt, max_new_tokens=2), torch.zeros(2, 64)
    *sampled, last = [prepared(target, prompt, max_new_tokens=2, **kind) for kind in (*kinds, {})]
    calls = [call for call in sampled for _ in range(copies)] + [last]
    for _ in range(12):
        *found, own = said(run(draft, calls, len(calls), learn=False))
        assert own == greedy
        for i, (*_, a, b) in enumerate(found):
            counts[i // copies, 8 * a + b] += 1
    assert draft.metrics.accepted_tokens
    for seen, kind in zip(counts, kinds, strict=True):
        assert follows(seen, _law(target, prompt, kind), THOUSAND)


def _law(target: PreTrainedModel, prompt: list[int], kind: dict[str, Any]) -> Tensor:
    """(64,) of two tokens."""

    def probs(rows: Tensor) -> Tensor:
        logits = target(rows).logits[:, -1].double() / kind["temperature"]
        if kind["top_k"]:
            logits[logits < logits.topk(kind["top_k"]).values[:, -1:]] = -torch.inf
        return logits.softmax(-1)

    with torch.no_grad():
        first = probs(torch.tensor([prompt]))[0]
        second = probs(torch.tensor([[*prompt, token] for token in range(8)]))
    return (first[:, None] * second).flatten()


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(num_return_sequences=2, do_sample=True), "A batch of 2"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate"),
        (dict(prefill_chunk_size=2), "prefill_chunk_size"),
        (dict(use_cache=False), "use_cache"),
    ],
)
def test_what_cannot_be_decoded_beside_others_is_told_before_any_work(settings: dict[str, Any], reason: str) -> None:
    target = tiny_llama(1)
    target.generation_config = GenerationConfig(pad_token_id=0)
    call = prepared(target, [3, 4, 5], max_new_tokens=4, **settings)
    with pytest.raises(UnsupportedError, match=reason):
        check_joins(call, MemoryDraft())
