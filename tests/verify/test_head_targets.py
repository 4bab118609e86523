"""Targets with a draft head: outputs are those of plain decoding while the head learns, and what does not fit is refused by name."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from hf_onlinespec import DraftError, OnlineCandidateGenerator, OnlineDraft, UnsupportedError
from tests.architectures import ARCHITECTURES, LIMIT
from tests.chi_square import MILLION, THOUSAND
from tests.encoder_decoders import START, bart, source, t5, whisper
from tests.heads.tiny import KINDS, tiny_eagle3, tiny_head
from tests.tiny_models import CACHE, tiny_llama
from tests.verify.test_sampling_law import Whims

PER_ROUND: dict[str, Any] = dict(lookahead=3, update_every=1, update_when="round", rank=2, alpha=2.0)
GREEDY: dict[str, Any] = dict(do_sample=False, pad_token_id=0)
# Layers with a window shorter than the text, capped logits, positions learned, rotated, by a slope; classes that hand out all hidden
# states for a list of some (bloom, falcon); text alone for models of pictures (gemma3, qwen2_vl).
FAMILIES = (
    *("llama", "qwen3", "gemma2 past-window", "gemma3", "gpt2", "gpt_neox", "mistral", "bloom", "falcon"),
    "qwen2_vl",
)

ENCODER_DECODERS = {"t5": t5, "bart": bart, "whisper": whisper}


def of_family(name: str) -> PreTrainedModel:
    return next(a for a in ARCHITECTURES if a.name == name).build()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_plain_decoding_while_the_head_learns(family: str) -> None:
    target = of_family(family)
    for kind in ("EAGLE-3", "EAGLE-1"):
        draft = OnlineDraft(tiny_head(kind, target), **PER_ROUND, memory_tokens=0)
        for seed in range(2 if kind == "EAGLE-3" else 1):
            tokens = torch.randint(1, 80, (1, 10), generator=torch.Generator().manual_seed(seed))
            how = GREEDY | dict(attention_mask=torch.ones_like(tokens), max_new_tokens=LIMIT - 13)
            plain = target.generate(tokens, **how)
            assert torch.equal(plain, target.generate(tokens, assistant_model=draft, **how))
        metrics = draft.metrics
        assert metrics.updates > 2 and metrics.sources["model"] + metrics.sources["memory+model"] > 3
        assert not metrics.failed_drafts and not metrics.failed_updates


@pytest.mark.parametrize(("name", "rows"), [("t5", 1), ("t5", 3), ("bart", 1), ("bart", 3), ("whisper", 1)])
def test_a_head_on_the_decoder_of_an_encoder_decoder_changes_no_answer_while_it_learns(name: str, rows: int) -> None:
    """Positions by distance, counted (in a batch by a second module tree), and given: there a head drafts trees."""
    target = ENCODER_DECODERS[name](0)
    draft = OnlineDraft(tiny_head("EAGLE-3", target), **PER_ROUND | dict(update_every=4), memory_tokens=0)
    how = dict(do_sample=False, max_new_tokens=20)
    first = torch.tensor([[START]])
    target(**source(target), decoder_input_ids=first, output_hidden_states=True)  # somebody has asked for them before
    for seed in (5, 6):
        inputs = source(target, rows, seed)
        plain = target.generate(**inputs, **how)
        assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, **how))
    metrics = draft.metrics
    assert metrics.updates > 2 and metrics.sources["model"] + metrics.sources["memory+model"] > 3
    assert not metrics.failed_drafts and not metrics.failed_updates


def test_a_head_learns_from_features_that_depend_on_the_source() -> None:
    """What it learns from is what the target said while it read its source, as a forward of the target gives it."""
    target = t5(0)
    draft = OnlineDraft(tiny_eagle3(target, reads=(0, 1, -1)), **PER_ROUND, memory_tokens=0)
    inputs = source(target)
    text = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=12)
    (feedback,) = draft.learning.replayed()
    with torch.no_grad():
        states = target(**inputs, decoder_input_ids=text, output_hidden_states=True).decoder_hidden_states
    assert feedback.features is not None and torch.equal(feedback.tokens, text[0, : len(feedback.tokens)])
    expected = torch.cat([states[i] for i in (0, 1, -1)], dim=-1)[0, : len(feedback.features)]
    torch.testing.assert_close(feedback.features, expected, rtol=1e-4, atol=1e-5)


class Seen(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"update_every": 1}], ids=["auto", "numbers"])
def test_scores_logits_and_streams_are_those_of_plain_decoding(kind: str, settings: dict[str, Any]) -> None:
    target = tiny_llama(1, vocab=40, layers=3, initializer_range=0.3)
    draft = OnlineDraft(tiny_head(kind, target), rank=2, alpha=2.0, **settings)
    for length in (1, 6, 6):
        prompt, streams = torch.arange(1, length + 1)[None], (Seen(), Seen())
        how = GREEDY | dict(max_new_tokens=40, return_dict_in_generate=True, output_scores=True, output_logits=True)
        plain = target.generate(prompt, streamer=streams[0], **how)
        ours = target.generate(prompt, streamer=streams[1], assistant_model=draft, **how)
        assert torch.equal(plain.sequences, ours.sequences) and streams[0].tokens == streams[1].tokens
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(plain[name]), torch.stack(ours[name]), rtol=1e-4, atol=1e-4)
    assert not draft.metrics.failed_drafts and not draft.metrics.failed_updates


KNOWN = [0, 2, 3, 5, 8, 9, 11]  # tokens of the head below: a part of all twelve
LAW: dict[str, Any] = dict(temperature=0.8, top_k=9, top_p=0.9)


@torch.no_grad()
def departures(
    texts: list[Tensor],
    prompt: int,
    target: PreTrainedModel,
    inputs_of: Callable[[Tensor], dict[str, Tensor]] = lambda text: {"input_ids": text},
    **law: Any,
) -> Tensor:
    """How far sampled texts (1, L) lean: to each token, to those that the head knows, to the likeliest one; in standard deviations.

    Behind every prefix the target's law says how often each of these is expected. The sum of the differences has mean 0, and as its
    variance the sum of the variances, whatever decided about drafting before.
    """
    warpers = [
        TemperatureLogitsWarper(law["temperature"]),
        TopKLogitsWarper(law["top_k"]),
        TopPLogitsWarper(law["top_p"]),
    ]
    difference = variance = torch.zeros(())
    for text in texts:
        read = inputs_of(text)
        p = LogitsProcessorList(warpers)(text, target(**read).logits[0, prompt - 1 : -1]).double().softmax(-1)
        tokens = torch.eye(p.shape[-1], dtype=p.dtype)
        known, best = tokens[KNOWN].sum(0).expand(len(p), 1, -1), tokens[p.argmax(-1)][:, None]
        asked = torch.cat([tokens.expand(len(p), -1, -1), known, best], dim=1)  # (n, questions, tokens)
        chance = (asked * p[:, None]).sum(-1)
        happened = asked.gather(-1, text[0, prompt:, None, None].expand(-1, asked.shape[1], 1))[..., 0]
        difference, variance = difference + (happened - chance).sum(0), variance + (chance * (1 - chance)).sum(0)
    return difference / variance.sqrt()


@pytest.mark.parametrize("how", ["chains", "trees"])
def test_a_head_that_knows_a_part_of_the_tokens_keeps_the_law_while_it_learns(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its q is 0 at all others, whatever temperature, top-k and top-p make of the rest."""
    target = tiny_llama(1, layers=2, vocab=12, initializer_range=0.2)
    settings: dict[str, Any] = dict(rank=2, alpha=2.0, lr=3e-3, replay_passes=0, seed=1)
    if how == "chains":
        settings |= dict(lookahead=4, update_when="round", update_every=8, memory_tokens=0)
    else:
        monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Whims)
        monkeypatch.setattr(Whims, "whim", random.Random(3))
        settings |= dict(memory_tokens=2000, update_every=1)
    draft = OnlineDraft(tiny_eagle3(target, KNOWN, reads=(1, 0, 2)), **settings)
    prompt, texts = torch.tensor([[1, 4]]), []
    torch.manual_seed(13)
    for _ in range(16):
        texts.append(target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=70, **LAW))
    assert departures(texts, 2, target, **LAW).abs().max() < THOUSAND
    assert departures(texts, 2, target, **LAW | {"temperature": 1.3}).abs().max() > MILLION  # the test can fail
    metrics, tokens = draft.metrics, draft.metrics.candidates.by_source()["model"]
    assert metrics.updates >= 16 and not metrics.failed_drafts and not metrics.failed_updates
    assert tokens["verified"] - 40 > tokens["kept"] > 40


def test_a_head_on_a_decoder_keeps_the_law_while_it_learns() -> None:
    target = t5(0, vocab_size=12, decoder_start_token_id=0)
    target.get_output_embeddings().weight.data.mul_(0.12)  # flat enough for all tokens
    target.generation_config.decoder_start_token_id = 0
    settings: dict[str, Any] = dict(rank=2, alpha=2.0, lr=3e-3, replay_passes=0, seed=1, lookahead=3)
    settings |= dict(update_when="round", update_every=16, memory_tokens=0, recycle=False)
    draft = OnlineDraft(tiny_eagle3(target, KNOWN, reads=(1, 0, 2)), **settings)
    read, texts = {"input_ids": torch.tensor([[2, 4, 1, 3]])}, []
    torch.manual_seed(17)
    for _ in range(10):
        texts.append(target.generate(**read, assistant_model=draft, do_sample=True, max_new_tokens=50, **LAW))

    def inputs_of(text: Tensor) -> dict[str, Tensor]:
        return read | {"decoder_input_ids": text}

    assert departures(texts, 1, target, inputs_of, **LAW).abs().max() < THOUSAND
    assert departures(texts, 1, target, inputs_of, **LAW | {"temperature": 1.3}).abs().max() > MILLION
    metrics, tokens = draft.metrics, draft.metrics.candidates.by_source()["model"]
    assert metrics.updates >= 10 and not metrics.failed_drafts and not metrics.failed_updates
    assert tokens["verified"] - 20 > tokens["kept"] > 20


class Silent(LlamaForCausalLM):
    """Hands out no hidden states, whatever it is asked."""

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output: ModelOutput = super().forward(*args, **kwargs | {"output_hidden_states": False})
        return output


class Unasked(LlamaForCausalLM):
    """Cannot be asked for them."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,  # as transformers 5.24 calls it
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> ModelOutput:
        past = {CACHE: past_key_values if cache is None else cache}
        output: ModelOutput = super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **past)
        return output


@pytest.mark.parametrize("name", ["Silent", "Unasked", "Gemma3nForCausalLM"])
def test_a_target_without_hidden_states_is_decoded_without_the_head(name: str) -> None:
    """Guesses are drafted as ever; nothing fails, nothing is learned, and `decisions` says why."""
    if name == "Gemma3nForCausalLM":
        target = of_family("gemma3n_text")  # it keeps several streams of them
    else:
        base = tiny_llama(1, vocab=40, layers=3)
        target = (Silent if name == "Silent" else Unasked)(base.config).eval()
        target.load_state_dict(base.state_dict())
    for settings in (PER_ROUND, {}):
        draft = OnlineDraft(tiny_eagle3(target), **settings)
        for _ in range(3):
            prompt = torch.arange(1, 7)[None]
            how = GREEDY | dict(max_new_tokens=20, attention_mask=torch.ones_like(prompt))
            assert torch.equal(target.generate(prompt, **how), target.generate(prompt, assistant_model=draft, **how))
        metrics = draft.metrics
        assert f"{name} hands out no hidden states" in metrics.decisions.drafting
        assert "not learned from: its target hands out no hidden states" in metrics.decisions.learning
        assert not metrics.updates and not metrics.failed_drafts and not metrics.failed_updates
        assert metrics.sources["memory"] and not metrics.sources["model"] and not draft.learning.replayed()


def test_a_head_of_another_target_is_refused_before_any_work() -> None:
    target = tiny_llama(1, vocab=40, layers=3)
    prompt = torch.tensor([[1, 2, 3]])
    others = {
        r"width 32 \(target_hidden_size\)": tiny_eagle3(tiny_llama(2, vocab=40, hidden=32)),
        "made for 48 tokens": tiny_eagle3(tiny_llama(2, vocab=48)),
        r"hidden_states\[4\] of its target, and LlamaForCausalLM has 3 layers": tiny_eagle3(target, reads=(1, 4, 2)),
    }
    for words, head in others.items():
        draft = OnlineDraft(head, **PER_ROUND)
        with pytest.raises(DraftError, match=words):
            target.generate(prompt, assistant_model=draft, max_new_tokens=4)
        assert draft.metrics.requests == 0
    projected = of_family("opt projected")
    with pytest.raises(DraftError, match="embedding of OPTForCausalLM is 16 wide"):
        projected.generate(prompt, assistant_model=OnlineDraft(tiny_eagle3(projected)), max_new_tokens=4)
    padded = tiny_eagle3(tiny_llama(2, vocab=40))
    with pytest.raises(DraftError, match="another tokenizer"):
        tiny_llama(1, vocab=2000, layers=3).generate(prompt, assistant_model=OnlineDraft(padded), max_new_tokens=4)
    target.generate(prompt, assistant_model=OnlineDraft(tiny_eagle3(target, reads=(3, -1, -4))), max_new_tokens=4)


def test_an_adapter_around_a_head_is_refused_by_name() -> None:
    head = tiny_eagle3(tiny_llama(1, vocab=40, layers=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a base without a name
        wrapped = get_peft_model(head, LoraConfig(target_modules=["fc"]))
    with pytest.raises(DraftError, match="PeftModel around the head Eagle3Head"):
        OnlineDraft(wrapped)


def test_in_another_loop_a_head_is_refused() -> None:
    draft = OnlineDraft(tiny_eagle3(tiny_llama(1, vocab=40, layers=3)))
    with pytest.raises(UnsupportedError, match="assistant_model="):
        OnlineCandidateGenerator(draft, GenerationConfig(max_length=20), LogitsProcessorList())


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_serves_targets_in_turns(kind: str) -> None:
    """Of equal shape and other weights: its embedding is that of the target at hand."""
    targets = [tiny_llama(seed, vocab=40, layers=3) for seed in (1, 2)]
    draft = OnlineDraft(tiny_head(kind, targets[0]), **PER_ROUND)
    for _ in range(3):
        for target in targets:
            prompt = torch.arange(1, 7)[None]
            how = GREEDY | dict(max_new_tokens=12)
            assert torch.equal(target.generate(prompt, **how), target.generate(prompt, assistant_model=draft, **how))
    assert not draft.metrics.failed_drafts and not draft.metrics.failed_updates and draft.metrics.updates > 6
    assert all(weight.grad is None for target in targets for weight in target.parameters())
