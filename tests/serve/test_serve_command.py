"""What `hf-onlinespec serve` refuses: in one line, with exit code 2, before a model is loaded."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_onlinespec import ConfigError, OnlineDraft
from hf_onlinespec.cli import common, loading
from hf_onlinespec.embedded import FOLDER, load_draft
from hf_onlinespec_cli import main
from tests.conftest import tiny_llama

TARGET, DRAFT = str(FOLDER / "target"), str(FOLDER / "draft")
LOADING = (f"Loading {TARGET} …",)

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", None)
    # These checks need none of the server's packages.
    monkeypatch.setitem(common.PACKAGES, "serve", ())
    monkeypatch.setitem(sys.modules, "hf_onlinespec.serve.app", ModuleType("app"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, before: tuple[str, ...] = ()) -> str:
    """The line that says why.

    Args:
        before: what was said before that.
    """
    terminates = signal.getsignal(signal.SIGTERM)
    assert main(["serve", TARGET, *arguments]) == 2
    assert signal.getsignal(signal.SIGTERM) is terminates
    out, err = capsys.readouterr()
    *said, line = err.splitlines()
    assert out == "" and tuple(said) == before
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "no.such.host.example"], "no such address"),
        (["--port", "70000"], "expected a number from 1 to 65535"),
        (["--save", "{tmp}/new"], "--save without --draft"),
        (["--save-every", "-1"], "--save-every -1"),
        (["--save", "{tmp}/file/draft", "--draft", "x"], "cannot be made"),
        (["--device", "abacus"], "--device abacus"),
        (["--draft", "{tmp}/nowhere"], "no such folder"),
    ],
)
def test_a_wrong_argument(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert message in refusal(capsys, "--port", "0", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert not (tmp_path / "new").exists()


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in refusal(capsys, "--port", str(taken.getsockname()[1]))


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(common.PACKAGES, "serve", ("no_such_package",))
    message = refusal(capsys)
    assert "no_such_package" in message and 'pip install "hf_onlinespec[serve]"' in message


def test_another_draft_where_this_one_would_be_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = OnlineDraft(load_draft())
    for name in ("one", "other"):
        draft.save_pretrained(tmp_path / name)
    capsys.readouterr()  # of loading
    message = refusal(capsys, "--draft", str(tmp_path / "one"), "--save", str(tmp_path / "other"), "--port", "0")
    assert "another draft was saved there" in message


def test_a_saved_draft_whose_tokenizer_is_not_at_hand_is_refused_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(2, vocab=4096).save_pretrained(tmp_path / "base")
    draft = OnlineDraft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    draft.save_pretrained(tmp_path / "saved")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")  # not to be read
    capsys.readouterr()
    message = refusal(capsys, "--draft", str(tmp_path / "saved"), "--port", "0", before=LOADING)
    assert "Use a draft with the target's own tokenizer" in message


def test_a_folder_with_a_draft_and_no_tokenizer_is_taken_as_in_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(option: str, *_: object) -> PreTrainedModel:
        if option == "--draft":
            return load_draft()
        raise ConfigError(f"{option} was to be loaded.")

    monkeypatch.setattr(loading, "load_model", loads)
    load_draft().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["serve", TARGET, "--draft", str(tmp_path), "--port", "0"]) == 2
    assert "error: TARGET was to be loaded." in capsys.readouterr().err
