"""Two gloo processes, see processes.py: they learn one adapter, and neither waits for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_onlinespec import OnlineDraft
from tests.drafts import flat_params
from tests.processes import DIED, PATIENCE_S
from tests.tiny_models import tiny_llama

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stderr)
    return folder


def ended(folder: Path, name: str) -> list[int]:
    found = json.loads((folder / "ended.json").read_text())
    return [found[f"{name}.{rank}"] for rank in range(2)]


def seen(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def two(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    assert ended(folder, "two_then_one") == [0, DIED], (folder / "told.txt").read_text()
    return seen(folder, "two_then_one", 0), seen(folder, "two_then_one", 1)


def test_the_average_of_two_processes_is_the_mean(two: tuple[dict[str, Any], dict[str, Any]]) -> None:
    starts, led = (torch.tensor([one[name] for one in two]) for name in ("start", "led"))
    assert torch.equal(*starts) and not torch.equal(*led)
    for one in two:
        assert one["met"]
        torch.testing.assert_close(torch.tensor(one["mean"]), led.mean(0))


def test_two_processes_end_with_the_same_adapter_and_rank_0_saves_it(
    two: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    assert two[0]["together"] == two[1]["together"] != two[0]["mean"]
    loaded = OnlineDraft.from_pretrained(folder / "two_then_one.saved_by_0", base_model=tiny_llama(2))
    assert flat_params(loaded).tolist() == two[0]["together"]
    assert not (folder / "two_then_one.saved_by_1").exists()


def test_a_process_that_lags_is_not_waited_for(two: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """It began to serve after the other one had finished, which averaged all the same."""
    assert two[0]["averages_alone"] >= 1 and two[1]["published"]


def test_a_process_that_is_killed_in_a_request_stops_nobody_and_what_it_had_learned_stays(
    two: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    left = two[0]
    assert left["caught_up"] and left["caught_up_again"] and left["requests"] == 11
    assert left["with_the_last_words"] != left["together"]
    loaded = flat_params(OnlineDraft.from_pretrained(folder / "two_then_one.left", base_model=tiny_llama(2)))
    assert loaded.isfinite().all() and loaded.tolist() == left["left"] != left["with_the_last_words"]


def test_without_the_process_that_holds_the_store_the_other_one_learns_on_alone(folder: Path) -> None:
    assert ended(folder, "without_the_first") == [DIED, 0], (folder / "told.txt").read_text()
    alone = seen(folder, "without_the_first", 1)
    assert not alone["caught_up"] and "learns on alone" in alone["reason"]
    loaded = flat_params(OnlineDraft.from_pretrained(folder / "without_the_first.left", base_model=tiny_llama(2)))
    assert loaded.isfinite().all() and loaded.tolist() == alone["left"] != alone["together"]


def test_processes_that_hold_one_target_run_equally_many_forwards_and_write_what_plain_decoding_writes(
    folder: Path,
) -> None:
    assert ended(folder, "in_step") == [0, 0], (folder / "told.txt").read_text()
    both = [seen(folder, "in_step", rank) for rank in range(2)]
    assert both[0]["forwards"] == both[1]["forwards"]
    assert all(both[0]["equal"]) and all(both[1]["equal"])
    for one in both:
        assert one["kept"] > 0 and one["rounds"] < sum(one["forwards"])  # it drafted, and ran forwards for the other
    assert "another process decodes its rows plainly" in both[0]["told"][6] and "Never" in both[1]["told"][6]
