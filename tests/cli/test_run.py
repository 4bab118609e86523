"""`hf-onlinespec run`: every prompt is answered once, whatever interrupts it, and answers of another run are not taken for its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperConfig

from hf_onlinespec import Answer, OnlineDraft
from hf_onlinespec.cli import run
from hf_onlinespec.cli.answer_files import AnswerFile, PromptFile
from hf_onlinespec.cli.loading import load_config
from hf_onlinespec.embedded import FOLDER, SEQ2SEQ_FOLDER, load_seq2seq_pair, prompts, questions
from hf_onlinespec.errors import ConfigError
from hf_onlinespec.share.folder import is_artifact
from hf_onlinespec_cli import main

TARGET = str(FOLDER / "target")

pytestmark = pytest.mark.usefixtures("process_settings")


def asked(folder: Path, n: int = 6, **more: Any) -> Path:
    path = folder / "in.jsonl"
    lines = [{"prompt": text, "id": f"p{i}"} | more for i, text in enumerate(prompts("shell")[:n])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def answers(path: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {line["index"]: line for line in lines}
    assert len(found) == len(lines), "each answer once"
    return found


def command(folder: Path, *more: str) -> int:
    files = ["--prompts", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")]
    return main(["run", TARGET, *files, "--new-tokens", "6", "--batch-size", "2", *more])


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets Ctrl-C come after so many answers."""

    def stop(after: int) -> None:
        stream = run.generate_stream

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            for i, answer in enumerate(stream(*args, **kwargs)):
                if i == after:
                    raise KeyboardInterrupt
                yield answer

        monkeypatch.setattr(run, "generate_stream", interrupted)

    return stop


def test_a_run_that_was_interrupted_goes_on_where_it_ended(
    tmp_path: Path,
    stopping: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked(tmp_path)
    out = tmp_path / "out.jsonl"
    assert command(tmp_path) == 0
    whole = answers(out)
    assert sorted(whole) == list(range(6)) and {line["id"] for line in whole.values()} == {f"p{i}" for i in range(6)}
    assert all(line["text"] and 0 < line["new_tokens"] <= 6 for line in whole.values())
    assert "Answered 6 prompts" in capsys.readouterr().out
    out.unlink()
    stopping(3)
    assert command(tmp_path) == 130
    before = out.read_text(encoding="utf-8")
    assert len(answers(out)) == 3
    assert "3 of 6 prompts are answered" in capsys.readouterr().err
    monkeypatch.undo()
    out.write_text(before + before.splitlines()[0][:-9], encoding="utf-8")  # killed while it wrote a fourth
    assert command(tmp_path) == 0
    assert out.read_text(encoding="utf-8").startswith(before), "what was answered stays"
    assert answers(out) == whole
    assert "Answered 3 prompts" in capsys.readouterr().out
    assert command(tmp_path) == 0
    assert "All 6 prompts were answered before" in capsys.readouterr().out


def test_a_draft_is_saved_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "evolved"
    options = ("--draft", str(FOLDER / "draft"), "--save", str(saved), "--save-every", "2")
    asked(tmp_path, 3)
    assert command(tmp_path, *options) == 0 and is_artifact(saved)
    before = OnlineDraft.from_pretrained(saved).metrics.new_tokens
    asked(tmp_path, 5)  # two more at the end of the file
    assert command(tmp_path, *options) == 0
    assert len(answers(tmp_path / "out.jsonl")) == 5
    assert "Answered 2 prompts" in capsys.readouterr().out
    assert 0 < before < OnlineDraft.from_pretrained(saved).metrics.new_tokens


def test_a_prompt_that_fails_has_an_error_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = asked(tmp_path, 2)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "word " * 600}) + "\n")
    assert command(tmp_path) == 1
    found = answers(tmp_path / "out.jsonl")
    assert "text" in found[0] and "text" in found[1] and "text" not in found[2]
    assert "the target reads 512" in found[2]["error"]
    assert "Failed: 1 prompts" in capsys.readouterr().out


def test_prompts_that_failed_are_tried_again_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(tmp_path, 3)
    stream = run.generate_stream

    def failing(*args: Any, **kwargs: Any) -> Any:
        for answer in stream(*args, **kwargs):
            failed = answer.index == 1
            yield Answer(1, answer.prompt, error=RuntimeError("of a test")) if failed else answer

    monkeypatch.setattr(run, "generate_stream", failing)
    assert command(tmp_path) == 1
    before = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert command(tmp_path) == 1  # as they stand there
    assert "1 of them with an error: --retry-failed" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == before
    assert command(tmp_path, "--retry-failed") == 0
    after = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    last = json.loads(after.splitlines()[-1])
    assert after.startswith(before) and len(after.splitlines()) == 4 and last["index"] == 1 and "text" in last
    assert command(tmp_path) == 0 and command(tmp_path, "--retry-failed") == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == after


HOLDER = """
import sys, time
from pathlib import Path
from hf_onlinespec.cli.answer_files import AnswerFile
file = AnswerFile(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_do_not_write_into_one_file_and_one_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"index": 0, "checksum": "a"}\n', encoding="utf-8")
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another hf-onlinespec run writes into it"):
            AnswerFile(path)
    finally:
        other.kill()
        other.communicate()
    with AnswerFile(path) as file:
        assert len(file) == 1
    assert path.read_text(encoding="utf-8") == '{"index": 0, "checksum": "a"}\n'


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: asked(folder, more=1),
        lambda folder: (folder / "in.jsonl").write_text('{"prompt": "another"}\n'),
        lambda folder: asked(folder, 1),
    ],
)
def test_answers_to_other_prompts_are_refused(
    tmp_path: Path, change: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(PromptFile(asked(tmp_path), run.RunSettings(TARGET, tmp_path, tmp_path, new_tokens=6).of_answers))
    with AnswerFile(tmp_path / "out.jsonl") as file:
        for line in lines[:2]:
            file.write(line, Answer(line.index, None, error=ValueError("x")))
    before = (tmp_path / "out.jsonl").read_bytes()
    change(tmp_path)
    assert command(tmp_path) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "option", [("--new-tokens", "7"), ("--temperature", "0.5"), ("--seed", "1"), ("--dtype", "bfloat16")]
)
def test_answers_under_other_settings_are_refused(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(PromptFile(asked(tmp_path), run.RunSettings(TARGET, tmp_path, tmp_path, new_tokens=6).of_answers))
    with AnswerFile(tmp_path / "out.jsonl") as file:
        file.write(lines[0], Answer(0, None, error=ValueError("x")))
    assert command(tmp_path, *option) == 2
    assert "not of this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ('{"text": "a"}\n', "line 1"),
        ('{"prompt": "a", "messages": []}\n', "line 1"),
        ('{"messages": "a"}\n', "line 1"),
        ('{"prompt": "\\ud800"}\n', "half of a character"),
    ],
)
def test_malformed_prompts_are_refused_before_any_work(
    tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(content, encoding="utf-8")
    assert command(tmp_path) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["no json\n", '{"index": 0}\n', '{"index": 0, "checksum": "a"}\n' * 2, "[]\n", "of a user's", "7"]
)
def test_a_file_of_something_else_is_not_appended_to(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="Name a new file"):
        AnswerFile(path)
    assert path.read_text(encoding="utf-8") == content


def test_a_last_line_that_was_cut_off_is_removed_alone(tmp_path: Path) -> None:
    path, whole = tmp_path / "out.jsonl", '{"index": 0, "checksum": "a"}\n'
    for cut in ('{"index": 1, "text": "' + "x" * 200_000, "{", ""):
        for before in (whole, ""):
            path.write_text(before + cut, encoding="utf-8")
            with AnswerFile(path) as file:
                assert len(file) == bool(before)
            assert path.read_text(encoding="utf-8") == before


def test_texts_and_messages_are_prompts(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": talk}) + "\r\n\n", encoding="utf-8")
    (tmp_path / "in.txt").write_text("\n one \ntwo\n", encoding="utf-8")
    assert [line.content for line in PromptFile(tmp_path / "in.jsonl", {})] == [{"messages": talk}]
    assert [line.content for line in PromptFile(tmp_path / "in.txt", {})] == [{"prompt": " one "}, {"prompt": "two"}]


def test_the_files_must_be_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = asked(tmp_path)
    assert main(["run", TARGET, "--prompts", str(path), "--out", str(path)]) == 2
    assert "one file" in capsys.readouterr().err


def test_an_encoder_decoder_answers_what_its_encoder_reads_with_a_draft_that_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, texts = load_seq2seq_pair(), questions("wikisql")[:4]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    saving = ["--draft", str(SEQ2SEQ_FOLDER / "draft"), "--save", str(tmp_path / "draft")]
    assert main(["run", str(SEQ2SEQ_FOLDER / "target"), *files, *saving, "--new-tokens", "12"]) == 0, (
        capsys.readouterr()
    )
    written = answers(tmp_path / "out.jsonl")
    for i, text in enumerate(texts):
        inputs = pair.tokenizer(text, return_tensors="pt")
        plain = pair.target.generate(inputs.input_ids, max_new_tokens=12, do_sample=False)
        assert written[i]["text"] == pair.tokenizer.decode(plain[0, 1:], skip_special_tokens=True)
    assert is_artifact(tmp_path / "draft")
    WhisperConfig().save_pretrained(tmp_path / "speech")
    with pytest.raises(ConfigError, match=r"TARGET .*: it hears speech \(whisper\).*attach\(model\)"):
        load_config("TARGET", str(tmp_path / "speech"), encoder_decoders=True)
    with pytest.raises(ConfigError, match=r"an encoder–decoder \(t5\).*hf-onlinespec try and run"):
        load_config("TARGET", str(SEQ2SEQ_FOLDER / "target"))
    with pytest.raises(ConfigError, match=r"--draft .*TARGET is none"):
        load_config("--draft", str(SEQ2SEQ_FOLDER / "draft"))
