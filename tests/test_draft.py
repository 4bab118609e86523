"""The draft adapts: right gradients, right positions, repeatable steps, and faults that cost a step but never the serving."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.trainable import Prefix
from hf_onlinespec.commit.base import Call
from hf_onlinespec.commit.request import Request
from hf_onlinespec.govern.governor import Plan
from hf_onlinespec.govern.routing import RouterConstants
from hf_onlinespec.metrics import Counts
from hf_onlinespec.rounds import Rows
from tests.drafts import learn_segment

from .conftest import tiny_llama
from .drafts import flat_params
from .tiny_models import CACHE

PLAIN = OnlineSpecConfig(
    rank=4, alpha=4.0, preconditioner="none", learner="ogd", lr=0.1, max_grad_norm=1e9, replay_passes=0
)


def moved(draft: OnlineDraft) -> OnlineDraft:
    """An adapter away from its start, where B = 0 hides the gradient of A."""
    draft.trainable.adapter.move(
        0.1 * torch.randn(draft.trainable.adapter.params.shape, generator=torch.Generator().manual_seed(4))
    )
    draft.learning.learner.experts.steps = 1
    return draft


def segment() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten tokens, and the target's logits for the last four of them."""
    return torch.randint(32, (1, 10), generator=torch.Generator().manual_seed(1)), torch.randn(4, 32)


def manual_gradient(draft: OnlineDraft, tokens: torch.Tensor, logits_p: torch.Tensor) -> torch.Tensor:
    """The gradient of mean KL(p‖q), written out anew: the logits that predict token j sit at j − 1."""
    draft.trainable.adapter.grads.zero_()
    with draft.trainable.adapter.gated() as model:
        logits_q = model(tokens).logits[0]
    loss = torch.zeros(())
    for row, j in enumerate(range(6, 10)):
        p, log_q = logits_p[row].softmax(-1), logits_q[j - 1].log_softmax(-1)
        loss = loss + (p * (p.log() - log_q)).sum() / 4
    loss.backward()
    return draft.trainable.adapter.grads.clone()


def step_taken(draft: OnlineDraft, tokens: torch.Tensor, logits_p: torch.Tensor, prefix: int) -> torch.Tensor:
    """−Δw / η of one plain step, which is its gradient."""
    before = flat_params(draft)
    cache = DynamicCache(config=draft.config)
    with torch.no_grad(), draft.trainable.serving() as model:
        model(tokens[:, :prefix] if prefix else tokens[:, :1], **{CACHE: cache}, use_cache=True)
    learn_segment(draft, tokens, [Teacher.from_logits(logits_p)], prefix=Prefix(cache, prefix) if prefix else None)
    return (before - flat_params(draft)) / 0.1


def test_teacher_rows_meet_the_positions_that_predict_them(draft_model: PreTrainedModel) -> None:
    """Pins the train/serve offset: training one position later gives another gradient."""
    tokens, logits_p = segment()
    draft = moved(OnlineDraft(draft_model, PLAIN))
    expected = manual_gradient(draft, tokens, logits_p)
    torch.testing.assert_close(step_taken(draft, tokens, logits_p, prefix=0), expected, atol=1e-4, rtol=1e-3)
    shifted = manual_gradient(moved(OnlineDraft(tiny_llama(2), PLAIN)), tokens.roll(1), logits_p)
    assert torch.cosine_similarity(expected, shifted, dim=0) < 0.9


def test_replay_of_unequal_lengths_gives_the_mean_gradient() -> None:
    """A padded batch of requests is the mean over all their taught positions."""
    requests = [
        Feedback(torch.randint(32, (length,)), Teacher.from_logits(torch.randn(new, 32)))
        for length, new in ((9, 4), (6, 5), (12, 1))
    ]

    def gradient(batch: list[Feedback]) -> torch.Tensor:
        draft = moved(OnlineDraft(tiny_llama(2), PLAIN))
        draft.learning.learn(batch, Counts())
        return draft.trainable.adapter.grads.clone()

    apart = sum(gradient([request]) * len(request.teacher) for request in requests) / 10
    torch.testing.assert_close(gradient(requests), apart, atol=1e-5, rtol=1e-3)


def test_prefix_from_the_cache_gives_the_same_loss(draft_model: PreTrainedModel) -> None:
    """With the prefix read from the KV cache the logits are the same; its gradient flows through the segment alone."""
    tokens, logits_p = segment()
    whole = step_taken(moved(OnlineDraft(draft_model, PLAIN)), tokens, logits_p, prefix=0)
    cached = step_taken(moved(OnlineDraft(tiny_llama(2), PLAIN)), tokens, logits_p, prefix=5)
    assert torch.cosine_similarity(whole, cached, dim=0) > 0.8
    head = slice(-32 * 4, None)  # B of the head sees no attention: there the two are equal
    torch.testing.assert_close(whole[head], cached[head], atol=1e-5, rtol=1e-3)


def test_learns_a_fixed_teacher(draft_model: PreTrainedModel) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(rank=8, alpha=8.0, lr=1e-2, replay_passes=0))
    tokens, logits_p = segment()
    for _ in range(200):
        learn_segment(draft, tokens, [Teacher.from_logits(logits_p)], Counts())
    q = draft(tokens).logits[0, 5:9].softmax(-1)
    assert torch.minimum(q, logits_p.softmax(-1)).sum(-1).mean() > 0.9


def run(target: PreTrainedModel, **settings: object) -> OnlineDraft:
    small = {"rank": 4, "alpha": 4.0, "lookahead": 5, "update_every": 1}
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(small | settings)))
    for i in range(4):
        target.generate(torch.tensor([[3 + i, 14, 15]]), assistant_model=draft, do_sample=False, max_new_tokens=16)
    return draft


@pytest.mark.parametrize(
    "settings", [{}, {"update_when": "round"}, {"update_when": "round", "update_every": 3, "top_k": 8}, {"loss": "js"}]
)
def test_runs_are_repeatable(target, settings) -> None:
    first, second = run(target, **settings), run(target, **settings)
    assert torch.equal(flat_params(first), flat_params(second))
    assert first.metrics.updates == second.metrics.updates > 0


def test_the_seed_matters(target) -> None:
    assert not torch.equal(flat_params(run(target)), flat_params(run(target, seed=1)))


def test_how_often_it_learns(target) -> None:
    rounds = run(target, update_when="round", replay_passes=0).metrics
    assert rounds.updates == rounds.rounds
    third = run(target, update_when="round", update_every=3, replay_passes=0).metrics
    assert third.rounds / 3 <= third.updates <= third.rounds / 3 + 4
    assert run(target, replay_passes=0).metrics.updates == 4
    assert run(target, replay_passes=2).metrics.updates == 4 * 3
    assert run(target, replay_passes=2, replay_tokens=0).metrics.updates == 4


def test_every_position_is_learned_once(target) -> None:
    """Whatever the interval, the segments of a request add up to its generated tokens."""
    for settings in ({"update_when": "round", "update_every": 2}, {"update_when": "request"}):
        draft = run(target, **settings)
        assert [len(f.teacher) for f in draft.learning.replayed()] == [16] * 4
        assert [len(f.tokens) for f in draft.learning.replayed()] == [19] * 4


def test_replay_remembers_what_the_target_said(target) -> None:
    draft = run(target, replay_top_k=5)
    for feedback in draft.learning.replayed():
        logits = target(feedback.tokens[None]).logits[0, 2:-1]
        values, index = logits.log_softmax(-1).topk(5)
        assert torch.equal(feedback.teacher.tokens, index)
        torch.testing.assert_close(feedback.teacher.log_probs, values, atol=1e-4, rtol=1e-4)


def test_context_tokens_bound_what_is_kept_of_a_prompt(target) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(rank=4, alpha=4.0, context_tokens=4))
    target.generate(torch.randint(32, (1, 30)), assistant_model=draft, do_sample=False, max_new_tokens=8)
    assert len(draft.learning.replayed()[0].tokens) == 4 + 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_teacher_costs_the_step_not_the_serving(
    target, draft_model, prompt, monkeypatch, bad: float
) -> None:
    draft = OnlineDraft(
        draft_model, OnlineSpecConfig(rank=4, alpha=4.0, update_when="round", replay_passes=0, update_every=1)
    )
    plain = target.generate(prompt, do_sample=False, max_new_tokens=10)
    before = flat_params(draft)
    original = Teacher.from_logits.__func__
    monkeypatch.setattr(Teacher, "from_logits", classmethod(lambda cls, logits, *a: original(cls, logits * bad, *a)))
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10))
    assert draft.metrics.skipped_updates == draft.metrics.rounds > 0 and draft.metrics.updates == 0
    assert torch.equal(flat_params(draft), before)


def test_a_non_finite_request_is_not_remembered(target, draft_model, prompt, monkeypatch) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(rank=4, alpha=4.0, update_every=1))
    original = Teacher.from_logits.__func__
    with monkeypatch.context() as patch:
        patch.setattr(
            Teacher, "from_logits", classmethod(lambda cls, logits, *a: original(cls, logits * torch.nan, *a))
        )
        target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10)
    assert draft.metrics.skipped_updates == 1 and len(draft.learning.learner.replay) == 0
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10)
    assert draft.metrics.skipped_updates == 1 and draft.metrics.updates > 1


def test_long_requests_are_learned_in_parts(target, draft_model, prompt) -> None:
    """No more than `context_tokens` full target laws are ever kept."""
    draft = OnlineDraft(
        draft_model, OnlineSpecConfig(rank=4, alpha=4.0, update_every=1, context_tokens=8, replay_passes=0)
    )
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=40)
    assert draft.metrics.updates >= 3 and len(draft.learning.replayed()[0].teacher) == 40


def test_learning_takes_less_than_half_the_memory_of_a_draft_of_100_million_parameters() -> None:
    model = tiny_llama(2, vocab=32_000, layers=9, hidden=768, num_attention_heads=12, num_key_value_heads=12)
    assert model.num_parameters() >= 100e6
    target = tiny_llama(1, vocab=32_000)
    draft = OnlineDraft(model, OnlineSpecConfig(lookahead=2))
    for start in range(2):
        target.generate(torch.tensor([[start + 1, 2, 3]]), assistant_model=draft, do_sample=False, max_new_tokens=6)
    tokens = torch.arange(9)
    counts = draft.learning.learn_request(Feedback(tokens, Teacher.from_logits(torch.randn(6, 32_000))))
    assert counts.updates > 1, "what steps on new and on remembered tokens moved is held"
    # As many earlier states as the guard keeps.
    learner = draft.learning.learner
    learner.guard.states = [learner.experts.best_params() for _ in range(draft.settings.snapshots)]
    replay_most = draft.settings.replay_tokens * (12 + 12 * draft.settings.replay_top_k)
    total = draft.learning_bytes - draft.learning.learner.replay.nbytes + replay_most
    assert (
        draft.learning.learner.replay.nbytes < replay_most
        and total + draft.metrics.memory_bytes < 0.5 * 4 * model.num_parameters()
    )


def test_a_function_in_place_of_forward_is_left_behind(target, prompt) -> None:
    """torch.compile(model.forward) wraps the user's own module: learning through it would train nothing."""
    model = tiny_llama(2)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    draft = OnlineDraft(model, OnlineSpecConfig(rank=4, alpha=4.0))
    before = flat_params(draft)
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=10)
    assert not torch.equal(before, flat_params(draft))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_clipped(draft_model: PreTrainedModel) -> None:
    config = OnlineSpecConfig(
        rank=4, alpha=4.0, preconditioner="none", learner="ogd", lr=1.0, max_grad_norm=0.01, replay_passes=0
    )
    draft = moved(OnlineDraft(draft_model, config))
    before = flat_params(draft)
    tokens, logits_p = segment()
    learn_segment(draft, tokens, [Teacher.from_logits(5 * logits_p)], Counts())
    assert (flat_params(draft) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_metrics_add_up(target) -> None:
    draft = run(target)
    m = draft.metrics
    assert m.requests == 4 and m.new_tokens == 64
    assert m.acceptance_length == m.new_tokens / m.rounds >= 1
    assert m.accepted_tokens + m.rounds == m.new_tokens
    assert 0 <= m.acceptance_rate <= 1 and m.verified_positions >= m.accepted_tokens
    assert 0 < m.update_share < 1 and m.decode_tokens_per_s > m.tokens_per_s > 0
    assert m.draft_time_s + m.target_time_s + m.update_time_s < m.wall_time_s
    assert m.replay_bytes == draft.learning.learner.replay.nbytes > 0
    assert m.last.requests == 1 and m.last.new_tokens == 16


def test_calling_the_draft_gives_its_evolved_forward(target) -> None:
    draft = run(target)
    tokens = torch.tensor([[1, 2, 3]])
    out = draft(input_ids=tokens)
    with draft.trainable.adapter.gated() as model:
        torch.testing.assert_close(out.logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(out.logits, tiny_llama(2)(tokens).logits)
    assert torch.equal(draft.model(tokens).logits, tiny_llama(2)(tokens).logits)  # gate shut outside


def test_preference_is_the_difference_of_log_likelihoods(draft_model: PreTrainedModel) -> None:
    draft = OnlineDraft(draft_model, PLAIN)
    tokens = torch.randint(32, (1, 12), generator=torch.Generator().manual_seed(5))
    assert draft.trainable.prompt_log_ratio(tokens, None, 128) == (0.0, {})  # nothing was learned
    moved(draft)

    def likelihood(frozen: bool) -> float:
        with torch.no_grad(), draft.trainable.serving(frozen) as model:
            log_q = model(tokens).logits[0, :-1].log_softmax(-1)
        return log_q.gather(-1, tokens[0, 1:, None]).mean().item()

    expected = likelihood(False) - likelihood(True)
    assert abs(expected) > 0.01
    assert draft.trainable.prompt_log_ratio(tokens, None, 128)[0] == pytest.approx(expected, abs=1e-4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=-1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], dim=-1)
    assert draft.trainable.prompt_log_ratio(padded, mask, 128)[0] == pytest.approx(expected, abs=1e-4)
    assert draft.trainable.prompt_log_ratio(tokens[:, :1], None, 128) == (0.0, {})
    long = tokens.repeat(1, RouterConstants().prompt_tokens // 12 + 1)  # the tiny draft sees more than that
    assert not draft.trainable.prompt_log_ratio(long, None, 128)[1], "caches of a part of the prompt"


@pytest.mark.parametrize("prompt_log_ratio", [-1.0, 1.0])
def test_the_prompt_decides_who_drafts(target, draft_model, prompt, monkeypatch, prompt_log_ratio: float) -> None:
    """The base draft's tokens are the base model's own, the learned one's are not; neither reads the prompt again."""
    draft = moved(OnlineDraft(draft_model, OnlineSpecConfig(memory_tokens=0)))
    asked = draft.trainable.prompt_log_ratio
    monkeypatch.setattr(
        draft.trainable, "prompt_log_ratio", lambda tokens, mask, most: (prompt_log_ratio, asked(tokens, mask, most)[1])
    )
    monkeypatch.setattr(draft.governor, "decide_prompt_scoring", lambda *_: True)
    monkeypatch.setattr(draft.governor, "model_pays", lambda plan, position, survival, begun: position < 4)
    monkeypatch.setattr(draft.governor, "plan", lambda drafts, seen, room, unread: Plan(4, 1.0, 0.0))
    config = draft.generation_config.__class__(do_sample=False, max_length=64)
    request = Request(draft, Call(config, LogitsProcessorList()))
    fed, inputs = [], draft.trainable.inputs
    with monkeypatch.context() as patch:
        patch.setattr(
            draft.trainable, "inputs", lambda tokens, *rest: (fed.append(tokens.shape[1]), inputs(tokens, *rest))[1]
        )
        drafted = request.propose(Rows.of(prompt), 40).tokens
    assert fed == [5, 5, 1, 1, 1, 1]  # the learned draft and the base read the prompt, once each
    with draft.trainable.serving(prompt_log_ratio < 0) as model:
        anew = model.generate(prompt, max_new_tokens=4, do_sample=False)[:, prompt.shape[1] :]
    assert torch.equal(drafted, anew)
    base = draft_model.generate(prompt, max_new_tokens=4, do_sample=False)[:, prompt.shape[1] :]
    assert torch.equal(drafted, base) == (prompt_log_ratio < 0)
    assert draft.metrics.decisions.serves_base == (prompt_log_ratio < 0)


def test_what_is_remembered_is_what_the_target_said_there(target, draft_model, prompt, monkeypatch) -> None:
    """A request that is kept in parts, with nothing affordable at its end: its tail belongs to it."""
    draft = OnlineDraft(draft_model, OnlineSpecConfig(rank=4, alpha=4.0, context_tokens=8))
    monkeypatch.setattr(draft.governor.budget, "affordable_steps", lambda: 0)
    monkeypatch.setattr(
        draft.governor.budget, "reset_full", lambda reason, frozen: None
    )  # at full effort all would be kept
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=21)
    (feedback,) = draft.learning.replayed()
    teacher = feedback.teacher
    with torch.no_grad():
        laws = target(feedback.tokens[None]).logits[0].log_softmax(-1)[-len(teacher) - 1 : -1]
    assert len(teacher) == 21
    said = laws if teacher.tokens is None else laws.gather(-1, teacher.tokens)
    torch.testing.assert_close(teacher.log_probs, said, atol=1e-4, rtol=1e-4)


def test_nothing_is_learned_that_could_not_be_held_against_the_memory(target, draft_model, prompt, monkeypatch) -> None:
    """Affordable only once a request has begun: it is learned from in the next one, where the memory was asked."""
    draft = OnlineDraft(draft_model, OnlineSpecConfig(rank=4, alpha=4.0, replay_passes=0))
    affordable, worth = iter([0, *[1] * 100]), []
    monkeypatch.setattr(draft.governor.budget, "affordable_steps", lambda: next(affordable))
    monkeypatch.setattr(draft.governor.budget, "observe_gain", lambda value, base=False: worth.append(value))
    for updates in (0, 1, 2, 3):
        target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=12)
        assert draft.metrics.updates == updates
    assert len(worth) == 2  # from the second update on there is something to compare
