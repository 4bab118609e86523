"""`generate_stream`: each prompt's answer is what `generate` says to it alone, once; what fails is one prompt; nothing is read ahead without bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import hf_onlinespec
from hf_onlinespec import ConfigError, OnlineDraft, UnsupportedError, embedded, generate_stream
from hf_onlinespec.embedded import EmbeddedPair
from hf_onlinespec.generation import stream
from tests.conftest import tiny_llama

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
END = 7  # a token that ends answers at different lengths


def target(seed: int = 1) -> LlamaForCausalLM:
    model = tiny_llama(seed)
    model.generation_config.eos_token_id = END
    return model


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=numbers).tolist()
    return [torch.randint(8, 32, (length,), generator=numbers).tolist() for length in lengths]


def alone(model: LlamaForCausalLM, prompt: list[int], **kwargs: Any) -> list[int]:
    """What plain `generate` says behind one prompt."""
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), onlinespec=False, **(GREEDY | kwargs))
    return out[0, len(prompt) :].tolist()


def said(tokens: Tensor | None) -> list[int]:
    assert tokens is not None
    return tokens.tolist()


class Counted:
    """An iterator that knows how much of it was read."""

    def __init__(self, prompts: list[Any]) -> None:
        self._prompts, self.read = iter(prompts), 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        prompt = next(self._prompts)
        self.read += 1
        return prompt


@pytest.mark.parametrize("drafting", ["plain", "memory", "draft", "attached"])
def test_every_answer_is_what_generate_says_to_the_prompt_alone(drafting: str) -> None:
    model, asked = target(), prompts(18)
    arguments: dict[str, Any] = {
        "memory": {"onlinespec": True},
        "draft": {"assistant_model": tiny_llama(7), "onlinespec": True},
    }.get(drafting, {})
    if drafting == "attached":
        hf_onlinespec.attach(model)
    answers = list(generate_stream(model, iter(asked), batch_size=4, **GREEDY, **arguments))
    assert [answer.index for answer in answers] == list(range(18))
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt) for prompt in asked]
    assert all(answer.prompt is prompt for answer, prompt in zip(answers, asked, strict=True))
    lengths = {len(said(answer.tokens)) for answer in answers}
    assert len(lengths) > 3, "the answers are of different lengths, or nothing was tested"
    if drafting != "plain":
        assert hf_onlinespec.online_metrics(model).rounds > 0


def test_answers_come_as_they_are_finished_if_no_order_is_asked_for() -> None:
    model, asked = target(), prompts(18)
    answers = list(generate_stream(model, asked, batch_size=4, ordered=False, **GREEDY))
    assert sorted(answer.index for answer in answers) == list(range(18))
    assert [answer.index for answer in answers] != list(range(18))
    for answer in answers:
        assert said(answer.tokens) == alone(model, asked[answer.index])


@pytest.mark.parametrize("ordered", [True, False])
def test_no_more_prompts_are_read_than_are_needed(ordered: bool) -> None:
    source = Counted(prompts(60))
    handed_out = 0
    for _ in generate_stream(target(), source, batch_size=3, ordered=ordered, **GREEDY):
        assert source.read <= handed_out + 12 + 3, "four batches wait, and one was answered"
        handed_out += 1
    assert handed_out == 60


def test_calls_of_many_batches_are_bounded_too_and_begin_small() -> None:
    source, ahead, handed_out = Counted(prompts(150)), 0, 0
    for _ in generate_stream(target(), source, 2, ordered=False, onlinespec=True, do_sample=False, max_new_tokens=2):
        if not handed_out:
            assert source.read == 4, "two batches at first"
        ahead, handed_out = max(ahead, source.read - handed_out), handed_out + 1
    assert handed_out == 150 and 16 < ahead <= 32


def test_a_draft_learns_from_the_whole_stream() -> None:
    draft = OnlineDraft(tiny_llama(7), rank=2, update_every=1, lookahead=3)
    answers = list(generate_stream(target(), prompts(12), batch_size=4, assistant_model=draft, **GREEDY))
    assert len(answers) == 12 and draft.metrics.new_tokens == sum(len(said(answer.tokens)) for answer in answers)
    assert draft.metrics.updates >= 3 and draft.steps == draft.metrics.updates


def test_texts_messages_and_ids_are_prompts(pair: EmbeddedPair) -> None:
    model, tokenizer = pair.target, pair.tokenizer
    text = "- Copy a file to"
    ids = tokenizer(text)["input_ids"]
    masked = {"input_ids": torch.tensor([[0, 0, *ids]]), "attention_mask": torch.tensor([[0, 0] + [1] * len(ids)])}
    asked = [text, {"prompt": text, "id": "a"}, ids, torch.tensor(ids), torch.tensor([ids]), {"input_ids": ids}, masked]
    answers = list(generate_stream(model, asked, tokenizer=tokenizer, **GREEDY))
    assert [answer.error for answer in answers] == [None] * len(asked)
    assert len({tuple(said(answer.tokens)) for answer in answers}) == 1
    assert answers[1].prompt["id"] == "a"
    assert answers[0].text == tokenizer.decode(answers[0].tokens, skip_special_tokens=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template
    try:
        talk = [{"role": "user", "content": text}]
        chats = list(generate_stream(model, [talk, {"messages": talk}], tokenizer=tokenizer, **GREEDY))
    finally:
        tokenizer.chat_template = None
    assert [said(answer.tokens) for answer in chats] == [said(answers[0].tokens)] * 2


BAD: list[tuple[Any, str]] = [
    ([], "no tokens"),
    ([[7, 8], [9]], "expected a text, messages, or the token ids"),  # ragged
    ([[7, 8], [9, 9]], "one sequence"),
    ({"input_ids": [0, 0], "attention_mask": [0, 0]}, "no tokens"),  # padding alone
    ({"input_ids": [7, 8], "attention_mask": [1]}, "attention_mask of 1"),
    ([7, 32], "token 32"),
    ([7, -1], "token -1"),
    ([7.5], "token ids of one sequence"),
    (list(range(6, 30)) * 11, "264 tokens"),  # longer than the context
    ("a text", "Pass tokenizer="),
    ({"question": "?"}, "expected one of prompt, messages, input_ids"),
    (None, "expected a text, messages, or the token ids"),
]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_prompt_that_cannot_be_read_is_that_prompts_failure(ordered: bool) -> None:
    model, good = target(), prompts(len(BAD) + 1)
    asked: list[Any] = [good[0]]
    for (bad, _), prompt in zip(BAD, good[1:], strict=True):
        asked += [bad, prompt]
    answers = {answer.index: answer for answer in generate_stream(model, asked, 4, ordered=ordered, **GREEDY)}
    assert len(answers) == len(asked)
    for i, (_, words) in enumerate(BAD):
        failed = answers[2 * i + 1]
        assert isinstance(failed.error, ConfigError) and words in str(failed.error), failed
        assert failed.tokens is None and failed.text is None
    for i, prompt in enumerate(good):
        assert said(answers[2 * i].tokens) == alone(model, prompt)


def test_prompts_that_all_fail_are_read_within_bounds_too() -> None:
    source = Counted([[]] * 100)
    for handed_out, answer in enumerate(generate_stream(target(), source, batch_size=2, **GREEDY)):
        assert answer.error is not None and source.read <= handed_out + 8
    assert source.read == 100


class RaisesAt(LogitsProcessor):
    """Fails where a row has a token."""

    supports_continuous_batching = False

    def __init__(self, token: int) -> None:
        self.token, self.calls = token, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        if bool((input_ids == self.token).any()):
            raise ArithmeticError(f"token {self.token}")
        return scores


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.filterwarnings("ignore:.*failed")
def test_a_processor_that_raises_for_one_row_costs_that_row(drafting: bool) -> None:
    model, asked = target(), [[token] for token in range(8, 22)]
    bad = 11
    fine = [prompt for prompt in asked if bad not in prompt + alone(model, prompt)]
    assert 3 < len(fine) < len(asked)
    processors = LogitsProcessorList([RaisesAt(bad)])
    found = list(generate_stream(model, asked, 4, logits_processor=processors, onlinespec=drafting, **GREEDY))
    for prompt, answer in zip(asked, found, strict=True):
        if prompt in fine:
            assert said(answer.tokens) == alone(model, prompt)
        else:
            assert isinstance(answer.error, ArithmeticError), answer


def test_what_fails_at_every_prompt_is_raised() -> None:
    with pytest.raises(ValueError, match="not_an_argument"):
        list(generate_stream(target(), prompts(5), 2, not_an_argument=1, **GREEDY))
    with pytest.raises(UnsupportedError):
        list(generate_stream(target(), prompts(5), 2, onlinespec=True, num_beams=2, **GREEDY))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"num_return_sequences": 2},
        {"attention_mask": torch.ones(1, 2)},
        {"streamer": object()},
        {"prompts": "one text"},
        {"prompts": 3},
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        generate_stream(target(), **({"prompts": prompts(3)} | arguments))


class Interrupts(LogitsProcessor):
    """Ctrl-C, after so many calls of all its copies."""

    supports_continuous_batching = False

    def __init__(self, calls: list[int]) -> None:
        self._calls = calls

    def __deepcopy__(self, memo: dict[int, Any]) -> Interrupts:
        return Interrupts(self._calls)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._calls[0] -= 1
        if self._calls[0] < 0:
            raise KeyboardInterrupt
        return scores


def test_an_interruption_hands_out_what_is_finished() -> None:
    model, asked = target(), prompts(20)
    processors = LogitsProcessorList([Interrupts([110])])
    found = []
    with pytest.raises(KeyboardInterrupt):
        for answer in generate_stream(model, asked, 4, onlinespec=True, logits_processor=processors, **GREEDY):
            found.append(answer)
    assert 4 <= len(found) < 20
    assert len({answer.index for answer in found}) == len(found)
    for answer in found:
        assert said(answer.tokens) == alone(model, asked[answer.index])
    memory = hf_onlinespec.online_metrics(model)
    assert memory.requests > 0 and memory.new_tokens >= sum(len(said(answer.tokens)) for answer in found)


def test_an_interruption_hands_out_what_waits_for_an_earlier_answer_too() -> None:
    found = {}
    for ordered in (True, False):
        found[ordered] = list[int]()
        processors = LogitsProcessorList([Interrupts([40])])
        with pytest.raises(KeyboardInterrupt):
            for answer in generate_stream(
                target(), prompts(20), 4, ordered=ordered, logits_processor=processors, **GREEDY
            ):
                found[ordered].append(answer.index)
    assert found[True] == sorted(found[False]) and len(found[True]) >= 8
    assert found[True] != list(range(len(found[True]))), "an earlier answer is missing"


def test_an_interruption_while_prompts_are_waited_for_hands_out_what_is_finished() -> None:
    def queue() -> Iterator[list[int]]:
        yield from prompts(8)
        raise KeyboardInterrupt

    found = []
    with pytest.raises(KeyboardInterrupt):
        for answer in generate_stream(target(), queue(), 2, **GREEDY):
            found.append(answer.index)
    assert found == sorted(set(found)) and found


def test_an_error_of_the_prompts_themselves_is_raised_when_the_earlier_ones_are_answered() -> None:
    def broken() -> Iterator[list[int]]:
        yield from prompts(5)
        raise OSError("the file is gone")

    found = []
    with pytest.raises(OSError, match="the file is gone"):
        for answer in generate_stream(target(), broken(), 2, **GREEDY):
            found.append(answer.index)
    assert found == list(range(5))


def test_stop_strings_end_a_row_where_they_end_it_alone(pair: EmbeddedPair) -> None:
    model, tokenizer, arguments = pair.target, pair.tokenizer, GREEDY | {"stop_strings": ["`", "\n\n"]}
    texts = embedded.prompts("shell")[:5]
    found = list(generate_stream(model, texts, 2, tokenizer=tokenizer, onlinespec=True, **arguments))
    for text, answer in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        plain = model.generate(**inputs, tokenizer=tokenizer, onlinespec=False, **arguments)
        assert said(answer.tokens) == plain[0, inputs["input_ids"].shape[1] :].tolist()
    assert len({len(said(answer.tokens)) for answer in found}) > 1


def test_a_bar_counts_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []

    class Bar:
        def update(self, n: int = 1) -> None:
            seen[-1] = seen[-1][0], seen[-1][1] + n

    @contextmanager
    def bar(total: int | None, what: str, unit: str) -> Iterator[Bar]:
        seen.append((total, 0))
        yield Bar()

    monkeypatch.setattr(stream, "progress_bar", bar)
    for asked in (prompts(7), iter(prompts(7))):
        assert len(list(generate_stream(target(), asked, 2, progress=True, **GREEDY))) == 7
    assert seen == [(7, 7), (None, 7)]


def test_no_prompts_are_no_answers() -> None:
    assert list(generate_stream(target(), [], **GREEDY)) == []


def test_pad_and_end_may_be_one_token() -> None:
    model, asked = target(), prompts(12)
    model.generation_config.pad_token_id = END
    answers = generate_stream(model, asked, 5, onlinespec=True, **GREEDY)
    assert [said(answer.tokens) for answer in answers] == [alone(model, prompt) for prompt in asked]
