"""A recording is one file: nothing is left of one that could not be written, and nothing else is taken for one."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_onlinespec import ConfigError
from hf_onlinespec.adapt.feedback import Feedback, Teacher
from hf_onlinespec.measure.recording import Recorded, Recording


def recording() -> Recording:
    law = Teacher.from_logits(torch.randn(3, 8), 1.0, 4)
    return Recording([Recorded("shop", Feedback(torch.arange(5), law), torch.zeros(3))], 0.0)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    recording().save(tmp_path / "stream")
    (request,) = Recording.load(tmp_path / "stream").requests
    assert request.domain == "shop" and request.feedback.tokens.tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_onlinespec.measure.recording.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        recording().save(tmp_path / "stream")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "stream.part").symlink_to(tmp_path / "victim")
    recording().save(tmp_path / "stream")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "stream").is_symlink()


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stream")
    refused: list[ConfigError] = []

    def load() -> None:
        try:
            Recording.load(tmp_path / "stream")
        except ConfigError as error:
            refused.append(error)

    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    loading.join(20)
    if loading.is_alive():  # let it go, which ends the pipe
        os.close(os.open(tmp_path / "stream", os.O_WRONLY | os.O_NONBLOCK))
        pytest.fail("it waits for whoever writes to the pipe")
    assert refused
