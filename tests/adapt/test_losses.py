"""Divergences against closed forms; bucketed teachers never exceed the full divergence."""

import math

import pytest
import torch

from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.losses import LOSSES

P = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
Q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])


def value(name: str, p: torch.Tensor = P, q: torch.Tensor = Q) -> list[float]:
    return LOSSES[name](p.log(), q.log()).tolist()


def test_forward_kl() -> None:
    assert value("forward_kl") == pytest.approx([0.25 * math.log(2), math.log(2)])


def test_reverse_kl_is_infinite_where_the_target_forbids() -> None:
    first, second = value("reverse_kl")
    assert first == pytest.approx(0.25 * math.log(2))
    assert second == math.inf


def test_js_is_bounded_and_symmetric() -> None:
    disjoint = LOSSES["js"](torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log())
    assert disjoint.item() == pytest.approx(math.log(2))
    assert value("js") == pytest.approx(value("js", Q, P))
    m = 0.5 * (P[0] + Q[0])
    by_hand = 0.5 * (P[0] * (P[0] / m).log()).sum() + 0.5 * (Q[0] * (Q[0] / m).log()).sum()
    assert value("js")[0] == pytest.approx(by_hand.item(), abs=1e-6)


def test_skew_kl_is_the_mean_of_both_directions() -> None:
    assert value("skew_kl")[0] == pytest.approx(0.5 * value("forward_kl")[0] + 0.5 * value("reverse_kl")[0])


def test_tv_is_one_minus_acceptance() -> None:
    assert value("tv") == pytest.approx([1 - torch.minimum(P[0], Q[0]).sum().item(), 0.5])


def test_cross_entropy_is_at_the_argmax() -> None:
    assert value("cross_entropy") == pytest.approx([math.log(4), math.log(2)])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_zero_or_least_at_equality_with_finite_gradients(name: str) -> None:
    z_p = torch.tensor([[2.0, 0.3, -1.0, 0.1]])
    z_q = z_p.clone().requires_grad_()
    loss = LOSSES[name](z_p.log_softmax(-1), z_q.log_softmax(-1))
    loss.sum().backward()
    assert torch.isfinite(z_q.grad).all()
    if name != "cross_entropy":
        assert loss.item() == pytest.approx(0, abs=1e-6)
    for direction in torch.eye(4):
        moved = LOSSES[name](z_p.log_softmax(-1), (z_p + 0.5 * direction).log_softmax(-1))
        assert name == "cross_entropy" or moved.item() > 1e-4


def test_forward_kl_gradient_is_q_minus_p() -> None:
    z_p, z_q = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    LOSSES["forward_kl"](z_p.log_softmax(-1), z_q.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(z_q.grad, z_q.detach().softmax(-1) - z_p.softmax(-1))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "skew_kl", "tv"])
def test_tail_bucket_never_exceeds_the_full_divergence(name: str) -> None:
    z_p, z_q = 2 * torch.randn(50, 20), 2 * torch.randn(50, 20)
    teacher = Teacher.from_logits(z_p)
    full = LOSSES[name](*teacher.compare(z_q))
    gaps = []
    for k in (1, 4, 12, 19):
        bucketed = LOSSES[name](*teacher.top(k).compare(z_q))
        assert (bucketed <= full + 1e-4).all()
        gaps.append((full - bucketed).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] == pytest.approx(0, abs=1e-3)  # 19 of 20 tokens and a tail of one token: the same partition


def test_top_k_gradient_stays_close_to_the_full_one() -> None:
    z_p, z_q = 3 * torch.randn(200, 50), torch.randn(200, 50)
    gradients = []
    for k in (None, 16):
        z = z_q.clone().requires_grad_()
        LOSSES["forward_kl"](*Teacher.from_logits(z_p, top_k=k).compare(z)).mean().backward()
        gradients.append(z.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_cross_entropy_of_a_top_k_teacher_is_that_of_the_whole() -> None:
    """Even where the mass of all other tokens exceeds the most probable one."""
    z_p, z_q = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5]]), torch.randn(1, 6)
    whole = LOSSES["cross_entropy"](*Teacher.from_logits(z_p).compare(z_q))
    top = LOSSES["cross_entropy"](*Teacher.from_logits(z_p, top_k=2).compare(z_q, tail=False))
    torch.testing.assert_close(whole, top)


def test_forbidden_tokens_cost_nothing() -> None:
    z_p = torch.tensor([[1.0, -torch.inf, 0.0]])
    z_q = torch.zeros(1, 3, requires_grad=True)
    loss = LOSSES["forward_kl"](*Teacher.from_logits(z_p).compare(z_q))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(z_q.grad).all()
