"""Learners against closed forms in float64, PyTorch's own optimisers and optax."""

import itertools
import math

import jax
import optax
import pytest
import torch

from hf_onlinespec.adapt.learners import (
    LEARNERS,
    UpdateRule,
    adam,
    heavy_ball,
    hedge,
    into_ball,
    last_chunk,
    ogd,
    optimistic,
    plain,
)


def gradients(n: int, shape: tuple[int, ...] = (6,), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(n)]


def run(learner: UpdateRule, w: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """The served parameters after every gradient."""
    state = learner.init(w)
    path = []
    for g in grads:
        updates, state = learner.update(g, state)
        w = w + updates
        path.append(w)
    return path


START = torch.linspace(-1, 1, 6, dtype=torch.float64)


def test_ogd_is_a_sum_of_gradients() -> None:
    grads = gradients(5)
    torch.testing.assert_close(run(ogd(0.3), START, grads)[-1], START - 0.3 * sum(grads))


def test_ogd_contracts_on_a_quadratic() -> None:
    # f(w) = ½ w²: w_T = (1 − η)^T w_0
    init, update = ogd(0.1)
    w = torch.tensor([2.0], dtype=torch.float64)
    state = init(w)
    for _ in range(10):
        updates, state = update(w, state)
        w = w + updates
    torch.testing.assert_close(w, torch.tensor([2.0 * 0.9**10], dtype=torch.float64))


def test_adam_follows_torch() -> None:
    grads = gradients(20)
    reference = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.Adam([reference], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    for g, w in zip(grads, run(ogd(0.02, adam()), START, grads), strict=True):
        reference.grad = g
        optimizer.step()
        torch.testing.assert_close(w, reference.detach())


def test_heavy_ball_follows_torch_at_the_matched_rate() -> None:
    grads = gradients(20)
    reference = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([reference], lr=0.3 * (1 - 0.9), momentum=0.9)
    for g, w in zip(grads, run(heavy_ball(0.3), START, grads), strict=True):
        reference.grad = g
        optimizer.step()
        torch.testing.assert_close(w, reference.detach())


@pytest.mark.parametrize("radius", [None, 1e6])
def test_heavy_ball_in_adams_metric_follows_optax(radius: float | None) -> None:
    jax.config.update("jax_enable_x64", True)
    oracle = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8), optax.trace(0.9), optax.scale(-0.05 * 0.1))
    learner = heavy_ball(0.05, adam(), radius)
    theirs, ours = oracle.init(START.numpy()), learner.init(START)
    for g in gradients(15):
        expected, theirs = oracle.update(g.numpy(), theirs)
        updates, ours = learner.update(g, ours)
        torch.testing.assert_close(updates, torch.tensor(expected.tolist(), dtype=torch.float64))


def test_heavy_ball_moves_as_far_as_ogd_along_a_constant_gradient() -> None:
    grads = [torch.ones(6, dtype=torch.float64)] * 400
    ball, steps = (run(make(0.1), START, grads) for make in (heavy_ball, ogd))
    torch.testing.assert_close(ball[-1] - ball[-2], steps[-1] - steps[-2])


def test_optimistic_is_twice_the_gradient_minus_the_last_one() -> None:
    """w − 2η g_t + η g_{t−1}, with g_0 = 0."""
    grads = gradients(8)
    w, before = START, torch.zeros_like(START)
    for g, served in zip(grads, run(optimistic(0.2), START, grads), strict=True):
        w, before = w - 2 * 0.2 * g + 0.2 * before, g
        torch.testing.assert_close(served, w)


@pytest.mark.parametrize("memory", [0.0, 0.8])
@pytest.mark.parametrize("radius", [0.5, 1e6])
def test_optimistic_follows_both_sequences(memory: float, radius: float) -> None:
    """ŵ and w as the paper states them, with the projection spelled out; a ball that is never left changes nothing."""

    def project(w: torch.Tensor) -> torch.Tensor:
        distance = (w - START).norm()
        return w if distance <= radius else START + (w - START) * radius / distance

    grads = gradients(30)
    second, hint = START, torch.zeros_like(START)
    path = run(optimistic(0.2, radius=radius, memory=memory), START, grads)
    for g, served in zip(grads, path, strict=True):
        second = project(second - 0.2 * g)
        hint = memory * hint + (1 - memory) * g
        torch.testing.assert_close(served, project(second - 0.2 * hint))
    if radius > 1:
        torch.testing.assert_close(path[-1], run(optimistic(0.2, memory=memory), START, grads)[-1])
    else:
        assert max((w - START).norm() for w in path) == pytest.approx(radius)


def test_optimistic_adam_is_twice_the_step_minus_the_last_one() -> None:
    grads, direction = gradients(8), adam()
    w, before, state = START, torch.zeros_like(START), direction.init(START)
    for g, served in zip(grads, run(optimistic(0.2, adam()), START, grads), strict=True):
        u, state = direction.of(g, state)
        w, before = w - 0.2 * (2 * u - before), u
        torch.testing.assert_close(served, w)


@pytest.mark.parametrize("metric", ["plain", "adam"])
def test_optimistic_follows_optax_from_the_second_step(metric: str) -> None:
    """At the first step optax takes the gradient as its own hint, the rule takes none."""
    jax.config.update("jax_enable_x64", True)
    oracle = (
        optax.optimistic_gradient_descent(0.05)
        if metric == "plain"
        else optax.optimistic_adam_v2(0.05, b1=0.9, b2=0.99, nesterov=False)
    )
    learner = optimistic(0.05, plain() if metric == "plain" else adam())
    w = START.numpy()
    theirs, ours = oracle.init(w), learner.init(START)
    for i, g in enumerate(gradients(15)):
        expected, theirs = oracle.update(g.numpy(), theirs)
        updates, ours = learner.update(g, ours)
        if i:
            torch.testing.assert_close(updates, torch.tensor(expected.tolist(), dtype=torch.float64))


def test_optimism_halves_the_loss_of_a_gradient_that_it_guesses() -> None:
    """A gradient that turns slowly: the regret against the best fixed point is smaller than OGD's at every step size."""
    grads = [torch.tensor([math.cos(t / 40), math.sin(t / 40)], dtype=torch.float64) for t in range(400)]
    zero = torch.zeros(2, dtype=torch.float64)
    for lr in (0.01, 0.05, 0.2):
        losses = []
        for learner in (ogd(lr, radius=1.0), optimistic(lr, radius=1.0)):
            served = [zero, *run(learner, zero, grads)[:-1]]
            losses.append(sum(float(w @ g) for w, g in zip(served, grads, strict=True)))
        assert losses[1] < losses[0]


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("direction", [plain, adam])
def test_no_learner_leaves_its_ball(name: str, direction) -> None:
    grads = [g + 1 for g in gradients(60, (3, 4))]
    w = torch.zeros(3, 4, dtype=torch.float64)
    lr = torch.tensor([[0.01], [0.1], [1.0]], dtype=torch.float64)
    path = run(LEARNERS[name](lr, direction(), 0.7), w, grads)
    distances = torch.stack([w.norm(dim=-1) for w in path])
    assert bool((distances <= 0.7 + 1e-12).all())
    assert distances[-1].tolist()[2] == pytest.approx(0.7)  # the boldest one is at the wall


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("direction", [plain, adam])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_rows_are_experts_that_know_nothing_of_each_other(name: str, direction, radius: float | None) -> None:
    rates = [0.01, 0.1, 0.5]
    grads, w = gradients(10, (3, 5)), gradients(1, (3, 5), seed=1)[0]
    together = run(LEARNERS[name](torch.tensor(rates, dtype=torch.float64)[:, None], direction(), radius), w, grads)
    for i, lr in enumerate(rates):
        alone = run(LEARNERS[name](lr, direction(), radius), w[i], [g[i] for g in grads])
        torch.testing.assert_close(torch.stack(together)[:, i], torch.stack(alone))


@pytest.mark.parametrize("name", LEARNERS)
def test_update_leaves_its_arguments_alone(name: str) -> None:
    learner = LEARNERS[name](0.1, adam(), 0.5)
    grads = torch.randn(3, generator=torch.Generator().manual_seed(0))
    _, state = learner.update(grads, learner.init(torch.zeros(3)))
    before = grads.clone(), {k: v.clone() for k, v in state.items()}
    learner.update(grads, state)
    assert torch.equal(grads, before[0])
    assert state.keys() == before[1].keys() and all(torch.equal(state[k], v) for k, v in before[1].items())


def test_into_ball() -> None:
    moved = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(into_ball(moved, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


# Hedge


def losses(n: int, experts: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(experts, dtype=torch.float64, generator=generator) for _ in range(n)]


def test_hedge_is_the_exponential_of_the_cumulative_losses() -> None:
    init, update = hedge(rate=0.4)
    state, total = init(3), torch.zeros(3, dtype=torch.float64)
    for loss in losses(12):
        weights, state = update(loss, state)
        total += loss
        expected = torch.exp(-0.4 * total)
        torch.testing.assert_close(weights, expected / expected.sum())


def test_discounted_hedge_forgets() -> None:
    init, update = hedge(rate=0.4, discount=0.5)
    state = init(3)
    stream = losses(6)
    for loss in stream:
        weights, state = update(loss, state)
    total = sum(0.5 ** (5 - i) * loss for i, loss in enumerate(stream))
    expected = torch.exp(-0.4 * total)
    torch.testing.assert_close(weights, expected / expected.sum())


def test_fixed_share_hands_out_a_part_of_every_weight() -> None:
    init, update = hedge(rate=0.4, share=0.1)
    state, expected = init(3), torch.full((3,), 1 / 3, dtype=torch.float64)
    for loss in losses(12):
        weights, state = update(loss, state)
        expected = expected * torch.exp(-0.4 * loss)
        expected = 0.9 * expected / expected.sum() + 0.1 / 3
        torch.testing.assert_close(weights, expected)


def test_the_doubling_rate_keeps_the_regret_below_theory() -> None:
    """Against losses of an adversary that turns now and then: regret ≤ 2 √(T ln N), twice the bound for a known T."""
    for seed, period in itertools.product(range(5), (3, 20, 500)):
        generator = torch.Generator().manual_seed(seed)
        init, update = hedge()
        n, rounds = 4, 1000
        state, weights = init(n), torch.full((n,), 1 / n, dtype=torch.float64)
        served, each = 0.0, torch.zeros(n, dtype=torch.float64)
        for t in range(rounds):
            bad = torch.arange(n) == (t // period) % n
            loss = (bad | (torch.rand(n, generator=generator) < 0.3)).double()
            served += float(weights @ loss)
            each += loss
            weights, state = update(loss, state)
        assert served - float(each.min()) <= 2 * math.sqrt(rounds * math.log(n))


@pytest.mark.parametrize("kind", [{}, {"discount": 0.9}, {"share": 0.05}, {"rate": 30.0}])
def test_weights_sum_to_one_whatever_the_losses(kind: dict[str, float]) -> None:
    init, update = hedge(**kind)
    state = init(4)
    for loss in [*losses(50, 4), torch.tensor([math.nan, math.inf, -math.inf, 1e9]), *losses(50, 4)]:
        weights, state = update(loss, state)
        assert float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())
        assert bool(torch.isfinite(weights).all())


def test_losses_are_clipped_and_what_is_not_finite_is_as_bad_as_can_be() -> None:
    init, update = hedge(rate=1.0, bound=2.0)
    weights, _ = update(torch.tensor([5.0, math.nan, 2.0, math.inf, -1.0, 0.0]), init(6))
    expected = torch.exp(-torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(weights, expected / expected.sum())


def test_who_was_bad_for_long_comes_back_sooner_by_fixed_share() -> None:
    def rounds_to_return(**kind: float) -> int:
        init, update = hedge(rate=1.0, **kind)
        state = init(2)
        for _ in range(300):
            _, state = update(torch.tensor([0.0, 1.0]), state)
        for t in range(1000):
            weights, state = update(torch.tensor([1.0, 0.0]), state)
            if weights[1] > 0.5:
                return t + 1
        return 1000

    assert rounds_to_return() == 301
    assert rounds_to_return(share=0.01) <= 10 and rounds_to_return(discount=0.95) <= 30


def test_last_chunk_remembers_nothing() -> None:
    init, update = last_chunk(10.0)
    _, state = update(torch.tensor([5.0, 0.0]), init(2))
    weights, _ = update(torch.tensor([0.0, 0.1]), state)
    torch.testing.assert_close(weights, torch.tensor([0.0, -1.0], dtype=torch.float64).softmax(-1))
