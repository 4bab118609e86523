"""Encoder–decoders as targets: what plain `generate` says, with the memory, in rounds of several tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import (
    ConfigError,
    OnlineDraft,
    OnlineSpecConfig,
    UnsupportedError,
    attached,
    generate_stream,
    online_draft,
    online_memory,
)
from tests.chi_square import THOUSAND, follows
from tests.encoder_decoders import START, VOCAB, bart, encoder_decoder, m2m, source, t5, whisper
from tests.tiny_models import CACHE

MEMORY = OnlineSpecConfig(lookahead=5)  # a number: no clock decides what is drafted
ARGUMENTS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
BUILT = {"t5": t5, "bart": bart, "m2m_100": m2m, "whisper": whisper}


def answers(target: PreTrainedModel, inputs: dict[str, Any], **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Plain `generate`'s, and ours of two calls: what is said in the second one is known from the first."""
    arguments = ARGUMENTS | inputs | arguments
    return target.generate(**arguments), [target.generate(**arguments, onlinespec=MEMORY) for _ in range(2)]


def check(target: PreTrainedModel, inputs: dict[str, Any], accepted: int = 10, **arguments: Any) -> Tensor:
    plain, ours = answers(target, inputs, **arguments)
    assert all(torch.equal(one, plain) for one in ours)
    assert online_memory(target).metrics.accepted_tokens >= accepted
    return plain


def ended_early(target: PreTrainedModel, inputs: dict[str, Any], place: int = 11) -> None:
    """Lets what the first row says at a place end answers, so that rows end at different lengths."""
    said = target.generate(**inputs, **ARGUMENTS)
    target.generation_config.eos_token_id = int(said[0, place])


@pytest.mark.parametrize("name", BUILT)
def test_one_row_says_what_plain_generate_says(name: str) -> None:
    target = BUILT[name](0)
    assert len(check(target, source(target))[0].unique()) > 4


@pytest.mark.parametrize("name", BUILT)
def test_rows_with_sources_of_different_lengths_say_what_they_say_in_plain_generate(name: str) -> None:
    target = BUILT[name](0)
    inputs = source(target, rows=4)
    ended_early(target, inputs)
    check(target, inputs, accepted=5)
    assert "plainly" not in online_memory(target).metrics.decisions.drafting


@pytest.mark.parametrize("rows", [1, 2])
def test_a_source_of_embeddings_says_what_it_says_in_plain_generate(rows: int) -> None:
    """As BLIP-2 hands a picture to T5. A draft with an encoder of its own cannot read them, and says so."""
    target, draft = t5(0), t5(1)
    tokens = source(target, rows)["input_ids"]
    vectors = {"inputs_embeds": target.get_input_embeddings()(tokens).detach() + 0.5}
    plain = check(target, vectors)
    assert not torch.equal(plain, target.generate(tokens, **ARGUMENTS))
    for _ in range(2):
        assert torch.equal(plain, target.generate(**vectors, **ARGUMENTS, assistant_model=draft, onlinespec=True))
    assert "without what they were made of" in online_draft(draft).metrics.decisions.learning


class Padding(LogitsProcessor):
    """Lets the padding token be said now and then, which decoders that count by tokens pass over."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([0]), 1e3) if input_ids.shape[1] % 5 == 3 else scores


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_are_counted_as_in_plain_decoding_where_padding_is_said(rows: int) -> None:
    target = m2m(0)
    prompt = torch.tensor([[START, 0, 5]] * rows)
    for given in ({}, {"decoder_input_ids": prompt}):
        processors = LogitsProcessorList([Padding()])
        plain = check(target, source(target, rows), logits_processor=processors, **given)
        assert int((plain[0] == 0).sum()) > 2


PROCESSORS: list[dict[str, Any]] = [
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.5},
    {"decoder_start_token_id": 11, "suppress_tokens": [3, 4], "begin_suppress_tokens": [5, 42]},
]


@pytest.mark.parametrize("arguments", PROCESSORS, ids=lambda arguments: next(iter(arguments)))
@pytest.mark.parametrize("rows", [1, 3])
def test_processors_see_what_they_see_in_plain_generate(arguments: dict[str, Any], rows: int) -> None:
    target = bart(1)
    check(target, source(target, rows), accepted=1, **arguments)


def test_a_prompt_of_the_decoder_is_gone_on_with_and_the_dict_has_what_plain_hands_back() -> None:
    target = t5(0)
    inputs = source(target, rows=2) | {"decoder_input_ids": torch.tensor([[START, 5, 6], [START, 9, 8]])}
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, ours = answers(target, inputs, **asked)
    for one in ours:
        assert type(one) is type(plain)
        assert one.keys() == plain.keys()
        assert torch.equal(one.sequences, plain.sequences)
        assert len(one.scores) == len(plain.scores)
        torch.testing.assert_close(torch.stack(one.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_cache_that_is_handed_back_goes_on_in_another_call(rows: int) -> None:
    target = bart(0)
    inputs = source(target, rows) | {"encoder_outputs": None}
    inputs["encoder_outputs"] = target.get_encoder()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    )
    del inputs["input_ids"]
    first = target.generate(**inputs, **ARGUMENTS, onlinespec=MEMORY, return_dict_in_generate=True)
    tokens, cache = first.sequences, {CACHE: first[CACHE]}
    mask = torch.ones_like(tokens)
    more = {"decoder_input_ids": tokens, "decoder_attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = target.generate(**inputs, **more)
    assert torch.equal(target.generate(**inputs, **more, **cache, onlinespec=MEMORY), expected)


class Kept(BaseStreamer):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_shown_every_token_once() -> None:
    target, streamer = t5(0), Kept()
    said = target.generate(**source(target), **ARGUMENTS, onlinespec=MEMORY, streamer=streamer)
    assert (streamer.tokens, streamer.ended) == (said[0].tolist(), True)


def test_an_attached_model_drafts_whoever_calls_it() -> None:
    target = t5(0)
    inputs = source(target, rows=2)
    plain = target.generate(**inputs, **ARGUMENTS)
    with attached(target, config=MEMORY) as memory:
        assert all(torch.equal(target.generate(**inputs, **ARGUMENTS), plain) for _ in range(2))
        assert memory.metrics.accepted_tokens > 10


@torch.no_grad()
def copying(target: PreTrainedModel) -> None:
    """Makes a target say what its source says: the token after the last one is what follows it there."""
    for module in (target.get_encoder(), target.get_decoder()):
        for name, parameter in module.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
                parameter.zero_()


def test_the_memory_goes_on_in_the_source() -> None:
    target = bart(0)
    copying(target)  # every token has one successor, whatever else was said
    said = target.generate(**source(target), **ARGUMENTS)[0, 1:]
    inputs = {"input_ids": said[None], "attention_mask": torch.ones_like(said[None])}
    config = OnlineSpecConfig(lookahead=5, memory_tokens=1024, recycle=False)
    ours = target.generate(**inputs, **ARGUMENTS, onlinespec=config)
    assert torch.equal(ours[0, 1:], said)
    metrics = online_memory(target).metrics
    assert metrics.requests == 1
    assert metrics.acceptance_length > 2.5  # nothing was known but the source


def test_sampling_follows_the_target() -> None:
    """All sequences of three tokens are enumerated; the memory guesses in every call."""
    vocab, draws = 6, 1200
    target = t5(0, vocab_size=vocab, pad_token_id=0)
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(0.1)  # flat enough for every cell to be visited
    inputs = {"input_ids": torch.tensor([[1, 4, 3]])}
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=3)))
    tokens = torch.cat([torch.full((len(sequences), 1), START), sequences], dim=-1)
    with torch.no_grad():
        logits = target(input_ids=inputs["input_ids"].expand(len(tokens), -1), decoder_input_ids=tokens).logits
    law = logits[:, :3].double().softmax(-1).gather(-1, sequences[..., None])[..., 0].prod(-1)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
    counts, place = torch.zeros(vocab**3, dtype=torch.long), torch.tensor([vocab**2, vocab, 1])
    torch.manual_seed(5)
    sampled = {"do_sample": True, "max_new_tokens": 3, "top_k": 0, "num_return_sequences": 40}
    for _ in range(draws // 40):
        for row in target.generate(**inputs, **sampled, onlinespec=MEMORY):
            counts[(row[1:] * place).sum()] += 1
    assert follows(counts, law, THOUSAND)
    assert online_memory(target).metrics.drafted_tokens > draws


def test_a_stream_answers_each_prompt_as_plain_generate_does_alone() -> None:
    target = bart(0)
    ended_early(target, source(target))
    numbers = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, 90, (n,), generator=numbers).tolist() for n in (3, 7, 5, 9, 4, 6)]
    found = list(generate_stream(target, prompts, batch_size=2, onlinespec=MEMORY, **ARGUMENTS))
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        plain = target.generate(tokens, attention_mask=torch.ones_like(tokens), **ARGUMENTS)
        assert answer.error is None and answer.tokens is not None
        assert answer.tokens.tolist() == plain[0, 1:].tolist()


def test_a_source_that_is_much_longer_than_others_is_read_by_itself() -> None:
    """Padded to its length, all others would take its memory."""
    target, read = t5(0), list[tuple[int, ...]]()
    numbers = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, 90, (n,), generator=numbers).tolist() for n in (3, 7, 1100, 5, 9, 6, 4, 8, 2, 700)]
    plain = [target.generate(torch.tensor([prompt]), **ARGUMENTS)[0, 1:] for prompt in prompts]
    target.encoder.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    found = list(generate_stream(target, prompts, batch_size=2, onlinespec=MEMORY, **ARGUMENTS))
    assert [answer.tokens.tolist() for answer in found] == [tokens.tolist() for tokens in plain]
    assert max(rows * width for rows, width in read) <= 2 * 1100 and max(rows for rows, width in read) > 2


def test_a_stream_says_which_prompt_is_longer_than_the_encoder_reads() -> None:
    found = list(generate_stream(bart(0), [[5] * 40, [5, 6]], onlinespec=MEMORY, **ARGUMENTS))
    assert isinstance(found[0].error, ConfigError)
    assert "Prompt 0 has 40 tokens: the encoder reads 32" in str(found[0].error)
    assert found[1].error is None
    separate = encoder_decoder(
        "marian", is_decoder=None, vocab_size=200, decoder_vocab_size=VOCAB, forced_eos_token_id=None
    )
    (other,) = generate_stream(separate, [[5, 150]], onlinespec=MEMORY, **ARGUMENTS)
    assert other.error is None, "the ids of a source are the encoder's"
    with pytest.raises(UnsupportedError, match="reads input_features"):
        next(generate_stream(whisper(0), [[5, 6]], onlinespec=MEMORY))


def test_a_source_without_anything_is_refused_before_any_work() -> None:
    target = t5(0)
    states = target.get_encoder()(input_ids=torch.tensor([[5]]))
    states.last_hidden_state = states.last_hidden_state[:, :0]
    with pytest.raises(UnsupportedError, match="source has length 0"):
        target.generate(encoder_outputs=states, onlinespec=MEMORY, max_new_tokens=4)
    assert online_memory(target).metrics.requests == 0
    with pytest.raises(UnsupportedError, match="source has length 0"):
        target.generate(torch.zeros(1, 0, dtype=torch.long), onlinespec=MEMORY, max_new_tokens=4)


def test_a_source_that_is_longer_than_the_encoder_is_refused_by_its_length_before_any_work() -> None:
    target, long = bart(0), torch.full((1, 40), 6)
    with pytest.raises(UnsupportedError, match=r"source has 40 tokens, and the encoder of .*BartFor.* reads 32"):
        target.generate(long, onlinespec=MEMORY, max_new_tokens=4)
    assert online_memory(target).metrics.requests == 0
    with pytest.raises(IndexError):  # plain decoding raises what it raises
        target.generate(long, max_new_tokens=4)
    grows = m2m(0)  # its table of positions does
    check(grows, {"input_ids": long}, max_new_tokens=8, accepted=1)


@pytest.mark.parametrize("drafts", ["memory", "model", "draft"])
def test_whisper_s_own_generate_says_with_a_draft_what_it_says_without_one(drafts: str) -> None:
    """Beside any assistant it would say tokens that must not begin an answer, and refuse those that are given to begin with."""
    target, model = whisper(0), whisper(1)
    draft = OnlineDraft(model, MEMORY) if drafts == "draft" else None
    given: dict[str, Any] = {"onlinespec": MEMORY} if draft is None else {}
    if drafts != "memory":
        given["assistant_model"] = draft or model
    inputs = source(target)
    first = int(target.generate(**inputs, **ARGUMENTS)[0, 0])
    for more in ({"begin_suppress_tokens": [first]}, {"decoder_input_ids": torch.tensor([[START, 7]])}):
        arguments = ARGUMENTS | inputs | more
        plain = target.generate(**arguments)
        assert plain[0, 0] != first
        assert torch.equal(target.generate(**arguments, **given), plain)
    drafting = online_memory(target) if drafts == "memory" else draft or online_draft(model)
    assert drafting.metrics.requests == 2 and drafting.metrics.drafted_tokens > 0


@pytest.mark.parametrize("saved", [False, True], ids=["of the call", "of the model"])
def test_whisper_finds_the_setting_wherever_a_configuration_is_given(saved: bool) -> None:
    target = whisper(0)
    features = source(target)["input_features"]
    config = GenerationConfig.from_dict(target.generation_config.to_dict() | ARGUMENTS)
    config.begin_suppress_tokens = [int(target.generate(features, config)[0, 0])]
    plain = target.generate(features, config)
    (target.generation_config if saved else config).onlinespec = MEMORY
    assert torch.equal(target.generate(features, config, assistant_model=whisper(1)), plain)


def test_times_of_tokens_say_what_to_do() -> None:
    target = whisper(0)
    target.generation_config.alignment_heads = [[0, 0]]
    arguments = ARGUMENTS | source(target) | {"return_token_timestamps": True}
    with pytest.raises(UnsupportedError, match=r"return_token_timestamps.*attach\(model, draft\)"):
        target.generate(**arguments, onlinespec=MEMORY)


def test_whisper_hands_its_arguments_to_our_custom_generate() -> None:
    target, draft = whisper(0), OnlineDraft(whisper(1), MEMORY)
    arguments = ARGUMENTS | source(target)
    plain = target.generate(**arguments)
    assert torch.equal(target.generate(**arguments, custom_generate=draft.generate_fn(), adapter="sql"), plain)
    assert draft.adapters["sql"].metrics.requests == 1
    updates = draft.metrics.updates
    assert torch.equal(target.generate(**arguments, custom_generate=draft.generate_fn(), onlinespec=False), plain)
    assert updates and draft.metrics.updates == updates and draft.metrics.requests == 2


LONG: list[dict[str, Any]] = [
    {},
    {"condition_on_prev_tokens": True, "return_segments": True},
    {"temperature": (0.0, 0.2), "logprob_threshold": -0.01, "return_segments": True},
]


@pytest.mark.parametrize("arguments", LONG, ids=["plain", "conditioned", "fallback"])
def test_long_speech_is_decoded_segment_by_segment(arguments: dict[str, Any]) -> None:
    target = whisper(0, max_source_positions=20, max_target_positions=64)
    saved = target.generation_config
    saved.eos_token_id = saved.pad_token_id = 2
    saved.no_timestamps_token_id, saved.prev_sot_token_id, saved.max_initial_timestamp_index = 70, 69, 5
    saved.is_multilingual, saved.return_timestamps = False, True
    speech = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(3))
    inputs = {"input_features": speech, "attention_mask": torch.ones(2, 100, dtype=torch.long), "max_new_tokens": 16}
    found = []
    for ours in ({}, {"onlinespec": MEMORY}):
        torch.manual_seed(0)
        out = target.generate(**inputs, **arguments, return_timestamps=True, **ours)
        found.append(out if isinstance(out, Tensor) else out["sequences"])
    metrics = online_memory(target).metrics
    assert metrics.requests > 1  # a call of the loop for each segment
    assert metrics.accepted_tokens > 5
    if "temperature" not in arguments:  # what is sampled differs
        assert torch.equal(*found)
