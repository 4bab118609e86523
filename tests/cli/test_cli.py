"""The demo, end to end on the embedded pair: what it writes, what it prints, how it refuses and how it stops."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from hf_onlinespec import OnlineDraft
from hf_onlinespec.cli import common
from hf_onlinespec.measure import demo
from hf_onlinespec.measure.demo import ARMS, Bench, Request, Settings, choose_prompts, intervals, summarise
from hf_onlinespec.measure.plots import conclusion, outputs_line
from hf_onlinespec.measure.records import Ratio, Record
from hf_onlinespec.models.identity import EMBEDDED_TARGET
from hf_onlinespec.share.folder import CARD
from hf_onlinespec.share.manifest import Manifest
from hf_onlinespec_cli import main

SMALL = ["--prompts", "1", "--new-tokens", "8", "--threads", "1"]
PNG = b"\x89PNG\r\n\x1a\n"


pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of calibrating where a test is about something else."""
    monkeypatch.setattr(demo, "ASSISTANT_TOKENS", (2,))
    monkeypatch.setattr(demo, "CALIBRATION_PROMPTS", 1)


def settings(**kwargs: Any) -> Settings:
    values: dict[str, Any] = dict(prompts=1, domain="orders", new_tokens=8, temperature=0.0, seed=0, threads=1)
    return Settings(**values | kwargs)


def record(arm: str, wall_time_s: float, **kwargs: Any) -> Record:
    values: dict[str, Any] = dict(request=0, segment=1, domain="shell", new_tokens=10, target_forwards=5)
    values |= dict(update_time_s=0.0, output=None if arm == "plain" else "identical")
    return Record(arm=arm, wall_time_s=wall_time_s, **values | kwargs)


def test_demo_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["demo", *SMALL, "--out", str(out)]) == 0

    assert (out / "demo.png").read_bytes().startswith(PNG)
    result = json.loads((out / "demo.json").read_text())
    assert result["settings"] == dict(prompts=1, domain="orders", new_tokens=8, temperature=0.0, seed=0, threads=1)
    assert {"cpu", "cores", "threads", "python", "torch", "transformers", "peft"} <= set(result["machine"])
    assert result["calibration"]["prompts"] == 8
    assert str(result["calibration"]["chosen"]) in result["calibration"]["tokens_per_s"]
    assert result["interrupted"] is False

    records = result["requests"]
    assert [(r["request"], r["arm"]) for r in records] == [(i, arm) for i in range(3) for arm in ARMS]
    assert [r["domain"] for r in records[::4]] == ["shell", "orders", "shell"]
    assert all(1 <= r["target_forwards"] <= r["new_tokens"] <= 8 for r in records)
    assert all(r["target_forwards"] == r["new_tokens"] for r in records if r["arm"] == "plain")
    assert all((r["update_time_s"] > 0) == (r["arm"] == "learning") for r in records)
    for arm in ("transformers", "frozen", "learning"):
        found = result["summary"]["outputs"][arm]
        # A tie is decided by rounding, which differs between machines.
        assert found["compared"] == 3 and found["different"] == 0 and found["identical"] + found["tie"] == 3

    serving = Manifest.read(out / "evolved").serving
    tokens = sum(r["new_tokens"] for r in records if r["arm"] == "learning")
    assert (serving.requests, serving.new_tokens, serving.targets) == (3, tokens, (EMBEDDED_TARGET,))
    assert f"{tokens:,} new tokens" in (out / "evolved" / CARD).read_text(encoding="utf-8")
    assert OnlineDraft.from_pretrained(out / "evolved").metrics.requests == 3

    printed, errors = capsys.readouterr()
    assert printed.startswith("Calibration of transformers' assisted generation on 8 prompts outside the stream")
    for words in (
        "1 shell",
        "2 orders",
        "3 shell",
        *ARMS.values(),
        "Outputs identical to plain",
        str(out / "demo.png"),
        str(out / "evolved"),
    ):
        assert words in printed
    assert printed.splitlines()[-1].startswith("With learning's own cost included, ours learning was ")
    assert "3 of 3 requests" in errors
    assert result["intervals"]["plain"]["low"] <= result["intervals"]["plain"]["value"]


@pytest.mark.usefixtures("uncalibrated")
def test_json_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--temperature", "0.7", "--seed", "3", "--domain", "orders", "--out", str(tmp_path)]
    assert main(["demo", *SMALL, *arguments]) == 0
    printed, errors = capsys.readouterr()
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert result["settings"]["temperature"] == 0.7 and result["requests"][4]["domain"] == "orders"
    assert result["summary"]["outputs"] == {} and "not compared" in outputs_line(result["summary"])
    assert "Calibration" in errors


@pytest.mark.usefixtures("uncalibrated")
def test_interrupt_keeps_finished_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.measure

    def interrupted(self: Bench, request: Request) -> list[Record]:
        records = measure(self, request)
        if request.number == 2:
            raise KeyboardInterrupt
        return records

    monkeypatch.setattr(Bench, "measure", interrupted)
    assert main(["demo", *SMALL, "--out", str(tmp_path)]) == 130
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["interrupted"] is True
    assert [r["request"] for r in result["requests"]] == [0] * 4 + [1] * 4
    assert [block["domain"] for block in result["summary"]["segments"]] == ["shell", "orders"]
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "Interrupted: only the finished requests count." in printed and "2 orders" in printed


@pytest.mark.usefixtures("uncalibrated")
def test_running_out_of_memory_keeps_finished_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.measure

    def runs_out(self: Bench, request: Request) -> list[Record]:
        if request.number == 1:
            raise torch.OutOfMemoryError("no memory is left")
        return measure(self, request)

    monkeypatch.setattr(Bench, "measure", runs_out)
    assert main(["demo", *SMALL, "--out", str(tmp_path)]) == 2
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["interrupted"] is True and [r["request"] for r in result["requests"]] == [0] * 4
    assert (tmp_path / "evolved" / "adapter_model.safetensors").exists()
    assert "error: out of memory (no memory is left)" in capsys.readouterr().err


def test_interrupt_before_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Bench, spare: list[str], bar: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "warm_up", interrupted)
    assert main(["demo", *SMALL, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts 0: expected a value from 1 to 98"),
        (["--prompts", "99"], "--prompts 99: expected a value from 1 to 98"),
        (["--new-tokens", "0"], "--new-tokens 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_bad_values(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    printed, errors = capsys.readouterr()
    assert message in errors and not printed
    assert not (tmp_path / "out").exists()


def test_bad_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["demo", "--domain", "shell"], ["demo", "--prompts", "many"], []):
        assert main(arguments) == 2
    (tmp_path / "file").touch()
    assert main(["demo", *SMALL, "--out", str(tmp_path / "file")]) == 2
    assert "the folder cannot be made" in capsys.readouterr().err


def test_missing_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert 'The demo needs matplotlib: run pip install "hf_onlinespec[demo]"' in errors
    assert not (tmp_path / "out").exists()


def test_prompts_are_used_once() -> None:
    stream, spare = choose_prompts(settings(prompts=98))
    texts = [request.prompt for request in stream] + spare
    assert len(texts) == len(set(texts)) == 3 * 98 + 8
    assert [request.number for request in stream] == list(range(294))
    assert choose_prompts(settings(seed=1)) == choose_prompts(settings(seed=1)) != choose_prompts(settings(seed=2))


def test_summary_numbers_and_words() -> None:
    records = [
        record("plain", 1.0, target_forwards=10),
        record("transformers", 0.5),
        record("frozen", 0.4, output="tie"),
        record("learning", 0.5, update_time_s=0.25, target_forwards=4),
        record("plain", 3.0, request=1, segment=2, domain="orders", target_forwards=10),
        record("transformers", 0.25, request=1, segment=2, domain="orders"),
        record("frozen", 0.5, request=1, segment=2, domain="orders"),
        record("learning", 0.5, request=1, segment=2, domain="orders", target_forwards=4, output="different"),
    ]
    summary = summarise(records)
    learning = summary["whole"]["arms"]["learning"]
    assert learning["acceptance_length"] == 2.5
    assert learning["tokens_per_s"] == 20 and learning["decode_tokens_per_s"] == pytest.approx(20 / 0.75)
    assert learning["update_share"] == 0.25
    assert summary["whole"]["learning_over"]["plain"] == {"total": 4.0, "median": 4.0}
    assert summary["segments"][0]["learning_over"]["frozen"]["total"] == pytest.approx(0.8)
    assert outputs_line(summary) == (
        "Outputs identical to plain: transformers assisted 2 of 2; "
        "ours frozen 1 of 2 (1 more parted at a tie of the target's two best tokens); "
        "ours learning 1 of 2 (1 different)."
    )
    ratios = {"plain": Ratio(4.0, 2.0, 6.0), "transformers": Ratio(1.2, 0.95, 1.52), "frozen": Ratio(1.0, 0.9, 1.11)}
    # ln(1.52 / 0.95) / 2 = 0.235 and ln 1.2 = 0.182: 2 · (0.235 / 0.182)² = 3.3 requests, of which two are there.
    assert conclusion(summary, ratios) == (
        "With learning's own cost included, ours learning was 4.00 (2.00–6.00) times as fast as plain, 1.20 (0.95–1.52) times as "
        "fast as transformers assisted and 1.00 (0.90–1.11) times as fast as ours frozen (95 % intervals over 2 requests). "
        "Whether that is faster than transformers assisted is not decided: it takes about 2 more requests. "
        "That and ours frozen are equally fast, as far as can be told. "
        "On orders, each target forward gave 2.50 tokens with learning, 2.00 without."
    )


def test_intervals_are_those_of_the_records() -> None:
    records = [
        record(arm, seconds, request=i)
        for i in range(3)
        for arm, seconds in zip(ARMS, (4.0, 2.0, 1.0, 1.0), strict=True)
    ]
    found = intervals(records)
    assert {arm: (ratio.value, ratio.low, ratio.high) for arm, ratio in found.items()} == {
        "plain": (4.0, 4.0, 4.0), "transformers": (2.0, 2.0, 2.0), "frozen": (1.0, 1.0, 1.0),
    }  # fmt: skip
    assert found["plain"].is_decided and not found["frozen"].is_decided
    assert found["frozen"].more_requests(3) is None
