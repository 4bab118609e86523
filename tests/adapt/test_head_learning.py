"""A draft head learns: from true features, aligned with the tokens that they belong to, and without a trace in its target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft
from hf_onlinespec._compat.hidden_states import hidden_states_inputs
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.objective import Objective
from hf_onlinespec.adapt.replay import Replay
from hf_onlinespec.adapt.segment import PendingRequest, Scores, Segment, padded, padded_features
from hf_onlinespec.commit.row_features import RowFeatures
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.heads.base import Head
from tests.drafts import flat_params, move
from tests.heads.tiny import KINDS, tiny_eagle3, tiny_head
from tests.tiny_models import tiny_llama

CLOSE = dict(rtol=1e-5, atol=1e-5)
SMALL: dict[str, Any] = dict(rank=2, alpha=2.0, memory_tokens=0, recycle=False, lookahead=3)
PER_ROUND = SMALL | dict(update_every=1, update_when="round")


def target_of() -> PreTrainedModel:
    return tiny_llama(1, vocab=24, layers=3, initializer_range=0.3)


@torch.no_grad()
def features_of(target: PreTrainedModel, head: Head, tokens: Tensor) -> Tensor:
    """(rows, L, width) of tokens (rows, L)."""
    states = target(tokens, **hidden_states_inputs(head.reads)).hidden_states
    return torch.cat([states[i] for i in head.reads], dim=-1)


def knows(head: Head, laws: Tensor) -> Tensor:
    """Whether a head has a word for what each of the target's logits (n, vocab) says is likeliest."""
    best = laws.argmax(-1)
    return torch.ones_like(best, dtype=torch.bool) if head.draft_ids is None else torch.isin(best, head.draft_ids)


def check_laws(teacher: Teacher, head: Head, laws: Tensor) -> None:
    """Whether a teacher is the target's law (logits (n, vocab)) on the tokens of the head."""
    known = knows(head, laws)
    laws = laws if head.draft_ids is None else laws[:, head.draft_ids]
    assert teacher.tokens is None and torch.equal(teacher.has_mass, known)
    torch.testing.assert_close(teacher.log_probs[known], laws.log_softmax(-1)[known], **CLOSE)


def learned(kind: str, **settings: Any) -> tuple[PreTrainedModel, Head, OnlineDraft]:
    """A target, a head, and a draft whose adapter says something else than the head alone."""
    target = target_of()
    head = tiny_head(kind, target)
    head.share(target)
    draft = OnlineDraft(head, **(SMALL | settings))
    generator = torch.Generator().manual_seed(4)
    move(draft, lambda part: 0.2 * torch.randn(part.shape, generator=generator))
    return target, head, draft


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_remembered_is_the_text_with_its_own_features_and_laws(kind: str, length: int) -> None:
    """Also where a stop ends the text inside of what was kept, and where no row of the head says the first new tokens."""
    target = target_of()
    head = tiny_head(kind, target)
    draft = OnlineDraft(head, **PER_ROUND | dict(replay_passes=0))
    texts = []
    for seed in range(6):
        torch.manual_seed(seed)
        prompt, how = torch.arange(1, length + 1)[None], dict(do_sample=True, temperature=4.0, top_k=0)
        texts.append(
            target.generate(prompt, assistant_model=draft, max_new_tokens=1 + 4 * seed, eos_token_id=[3, 20], **how)
        )
    metrics = draft.metrics
    assert not metrics.failed_updates and not metrics.failed_drafts and metrics.updates and metrics.skipped_updates == 0
    remembered = {tuple(one.tokens.tolist()): one for one in draft.learning.replayed()}
    for text in texts:
        found = remembered.pop(tuple(text[0].tolist()), None)
        n = min(text.shape[1] - length, text.shape[1] - 2)  # rows say the third token and those behind it
        laws = target(text).logits[0, -1 - n : -1]
        if found is None:
            assert n == 0 or not knows(head, laws).any()
            continue
        torch.testing.assert_close(found.features, features_of(target, head, text)[0, :-1], **CLOSE)
        assert len(found.teacher) == n
        check_laws(found.teacher, head, laws)
    assert not remembered


def test_of_a_long_answer_the_newest_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.row_model.MOST_HELD", 8)
    target = target_of()
    head = tiny_head("EAGLE-3", target)
    for when in ("round", "request"):
        draft = OnlineDraft(head, **SMALL | dict(update_every=1, update_when=when))
        text = target.generate(torch.arange(1, 13)[None], assistant_model=draft, max_new_tokens=30)
        assert not draft.metrics.failed_updates and draft.metrics.updates
        (found,) = draft.learning.replayed()
        held = len(found.features)
        assert 8 <= held < 20 and torch.equal(found.tokens, text[0, -held - 1 :]) and len(found.teacher) == held - 1
        torch.testing.assert_close(found.features, features_of(target, head, text)[0, -held - 1 : -1], **CLOSE)
        check_laws(found.teacher, head, target(text).logits[0, -held:-1])


@pytest.mark.parametrize("length", [5, 15, 30])
@pytest.mark.parametrize("context", [1, 512])
def test_behind_its_last_position_a_head_neither_drafts_nor_learns(
    length: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.commit.row_model.MOST_HELD", 8)
    target = target_of()
    draft = OnlineDraft(tiny_eagle3(target, max_position_embeddings=16), **PER_ROUND | dict(context_tokens=context))
    for _ in range(2):
        prompt = torch.randint(1, 24, (1, length))
        target.generate(prompt, assistant_model=draft, max_new_tokens=25)
    metrics = draft.metrics
    assert not metrics.failed_drafts and not metrics.failed_updates and bool(metrics.updates) == (length < 17)
    assert all(len(one.features) == len(one.tokens) - 1 for one in draft.learning.replayed())


@pytest.mark.parametrize("known", [12, 4, 2])
def test_segments_of_one_request_are_joined_with_their_features(known: int) -> None:
    """Of a later segment that knows features of all tokens, of the new ones alone, or not even of these."""
    tokens, features = torch.arange(14)[None], torch.arange(13.0)[None, :, None]
    laws = torch.randn(6, 5)
    first = Segment(tokens[:, :10], [Teacher.from_logits(laws[:2])], None, 0.0, features[:, 4:9])
    second = Segment(tokens, [Teacher.from_logits(laws[2:])], None, 0.0, features[:, 13 - known :])
    scores = Scores([0.5] * 2, None), Scores([0.5] * 4, None)
    whole = PendingRequest(first, [[0.5] * 2], scores[0]).joined(second, [[0.5] * 4], scores[1]).segment
    if known < 4:
        assert whole.n == 4 and torch.equal(whole.features, features[:, 11:])
        return
    assert whole.n == 6 and torch.equal(whole.features, features[:, 4:])
    torch.testing.assert_close(whole.teachers[0].log_probs, laws.log_softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_target(kind: str) -> None:
    target = target_of()
    draft = OnlineDraft(tiny_head(kind, target), **PER_ROUND)
    target.generate(torch.tensor([[1, 2, 3]]), assistant_model=draft, max_new_tokens=12)
    assert draft.metrics.updates > 3
    assert all(weight.requires_grad and weight.grad is None for weight in target.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_was_read_while_serving_need_not_be_read_again(kind: str) -> None:
    target, head, draft = learned(kind)
    model, tokens, n = draft.trainable, torch.randint(1, 24, (1, 12)), 4
    features = features_of(target, head, tokens)
    held = RowFeatures(0, 100)
    held.take(features[:, :9])
    held.keep(9, 0, ())
    reader = model.reader(None, held)
    with torch.no_grad(), model.adapter.gated() as served:
        reader.scores(served, tokens[:, :10])
    prefix = reader.prefix(tokens.shape[1] - 1 - n)
    assert prefix is not None
    whole = model.training_logits(tokens, n, features=features[:, :-1])
    built = model.training_logits(tokens, n, features=features[:, :-1], prefix=prefix)
    window = model.training_logits(tokens, n, features=features[:, 3:-1], prefix=prefix)
    torch.testing.assert_close(built, whole, **CLOSE)
    torch.testing.assert_close(window, whole, **CLOSE)
    # Gradients are those of the rows that are read now.
    grads = []
    for found in (whole, built):
        model.adapter.grads.zero_()
        found.log_softmax(-1)[..., 0].sum().backward()
        grads.append(model.adapter.grads.clone())
    assert grads[1].norm() > 0
    if kind == "Hydra mlp":
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    else:
        assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_padded_batch_are_as_alone_and_as_what_serves(kind: str) -> None:
    target, head, draft = learned(kind)
    model = draft.trainable
    texts = [torch.randint(1, 24, (length,)) for length in (9, 5, 12)]
    known = [features_of(target, head, text[None])[0, :-1] for text in texts]
    tokens, mask = padded(texts)
    features = padded_features(list(known))
    batch = model.training_logits(tokens, 4, mask, features=features)[0]
    served = model.logits(tokens[:, :-1], 4, mask=mask, features=features[:, :-1])
    for i, (text, own) in enumerate(zip(texts, known, strict=True)):
        n = min(4, len(text) - 2)
        alone = model.training_logits(text[None], n, features=own[None])[0]
        torch.testing.assert_close(batch[i, -n:], alone[0], **CLOSE)
        torch.testing.assert_close(served[i, -n:], alone[0], **CLOSE)
        # A prompt that is padded has a mask for itself alone, and its features begin behind the padding.
        start = tokens.shape[1] - len(text)
        prompt = mask[i : i + 1, : start + 2]
        one = model.training_logits(tokens[i : i + 1], n, prompt, features=own[None])[0]
        torch.testing.assert_close(one, alone, **CLOSE)
        one = model.logits(tokens[i : i + 1, :-1], n, mask=prompt, features=own[None, :-1])
        torch.testing.assert_close(one, alone, **CLOSE)
        # Without features the target is asked for them.
        model.belongs_to(target)
        asked = model.training_logits(tokens[i : i + 1], n, prompt)[0]
        torch.testing.assert_close(asked, alone, **CLOSE)


def test_experts_and_the_base_head_read_side_by_side() -> None:
    target, head, draft = learned("EAGLE-3", learner="ensemble")
    model, tokens = draft.trainable, torch.randint(1, 24, (2, 8))
    features, blocks = features_of(target, head, tokens)[:, :-1], draft.trainable.adapter.blocks
    gates = torch.cat([torch.eye(blocks), torch.zeros(1, blocks), torch.full((1, blocks), 1 / blocks)])
    together = model.training_logits(tokens, 3, gates=gates, features=features)
    for row, gate in zip(together, gates, strict=True):
        alone = model.training_logits(tokens, 3, gates=gate[None], features=features)[0]
        torch.testing.assert_close(row, alone, **CLOSE)
    base = model.training_logits(tokens, 3, base=True, features=features)[0]
    torch.testing.assert_close(together[blocks], base, **CLOSE)
    assert (together[0] - base).abs().max() > 0.01


def test_where_the_head_has_no_word_for_what_the_target_says_nothing_is_learned() -> None:
    target, head, draft = learned("EAGLE-3")
    tokens, n = torch.randint(1, 24, (1, 9)), 4
    features, laws = features_of(target, head, tokens)[:, :-1], torch.randn(n, 24)
    laws[:, :] += torch.tensor([5.0, 0.0]).repeat(12)  # the even ones are the head's
    grads = []
    for gap in (0.0, 20.0):
        laws[1, 7] = gap
        teacher = Teacher.from_logits(laws, vocabulary=head.draft_ids)
        draft.trainable.adapter.grads.zero_()
        logits = draft.trainable.training_logits(tokens, n, features=features)[0]
        losses = Objective(draft.settings).losses([teacher], logits)
        assert len(losses) == (n if gap == 0 else n - 1)
        losses.sum().backward()
        grads.append(draft.trainable.adapter.grads.clone())
    draft.trainable.adapter.grads.zero_()
    logits = draft.trainable.training_logits(tokens, n, features=features)[0, :, [0, 2, 3]]
    laws = laws[[0, 2, 3]][:, head.draft_ids]
    (laws.softmax(-1) * (laws.log_softmax(-1) - logits[0].log_softmax(-1))).sum().backward()
    torch.testing.assert_close(grads[1], draft.trainable.adapter.grads, rtol=1e-4, atol=1e-5)
    assert (grads[0] - grads[1]).abs().max() > 1e-3


@pytest.mark.parametrize("learner", ["ogd", "optimistic", "ensemble"])
@pytest.mark.parametrize("when", ["round", "request", "idle"])
def test_every_learner_takes_steps(learner: str, when: str) -> None:
    target = target_of()
    for kind in ("EAGLE-3", "Hydra prefix-mlp"):
        settings = SMALL | dict(learner=learner, update_when=when, update_every="auto" if when == "idle" else 1)
        draft = OnlineDraft(tiny_head(kind, target), **settings)
        start = flat_params(draft)
        for _ in range(2):
            target.generate(torch.tensor([[1, 2, 3, 4]]), assistant_model=draft, max_new_tokens=12)
            assert draft.catch_up(60)
        metrics = draft.metrics
        assert metrics.updates + metrics.idle_updates >= 4 and not metrics.failed_updates and not metrics.idle_failures
        assert not torch.equal(flat_params(draft), start)


def test_memory_of_features_is_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of()
    draft = OnlineDraft(tiny_head("EAGLE-3", target), **SMALL | dict(update_every=1))
    before = draft.learning_bytes
    target.generate(torch.tensor([[1, 2, 3, 4]]), assistant_model=draft, max_new_tokens=12)
    (one,) = draft.learning.replayed()
    features = 4 * 3 * 16 * 15  # float32, three hidden states of 16 numbers, of all tokens but the last
    assert one.features.nbytes == features and one.nbytes > features
    assert draft.metrics.replay_bytes >= features and draft.learning_bytes - before >= features
    monkeypatch.setattr("hf_onlinespec.adapt.replay.MOST_FEATURES_BYTES", 10_000)
    replay = Replay(1000, 4, 0)
    for i in range(30):
        text = torch.full((10 + i % 5,), i)
        replay.add(Feedback(text, Teacher.from_logits(torch.randn(4, 24)), torch.randn(len(text) - 1, 48)))
        assert sum(f.features.nbytes for f in replay.requests) <= 10_000
    assert replay.tokens > 30 and replay.refused == 0  # 10,000 bytes of 192 each are 52 tokens
    replay.add(
        Feedback(torch.zeros(60, dtype=torch.long), Teacher.from_logits(torch.randn(4, 24)), torch.randn(59, 48))
    )
    assert replay.refused == 1


def test_features_of_a_request_in_progress_are_counted() -> None:
    target = target_of()
    draft = OnlineDraft(tiny_head("EAGLE-1", target), **SMALL | dict(update_every=1, replay_tokens=0))
    seen = []
    forward = target.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(draft.learning_bytes)
        return forward(*args, **kwargs)

    start = draft.learning_bytes
    target.forward = counted
    target.generate(torch.tensor([[1, 2, 3, 4]]), assistant_model=draft, max_new_tokens=30)
    grown = 64 * 20  # float32, 16 numbers of a token; and what the target said of it
    assert max(seen) - start > grown + 4 * 24 * 20


def from_the_target(target: PreTrainedModel) -> Head:
    """A head that says what the target's own vocabulary head says of a late hidden state, and attends at random."""
    config = target.config
    reads, width = (1, config.num_hidden_layers // 2, -2), config.hidden_size
    head = tiny_eagle3(target, reads=reads, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.02)
    with torch.no_grad():
        head.lm_head.weight.copy_(target.get_output_embeddings().weight)
        head.norm.weight.copy_(target.model.norm.weight)
        head.fc.weight.zero_()[:, -width:] = torch.eye(width)
    return head


def test_a_new_head_of_a_trained_target_is_accepted_more_often_with_every_request(pair: EmbeddedPair) -> None:
    """Of one domain, without memory and recycling: what is kept is the head's."""
    target, orders = pair.target, [pair.tokenizer(text, return_tensors="pt") for text in prompts("orders")[:6]]
    how = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    settings = SMALL | dict(rank=16, alpha=16.0, lr=0.01, update_every=1, replay_passes=5)
    learning, frozen = (OnlineDraft(from_the_target(target), **settings) for _ in range(2))
    lengths: dict[str, list[float]] = {"learning": [], "frozen": []}
    for i, one in enumerate(orders):
        text = target.generate(**one, assistant_model=learning, **how)
        lengths["learning"].append(learning.metrics.last.acceptance_length)
        if i > 3:
            assert torch.equal(text, target.generate(**one, assistant_model=frozen, onlinespec=False, **how))
            lengths["frozen"].append(frozen.metrics.last.acceptance_length)
    assert sum(lengths["learning"][-2:]) > sum(lengths["frozen"]) + 0.5, lengths
