"""A new head learns its target's law by training-time test, goes on after an interruption to equal bits, and is written to its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_onlinespec import ConfigError, DraftError, UnsupportedError
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.heads.starting import new_config, start_from_target
from hf_onlinespec.training import head_loop
from hf_onlinespec.training.head_acceptance import acceptance_by_kind, accepted_behind, forwards
from hf_onlinespec.training.head_answers import Answer, EncodedPrompt, Writing, read_answers, write_answers
from hf_onlinespec.training.head_features import FeatureCache, TargetReader, collated
from hf_onlinespec.training.head_loop import LoopSettings, epoch_batches
from hf_onlinespec.training.head_loss import unrolled_loss
from hf_onlinespec.training.head_start import frequent_tokens
from hf_onlinespec.training.new_head import HeadTraining, chat_prompts, new_head
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_gpt2, tiny_llama
from tests.encoder_decoders import t5

VOCAB = 32
QUICK = HeadTraining(
    draft_vocab_size=20,
    held_out=0.2,
    writing=Writing(new_tokens=10, batch_size=4, sampled_share=0.5),
    loop=LoopSettings(epochs=2, batch_size=3, checkpoint_s=0),
)


def target_of(layers: int = 4, **settings: Any) -> PreTrainedModel:
    return tiny_llama(1, VOCAB, layers, **settings)


def asked(n: int = 12) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(3)
    return [
        EncodedPrompt(torch.randint(VOCAB, (2 + i % 5,), generator=generator).tolist(), "ab"[i % 2]) for i in range(n)
    ]


def made(target: PreTrainedModel, draft_vocab_size: int = 20, seed: int = 0) -> Eagle3Head:
    """A random head whose weights are as wide as the target's."""
    torch.manual_seed(seed)
    config = new_config(target, draft_vocab_size, initializer_range=0.4)
    head = Eagle3Head(config, torch.arange(draft_vocab_size) + 5 if draft_vocab_size < VOCAB else None)
    head.share(target)
    return head.eval()


def tensors(folder: Path, target: PreTrainedModel) -> dict[str, Tensor]:
    return read_head(folder, target.config).state_dict()


# The loss


def drafted_one_by_one(head: Eagle3Head, target: PreTrainedModel, answer: Answer, steps: int) -> list[list[Tensor]]:
    """Logits (Vd,) of step k behind row i, [k][i], as the head drafts them: with a cache that is cropped, the answer's tokens forced."""
    row = torch.tensor([answer.prompt + answer.tokens])
    states = target(row, output_hidden_states=True).hidden_states
    features = torch.cat([states[j] for j in head.reads], dim=-1).bfloat16()
    first, found = len(answer.prompt) - 1, [[] for _ in range(steps)]
    for i in range(answer.learned):
        t, cache = first + i, DynamicCache()
        out = head(row[:, 1 : t + 2], features=features[:, : t + 1], past_key_values=cache)
        found[0].append(out.logits[0, -1])
        for k in range(1, steps):
            if t + 1 + k >= row.shape[1]:
                break
            out = head(row[:, t + 1 + k, None], hidden=out.hidden[:, -1:], past_key_values=cache)
            found[k].append(out.logits[0, -1])
    return found


@torch.no_grad()
def test_the_loss_is_that_of_a_head_that_drafts_behind_one_token_after_the_other() -> None:
    target = target_of()
    head = made(target)
    ids = head.draft_ids
    assert ids is not None
    answers = [Answer([1, 2, 3], [7, 9, 4, 8, 11, 6]), Answer([4, 5, 6, 7, 8, 9], [20, 22, 5, 9]), Answer([9], [1, 2])]
    reader = TargetReader(target, head.reads, ids)
    batch = collated(answers, reader.read(answers))
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[ids] = True
    steps, decay = 3, 0.8
    sums, counts = [0.0] * steps, [0] * steps
    for answer in answers:
        logits = target(torch.tensor([answer.prompt + answer.tokens])).logits[0]
        for k, rows in enumerate(drafted_one_by_one(head, target, answer, steps)):
            for i, own in enumerate(rows[: answer.learned - k]):
                said = logits[len(answer.prompt) + i + k]
                if int(said.argmax()) not in ids.tolist():
                    continue
                law = said[ids].softmax(-1)
                sums[k] -= float(law @ own.log_softmax(-1))
                counts[k] += 1
    found = unrolled_loss(head, batch, reader.logits(batch.said), steps, decay, known)
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert min(counts) > 1 and found.steps == pytest.approx(
        expected, rel=5e-3
    )  # the target's states are kept in bfloat16
    assert float(found.loss) == pytest.approx(sum(decay**k * x for k, x in enumerate(expected)), rel=5e-3)


@torch.no_grad()
def test_an_answer_has_the_same_loss_whatever_lies_beside_it() -> None:
    target = target_of()
    head = made(target)
    answers = [Answer([1, 2, 3], [7, 9, 4, 8, 11, 6]), Answer([4, 5, 6, 7, 8, 9], [20, 22, 5, 9])]
    reader = TargetReader(target, head.reads, head.draft_ids)
    alone, beside = (collated(some, reader.read(some)) for some in (answers[:1], answers))
    beside = replace(beside, real=beside.real & torch.tensor([True, False])[:, None])  # the second one does not count
    losses = [unrolled_loss(head, one, reader.logits(one.said), 3, 1.0).steps for one in (alone, beside)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@torch.no_grad()
def test_acceptance_is_that_of_drafts_made_one_by_one() -> None:
    target = target_of()
    head = made(target, VOCAB)
    row = target.generate(torch.tensor([[3, 1, 2]]), max_new_tokens=12, do_sample=False)[0].tolist()
    answer = Answer(row[:3], row[3:])
    states = target(torch.tensor([row]), output_hidden_states=True).hidden_states
    features = torch.cat([states[j] for j in head.reads], dim=-1).bfloat16()
    expected = []
    for i in range(answer.learned):
        t, cache, right = 2 + i, DynamicCache(), 0
        out = head(torch.tensor([row[1 : t + 2]]), features=features[:, : t + 1], past_key_values=cache)
        for at in range(t + 2, min(t + 5, len(row))):
            drafted = int(out.logits[0, -1].argmax())
            if drafted != row[at]:
                break
            right += 1
            out = head(torch.tensor([[drafted]]), hidden=out.hidden[:, -1:], past_key_values=cache)
        expected.append(right)
    reader = TargetReader(target, head.reads, torch.arange(VOCAB))
    assert accepted_behind(head, collated([answer], reader.read([answer])), 3).tolist() == [expected]


def test_a_walk_over_an_answer_counts_the_target_s_own_token_of_each_forward() -> None:
    assert (
        forwards([0, 0, 0]) == 3 and forwards([2, 1, 0]) == 1 and forwards([1, 5, 0, 1, 0]) == 3 and forwards([]) == 0
    )


# Answers and hidden states


def test_answers_are_written_once_and_go_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    target, file = target_of(), tmp_path / "answers.jsonl"
    writing = Writing(new_tokens=6, batch_size=4, sampled_share=0.5)
    whole = write_answers(target, asked(), file, writing)
    assert [a.sampled for a in whole[::4]] == [False, True, False] and {a.kind for a in whole} == {"a", "b"}
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:8]) + lines[8][:20])
    before = torch.get_rng_state()
    assert write_answers(target, asked(), file, writing) == whole == read_answers(file)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="other prompts"):
        write_answers(target, asked()[:6], file, writing)


def test_a_greedy_answer_ends_with_the_token_that_ends_texts(tmp_path: Path) -> None:
    target = target_of()
    free = write_answers(target, asked(), tmp_path / "free.jsonl", Writing(new_tokens=8, sampled_share=0))
    target.generation_config.eos_token_id = end = free[0].tokens[3]
    for answer, cut in zip(
        free, write_answers(target, asked(), tmp_path / "cut.jsonl", Writing(8, sampled_share=0)), strict=True
    ):
        n = answer.tokens.index(end) + 1 if end in answer.tokens else 8
        assert cut.tokens == answer.tokens[:n]


def test_hidden_states_are_the_same_from_the_cache_and_where_it_has_no_room(tmp_path: Path) -> None:
    target = target_of()
    answers = [Answer(p.tokens, [1 + i % 7, 2, 3, 4]) for i, p in enumerate(asked(20))]
    reader = TargetReader(target, (0, 2, 4), torch.arange(5, 25))
    caches = [FeatureCache(reader, answers, tmp_path / str(room), room) for room in (0, 10**9)]
    for cache in caches:
        for block in range(cache.blocks):
            cache.prepare(block)
    assert [len(list((tmp_path / str(room)).iterdir())) for room in (0, 10**9)] == [0, 2]
    for one, other in zip(*(cache[[17, 3]] for cache in caches), strict=True):
        for name, tensor in vars(one).items():
            assert torch.allclose(tensor.float(), vars(other)[name].float(), atol=1e-2), name


def test_the_law_is_kept_in_logits_where_the_last_hidden_state_does_not_say_it(tmp_path: Path) -> None:
    target = target_of()
    answer, ids = Answer([1, 2], [3, 4, 5, 6]), torch.arange(5, 25)
    plain = TargetReader(target, (0, 2, 4), ids)
    logits = target(torch.tensor([answer.prompt + answer.tokens])).logits[0, 2:5].detach()
    lm_head, scaled = target.lm_head, 3.0
    target.lm_head.register_forward_hook(lambda module, args, out: out)  # nothing changes
    assert torch.allclose(plain.logits(plain.read([answer])[0].said), logits[:, ids], atol=0.1)
    forward = target.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = scaled * torch.tanh(out.logits / scaled)
        return out

    target.forward = capped  # type: ignore[method-assign]
    reader = TargetReader(target, (0, 2, 4), ids)
    expected = scaled * torch.tanh(logits / scaled)
    assert lm_head is target.lm_head
    assert torch.allclose(reader.logits(reader.read([answer])[0].said), expected[:, ids], atol=0.02)


def test_a_target_with_fewer_layers_than_are_read_is_refused() -> None:
    with pytest.raises(DraftError, match="has 3 hidden states"):
        TargetReader(target_of(2), (1, 5), torch.arange(4))


# The start


def test_the_draft_vocabulary_is_ascending_and_has_the_most_frequent_tokens_and_the_special_ones() -> None:
    answers = [Answer([3, 3, 3, 3], [9, 9, 8, 7, 7, 7]), Answer([30], [8, 7])]
    assert frequent_tokens(answers, 5, [31, 0], VOCAB).tolist() == [0, 7, 8, 9, 31]
    assert frequent_tokens(answers, 7, [31, 0], VOCAB).tolist() == [0, 3, 7, 8, 9, 30, 31]


@pytest.mark.parametrize("make", [target_of, lambda: tiny_gpt2(1)])
def test_a_head_takes_from_its_target_what_has_its_shape(make: Any) -> None:
    target = make()
    head = Eagle3Head(new_config(target, 20), torch.arange(20) + 2)
    named = start_from_target(head, target)
    rows = target.get_output_embeddings().weight[2:22]
    assert "lm_head.weight" in named and torch.equal(head.lm_head.weight, rows)
    if target.config.model_type == "llama":
        last = target.model.layers[-1]
        assert torch.equal(head.layers[0].mlp.down_proj.weight, last.mlp.down_proj.weight)
        assert torch.equal(head.layers[0].self_attn.k_proj.weight[:, 16:], last.self_attn.k_proj.weight)
        assert torch.equal(head.norm.weight, target.model.norm.weight) and len(named) == 12
        features = torch.randn(1, 3, head.features_size)
        assert torch.equal(head.projected(features), features[..., -16:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: t5(num_layers=1, num_decoder_layers=4, tie_word_embeddings=True),
        lambda: next(a for a in ARCHITECTURES if a.name == "cohere").build(),
    ],
    ids=["t5", "cohere"],
)
def test_the_logits_of_a_new_head_are_scaled_as_its_target_s(make: Callable[[], PreTrainedModel]) -> None:
    """T5's decoder multiplies its hidden states in front of the vocabulary head, Cohere what that says."""
    target = make()
    head = Eagle3Head(new_config(target, 20), torch.arange(20) + 2)
    start_from_target(head, target)
    tokens, read = torch.tensor([[3, 5, 7, 4]]), {"input_ids": torch.tensor([[9, 8, 6]])}
    read = read | {"decoder_input_ids": tokens} if target.config.is_encoder_decoder else {"input_ids": tokens}
    with torch.no_grad():
        out = target(**read, output_hidden_states=True)
        states = out["decoder_hidden_states" if target.config.is_encoder_decoder else "hidden_states"]
        said = head.lm_head(states[-1])
    assert max(head.reads) < len(states)
    torch.testing.assert_close(said, out.logits[..., 2:22], rtol=1e-3, atol=1e-4)


def test_a_head_of_an_encoder_decoder_grows_and_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"T5ForConditionalGeneration is an encoder–decoder.*grow_head=True"):
        new_head(t5(), [], tmp_path / "head")


# The training


def test_every_answer_is_learned_once_an_epoch_beside_others_of_its_length() -> None:
    lengths = [i * 7 % 50 for i in range(100)]
    batches = epoch_batches(lengths, LoopSettings(batch_size=8), 0)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert batches == epoch_batches(lengths, LoopSettings(batch_size=8), 0)
    assert batches != epoch_batches(lengths, LoopSettings(batch_size=8), 1)
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) < 25


def test_the_rate_rises_and_falls_to_nothing() -> None:
    settings = LoopSettings(learning_rate=1.0, warmup=0.1, cooldown=0.5)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[30] == 1.0 and rates[-1] == pytest.approx(0.02)
    )


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_training_comes_to_equal_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    target = target_of()
    new_head(target, asked(), tmp_path / "whole", QUICK)
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return unrolled_loss(*args)

    monkeypatch.setattr(head_loop, "unrolled_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_head(target, asked(), tmp_path / "parts", QUICK)
    monkeypatch.undo()
    new_head(target, asked(), tmp_path / "parts", QUICK)
    whole, parts = (tensors(tmp_path / name, target) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "parts")]
    assert records[0]["curve"] == records[1]["curve"] and records[0]["learned_tokens"] == records[1]["learned_tokens"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    new_head(target_of(), asked(), tmp_path / "head", QUICK)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt is the checkpoint of a training with other"):
        new_head(target_of(), asked(), tmp_path / "head", replace(QUICK, draft_vocab_size=10))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Writing, {"new_tokens": 1}),
        (Writing, {"sampled_share": 1.0}),
        (Writing, {"temperature": 0.0}),
        (LoopSettings, {"epochs": 0}),
        (LoopSettings, {"learning_rate": -1.0}),
        (LoopSettings, {"warmup": 0.7, "cooldown": 0.4}),
        (HeadTraining, {"held_out": 0.0}),
        (HeadTraining, {"draft_vocab_size": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(kind: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        kind(**changes)


def test_too_few_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        new_head(target_of(), [], tmp_path / "head", QUICK, answers=[Answer([1], [2, 3])])


def test_a_head_learns_to_foretell_a_trained_target(tmp_path: Path, pair: EmbeddedPair) -> None:
    texts = prompts("orders")[:24]
    asked = chat_prompts(pair.tokenizer, texts, ["orders"] * len(texts))
    loop = LoopSettings(epochs=6, batch_size=8, learning_rate=4e-3)
    settings = HeadTraining(
        draft_vocab_size=512, held_out=0.2, writing=Writing(new_tokens=32, sampled_share=0), loop=loop
    )
    head = new_head(pair.target, asked, tmp_path / "head", settings)
    record = json.loads((tmp_path / "head" / "training.json").read_text())
    answers = read_answers(tmp_path / "head.work" / "answers.jsonl")
    reader = TargetReader(pair.target, head.reads, torch.arange(8))
    start = made(pair.target, 512)
    start_from_target(start, pair.target)
    length = [
        acceptance_by_kind(one, FeatureCache(reader, answers, tmp_path / "f", 0))["orders"] for one in (start, head)
    ]
    assert length[1] > 1.3 > 1.1 > length[0]
    assert record["acceptance_length"]["all"] == record["acceptance_length"]["orders"] > 1
    card = (tmp_path / "head" / "README.md").read_text()
    assert "| orders | 5 |" in card and "EAGLE-3" in card
    again = read_head(tmp_path / "head", pair.target.config)
    assert all(torch.equal(t, head.state_dict()[name]) for name, t in again.state_dict().items())
    assert not (tmp_path / "head.work" / "features").exists()
