"""The fuzzer of benchmarks/: some cases in every run, and that it finds what it looks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hf_onlinespec.verify import target as verifier

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CASES = 200
SEED = 12


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.failures
def test_random_calls_equal_plain_generate(fuzz: ModuleType) -> None:
    report = fuzz.fuzz(CASES, SEED, say=lambda words: None)
    assert report.unexplained == []
    # Equality would show nothing where nothing is drafted, learned or broken.
    assert report.outcomes["equal"] > CASES
    assert all(report.counts[name] > CASES // 2 for name in ("drafted_tokens", "accepted_tokens", "updates"))
    assert report.counts["failures"] > CASES // 20
    kinds = ("batches", "trees", "encoder_decoders", "heads", "other_tokenizers", "scripts", "named_adapters")
    assert all(report.counts[name] > CASES // 20 for name in kinds), report.counts


def test_a_case_alone_is_the_case_among_others(fuzz: ModuleType) -> None:
    among = [fuzz.run_case(SEED, number) for number in range(4)][3]
    alone = fuzz.run_case(SEED, 3)
    assert alone[1] == among[1]
    assert alone[0].counts == among[0].counts and fuzz.describe(alone[0], None) == fuzz.describe(among[0], None)


@pytest.mark.failures
def test_a_cache_that_keeps_rejected_tokens_is_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "crop", lambda cache, n: None)
    assert fuzz.fuzz(10, SEED, say=lambda words: None).unexplained
