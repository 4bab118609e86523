"""hf-onlinespec head, from prompts in a file to the folder of a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_onlinespec import ConfigError
from hf_onlinespec.cli.head import HeadSettings, run_head
from hf_onlinespec.embedded import FOLDER
from hf_onlinespec.heads.recognising import is_head

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"Order {i}: two boxes of tea"} | ({"domain": "tea"} if i % 2 else {}) for i in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(prompts: Path, out: Path, **changes: object) -> HeadSettings:
    quick = dict(new_tokens=8, batch_size=4, draft_vocab=256, epochs=1)
    return HeadSettings(str(FOLDER / "target"), out, [prompts], **(quick | changes))  # type: ignore[arg-type]


def test_a_head_is_built_and_says_what_it_measured(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    assert run_head(settings(prompts, out)) == 0
    said = capsys.readouterr().out
    assert f"Written: {out}" in said and "acceptance length, tea: " in said and "acceptance length, mine: " in said
    record = json.loads((out / "training.json").read_text())
    assert is_head(out) and record["draft_vocab_size"] == 256 and record["settings"]["writing"]["new_tokens"] == 8
    assert run_head(settings(prompts, out)) == 0  # once more: nothing is left to do, and it is written again


def test_what_cannot_work_is_refused_before_a_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--epochs 0"):
        settings(prompts, tmp_path / "head", epochs=0)
    with pytest.raises(ConfigError, match="--learning-rate 2"):
        settings(prompts, tmp_path / "head", learning_rate=2.0)
    with pytest.raises(ConfigError, match="other files lie there"):
        run_head(settings(prompts, tmp_path))
    with pytest.raises(ConfigError, match="--prompts"):
        run_head(settings(tmp_path / "none.jsonl", tmp_path / "head"))
