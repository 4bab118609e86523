"""Acceptance keeps the target's law."""

import pytest
import torch

from hf_onlinespec.verify.accept import speculative_sample


def test_speculative_sample_keeps_the_law() -> None:
    """Many draws at once, one position: frequencies follow p, the kept share is Σ min(p, q)."""
    p, q = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    n, kept, counts = 4000, 0, torch.zeros(4)
    for _ in range(n):
        token, same = speculative_sample(p, q, torch.multinomial(q, 1).squeeze(1))
        counts[token] += 1
        kept += same
    assert counts[3] == 0
    torch.testing.assert_close(counts / n, p[0], atol=0.03, rtol=0)
    assert kept / n == pytest.approx(0.5, abs=0.03)


def test_rounding_that_empties_the_residual_falls_back_to_p(monkeypatch) -> None:
    p = torch.tensor([[0.25, 0.75]])
    monkeypatch.setattr(
        torch, "rand", lambda *a, **k: torch.full((1, 1), 1.0, dtype=k.get("dtype"))
    )  # rejects even p = q
    token, kept = speculative_sample(p, p.clone(), torch.tensor([1]))
    assert not kept and token.item() in (0, 1)
