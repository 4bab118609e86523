"""Evidence that a draft does not fit: how much it takes, and what settles it."""

from __future__ import annotations

from hf_onlinespec.govern.fit import Fit

SLOW = [(0.0, 24)] * 12


def run_of(evidence: list[tuple[float, int]], steps: int = 3) -> Fit:
    fit = Fit()
    fit.request_ended(steps)
    for accepted, tokens in evidence:
        fit.note(accepted, tokens)
        fit.request_ended(steps)
    return fit


def test_evidence_counts_after_learning_alone() -> None:
    assert run_of(SLOW).message is not None
    assert run_of(SLOW, steps=2).message is None
    assert run_of(SLOW[:3]).message is None
    assert run_of([(0.0, 8)] * 11).message is None


def test_what_has_fitted_once_fits() -> None:
    assert run_of([(4.0, 16), *SLOW]).message is None
    assert run_of([(2.0, 24)] * 4 + SLOW).message is None
    assert run_of([(1.0, 24)] * 4).message is None  # 4 %: open
    assert run_of([(1.0, 24)] * 4 + SLOW).message is not None


def test_looks_are_few() -> None:
    fit = Fit()
    fit.request_ended(3)
    looks = 0
    for _ in range(100):
        fit.request_ended(3)
        if fit.decide_scoring():
            looks += 1
            fit.note(1.0, 24)  # stays open
    assert looks == 8
    assert not run_of(SLOW).decide_scoring() and not Fit().decide_scoring()
