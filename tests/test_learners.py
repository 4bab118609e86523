"""Learners against closed forms and PyTorch's own optimisers."""

import torch

from hf_onlinespec.learners import Learner, adam, ogd


def run(learner: Learner, w: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    state = learner.init(w)
    for g in grads:
        updates, state = learner.update(g, state)
        w = w + updates
    return w


def test_ogd_is_a_sum_of_gradients() -> None:
    w = torch.randn(6, dtype=torch.float64)
    grads = [torch.randn(6, dtype=torch.float64) for _ in range(5)]
    torch.testing.assert_close(run(ogd(0.3), w, grads), w - 0.3 * sum(grads))


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
    w = torch.randn(8, dtype=torch.float64)
    grads = [torch.randn(8, dtype=torch.float64) for _ in range(20)]
    reference = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.Adam([reference], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    for g in grads:
        reference.grad = g
        optimizer.step()
    torch.testing.assert_close(run(adam(0.02), w, grads), reference.detach())


def test_update_leaves_its_arguments_alone() -> None:
    learner = adam(0.1)
    grads, state = torch.randn(3), learner.init(torch.zeros(3))
    before = grads.clone(), {k: v.clone() for k, v in state.items()}
    learner.update(grads, state)
    assert torch.equal(grads, before[0])
    assert all(torch.equal(state[k], v) for k, v in before[1].items())
