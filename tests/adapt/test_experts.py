"""One learner or several: every expert learns as it would alone, the weights follow acceptance, who diverges goes."""

import itertools
import logging
import math

import pytest
import torch
from transformers import PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft, OnlineSpecConfig
from hf_onlinespec._compat.adapters import delta_weight
from hf_onlinespec.adapt import gated_lora
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.learners import step_sizes
from hf_onlinespec.adapt.objective import Objective
from hf_onlinespec.commit.causal_lm import CausalLM
from hf_onlinespec.metrics import Counts
from tests.conftest import tiny_llama
from tests.drafts import flat_params, learn_segment

SMALL = {"rank": 4, "alpha": 4.0, "lookahead": 3, "update_every": 1, "snapshots": 0}
MANY = OnlineSpecConfig(learner="ensemble", **SMALL)


def lesson(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve tokens, and the target's logits for the last six of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(32, (1, 12), generator=generator), 3 * torch.randn(6, 32, generator=generator)


def teach(draft: OnlineDraft, times: int = 1, seed: int = 1) -> Counts:
    tokens, logits = lesson(seed)
    counts = Counts()
    for _ in range(times):
        learn_segment(draft, tokens, [Teacher.from_logits(logits)], counts)
    return counts


def test_the_grid_is_geometric_around_the_step_size() -> None:
    assert step_sizes(OnlineSpecConfig(lr=0.01)) == [0.01]
    assert step_sizes(OnlineSpecConfig(learner="ensemble", lr=0.01, experts=1)) == [0.01]
    sizes = step_sizes(OnlineSpecConfig(learner="ensemble", lr=0.01, experts=4, expert_ratio=2.0))
    assert [b / a for a, b in itertools.pairwise(sizes)] == pytest.approx([2.0] * 3)
    assert math.prod(sizes) ** 0.25 == pytest.approx(0.01)


@pytest.mark.parametrize("learner", ["ogd", "optimistic", "heavy_ball"])
@pytest.mark.parametrize("preconditioner", ["adam", "none"])
def test_every_expert_learns_as_it_would_alone(learner: str, preconditioner: str) -> None:
    """One batched pass over three experts, against three drafts with an adapter of one block each; replay included."""
    many = OnlineDraft(
        tiny_llama(2),
        OnlineSpecConfig(learner="ensemble", expert_learner=learner, preconditioner=preconditioner, lr=0.01, **SMALL),
    )
    starts = many.trainable.adapter.split(many.trainable.adapter.params).clone()
    alone = []
    for i, lr in enumerate(step_sizes(many.settings)):
        draft = OnlineDraft(
            tiny_llama(2), OnlineSpecConfig(learner=learner, preconditioner=preconditioner, lr=lr, **SMALL)
        )
        draft.trainable.adapter.params.copy_(starts[i])
        alone.append(draft)
    for draft in (many, *alone):
        for seed in (1, 2, 3):
            teach(draft, seed=seed)
        draft.learning.remember(feedback())
        draft.learning.replay_steps(Counts(), 2)
    rows = many.trainable.adapter.split(many.trainable.adapter.params)
    for row, start, draft in zip(rows, starts, alone, strict=True):
        torch.testing.assert_close(row - start, flat_params(draft) - start, atol=2e-5, rtol=2e-2)
        assert (row - start).norm() > 1e-3
    gaps = [float((rows[i] - rows[j]).norm()) for i in range(3) for j in range(i)]
    assert min(gaps) > 1e-2, "experts stay distinct"


def feedback() -> Feedback:
    tokens, logits = lesson(9)
    return Feedback(tokens[0], Teacher.from_logits(logits))


def test_an_ensemble_learns_and_its_weights_sum_to_one() -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(learner="ensemble", lr=1e-2, **SMALL))
    tokens, logits = lesson()
    for _ in range(60):
        teach(draft)
        assert sum(draft.metrics.expert_weights) == pytest.approx(1.0) and len(draft.metrics.expert_weights) == 4
        assert min(draft.metrics.expert_weights) >= 0
    p, q = logits.softmax(-1), draft(tokens).logits[0, 5:11].softmax(-1)
    assert torch.minimum(p, q).sum(-1).mean() > 0.9
    assert draft.metrics.expert_weights[-1] < 0.1  # the base draft knows nothing of it


def test_what_serves_is_the_mixture_or_the_best_row() -> None:
    draft = OnlineDraft(tiny_llama(2), MANY)
    teach(draft, 3)
    adaptation, lora = draft.learning.learner.experts, draft.trainable.adapter
    tokens, _ = lesson()

    def served(weights: list[float]) -> torch.Tensor:
        with torch.no_grad(), lora.gated(torch.tensor([weights])) as model:
            return model(tokens).logits

    for _ in range(8):
        adaptation.weigh([0.6, 0.5, 0.5, 0.3, 0.7])  # the mixture is best
    torch.testing.assert_close(draft(tokens).logits, served(adaptation.mixture.weights[:3]), atol=1e-4, rtol=1e-4)
    for _ in range(8):
        adaptation.weigh([0.4, 0.8, 0.5, 0.3, 0.6])
    torch.testing.assert_close(draft(tokens).logits, served([0.0, 1.0, 0.0]), atol=1e-4, rtol=1e-4)
    for _ in range(8):
        adaptation.weigh([0.1, 0.1, 0.1, 0.9, 0.2])
    with torch.no_grad():
        assert torch.equal(draft(tokens).logits, tiny_llama(2)(tokens).logits)
    for _ in range(8):
        adaptation.weigh([0.4, 0.8, 0.5, 0.3, 0.8])  # no worse than the best row
    assert adaptation.mixture.served_row == 4


def test_weights_follow_acceptance() -> None:
    draft = OnlineDraft(tiny_llama(2), MANY)
    for _ in range(60):
        draft.learning.learner.experts.weigh([0.2, 0.7, 0.3, 0.1, 0.5])
    assert (
        max(draft.learning.learner.experts.mixture.weights) == draft.learning.learner.experts.mixture.weights[1] > 0.8
    )


def test_an_expert_that_diverges_is_removed_and_counted(target, prompt) -> None:
    """Serving goes on, the others go on learning, and nothing of the broken numbers reaches them."""
    draft = OnlineDraft(tiny_llama(2), MANY)
    teach(draft, 3)
    lora = draft.trainable.adapter
    rows = lora.split(lora.params).clone()
    rows[2] = torch.inf
    lora.params.copy_(lora.join(rows))
    counts = teach(draft, 5)
    assert counts.skipped_updates == 1 and counts.updates == 4
    assert draft.metrics.removed_experts == 1 and draft.metrics.expert_weights[2] == 0.0
    assert sum(draft.metrics.expert_weights) == pytest.approx(1.0)
    now = lora.split(lora.params)
    assert bool(torch.isfinite(now).all()) and not torch.equal(now[0], rows[0])
    plain = target.generate(prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=20))


def test_all_experts_may_go() -> None:
    """The base draft is left, and serves."""
    draft = OnlineDraft(tiny_llama(2), MANY)
    teach(draft, 2)
    lora = draft.trainable.adapter
    for i in range(3):
        rows = lora.split(lora.params).clone()
        rows[i] = torch.nan
        lora.put(rows)
        teach(draft)
    assert draft.metrics.removed_experts == 3 and draft.metrics.expert_weights == (0.0, 0.0, 0.0, 1.0)
    before = flat_params(draft)
    teach(draft, 3)
    assert torch.equal(flat_params(draft), before)
    tokens, _ = lesson()
    with torch.no_grad():
        torch.testing.assert_close(draft(tokens).logits, tiny_llama(2)(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_teacher_that_is_not_finite_blames_no_expert() -> None:
    draft = OnlineDraft(tiny_llama(2), MANY)
    teach(draft, 2)
    tokens, logits = lesson()
    before, counts = flat_params(draft), Counts()
    learn_segment(draft, tokens, [Teacher.from_logits(logits * torch.nan)], counts)
    assert counts.skipped_updates == 1 and draft.learning.learner.experts.removed == 0
    assert torch.equal(flat_params(draft), before)
    assert all(math.isfinite(w) for w in draft.metrics.expert_weights)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("when", ["round", "request"])
def test_generation_with_an_ensemble_says_what_the_target_says(target, prompt, experts: int, when: str) -> None:
    config = OnlineSpecConfig(learner="ensemble", experts=experts, update_when=when, lr=1e-2, **SMALL)
    draft = OnlineDraft(tiny_llama(2), config)
    for start in range(3):
        inputs = (prompt + start) % 32
        plain = target.generate(inputs, do_sample=False, max_new_tokens=24)
        assert torch.equal(plain, target.generate(inputs, assistant_model=draft, do_sample=False, max_new_tokens=24))
    assert draft.metrics.updates > 0 and len(draft.metrics.expert_weights) == experts + 1


def test_ensembles_where_nothing_is_folded(target, prompt) -> None:
    """Half-precision drafts keep the adapter beside the weights: the gate speaks there."""
    draft = OnlineDraft(tiny_llama(2).to(torch.bfloat16), OnlineSpecConfig(learner="ensemble", lr=1e-2, **SMALL))
    assert not draft.trainable.adapter.folds
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(3):
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=24))
    tokens, _ = lesson()
    for _ in range(8):
        draft.learning.learner.experts.weigh([0.4, 0.8, 0.5, 0.3, 0.6])
    with torch.no_grad(), draft.trainable.adapter.gated(torch.tensor([[0.0, 1.0, 0.0]])) as model:
        expected = model(tokens).logits
    assert torch.equal(draft(tokens).logits, expected)


def test_a_learner_that_diverges_with_finite_numbers_begins_anew(target, prompt) -> None:
    for config in (OnlineSpecConfig(**SMALL), MANY):
        draft = OnlineDraft(tiny_llama(2), config)
        teach(draft, 3)
        draft.trainable.adapter.put(draft.trainable.adapter.split(draft.trainable.adapter.params) * 0 + 1e30)
        counts = teach(draft, 30)
        assert counts.updates >= 20 and draft.metrics.removed_experts >= 1
        assert bool(torch.isfinite(flat_params(draft)).all())
        plain = target.generate(prompt, do_sample=False, max_new_tokens=20)
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=20))


def test_who_begins_anew_has_no_moments() -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**SMALL))
    teach(draft, 3)
    assert all(bool(value.any()) for value in draft.learning.learner.experts.rule_state.values())
    draft.trainable.adapter.params.fill_(torch.nan)
    teach(draft)
    assert draft.metrics.removed_experts == 1
    assert not any(bool(value.any()) for value in draft.learning.learner.experts.rule_state.values())
    tokens, _ = lesson()
    with torch.no_grad():  # it says nothing, and learns
        torch.testing.assert_close(draft(tokens).logits, tiny_llama(2)(tokens).logits, atol=1e-5, rtol=1e-5)
    before = flat_params(draft)
    assert teach(draft, 2).updates == 2 and not torch.equal(flat_params(draft), before)


def test_teachers_that_forbid_tokens_blame_nobody() -> None:
    """Reverse KL is infinite where the target forbids what the draft allows: of the base draft, too."""
    tokens, logits = lesson()
    logits[:, :5] = -torch.inf
    for config in (
        OnlineSpecConfig(loss="reverse_kl", **SMALL),
        OnlineSpecConfig(loss="reverse_kl", learner="ensemble", **SMALL),
    ):
        draft = OnlineDraft(tiny_llama(2), config)
        counts = Counts()
        for _ in range(3):
            learn_segment(draft, tokens, [Teacher.from_logits(logits)], counts)
        assert counts.skipped_updates == 3 and draft.learning.learner.experts.removed == 0
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**SMALL))  # forward KL: what is impossible costs nothing
    counts = Counts()
    learn_segment(draft, tokens, [Teacher.from_logits(logits)], counts)
    assert counts.updates == 1


@pytest.mark.parametrize("settings", [{}, {"learner": "ensemble"}, {"learner": "ensemble", "hedge": "last_chunk"}])
def test_back_in_an_old_domain_an_earlier_state_serves(settings: dict[str, object]) -> None:
    """A target of two minds: the guard finds the state that was right before, inside a draft, and says so."""
    small = SMALL | {"snapshots": 2, "lr": 1e-2, "replay_passes": 0}
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(small | settings)))

    def requests(mind: int, n: int, rng: torch.Generator) -> None:
        for _ in range(n):
            tokens = torch.randint(32, (1, 60), generator=rng)
            logits = torch.full((40, 32), -4.0)
            # Each mind has a successor of its own for every token.
            logits[torch.arange(40), (tokens[0, 19:59] * (3 if mind else 7) + 5 + mind) % 32] = 4.0
            learn_segment(draft, tokens, [Teacher.from_logits(logits)], Counts())

    rng = torch.Generator().manual_seed(0)
    requests(0, 120, rng)
    requests(1, 120, rng)
    before, restored = draft.metrics.rollbacks, []
    restore = draft.learning.learner.experts.restore

    def spy(state: torch.Tensor) -> None:
        restore(state)
        rows = draft.trainable.adapter.split(draft.trainable.adapter.params)
        restored.append(float((rows - state.float()).norm(dim=-1).min()))

    draft.learning.learner.experts.restore = spy
    requests(0, 20, rng)
    assert restored and max(restored) < 1e-4, "the state is in the adapter"
    assert draft.metrics.rollbacks > before and "earlier state" in draft.metrics.decisions.rollback
    assert (
        draft.learning_bytes
        > draft.trainable.adapter.nbytes + 2 * 2 * flat_params(draft).numel() // draft.trainable.adapter.blocks
    )


def test_a_request_of_nonsense_in_a_trial_is_survived() -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(SMALL | {"snapshots": 2})))
    guard, watched = draft.learning.learner.guard, []
    watch = guard.observe
    guard.observe = lambda learned, *rest: (watched.append(len(learned)), watch(learned, *rest))[1]
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        tokens, logits = torch.randint(32, (1, 50), generator=generator), 3 * torch.randn(40, 32, generator=generator)
        bad = torch.nan if i % 5 == 3 else 1.0
        learn_segment(draft, tokens, [Teacher.from_logits(logits * bad)], Counts(), temperature=0.8)
    assert watched == [40] * 32, "what the target did not say is no evidence"
    kept = guard.state().values
    assert math.isfinite(kept["level"]) and math.isfinite(kept["spread"]) and kept["trials"] <= 8


def test_small_segments_of_a_request_are_judged_together(target, prompt) -> None:
    """Learning after every round must not look at single tokens."""
    config = OnlineSpecConfig(**(SMALL | {"snapshots": 2, "update_when": "round", "learner": "ensemble"}))
    draft = OnlineDraft(tiny_llama(2), config)
    judged: list[int] = []
    watch = draft.learning.learner.guard.observe

    def spy(learned: list[float], *rest: object) -> object:
        judged.append(len(learned))
        return watch(learned, *rest)

    draft.learning.learner.guard.observe = spy
    for i in range(4):
        target.generate((prompt + i) % 32, assistant_model=draft, do_sample=False, max_new_tokens=48)
    assert draft.metrics.rounds > 40 and len(judged) <= 8 and max(judged) >= 32
    draft.learning.end_request()
    assert sum(judged) == draft.metrics.new_tokens


def test_an_idle_ensemble_is_weighed(target, prompt) -> None:
    config = OnlineSpecConfig(**(SMALL | {"update_when": "idle", "learner": "ensemble", "snapshots": 2, "lr": 1e-2}))
    draft = OnlineDraft(tiny_llama(2), config)
    for i in range(6):
        target.generate((prompt + i) % 32, assistant_model=draft, do_sample=False, max_new_tokens=40)
        assert draft.catch_up(60)
    assert len(draft.metrics.expert_weights) == 4 and len(set(draft.metrics.expert_weights)) > 1
    assert draft.learning.learner.guard.nbytes > 0


@pytest.mark.parametrize("learner", ["ogd", "optimistic", "ensemble"])
def test_a_snapshot_takes_the_place_of_the_worst(learner: str) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(learner=learner, radius=5.0, lr=1e-2, **SMALL))
    adaptation, lora = draft.learning.learner.experts, draft.trainable.adapter
    origin = lora.split(lora.params).clone()
    teach(draft, 5)
    if learner == "ensemble":
        for _ in range(10):
            adaptation.weigh([0.8, 0.1, 0.5, 0.3, 0.6])
    best = adaptation.best_params()
    assert best.dtype == torch.bfloat16
    torch.testing.assert_close(best.float(), lora.split(lora.params)[0], atol=1e-2, rtol=1e-2)
    teach(draft, 5, seed=2)
    others = lora.split(lora.params).clone()
    adaptation.restore(best)
    rows = lora.split(lora.params)
    at = 1 if learner == "ensemble" else 0
    torch.testing.assert_close(rows[at], best.float(), atol=1e-6, rtol=1e-6)
    if learner == "ensemble":
        assert torch.equal(rows[0], others[0]) and torch.equal(rows[2], others[2])
        teach(draft)
        assert adaptation.mixture.weights[1] > 0.2  # as good as the best one, until it is seen
    for key in ("m", "v", "step"):
        assert not adaptation.rule_state[key][at].any() or learner == "ensemble"
    for _ in range(50):
        teach(draft)
    centre = origin.clone()
    if learner == "ensemble":  # it came from the first one's ball
        centre[1] = origin[0]
    distance = (lora.split(lora.params) - centre).norm(dim=-1)
    assert bool((distance <= 5.0 + 1e-3).all()) and distance[at] > 1.0


def test_a_burst_cannot_move_the_adapter_far(draft_model: PreTrainedModel, monkeypatch) -> None:
    """A step of plain gradients that is a thousand times as long as usual is cut."""
    config = OnlineSpecConfig(preconditioner="none", lr=1e-3, max_grad_norm=1e9, **SMALL)
    draft = OnlineDraft(draft_model, config)
    for seed in range(10):
        teach(draft, seed=seed)
    before = flat_params(draft)
    usual = (before - (teach(draft), flat_params(draft))[1]).norm()
    before = flat_params(draft)
    losses = Objective.losses
    monkeypatch.setattr(Objective, "losses", lambda self, *given: 1e3 * losses(self, *given))
    assert teach(draft).updates == 1
    assert (flat_params(draft) - before).norm() < 10 * usual


def test_a_divergence_is_counted_once(monkeypatch) -> None:
    """The request's KV cache was read by the broken adapter: it is not learned from any more."""
    config = OnlineSpecConfig(rank=2, alpha=2.0, lookahead=2, update_every=1, update_when="round", memory_tokens=0)
    draft = OnlineDraft(tiny_llama(2), config)
    target = tiny_llama(1, layers=2)
    prompt = torch.tensor([[3, 14, 15, 9]])
    target.generate(prompt, max_new_tokens=8, assistant_model=draft, do_sample=False)
    read: list[bool] = []
    training_logits = CausalLM.training_logits

    def spy(self, tokens, n, mask=None, gates=None, prefix=None, base=False):
        read.append(prefix is not None)
        return training_logits(self, tokens, n, mask, gates, prefix, base)

    monkeypatch.setattr(CausalLM, "training_logits", spy)
    draft.trainable.adapter.params.fill_(float("nan"))
    draft.trainable.adapter.move(torch.zeros_like(draft.trainable.adapter.params))
    expected = target.generate(prompt, max_new_tokens=16, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=16, assistant_model=draft, do_sample=False), expected)
    assert draft.metrics.rollbacks + draft.metrics.removed_experts == 1 and draft.metrics.skipped_updates == 1
    assert bool(torch.isfinite(flat_params(draft)).all()) and draft.metrics.last.updates > 8
    assert not any(read[2:])
    read.clear()
    target.generate(prompt, max_new_tokens=8, assistant_model=draft, do_sample=False)
    assert any(read), "the next request reads its own cache again"


def guarded(learner: str = "optimistic", **settings: object) -> OnlineDraft:
    """A draft that has learned for a while, with an earlier state."""
    config = OnlineSpecConfig(learner=learner, **(SMALL | {"snapshots": 2, "replay_passes": 0} | settings))
    draft = OnlineDraft(tiny_llama(2), config)
    for seed in range(4):
        teach(draft, 2, seed)
        draft.learning.remember(feedback())
    assert draft.learning.learner.guard.nbytes > 0
    return draft


def held(draft: OnlineDraft) -> list[torch.Tensor]:
    adaptation = draft.learning.learner.experts
    return [
        flat_params(draft),
        *(v.clone() for v in adaptation.rule_state.values()),
        torch.tensor(adaptation.mixture.weights),
    ]


@pytest.mark.parametrize("learner", ["optimistic", "heavy_ball", "ensemble"])
@pytest.mark.parametrize("where", ["the loss", "one row's loss", "the gradient", "the replay"])
def test_a_number_that_is_not_finite_costs_the_step_and_nothing_else(learner, where, monkeypatch, caplog) -> None:
    draft = guarded(learner)
    before = held(draft)
    losses, counts = Objective.losses, Counts()

    def spoilt(self, teachers, logits):
        """The first loss that has a gradient is not finite, or its gradient is not."""
        found = losses(self, teachers, logits)
        if not found.requires_grad:
            return found
        monkeypatch.undo()
        if where == "the gradient":
            return found + (0 * found).sqrt()  # finite; its derivative is not
        return found * (torch.nan if where != "one row's loss" else torch.inf)

    monkeypatch.setattr(Objective, "losses", spoilt)
    tokens, logits = lesson(7)
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        if where == "the replay":
            draft.learning.replay_steps(counts, 1)
        else:
            learn_segment(draft, tokens, [Teacher.from_logits(logits)], counts)
    assert all(torch.equal(a, b) for a, b in zip(before, held(draft), strict=True)), "what was learned stays"
    assert counts.skipped_updates == 1 and counts.updates == 0 and "skipped" in caplog.text
    assert draft.learning.learner.experts.removed == draft.learning.learner.guard.rollbacks == 0
    assert teach(draft, 2, 8).updates == 2 and not torch.equal(before[0], flat_params(draft))


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_parameters_that_are_not_finite_go_back_to_the_newest_earlier_state(learner: str, bad: float, caplog) -> None:
    draft = guarded(learner)
    earlier, at = draft.learning.learner.guard.state().tensors["candidate"].clone(), 1 if learner == "ensemble" else 0
    rows = draft.trainable.adapter.split(draft.trainable.adapter.params).clone()
    others = [row.clone() for i, row in enumerate(rows) if i != at]
    rows[at] = bad
    draft.trainable.adapter.put(rows)
    with caplog.at_level(logging.WARNING, "hf_onlinespec"):
        counts = teach(draft, 1)
    now = draft.trainable.adapter.split(draft.trainable.adapter.params)
    torch.testing.assert_close(now[at], earlier.float(), atol=0, rtol=0)
    assert all(
        torch.equal(row, other) for row, other in zip([r for i, r in enumerate(now) if i != at], others, strict=True)
    )
    assert counts.skipped_updates == 1 and draft.metrics.rollbacks == 1 and draft.metrics.removed_experts == 0
    assert "earlier state" in caplog.text and "earlier state" in draft.metrics.decisions.rollback
    assert teach(draft, 4).updates == 4 and bool(torch.isfinite(flat_params(draft)).all())


def test_a_state_to_go_back_to_is_used_once() -> None:
    """One that is no better leads to an older one, and without any the draft begins anew."""
    draft = guarded()
    guard = draft.learning.learner.guard
    newest = guard.state().tensors["candidate"]
    guard.states = [torch.full_like(newest, 0.25), torch.full_like(newest, torch.nan)]
    for expected in (newest.clone(), guard.states[0].clone()):
        draft.trainable.adapter.params.fill_(torch.nan)
        teach(draft, 1)
        assert torch.equal(flat_params(draft), expected.float())
    draft.trainable.adapter.params.fill_(torch.nan)
    teach(draft, 1)
    assert draft.metrics.removed_experts == 1 and draft.metrics.rollbacks == 2
    tokens, _ = lesson()
    with torch.no_grad():
        torch.testing.assert_close(draft(tokens).logits, tiny_llama(2)(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learner", ["optimistic", "heavy_ball", "ensemble"])
@pytest.mark.parametrize("radius", [None, 5.0])
def test_moments_that_are_not_finite_begin_anew_and_the_parameters_stay(learner: str, radius: float | None) -> None:
    draft = guarded(learner, radius=radius)
    before = flat_params(draft)
    key = "m"
    draft.learning.learner.experts.rule_state[key][0, 3] = torch.nan
    counts = teach(draft, 1)
    assert torch.equal(flat_params(draft), before) and counts.skipped_updates == 1
    counts = teach(draft, 3)
    assert counts.updates == 3 and bool(torch.isfinite(flat_params(draft)).all())
    assert all(bool(torch.isfinite(v).all()) for v in draft.learning.learner.experts.rule_state.values())
    assert (flat_params(draft) - before).abs().max() < 10 * draft.settings.lr * draft.settings.expert_ratio * 3


def test_weights_that_are_folded_to_nan_are_not_served(monkeypatch) -> None:
    draft = guarded()
    teach(draft, 1)
    tokens, _ = lesson()
    with torch.no_grad(), draft.trainable.adapter.gated() as model:
        expected = model(tokens).logits
    with monkeypatch.context() as patch:
        patch.setattr(gated_lora, "delta_weight", lambda *given: delta_weight(*given) * torch.nan)
        torch.testing.assert_close(draft(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draft(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert not draft.trainable.adapter.stale


def test_a_request_that_is_not_finite_is_no_evidence(monkeypatch) -> None:
    """Neither for the weights of experts nor for the guard."""
    draft = guarded("ensemble")
    draft.learning.end_request()
    weights, known = list(draft.learning.learner.experts.mixture.weights), draft.learning.learner.guard.state().values
    losses = Objective.losses
    monkeypatch.setattr(Objective, "losses", lambda self, *given: losses(self, *given) * torch.nan)
    teach(draft, 1)
    draft.learning.end_request()
    assert (
        draft.learning.learner.experts.mixture.weights == weights
        and draft.learning.learner.guard.state().values == known
    )
