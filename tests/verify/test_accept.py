"""Acceptance keeps the target's law: held in 10⁵ rows at once against laws that are written down.

Seeds are fixed. A right rule that consumes random numbers in another way would fail a case once in a million times.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_onlinespec.verify.accept import speculative_sample
from tests.chi_square import MILLION, follows

ROWS = 100_000

P = torch.tensor([0.5, 0.3, 0.2, 0.0])
LAWS = {  # of the target and of the draft at one position
    "apart": (P, torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "a point guess": (P, torch.tensor([0.0, 1.0, 0.0, 0.0])),
    "a guess that never holds": (P, torch.tensor([0.0, 0.0, 0.0, 1.0])),
    "nearly the same": (P, torch.tensor([0.49, 0.31, 0.2, 0.0])),
    "the same": (P, P),
    "a larger vocabulary": tuple(torch.softmax(torch.randn(2, 24, generator=torch.Generator().manual_seed(5)), -1)),
}

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def draws(law: Tensor, rows: int = ROWS) -> Tensor:
    return torch.multinomial(law, rows, replacement=True)


def ours(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    return speculative_sample(p, q, drafted)[0]


def counted(p: Tensor, q: Tensor, rule: Rule) -> Tensor:
    """(V, V) how often what was drafted became what."""
    torch.manual_seed(17)
    drafted = draws(q)
    tokens = rule(p.expand(ROWS, -1), q.expand(ROWS, -1), drafted)
    return torch.bincount(drafted * len(p) + tokens, minlength=len(p) ** 2).view(len(p), -1)


def exact(p: Tensor, q: Tensor) -> Tensor:
    """(V, V) how likely it becomes what: it stays with min(1, p/q), else the token comes from (p − q)₊."""
    p, q = p.double(), q.double()
    residual = (p - q).clamp_min(0)
    moved = (q - p).clamp_min(0)[:, None] * (residual / residual.sum().clamp_min(1e-300))
    return torch.minimum(p, q).diag() + moved


@pytest.mark.parametrize("name", LAWS)
def test_tokens_follow_the_target_and_as_many_are_kept_as_can_be(name: str) -> None:
    p, q = LAWS[name]
    law = exact(p, q)
    torch.testing.assert_close(law.sum(0), p.double(), atol=1e-6, rtol=0)  # what is drawn follows p
    torch.testing.assert_close(law.sum(1), q.double(), atol=1e-6, rtol=0)
    assert follows(counted(p, q, ours).flatten(), law.flatten(), MILLION)


def keeps_by_p_alone(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    kept = torch.rand(len(drafted)) < p.gather(-1, drafted[:, None]).squeeze(-1)
    return torch.where(kept, drafted, torch.multinomial((p - q).clamp_min(1e-9), 1).squeeze(1))


def replaces_from_p(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    tokens = ours(p, q, drafted)
    return torch.where(tokens == drafted, tokens, torch.multinomial(p, 1).squeeze(1))


def keeps_too_often(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """A drafted token in ten whatever its chance, if only the target may say it."""
    lucky = (torch.rand(len(drafted)) < 0.1) & (p.gather(-1, drafted[:, None]).squeeze(-1) > 0)
    return torch.where(lucky, drafted, ours(p, q, drafted))


def draws_again(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """Follows p and keeps less than could be kept."""
    return torch.multinomial(p, 1).squeeze(1)


def keeps_both_rows_or_none(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    kept = torch.rand(len(drafted)) * q.gather(-1, drafted[:, None]).squeeze(-1) < p.gather(
        -1, drafted[:, None]
    ).squeeze(-1)
    kept = kept.view(-1, 2).all(-1).repeat_interleave(2)
    return torch.where(kept, drafted, torch.multinomial((p - q).clamp_min(1e-9), 1).squeeze(1))


@pytest.mark.parametrize(
    "rule", [keeps_by_p_alone, replaces_from_p, keeps_too_often, draws_again, keeps_both_rows_or_none]
)
def test_a_wrong_rule_is_found(rule: Rule) -> None:
    p, q = LAWS["apart"]
    assert not follows(counted(p, q, rule).flatten(), exact(p, q).flatten(), MILLION)


def test_rounding_that_empties_the_residual_falls_back_to_p(monkeypatch) -> None:
    p = torch.tensor([[0.25, 0.75]])
    monkeypatch.setattr(
        torch, "rand", lambda *a, **k: torch.full((1, 1), 1.0, dtype=k.get("dtype"))
    )  # rejects even p = q
    token, kept = speculative_sample(p, p.clone(), torch.tensor([1]))
    assert not kept and token.item() in (0, 1)
