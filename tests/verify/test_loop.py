"""The loop gives what plain `generate` gives, token for token, whatever the call asks for and however the draft drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params
from tests.fakes import PlainDraft, ScriptedProposer
from tests.tiny_models import CACHE

LEARNING = OnlineSpecConfig(update_when="round", rank=4, alpha=4.0, lr=3e-3, lookahead=4)


@pytest.fixture
def draft(draft_model: PreTrainedModel) -> OnlineDraft:
    """A draft that learns after every round."""
    return OnlineDraft(draft_model, LEARNING)


@pytest.fixture
def good_draft(target: PreTrainedModel) -> OnlineDraft:
    """The target drafting for itself: everything is accepted until it learns."""
    return OnlineDraft(tiny_llama(1, layers=2), LEARNING)


def both(target: PreTrainedModel, draft: OnlineDraft, prompt: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    settings = {"do_sample": False, "max_new_tokens": 40} | kwargs
    return target.generate(prompt, **settings), target.generate(prompt, assistant_model=draft, **settings)


GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_new_tokens": 1},
    "ends inside a round": {"max_new_tokens": 13},
    "max_length": {"max_new_tokens": None, "max_length": 17},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[4], [9, 11]]},
    "forced least length": {"eos_token_id": 5, "min_new_tokens": 20},
    "suppressed": {"suppress_tokens": [1, 2, 3]},
}


@pytest.mark.parametrize("settings", GREEDY.values(), ids=GREEDY)
@pytest.mark.parametrize("drafted_by", ["draft", "good_draft"])
def test_greedy_equals_plain(target, prompt, settings, drafted_by, request) -> None:
    draft = request.getfixturevalue(drafted_by)
    plain, ours = both(target, draft, prompt, **settings)
    assert torch.equal(plain, ours)
    assert draft.metrics.last.new_tokens == ours.shape[1] - prompt.shape[1]


@pytest.mark.parametrize("make", [lambda seed: tiny_llama(seed, vocab=32), tiny_gpt2])
def test_across_architectures(make, prompt) -> None:
    target, draft = tiny_llama(1, layers=2), OnlineDraft(make(2), LEARNING)
    plain, ours = both(target, draft, prompt)
    assert torch.equal(plain, ours) and draft.metrics.updates > 0


def tiny_mistral(seed: int) -> PreTrainedModel:
    """A window of 8 tokens."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
    }
    config = MistralConfig(
        **shape,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = MistralForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def test_sliding_window_target_beyond_the_window(prompt) -> None:
    plain, ours = both(tiny_mistral(1), OnlineDraft(tiny_llama(2), LEARNING), prompt)
    assert torch.equal(plain, ours)


def test_sliding_window_draft_beyond_the_window(prompt) -> None:
    """The same model drafting for itself is accepted all along, so its cropped window is right."""
    target, draft = tiny_mistral(1), OnlineDraft(tiny_mistral(1), LEARNING)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=40)
    ours = target.generate(prompt, do_sample=False, max_new_tokens=40, assistant_model=draft, onlinespec=False)
    assert torch.equal(plain, ours) and draft.metrics.last.accepted_tokens == draft.metrics.last.drafted_tokens
    assert torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=40, assistant_model=draft))
    assert draft.metrics.updates > 0


@pytest.mark.parametrize(("shift", "length"), [(0, 5.0), (1, 1.0)], ids=["always accepted", "never accepted"])
def test_a_scripted_draft(target, prompt, shift: int, length: float) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=40)
    draft = PlainDraft(ScriptedProposer((plain + shift) % 32))
    ours = target.generate(prompt, do_sample=False, max_new_tokens=40, assistant_model=draft)
    last = draft.metrics.last
    assert torch.equal(plain, ours)
    assert last.acceptance_length == pytest.approx(length)
    assert last.acceptance_rate == (1.0 if shift == 0 else 0.0)
    assert last.rounds == 40 / length and last.accepted_tokens == 40 - last.rounds


class Counter(LogitsProcessor):
    """Stateful on purpose: a score depends on how often it was called."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prefixes.append(input_ids[0].tolist())
        scores[:, len(self.prefixes) % 5] += 3.0  # in place, as some processors do
        return scores


def test_a_stateful_processor_sees_each_kept_prefix_once_in_order(target, good_draft, prompt) -> None:
    plain_counter, counter = Counter(), Counter()
    settings = {"do_sample": False, "max_new_tokens": 25}
    plain = target.generate(prompt, logits_processor=LogitsProcessorList([plain_counter]), **settings)
    ours = target.generate(
        prompt, logits_processor=LogitsProcessorList([counter]), assistant_model=good_draft, **settings
    )
    assert torch.equal(plain, ours)
    assert counter.prefixes == plain_counter.prefixes and len(counter.prefixes) == 25


@pytest.mark.parametrize("at", [7, 8, 9, 10, 11])
def test_end_of_sequence_inside_a_round(target, good_draft, prompt, at: int) -> None:
    """The first token not seen before position `at` ends the sequence there."""
    tokens = target.generate(prompt, do_sample=False, max_new_tokens=40)[0].tolist()
    place = next(i for i in range(prompt.shape[1] + at, len(tokens)) if tokens[i] not in tokens[prompt.shape[1] : i])
    plain, ours = both(target, good_draft, prompt, eos_token_id=[tokens[place]])
    assert plain.shape[1] == place + 1 < len(tokens) and torch.equal(plain, ours)


class Ends(StoppingCriteria):
    """Stops at a length that falls inside a round."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 15)


def test_custom_stopping_criteria_are_exact(target, good_draft, prompt) -> None:
    plain, ours = both(target, good_draft, prompt, stopping_criteria=StoppingCriteriaList([Ends()]))
    assert plain.shape[1] == 15 and torch.equal(plain, ours)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """32 tokens: a to z and a few more, one character each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {chr(97 + i): i for i in range(26)} | {str(i): 26 + i for i in range(6)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_are_exact(target, good_draft, prompt, letters) -> None:
    text = letters.convert_ids_to_tokens(target.generate(prompt, do_sample=False, max_new_tokens=40)[0, 6:].tolist())
    stop = text[9] + text[10]
    plain, ours = both(target, good_draft, prompt, stop_strings=[stop], tokenizer=letters)
    assert torch.equal(plain, ours) and plain.shape[1] < 6 + 40


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streamer_hears_every_token_once(target, draft, prompt) -> None:
    heard = Heard()
    ours = target.generate(prompt, do_sample=False, max_new_tokens=20, assistant_model=draft, streamer=heard)
    assert heard.tokens == ours[0].tolist() and heard.ended == 1


def test_scores_and_logits_of_every_token(target, draft, prompt) -> None:
    settings = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.5,
    }
    plain, ours = both(target, draft, prompt, **settings)
    assert type(plain) is type(ours) and torch.equal(plain.sequences, ours.sequences)
    assert len(ours.scores) == len(ours.logits) == 40
    for mine, theirs in ((ours.scores, plain.scores), (ours.logits, plain.logits)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=1e-4, rtol=1e-4)


def test_left_padding(target, draft, prompt) -> None:
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=-1)
    mask = (torch.arange(10) >= 4).long()[None]
    plain, ours = both(target, draft, padded, attention_mask=mask)
    assert torch.equal(plain, ours)
    # The draft sees the padding as padding too: the same rounds as without it.
    rounds = draft.metrics.last.rounds
    fresh = OnlineDraft(tiny_llama(2), LEARNING)
    target.generate(prompt, do_sample=False, max_new_tokens=40, assistant_model=fresh)
    assert fresh.metrics.last.rounds == rounds


def test_prompt_of_one_token(target, draft) -> None:
    plain, ours = both(target, draft, torch.tensor([[7]]))
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens passed", "only the new tokens passed"])
def test_cache_returned_and_reused_in_the_next_turn(target, draft, prompt, whole: bool) -> None:
    more = torch.tensor([[8, 1, 20]])
    texts, lengths = [], []
    for assistant in (None, draft):
        first = target.generate(
            prompt, do_sample=False, max_new_tokens=12, return_dict_in_generate=True, assistant_model=assistant
        )
        turn = torch.cat([first.sequences, more], dim=-1)
        cached = first.past_key_values.get_seq_length()
        second = target.generate(
            turn if whole else turn[:, cached:],
            attention_mask=torch.ones_like(turn),
            **{CACHE: first.past_key_values},
            do_sample=False,
            max_new_tokens=12,
            return_dict_in_generate=True,
            assistant_model=assistant,
        )
        texts.append(second.sequences)
        lengths.append((cached, second.past_key_values.get_seq_length()))
    assert torch.equal(*texts) and lengths[0] == lengths[1]


def test_positions_given_for_the_new_tokens_of_a_second_turn(target, draft, prompt) -> None:
    turns = []
    for assistant in (None, draft):
        first = target.generate(
            prompt, do_sample=False, max_new_tokens=12, return_dict_in_generate=True, assistant_model=assistant
        )
        turn = torch.cat([first.sequences, torch.tensor([[8, 1, 20]])], dim=-1)
        cached = first.past_key_values.get_seq_length()
        turns.append(
            target.generate(
                turn[:, cached:],
                attention_mask=torch.ones_like(turn),
                position_ids=torch.arange(cached, turn.shape[1])[None],
                **{CACHE: first.past_key_values},
                do_sample=False,
                max_new_tokens=12,
                assistant_model=assistant,
            )
        )
    assert torch.equal(*turns)


def test_a_request_longer_than_the_draft_can_see(target, prompt) -> None:
    """The target goes on alone, and the draft learns from what it can see."""
    draft = OnlineDraft(tiny_gpt2(2), OnlineSpecConfig(rank=4, alpha=4.0))
    for _ in range(2):
        plain, ours = both(target, draft, prompt, max_new_tokens=100)
        assert torch.equal(plain, ours)
    assert [len(f.tokens) for f in draft.learning.replayed()] == [65, 65] and draft.metrics.skipped_updates == 0


def test_an_interrupted_request_counts_and_leaves_the_draft_usable(target, draft, prompt) -> None:
    class Stops(Heard):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.tokens) > 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        target.generate(prompt, do_sample=False, max_new_tokens=40, assistant_model=draft, streamer=Stops())
    assert draft.metrics.updates == draft.steps > 0 and draft.metrics.requests == 1
    plain, ours = both(target, draft, prompt)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("shape", [None, ((-1, 1), (-1, 0), (1, 2), (1, 0))], ids=["chains", "trees"])
@pytest.mark.parametrize("seen", [7, 12, 15])
def test_an_interrupted_request_leaves_no_candidate_in_the_callers_cache(target, prompt, seen, shape) -> None:
    """Whoever goes on in the cache, with or without a draft, is told what he would be told without it."""

    def stops(tokens: torch.Tensor, scores: object, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] == seen:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    settings = {"do_sample": False, "max_new_tokens": 20}
    script = target.generate(prompt, **settings)
    right = target.generate(turn := torch.cat([script[:, :seen], prompt], dim=-1), **settings)
    wrong = script.clone()
    wrong[:, ::3] = (wrong[:, ::3] + 1) % 32
    for going_on in ({}, {"onlinespec": True}):
        cache, draft = DynamicCache(config=target.config), PlainDraft(ScriptedProposer(wrong, shape))
        with pytest.raises(KeyboardInterrupt):
            target.generate(
                prompt,
                assistant_model=draft,
                stopping_criteria=[stops],
                **settings | {CACHE: cache, "max_new_tokens": 30},
            )
        assert torch.equal(target.generate(turn, **settings, **{CACHE: cache}, **going_on), right)


def test_model_generation_config_defaults(target, draft, prompt) -> None:
    target.generation_config.update(max_new_tokens=9, repetition_penalty=1.5, eos_token_id=5)
    assert torch.equal(target.generate(prompt), target.generate(prompt, assistant_model=draft))


def test_works_and_learns_under_inference_mode(target, draft, prompt) -> None:
    before = flat_params(draft)
    with torch.inference_mode():
        plain, ours = both(target, draft, prompt)
        sampled = target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=10)
    assert torch.equal(plain, ours) and sampled.shape == (1, 16)
    assert draft.metrics.updates > 0 and not torch.equal(before, flat_params(draft))


def test_draft_made_and_loaded_under_inference_mode(target, prompt) -> None:
    with torch.inference_mode():
        draft = OnlineDraft(tiny_llama(2), LEARNING)
        plain, ours = both(target, draft, prompt)
    assert torch.equal(plain, ours) and draft.metrics.updates > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draft_of_another_dtype(target, prompt, dtype: torch.dtype) -> None:
    draft = OnlineDraft(tiny_llama(2).to(dtype), LEARNING)
    plain, ours = both(target, draft, prompt)
    sampled = target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=10)
    assert torch.equal(plain, ours) and sampled.shape == (1, 16)
    assert draft.metrics.updates > 0 and draft.metrics.skipped_updates == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_draft_on_another_device(target, prompt) -> None:
    draft = OnlineDraft(tiny_llama(2).to("cuda"), LEARNING)
    plain, ours = both(target, draft, prompt)
    assert torch.equal(plain, ours) and draft.metrics.updates > 0


def test_lookahead_zero_is_plain_decoding_that_learns(target, prompt) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(lookahead=0, rank=4, alpha=4.0))
    plain, ours = both(target, draft, prompt)
    assert torch.equal(plain, ours)
    assert draft.metrics.last.drafted_tokens == 0 and draft.metrics.last.updates > 0
