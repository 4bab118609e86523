"""What a draft head learns of its later steps is what it drafts with while it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.objective import Objective
from hf_onlinespec.adapt.segment import padded, padded_features
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.commit.row_features import RowFeatures
from hf_onlinespec.heads.base import Head
from hf_onlinespec.metrics import Counts
from tests.adapt.test_head_learning import CLOSE, SMALL, features_of, learned, target_of
from tests.drafts import flat_params
from tests.heads.tiny import KINDS, tiny_head

STEPS = 3


@torch.no_grad()
def drafted(draft: OnlineDraft, head: Head, features: Tensor, tokens: Tensor, t: int, steps: int) -> list[Tensor]:
    """What a head says while it serves, each (ids,), from the features (1, L, width) of the tokens up to t and the true ones behind it."""
    held = RowFeatures(0, 100)
    held.take(features[:, : t + 1])
    held.keep(t + 1, 0, ())
    model = draft.trainable
    reader = model.reader(None, held)
    with model.adapter.gated() as served:
        said = [reader.scores(served, tokens[:, : t + 2 + k])[0] for k in range(steps)]
    return said if head.draft_ids is None else [logits[head.draft_ids] for logits in said]


def prefix_of(draft: OnlineDraft, features: Tensor, tokens: Tensor, n: int) -> Prefix:
    """What a head has read before the last n tokens."""
    held = RowFeatures(0, 100)
    held.take(features[:, :-2])
    held.keep(features.shape[1] - 2, 0, ())
    reader = draft.trainable.reader(None, held)
    with torch.no_grad(), draft.trainable.adapter.gated() as served:
        reader.scores(served, tokens[:, :-1])
    prefix = reader.prefix(tokens.shape[1] - 1 - n)
    assert prefix is not None
    return prefix


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_what_serving_drafts_behind_the_same_true_tokens(kind: str, n: int) -> None:
    target, head, draft = learned(kind)
    tokens = torch.randint(1, 24, (1, 11))
    features, last = features_of(target, head, tokens), tokens.shape[1]
    model, prefix = draft.trainable, prefix_of(draft, features, tokens, n)
    whole = model.unrolled_logits(tokens, n, features=features[:, :-1], steps=STEPS)
    built = model.unrolled_logits(tokens, n, features=features[:, :-1], prefix=prefix, steps=STEPS)
    assert len(whole) == len(built) == STEPS
    torch.testing.assert_close(whole[0], model.training_logits(tokens, n, features=features[:, :-1]), **CLOSE)
    for t in range(last - n - 2 - STEPS + 1, last - 2):
        for k, said in enumerate(drafted(draft, head, features, tokens, t, min(STEPS, last - 2 - t))):
            at = t + 2 + k - (last - n)
            if at >= 0:
                torch.testing.assert_close(whole[k][0, 0, at], said, **CLOSE)
                torch.testing.assert_close(built[k][0, 0, at], said, **CLOSE)
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_padded_batch_are_as_alone_and_have_no_loss_where_no_row_says_a_token(kind: str) -> None:
    target, head, draft = learned(kind, head_steps=STEPS)
    texts = [torch.randint(1, 24, (length,)) for length in (9, 4, 12)]
    known = [features_of(target, head, text[None])[0, :-1] for text in texts]
    ids = None if head.draft_ids is None else head.draft_ids
    requests = []
    for text, own in zip(texts, known, strict=True):
        laws = torch.randn(min(4, len(text) - 2), 24)
        if ids is not None:
            laws[:, ids] += 9.0
        requests.append(Feedback(text, Teacher.from_logits(laws, vocabulary=ids), own))
    tokens, mask = padded(texts)
    features = padded_features(list(known))
    batch = draft.trainable.unrolled_logits(tokens, 4, mask, features=features, steps=STEPS)
    alone = [
        draft.trainable.unrolled_logits(t[None], 4, features=f[None], steps=STEPS)
        for t, f in zip(texts, known, strict=True)
    ]
    objective = Objective(draft.settings)
    expected: list[list[Tensor]] = [[] for _ in range(STEPS)]
    for i, text in enumerate(texts):
        for k in range(STEPS):
            said = min(4, len(text) - 2 - k)
            torch.testing.assert_close(batch[k][0, i, 4 - said :], alone[i][k][0, 0, 4 - said :], **CLOSE)
            assert not alone[i][k][0, 0, : 4 - said].any()
            if said:
                expected[k].append(objective.losses([requests[i].teacher.last(said)], alone[i][k][0]))
    (found,) = objective.request_losses(draft.trainable, requests, None)
    assert [len(losses) for losses in found.later] == [4 + 1 + 4, 4 + 0 + 4]
    for got, own in zip([torch.cat(found.first), *found.later], expected, strict=True):
        torch.testing.assert_close(got, torch.cat(own), **CLOSE)
    means = [torch.cat(own).mean() for own in expected]
    torch.testing.assert_close(found.mean, (means[0] + 0.8 * means[1] + 0.64 * means[2]) / 2.44, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_window_of_features_later_steps_say_the_last_tokens(kind: str) -> None:
    target, head, draft = learned(kind)
    tokens, n = torch.randint(1, 24, (1, 10)), 4
    features = features_of(target, head, tokens)[:, 4:-1]  # of five tokens: rows 4 to 7
    found = draft.trainable.unrolled_logits(tokens, n, features=features, steps=STEPS)
    for k, logits in enumerate(found):
        assert [bool(row.any()) for row in logits[0, 0]] == [at >= k for at in range(n)]
    short = draft.trainable.unrolled_logits(tokens, n, features=features[:, -2:], steps=STEPS)
    assert [int(logits.any(-1).sum()) for logits in short] == [1, 0, 0]
    # Behind rows that were read while serving it says the same as with all features.
    everything = features_of(target, head, tokens)
    prefix = prefix_of(draft, everything, tokens, n)
    whole = draft.trainable.unrolled_logits(tokens, n, features=everything[:, :-1], steps=STEPS)
    built = draft.trainable.unrolled_logits(tokens, n, features=features, prefix=prefix, steps=STEPS)
    for k in range(STEPS):
        torch.testing.assert_close(built[k][0, 0, k:], whole[k][0, 0, k:], **CLOSE)
        assert not built[k][0, 0, :k].any()


def test_experts_unroll_side_by_side() -> None:
    target, head, draft = learned("EAGLE-3", learner="ensemble")
    model, tokens = draft.trainable, torch.randint(1, 24, (2, 9))
    features, blocks = features_of(target, head, tokens)[:, :-1], draft.trainable.adapter.blocks
    gates = torch.cat([torch.eye(blocks), torch.zeros(1, blocks)])
    together = model.unrolled_logits(tokens, 3, gates=gates, features=features, steps=STEPS)
    base = model.unrolled_logits(tokens, 3, base=True, features=features, steps=STEPS)
    for k, logits in enumerate(together):
        for row, gate in zip(logits, gates, strict=True):
            alone = model.unrolled_logits(tokens, 3, gates=gate[None], features=features, steps=STEPS)
            torch.testing.assert_close(row, alone[k][0], **CLOSE)
        torch.testing.assert_close(logits[blocks], base[k][0], **CLOSE)
        assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["Hydra mlp", "Hydra prefix-mlp"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_hydra_learns_as_many_heads_as_there_are_steps(kind: str, steps: int) -> None:
    target = target_of()
    head = tiny_head(kind, target)
    head.share(target)
    draft = OnlineDraft(head, **SMALL | dict(head_steps=steps))
    tokens = torch.randint(1, 24, (12,))
    features = features_of(target, head, tokens[None])[0, :-1]
    draft.learning.learn([Feedback(tokens, Teacher.from_logits(torch.randn(6, 24)), features)], Counts())
    adapter = draft.trainable.adapter
    grads = adapter.named(adapter.grads)
    heads = {i for i in range(3) for name, grad in grads.items() if f"lm_heads.{i}." in name and grad.any()}
    mlps = {i for i in range(3) for name, grad in grads.items() if f"mlps.{i}." in name and grad.any()}
    assert heads == mlps == set(range(min(steps, 3)))


def answers(target: PreTrainedModel, **how: Any) -> list[Tensor]:
    prompts = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]])
    return [target.generate(prompt, max_new_tokens=14, do_sample=False, **how) for prompt in prompts]


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
@pytest.mark.parametrize("when", ["round", "request", "idle"])
def test_serving_learns_several_steps(learner: str, when: str) -> None:
    for kind in ("EAGLE-3", "Hydra mlp"):
        target, found = target_of(), []
        plain = answers(target)
        for steps in (1, STEPS):
            settings = SMALL | dict(learner=learner, update_when=when, update_every="auto" if when == "idle" else 1)
            draft = OnlineDraft(tiny_head(kind, target), **settings | dict(head_steps=steps))
            for text, own in zip(answers(target, assistant_model=draft), plain, strict=True):
                assert torch.equal(text, own)
            assert draft.catch_up(60)
            metrics = draft.metrics
            assert metrics.updates + metrics.idle_updates >= 2 and not metrics.failed_updates + metrics.idle_failures
            assert metrics.skipped_updates == 0
            found.append(flat_params(draft))
        assert (found[0] - found[1]).abs().max() > 1e-3
