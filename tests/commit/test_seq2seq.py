"""Drafts that read the source of an encoder–decoder target: they serve losslessly, learn with it, and go on where they were."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, T5ForConditionalGeneration, WhisperForCausalLM

from hf_onlinespec import DraftError, OnlineDraft
from hf_onlinespec.commit.seq2seq import Seq2Seq
from hf_onlinespec.models.source import Source
from hf_onlinespec.share.canaries import learn
from hf_onlinespec.share.privacy import loss_gap
from tests.chi_square import THOUSAND, follows
from tests.drafts import move
from tests.encoder_decoders import START, VOCAB, bart, encoder_decoder, source, t5, whisper
from tests.share.test_artifact import same_state, warnings_of_tied_models
from tests.tiny_models import tiny_llama

REPEATABLE: dict[str, Any] = dict(
    lookahead=4, update_when="round", update_every=2, rank=2, memory_tokens=0, recycle=False, seed=3
)
CLOSE = dict(rtol=1e-3, atol=1e-4)


def marian(seed: int = 0) -> PreTrainedModel:
    """Encoder and decoder have vocabularies of their own."""
    return encoder_decoder(
        "marian", seed, is_decoder=None, decoder_vocab_size=VOCAB, decoder_start_token_id=START, forced_eos_token_id=None
    )  # fmt: skip


def decoder_of(target: PreTrainedModel, seed: int) -> WhisperForCausalLM:
    """A decoder alone, which reads the target's encoder outputs."""
    torch.manual_seed(seed)
    model = WhisperForCausalLM(copy.deepcopy(target.config)).eval()
    model.generation_config = copy.deepcopy(target.generation_config)
    return model


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {"t5": t5, "bart": bart, "marian": marian, "whisper": whisper}
DRAFTS: dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedModel]]] = {
    "t5, own encoder": lambda: (t5(0), t5(1)),
    "bart, own encoder": lambda: (bart(0), bart(1)),
    "whisper, own encoder": lambda: (whisper(0), whisper(1)),
    "whisper, the target's encoder": lambda: (whisper(0), decoder_of(whisper(0), 1)),
    "t5, decoder's text alone": lambda: (t5(0), tiny_llama(1, vocab=VOCAB)),
    "t5, the target itself": lambda: (t5(0), t5(0)),
}


def generated(target: PreTrainedModel, seed: int = 5, new_tokens: int = 12, **how: Any) -> Tensor:
    """(1, L) what is written from a source."""
    settings = dict(max_new_tokens=new_tokens, do_sample=False) | how
    output: Tensor = target.generate(**source(target, 1, seed), **settings)
    return output


def read_by(draft: OnlineDraft, target: PreTrainedModel, rows: int) -> list[Source | None]:
    """What a draft reads of the sources of some rows, of different lengths where they are text."""
    inputs = source(target, rows)
    states = target.get_encoder()(**inputs)[0]
    tokens, signal = inputs.get("input_ids"), inputs.get("input_features")
    whole = Source(tokens, inputs.get("attention_mask"), states, signal)
    return [draft.trainable.readable_source(whole.row(i)) for i in range(rows)]


@pytest.mark.parametrize("name", DRAFTS)
def test_what_is_said_stays_the_same_while_the_draft_learns(name: str) -> None:
    target, model = DRAFTS[name]()
    draft = OnlineDraft(model, learner="ensemble" if "own encoder" in name else "optimistic", **REPEATABLE)
    before = draft.learning.learner.trainable.adapter.params.clone()
    for seed in (5, 6):
        assert torch.equal(generated(target, seed, assistant_model=draft), generated(target, seed))
    assert draft.metrics.updates >= 2 and draft.metrics.failed_drafts == draft.metrics.failed_updates == 0
    assert draft.metrics.drafted_tokens and not torch.equal(draft.trainable.adapter.params, before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_it_serves_as_it_is_learned(make: Callable[[int], PreTrainedModel]) -> None:
    """Token by token with a cache that is rolled back, on what was read before, and all at once beside a row of another length."""
    target = make(0)
    draft = OnlineDraft(make(1), **REPEATABLE)
    move(draft, lambda part: part + 0.02)
    model = draft.trainable
    assert isinstance(model, Seq2Seq)
    tokens, (one, other) = torch.arange(3, 12)[None], read_by(draft, target, 2)
    learned = model.training_logits(tokens, 5, sources=[one])[0, 0]  # (5, vocab), of the last five tokens
    reader = model.reader(None, None, one)
    with model.serving() as served:
        found = [reader.scores(served, tokens[:, :4]), reader.scores(served, tokens[:, :6])]
        reader.rewind(6)
        found.append(reader.scores(served, tokens[:, :8]))
    torch.testing.assert_close(torch.cat(found), learned[[0, 2, 4]], **CLOSE)
    torch.testing.assert_close(model.logits(tokens[:, :-1], 5, sources=[one])[0], learned, **CLOSE)
    prefix = reader.prefix(3)
    assert prefix is not None and prefix.length == 3
    torch.testing.assert_close(model.training_logits(tokens, 5, prefix=prefix, sources=[one])[0, 0], learned, **CLOSE)
    shorter = torch.nn.functional.pad(tokens[:, :6], (3, 0))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    both = model.training_logits(torch.cat([tokens, shorter]), 5, mask, sources=[one, other])[0]
    alone = model.training_logits(tokens[:, :6], 5, sources=[other])[0, 0]
    torch.testing.assert_close(both, torch.stack([learned, alone]), **CLOSE)


def test_sampling_is_exact_while_the_draft_learns() -> None:
    """All two-token outputs are enumerated."""
    vocab, draws = 5, 150
    small = dict(vocab_size=vocab, decoder_start_token_id=0)
    target, model = t5(0, **small), t5(1, **small)
    for one in (target, model):
        one.get_output_embeddings().weight.data.mul_(0.3)  # flat enough for every cell to be visited
        one.generation_config.decoder_start_token_id = 0
    inputs = {"input_ids": torch.tensor([[2, 4, 1, 3]])}
    pairs = torch.tensor(list(itertools.product(range(vocab), repeat=2)))
    with torch.no_grad():
        written = torch.cat([torch.zeros(len(pairs), 1, dtype=torch.long), pairs], dim=1)
        states = target.get_encoder()(**inputs)[0].expand(len(pairs), -1, -1)
        probs = target(encoder_outputs=(states,), decoder_input_ids=written[:, :2]).logits.double().softmax(-1)
    law = probs.gather(-1, pairs[..., None])[..., 0].prod(-1)
    assert law.sum().item() == pytest.approx(1.0)
    draft = OnlineDraft(model, **(REPEATABLE | dict(update_when="request", update_every=1, replay_passes=0, lr=3e-3)))
    counts = torch.zeros(vocab**2, dtype=torch.long)
    torch.manual_seed(11)
    for _ in range(draws):
        out = target.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=2, assistant_model=draft)
        counts[out[0, 1] * vocab + out[0, 2]] += 1
    assert follows(counts, law, THOUSAND)
    assert draft.metrics.updates >= draws and draft.metrics.drafted_tokens


def test_an_equal_encoder_is_shared_and_another_one_is_not() -> None:
    target = t5(0)
    own, equal = t5(1), t5(1)
    equal.encoder.load_state_dict(target.encoder.state_dict())
    for model, shared in ((own, False), (equal, True)):
        draft = OnlineDraft(model, **REPEATABLE)
        (read,) = read_by(draft, target, 1)
        assert read is not None and (read.states is not None) is shared and (read.tokens is None) is shared
    named = OnlineDraft(equal, target_modules=("encoder.block.0.layer.0.SelfAttention.q",), **REPEATABLE)
    (read,) = read_by(named, target, 1)  # an encoder that learns is its own
    assert read is not None and read.tokens is not None and read.states is None


def test_an_encoder_learns_where_its_layers_are_named() -> None:
    target = t5(0)
    draft = OnlineDraft(t5(1), target_modules=("q", "v"), **REPEATABLE)
    assert torch.equal(generated(target, assistant_model=draft), generated(target))
    learned = [name for name, part in draft.learning.adapter_params().items() if "lora_B" in name and part.any()]
    assert any("encoder" in name for name in learned) and any("EncDecAttention" in name for name in learned)


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
def test_resumed_is_uninterrupted(learner: str, tmp_path: Path) -> None:
    target, settings = t5(0), REPEATABLE | dict(learner=learner, replay_tokens=0)
    whole, parts = (OnlineDraft(t5(1), **settings) for _ in range(2))
    for seed in range(3):
        generated(target, seed, 8, assistant_model=whole)
        generated(target, seed, 8, assistant_model=parts)
        if seed in (0, 1):
            parts.save_pretrained(tmp_path)
            parts = OnlineDraft.from_pretrained(tmp_path, t5(1))
    assert whole.metrics.updates >= 6 and same_state(whole, parts)


@torch.no_grad()
def test_saved_it_is_an_adapter_of_peft_and_exported_a_model(tmp_path: Path) -> None:
    target, base = t5(0), t5(1)
    base.save_pretrained(tmp_path / "base")
    draft = OnlineDraft(T5ForConditionalGeneration.from_pretrained(tmp_path / "base"), **REPEATABLE)
    generated(target, assistant_model=draft)
    inputs = {**source(target), "decoder_input_ids": torch.tensor([[START, 7, 11]])}
    live, before = draft(**inputs).logits, base(**inputs).logits
    assert not torch.allclose(live, before, atol=1e-3)
    draft.save_pretrained(tmp_path / "draft")
    again = OnlineDraft.from_pretrained(tmp_path / "draft")  # the base is found by its name, and is no causal model
    assert torch.equal(again(**inputs).logits, live) and again.config.is_encoder_decoder
    with warnings_of_tied_models():
        by_peft = PeftModel.from_pretrained(t5(1), tmp_path / "draft").eval()
    torch.testing.assert_close(by_peft(**inputs).logits, live, **CLOSE)
    draft.merge_and_export(tmp_path / "exported")
    exported = T5ForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(exported(**inputs).logits, live, **CLOSE)
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "draft" / "README.md").read_text(encoding="utf-8")
    assert torch.equal(base(**inputs).logits, before)


def test_what_is_remembered_holds_its_source_and_is_bounded() -> None:
    target = t5(0)
    draft = OnlineDraft(t5(1), replay_tokens=60, **REPEATABLE)
    for seed in range(5):
        generated(target, seed, assistant_model=draft)
    replay = draft.learning.learner.replay
    assert len(replay) == 2 and replay.tokens <= 60  # each has 13 tokens of its own and 10 of its source
    kept = [request.source for request in replay.requests]
    assert all(one is not None and one.tokens is not None and one.states is None for one in kept)
    assert draft.metrics.replay_bytes == replay.nbytes >= sum(one.nbytes for one in kept if one is not None) > 0


def test_encoder_outputs_take_their_part_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    target = whisper(0)
    draft = OnlineDraft(decoder_of(target, 1), replay_tokens=100, **REPEATABLE)
    generated(target, assistant_model=draft)
    (one,) = draft.learning.learner.replay.requests
    assert one.source is not None and one.source.states is not None
    monkeypatch.setattr("hf_onlinespec.adapt.replay.MOST_FEATURES_BYTES", 2 * one.source.nbytes)
    for seed in range(4):
        generated(target, seed, assistant_model=draft)
    assert sum(request.source.nbytes for request in draft.learning.learner.replay.requests[1:] if request.source) <= (
        2 * one.source.nbytes
    )


def test_encoder_outputs_alone_are_not_learned_from_what_is_not_known() -> None:
    target = t5(0)
    draft = OnlineDraft(t5(1), **REPEATABLE)
    outputs = target.get_encoder()(**source(target))
    settings = dict(max_new_tokens=8, do_sample=False)
    found = target.generate(encoder_outputs=outputs, assistant_model=draft, **settings)
    assert torch.equal(found, target.generate(encoder_outputs=outputs, **settings))
    assert not draft.metrics.drafted_tokens and not draft.metrics.updates
    assert "encoder outputs were given" in draft.metrics.decisions.learning


def test_drafts_that_do_not_fit_are_refused_with_the_way_out() -> None:
    causal, prompt = tiny_llama(0, vocab=VOCAB), torch.tensor([[3, 5]])
    with pytest.raises(DraftError, match=r"T5ForConditionalGeneration is an encoder–decoder.*causal language model"):
        causal.generate(prompt, max_new_tokens=2, assistant_model=t5(1), onlinespec=True)
    wider = whisper(0, d_model=64)
    with pytest.raises(DraftError, match=r"encoder outputs of 32 numbers.*have 64.*encoder of its own"):
        generated(wider, assistant_model=decoder_of(whisper(0), 1), onlinespec=True)


def test_rows_of_a_batch_are_read_with_their_own_sources() -> None:
    target = whisper(0)
    draft = OnlineDraft(whisper(1), **REPEATABLE)
    inputs, settings = source(target, 3), dict(max_new_tokens=10, do_sample=False)
    plain = target.generate(**inputs, **settings)
    for _ in range(3):
        assert torch.equal(target.generate(**inputs, assistant_model=draft, **settings), plain)
    assert draft.metrics.updates and not draft.metrics.failed_drafts


def test_adapters_are_compared_on_texts_with_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = t5(0), list[bool]()
    draft, logits = OnlineDraft(t5(1), **REPEATABLE), Seq2Seq.logits

    def noted(model: Seq2Seq, *arguments: Any, **named: Any) -> Tensor:
        sources = named.get("sources", arguments[-1])
        seen.append(isinstance(sources, tuple) and None not in sources)
        return logits(model, *arguments, **named)

    generated(target, assistant_model=draft, adapter="sql")
    monkeypatch.setattr(Seq2Seq, "logits", noted)
    plain = generated(target)
    assert torch.equal(generated(target, assistant_model=draft, adapter="auto"), plain)
    assert seen and all(seen)


def test_an_audit_reads_texts_with_the_sources_that_are_remembered() -> None:
    target, drafts = t5(0), [OnlineDraft(t5(1), **REPEATABLE) for _ in range(2)]
    for draft, seeds in zip(drafts, ((5, 6), (7, 8)), strict=True):
        for seed in seeds:
            generated(target, seed, assistant_model=draft)
    own, others = (draft.learning.replayed() for draft in drafts)
    draft, losses = drafts[0], []
    for text in own:
        n = text.teacher.length
        logits = draft.trainable.logits(text.tokens[None, :-1], n, sources=[text.source])[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), text.tokens[-n:]))
    gap = loss_gap(draft, own, others)
    assert gap.own[1] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    copied = draft.clone_for_audit()
    learn(copied, own)
    assert copied.steps > draft.steps
