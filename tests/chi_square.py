"""Whether counts follow a law: Pearson's χ² test."""

from __future__ import annotations

import torch

# Of a standard normal: what is passed by chance once in a thousand and once in a million times.
THOUSAND, MILLION = 3.0902, 4.7534


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells with an expectation below 5 are pooled."""
    expected = law * counts.sum()
    large = expected >= 5
    observed, wanted = counts[large].double(), expected[large]
    if (~large).any() and expected[~large].sum() > 0:
        observed = torch.cat([observed, counts[~large].sum().double().view(1)])
        wanted = torch.cat([wanted, expected[~large].sum().view(1)])
    return ((observed - wanted) ** 2 / wanted).sum().item(), len(wanted) - 1


def quantile(freedom: int, normal: float) -> float:
    """What χ² passes as rarely as a standard normal passes `normal` (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + normal * (2 / (9 * freedom)) ** 0.5) ** 3


def follows(counts: torch.Tensor, law: torch.Tensor, normal: float) -> bool:
    """Whether counts (cells,) may be draws from `law`: none where it is 0, and a χ² that chance passes as rarely as `normal`."""
    statistic, freedom = chi_square(counts, law)
    limit = quantile(freedom, normal)
    print(f"chi square {statistic:.1f} at {freedom} degrees of freedom, limit {limit:.1f}")
    return not bool(counts[law == 0].any()) and statistic < limit
