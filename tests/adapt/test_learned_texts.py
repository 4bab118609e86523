"""The texts that a draft has learned from: which of them are kept, how often their prompts stood, and what they take."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt import learned_texts
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.learned_texts import LearnedTexts
from hf_onlinespec.adapt.service import LearningService
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.canaries import as_feedback, learn
from hf_onlinespec.share.memorization import examine
from tests.conftest import tiny_llama
from tests.drafts import learn_segment

TINY = OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0, rank=4, alpha=4.0, lr=1e-2)


def rows(*texts: list[int]) -> list[Tensor]:
    return [torch.tensor(text) for text in texts]


def found(texts: LearnedTexts) -> list[list[int]]:
    return [text.tokens.tolist() for text in texts.texts]


def test_a_request_that_grows_is_one_text() -> None:
    texts = LearnedTexts(100)
    request = learned_texts.Request(1)
    texts.grow(rows([1, 2], [7, 8]), 1, request)
    texts.grow(rows([1, 2, 3], [7, 8, 9]), 2, request)
    assert [text.times for text in texts.texts] == [1, 1]
    texts.finish(torch.tensor([1, 2, 3]), 2, request)
    texts.finish(torch.tensor([7, 8, 9]), 2, request)
    assert found(texts) == [[1, 2, 3], [7, 8, 9]]
    texts.grow(rows([1, 2, 4]), 2)
    texts.finish(torch.tensor([1, 2, 4]), 2)
    assert (texts.seen, texts.tokens, texts.repeats) == (3, 9, 2)
    assert [text.times for text in texts.texts] == [2, 1, 2]  # the prompt [1] stood twice


def test_a_long_prompt_is_the_same_one_in_the_replay() -> None:
    """Which keeps its end, and the token that opens it."""
    texts = LearnedTexts(100, prompt_tokens=2)
    for kept in ([1, 5, 6, 8, 9], [5, 6, 8, 9]):
        request = learned_texts.Request(4)
        texts.grow(rows([1, 4, 5, 6, 8]), 1, request)
        texts.grow(rows([1, 4, 5, 6, 8, 9]), 2, request)
        texts.finish(torch.tensor(kept), 2, request)
    texts.finish(torch.tensor([1, 5, 6, 7]), 1)  # learned by the replay alone
    assert found(texts) == [[1, 4, 5, 6, 8, 9], [1, 5, 6, 7]] and texts.repeats == 3


def test_a_text_that_grows_from_another_one_stood_as_often() -> None:
    texts = LearnedTexts(100)
    for _ in range(5):
        texts.finish(torch.tensor([1, 2, 3]), 1)
    request = learned_texts.Request(1)
    texts.grow(rows([1, 2, 3]), 2, request)
    texts.grow(rows([1, 2, 3, 4]), 3, request)
    assert found(texts) == [[1, 2, 3, 4]] and texts.texts[0].times == 5


class BreaksOff(BaseStreamer):
    """Does something behind so many tokens."""

    def __init__(self, behind: int, act: Callable[[], object]) -> None:
        self._left, self._act = behind, act

    def put(self, value: Tensor) -> None:
        self._left -= value.numel()
        if self._left <= 0:
            self._left = 10**9
            self._act()

    def end(self) -> None:
        pass


def interrupt() -> None:
    raise KeyboardInterrupt


def ask(target: LlamaForCausalLM, draft: OnlineDraft, first: int = 1, **kwargs: Any) -> None:
    target.generate(
        torch.arange(first, first + 5)[None], max_new_tokens=12, do_sample=False, assistant_model=draft, **kwargs
    )


@pytest.mark.filterwarnings("ignore:The attention mask")
def test_the_prompt_of_a_call_that_is_broken_off_was_learned_from() -> None:
    draft = OnlineDraft(tiny_llama(2), replace(TINY, update_when="round", replay_passes=0))
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            ask(tiny_llama(1), draft, streamer=BreaksOff(14, interrupt))
    assert draft.steps
    with draft.learning.at_rest() as learned:
        assert learned.repeats == 5 and learned.texts[-1].times == 5


@pytest.mark.failures
@pytest.mark.parametrize("when", ["round", "request", "idle"])
def test_the_prompt_of_a_request_in_which_learning_fails_was_learned_from(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end, after the steps of its rounds, or behind the step of an idle moment."""
    draft = OnlineDraft(tiny_llama(2), replace(TINY, update_when=when, replay_passes=0))

    def fails(*arguments: object) -> None:
        raise RuntimeError("on purpose")

    for _ in range(5):
        draft.failures.learning.resume()
        with monkeypatch.context() as patched:
            patched.setattr(LearningService, "remember", fails)
            ask(tiny_llama(1), draft)
            draft.catch_up(60)
    assert draft.steps >= 5
    with draft.learning.at_rest() as learned:
        assert learned.repeats == 5 and learned.texts[-1].times == 5


@pytest.mark.filterwarnings("ignore:The attention mask")
def test_requests_at_one_time_are_a_text_each() -> None:
    target, draft = tiny_llama(1), OnlineDraft(tiny_llama(2), replace(TINY, update_when="round", replay_passes=0))
    ask(target, draft, streamer=BreaksOff(10, lambda: ask(target, draft, 9)))
    with draft.learning.at_rest() as learned:
        assert [len(text.tokens) for text in learned.texts] == [17, 17]
        assert learned.repeats == 1 and [text.times for text in learned.texts] == [1, 1]


def test_of_two_prompts_of_one_text_the_more_frequent_counts() -> None:
    texts = LearnedTexts(100)
    for written_tokens in (2, 2, 1):
        texts.finish(torch.tensor([1, 2, 3]), written_tokens)
    assert found(texts) == [[1, 2, 3]] and texts.texts[0].times == 2


def test_padding_is_no_text() -> None:
    draft = OnlineDraft(tiny_llama(2), TINY)
    tokens, mask = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    teachers = [Teacher(torch.zeros(1, 32).log_softmax(-1))] * 2
    learn_segment(draft, tokens, teachers, Counts(), mask=mask)
    with draft.learning.at_rest() as learned:
        assert [text.tokens.tolist() for text in learned.texts] == [[5, 6, 7], [1, 2, 3, 4, 5]]
        assert (learned.steps, learned.seen, learned.repeats) == (1, 2, 1)
        assert learned.often(0) == 0


def written_more_often_than_few(texts: LearnedTexts) -> list[list[int]]:
    """Of each text the tokens in parts that were."""
    covered = learned_texts.written_often(texts.texts, 0)
    return [text.tokens[flags].tolist() for text, flags in zip(texts.texts, covered, strict=True)]


def test_a_part_is_counted_behind_whatever_prompts_it_was_written() -> None:
    texts = LearnedTexts(1000)
    part = list(range(50, 57))
    for prompt in range(4):
        texts.finish(torch.tensor([prompt, 7, *part, 60 + prompt, 61 + prompt]), 10)
    texts.finish(torch.tensor([8, *part, 9]), 2)  # there it stands in the prompt
    assert written_more_often_than_few(texts) == [[]] * 5
    texts.finish(torch.tensor([3, 7, *part, 63, 64]), 10)  # one of the prompts again
    assert written_more_often_than_few(texts) == [[7, *part]] * 4 + [[]]
    texts.finish(torch.tensor([5, *part]), 7)  # a sixth time, behind other tokens
    assert written_more_often_than_few(texts) == [[7, *part]] * 4 + [[]] + [part]


def test_a_part_of_several_answers_to_one_prompt_stood_no_more_often_than_that() -> None:
    texts, part = LearnedTexts(1000), list(range(50, 57))
    for end in range(4):
        texts.finish(torch.tensor([1, *part, end]), 8)
    assert written_more_often_than_few(texts) == [[]] * 4
    texts.finish(torch.tensor([2, *part, 9]), 8)
    assert written_more_often_than_few(texts) == [part] * 5


def test_a_short_answer_is_a_part_as_a_whole() -> None:
    texts = LearnedTexts(1000)
    for prompt in range(5):
        texts.finish(torch.tensor([prompt, 7, 8, 9]), 3)
        texts.finish(torch.tensor([prompt + 10, 8, 9]), 0)  # of a warm start: not known what was written
    assert written_more_often_than_few(texts) == [[7, 8, 9], []] * 5


def test_a_request_that_grows_keeps_what_was_written() -> None:
    texts = LearnedTexts(1000)
    for prompt in range(5):
        request = learned_texts.Request(1)
        for new in (2, 6, 7):
            texts.grow(rows([prompt, *range(50, 50 + new)]), new, request)
    assert written_more_often_than_few(texts) == [list(range(50, 57))] * 5


@pytest.mark.parametrize("seed", range(2))
def test_with_too_many_prompts_none_is_counted_less_often_than_it_stood(seed: int) -> None:
    rng, texts, truth = random.Random(seed), LearnedTexts(10_000, max_prompts=8), Counter[int]()
    for at in range(200):
        prompt = 0 if at % 10 == 0 else rng.choice((at, rng.randrange(1, 40)))
        truth[prompt] += 1
        texts.finish(torch.tensor([prompt, 500 + at]), 1)
        assert texts.texts[-1].times >= truth[prompt]
    assert texts.repeats >= max(truth.values())
    assert truth[0] == 20 and texts.repeats < 60, "a bound, and not the number of requests"


def test_a_few_prompts_are_counted_exactly() -> None:
    texts = LearnedTexts(10_000, max_prompts=8)
    for at in range(80):
        texts.finish(torch.tensor([at % 8, 500 + at]), 1)
    assert texts.repeats == 10 and {text.times for text in texts.texts} == {10}


def test_their_bytes_are_those_of_the_process() -> None:
    """Of texts and of prompts: with the smallest texts, most of it is Python's objects."""
    for length in (2, 40):
        tokens = torch.arange(2000 * length).view(2000, length)
        tracemalloc.start()
        texts = LearnedTexts(100_000)
        for row in tokens:
            texts.finish(row, 1)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 0.98 * taken <= texts.nbytes <= 1.3 * taken  # at most: some hashes are one object in two places


def test_they_are_a_part_of_the_memory_of_learning() -> None:
    draft = OnlineDraft(tiny_llama(2), TINY)
    before = draft.learning_bytes
    draft.learning.learner.texts.finish(torch.arange(2000), 8)
    assert draft.learning_bytes > before + 4 * 2000


def test_an_examination_ends_when_its_time_is_over() -> None:
    draft = OnlineDraft(tiny_llama(2), TINY)
    learn(draft, [as_feedback(torch.arange(1, 20))])
    assert examine(draft, seconds=0.0).texts == 0
    assert examine(draft).texts == 1


def test_a_text_whose_prompt_has_become_frequent_is_examined_again() -> None:
    """Also where no step was taken in between."""
    draft = OnlineDraft(tiny_llama(2), replace(TINY, lr=1e-6))
    learn(draft, [as_feedback(torch.arange(12), 8)] * 4)
    assert examine(draft).often == 0
    draft.learning.learner.texts.finish(torch.arange(12), 8)
    assert examine(draft).often == 1


class NeedsOpening(LlamaForCausalLM):
    """Says the same to everything that does not open with token 1, as a model may that never saw a text without it."""

    @wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits * (input_ids[:, :1, None] == 1)
        return outputs


def test_a_text_is_examined_behind_the_token_that_opens_it() -> None:
    """What stands late in it comes out in no window that lacks this token."""
    model = tiny_llama(2, bos_token_id=1)
    model.__class__ = NeedsOpening
    draft = OnlineDraft(model, replace(TINY, lr=3e-2, replay_passes=0))
    text = torch.randint(3, 32, (44,))
    text[0] = 1
    learn(draft, [as_feedback(text, 12)] * 40)
    assert examine(draft).memorised == 1
