"""Progress bars: on everything that may take seconds, and switched off as transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import EmbeddedPair
from hf_onlinespec.measure.recording import Recording, record
from hf_onlinespec.measure.records import Prompt
from hf_onlinespec.measure.regret import evaluate
from hf_onlinespec.runtime import progress
from hf_onlinespec.share.export import merge_and_export
from hf_onlinespec.share.privacy import audit
from hf_onlinespec.training.combining import distil
from hf_onlinespec.training.warm_start import warm_start
from tests.conftest import tiny_llama
from tests.share.test_artifact import REPEATABLE, serve

VOCAB = 2048


def learned(n: int = 2) -> OnlineDraft:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    serve(tiny_llama(1), draft, range(n))
    return draft


def recording(tokenizer: PreTrainedTokenizerBase) -> Recording:
    target = tiny_llama(1, vocab=VOCAB)
    return Recording(list(record(target, tokenizer, [Prompt("ls", "shell", 3)] * 2, 0.0)), 0.0)


CASES: dict[str, Callable[[PreTrainedTokenizerBase, Path], object]] = {
    "Recording": lambda tokenizer, folder: recording(tokenizer),
    "The best fixed adapter": lambda tokenizer, folder: evaluate(
        recording(tokenizer), lambda: tiny_llama(2, vocab=VOCAB), OnlineSpecConfig(rank=2), epochs=1
    ),
    "Planting": lambda tokenizer, folder: audit(learned(), canaries=1, repeats=(1,)),
    "Looking whether texts come out": lambda tokenizer, folder: learned().save_pretrained(folder),
    "Distilling": lambda tokenizer, folder: distil(learned().artifact(), 1, tiny_llama(2)),
    "Merging": lambda tokenizer, folder: merge_and_export(learned(), folder),
    "Warm start": lambda tokenizer, folder: warm_start(
        OnlineDraft(tiny_llama(2, vocab=VOCAB), OnlineSpecConfig(rank=2)), tiny_llama(1, vocab=VOCAB), tokenizer, ["ls -l"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_may_take_seconds_shows_a_bar_that_is_full_at_the_end(
    what: str, pair: EmbeddedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: dict[str, tuple[int, list[int]]] = {}

    class Bar:
        def __init__(self, total: int, desc: str, **_: Any) -> None:
            self.steps: list[int] = []
            bars[desc] = (total, self.steps)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int = 1) -> None:
            self.steps.append(n)

    monkeypatch.setattr(progress, "logging", SimpleNamespace(tqdm=Bar))
    CASES[what](pair.tokenizer, tmp_path / "out")
    total, steps = bars[what]
    assert total == sum(steps) > 0


def test_bars_come_late_and_are_switched_off_as_transformers_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, process_settings: None
) -> None:
    logging.enable_progress_bar()  # another test may have switched them off
    assert list(progress.each(range(3), "Counting", "step")) == [0, 1, 2]
    assert "Counting" not in capsys.readouterr().err  # it took no time
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    assert list(progress.each([torch.ones(1)], "Counting", "step"))
    assert "Counting" in capsys.readouterr().err
    logging.disable_progress_bar()
    assert list(progress.each(range(3), "Counting", "step")) == [0, 1, 2]
    with progress.progress(1, "Counting", "step") as bar:
        bar.update()
    assert "Counting" not in capsys.readouterr().err
