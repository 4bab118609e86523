"""What a manifest says of a draft's life: its serving history, its lineage, its privacy record."""

from __future__ import annotations

from typing import Any

import pytest

from hf_onlinespec import ArtifactError
from hf_onlinespec.metrics import Counts, DraftMetrics
from hf_onlinespec.share.history import ServingHistory
from hf_onlinespec.share.lineage import Lineage, WarmStart
from hf_onlinespec.share.privacy_record import PrivacyRecord


def one_request() -> DraftMetrics:
    metrics = DraftMetrics()
    metrics.close(Counts(rounds=2, new_tokens=3, verified_positions=4, overlap=1.0))
    return metrics


RUN = ServingHistory.of(one_request(), ["org/target"]).to_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": {}},
        {"run": RUN | {"history": [[1, 2]]}},
        {"run": RUN | {"rounds": "many"}},
        {"run": RUN | {"rounds": True}},
        {"run": RUN | {"rounds": -1}},
        {"run": RUN | {"before": None}},
        {"lineage": {"merged": [{}]}},
        {"lineage": {"parent": "me/draft"}},
        {"lineage": {"warm_start": {"texts": 1}}},
        {"lineage": {"alignment": {"target": None, "tokens": "many"}}},
        {"lineage": {"data_statement": 7}},
    ],
)
def test_odd_runs_and_lineages_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r" has | is "):
        ServingHistory.from_dict(wrong.get("run", RUN), "a folder: run")
        Lineage.from_dict(wrong.get("lineage", {}), "a folder: lineage")


def test_what_a_later_version_wrote_besides_is_kept() -> None:
    lineage = {
        "draft": "1f",
        "later": {"a": [1]},
        "merged": [{"weight": -0.5, "parent": {"source": "x", "revision": None, "b": 2}}],
    }
    assert Lineage.from_dict(lineage, "a lineage").to_dict() == lineage
    run = RUN | {"later": 1, "machine": RUN["machine"] | {"disk": "x"}, "total": RUN["total"] | {"energy": 3.5}}
    assert ServingHistory.from_dict(run, "a run").to_dict() == run
    record = PrivacyRecord(texts=3, unknown=("why",)).to_dict() | {"later": [1]}
    assert PrivacyRecord.from_dict(record).to_dict() == record


def test_what_does_not_apply_is_not_written() -> None:
    assert Lineage().to_dict() == {} and Lineage.from_dict({}, "a lineage") == Lineage()
    assert Lineage.from_dict({"parent": None, "license": None}, "a lineage") == Lineage()
    assert ServingHistory.of(DraftMetrics(), []).to_dict()["total"] is None


def test_warm_starts_are_counted_together() -> None:
    first = WarmStart("a", texts=1, prompts=2, tokens=30)
    assert WarmStart("b", 10, 20, 300).after(first) == WarmStart("b", 11, 22, 330)
    assert first.after(None) == first


def test_a_malformed_privacy_record_says_that_it_cannot_be_read() -> None:
    for found in ("text", {}, {"texts": -1}, PrivacyRecord().to_dict() | {"unknown": [1]}):
        lineage = Lineage.from_dict({"privacy": found}, "a lineage")
        assert lineage.privacy.reasons() == ["It cannot be judged: the record of what it learned from cannot be read."]
