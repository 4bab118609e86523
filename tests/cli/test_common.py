"""The command line's frame: what `--help` imports, exit codes, errors in one line, the best device and dtype."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, T5Config, ViTConfig

import hf_onlinespec_cli
from hf_onlinespec import OnlineDraft
from hf_onlinespec.cli import common, loading
from hf_onlinespec.cli.common import check_folder, check_writable
from hf_onlinespec.cli.loading import best_device, best_dtype, load_model, load_pair, load_tokenizer
from hf_onlinespec.embedded import DOMAINS, HOME_DOMAIN
from hf_onlinespec.embedded import FOLDER as EMBEDDED
from hf_onlinespec.errors import ConfigError, DraftError, VersionError
from hf_onlinespec_cli import main
from tests.conftest import tiny_llama
from tests.loopback_hub import LoopbackHub
from tests.share.test_artifact import TOKENS, serve
from tests.tokenizers import byte_level, sentencepiece, strings

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = list(vars(typer.main.get_command(hf_onlinespec_cli.app))["commands"])

pytestmark = pytest.mark.usefixtures("process_settings")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, without a terminal."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=ROOT)


def one_line(errors: str) -> str:
    """What a command said, which must be one line of error."""
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf-onlinespec: error: "), errors
    return lines[0]


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    whole = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 success" in whole and "130 interrupted" in whole and "--install-completion" in whole
    for name in COMMANDS:
        assert name in whole and main([name, "--help"]) == 0
        assert "Example: hf-onlinespec" in " ".join(capsys.readouterr().out.split()), name


def test_the_version_comes_with_those_it_depends_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert re.match(rf"hf_onlinespec \d+\.\d+\.\d+ .*torch {re.escape(torch.__version__)}", printed), printed


def test_choices_are_those_of_the_package() -> None:
    """They are written twice, because the help must not import the package."""
    assert [domain.value for domain in hf_onlinespec_cli.Domain] == [name for name in DOMAINS if name != HOME_DOMAIN]
    assert all(isinstance(vars(torch).get(d.value), torch.dtype) for d in hf_onlinespec_cli.Dtype if d.value != "auto")
    assert (hf_onlinespec_cli.FAILED, hf_onlinespec_cli.INTERRUPTED) == (common.FAILED, common.INTERRUPTED)


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["demoo"], ["demo", "--promts", "3"], ["merge"], ["regret", "run", "--dtype", "int8"]):
        assert main(arguments) == 2, arguments
    assert "Did you mean" in capsys.readouterr().err


def test_an_old_python_is_refused_in_one_line() -> None:
    code = "import sys; sys.version_info = (3, 9, 7, 'final', 0); import hf_onlinespec_cli"
    done = run("-c", code)
    assert done.returncode == 2
    assert "Python 3.9 is too old" in one_line(done.stderr)


def test_packages_that_do_not_fit_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = "transformers has no GenerationMixin._assisted_decoding"

    def fails(*_: Any, **__: Any) -> None:
        raise VersionError(f"{moved}.\nInstall another one.")

    monkeypatch.setattr(OnlineDraft, "from_pretrained", fails)
    assert main(["audit", str(EMBEDDED / "draft")]) == 2
    assert one_line(capsys.readouterr().err).endswith(f"{moved}. Install another one.")
    monkeypatch.setitem(sys.modules, "hf_onlinespec.cli.drafts", None)  # importing it fails
    assert main(["inspect", "x"]) == 2
    line = one_line(capsys.readouterr().err)
    assert "hf_onlinespec needs torch" in line and "transformers" in line and ">=" in line


def test_an_interrupt_anywhere_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnlineDraft, "from_pretrained", interrupted)
    assert main(["audit", str(EMBEDDED / "draft")]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_whoever_ends_a_command_interrupts_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: what is known is written. A signal that somebody else has provided for is left to them."""
    ending = signal.Signals[name]
    after: list[str] = []

    def ended(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), ending)
        time.sleep(10)  # the signal comes before that
        after.append("went on")
        raise ConfigError("went on")

    before = signal.signal(ending, signal.SIG_DFL)
    try:
        monkeypatch.setattr(OnlineDraft, "from_pretrained", ended)
        assert main(["audit", str(EMBEDDED / "draft")]) == 130
        assert "interrupted" in capsys.readouterr().err and not after
        assert signal.getsignal(ending) is signal.SIG_DFL
        signal.signal(ending, signal.SIG_IGN)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        assert main(["audit", str(EMBEDDED / "draft")]) == 2 and after == ["went on"]
    finally:
        signal.signal(ending, before)


def test_a_reader_that_has_gone_is_no_finding() -> None:
    """rich leaves by SystemExit(1) when the pipe that it writes into is closed; 1 would say that something was found."""
    code = (
        "import sys, typer, hf_onlinespec_cli as cli\n"
        "def gone(): raise SystemExit(1)\n"
        "try: cli.reports_errors(gone)()\n"
        "except typer.Exit as done: sys.exit(done.exit_code)\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_that_were_closed_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--version"]) == 0
    assert main(["demoo"]) == 2
    assert sys.stdin.read() == "" and not sys.stdin.isatty()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_a_model_that_the_hub_does_not_have(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regret", str(ROOT / "none"), "--draft", "nobody/nothing"]) == 2  # the recording is read first
    assert "none" in one_line(capsys.readouterr().err)
    with pytest.raises(ConfigError, match=r"--draft nobody/nothing: the Hub has no model of this name"):
        load_model("--draft", "nobody/nothing")


def test_no_network_is_told_from_a_wrong_name(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(ConfigError, match=r"--target nobody/nothing: no network: the Hub cannot be reached") as told:
        load_model("--target", "nobody/nothing")
    assert "\n" not in str(told.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_model("--target", "nobody/nothing")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--target .*: the folder holds no model that can be loaded"):
        load_model("--target", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--target .*none: no such folder"):
        load_model("--target", str(tmp_path / "none"))


def broken(how: str, folder: Path) -> str:
    """The embedded target with one file that is not as it should be."""
    shutil.copytree(EMBEDDED / "target", folder, copy_function=shutil.copyfile)
    weights = folder / "model.safetensors"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "of another size":
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | {"intermediate_size": 16}))
    elif how == "of another kind":
        ViTConfig().save_pretrained(folder)
    elif how == "an encoder–decoder":
        T5Config().save_pretrained(folder)
    elif how == "no index":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "with code":
        about = json.loads((folder / "config.json").read_text())
        code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        (folder / "config.json").write_text(json.dumps(about | {"model_type": "own", "auto_map": code}))
    return str(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut off", "SafetensorError"),
        ("empty", "SafetensorError"),
        ("of another size", "its weights have other shapes than its config.json says"),
        ("of another kind", "Unrecognized configuration class"),
        ("an encoder–decoder", "TARGET is none: it drafts for encoder–decoders alone"),
        ("no index", "weight_map"),
        ("with code", "this model brings code of its own, which is not run unasked"),
    ],
)
def test_a_broken_checkpoint_is_one_line(how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked somebody who is not there"))
    name = broken(how, tmp_path / "model")
    with pytest.raises(ConfigError, match=re.escape(said)) as told:
        load_model("--draft", name)
    assert str(told.value).startswith(f"--draft {name}: ") and "\n" not in str(told.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copyfile(EMBEDDED / "target" / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"TARGET .*: the folder holds no tokenizer that can be loaded"):
        load_tokenizer("TARGET", str(tmp_path))


def test_weights_that_a_checkpoint_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(1, layers=1).save_pretrained(tmp_path)
    LlamaConfig.from_pretrained(tmp_path, num_hidden_layers=2).save_pretrained(tmp_path)
    common.quiet_libraries()
    capsys.readouterr()
    load_model("TARGET", str(tmp_path))
    assert capsys.readouterr().err.startswith(
        f"hf-onlinespec: warning: TARGET {tmp_path}: 9 of its weights are not in the checkpoint, model.layers.1."
    )
    LlamaConfig.from_pretrained(tmp_path, num_hidden_layers=1).save_pretrained(tmp_path)
    load_model("TARGET", str(tmp_path))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError(), torch.OutOfMemoryError()],
)
def test_too_little_memory_names_what_was_needed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(1)
    model.save_pretrained(tmp_path)
    weights = sum(parameter.numel() for parameter in model.parameters())

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(ConfigError) as told:
        load_model("--target", str(tmp_path), device=torch.device("cpu"))
    assert f"its weights need {weights * 4 / 1e6:.1f} MB in float32" in str(told.value)
    assert f"With --dtype bfloat16 they need {weights * 2 / 1e6:.1f} MB, which would do." in str(told.value)
    with pytest.raises(ConfigError, match="No smaller dtype would do"):
        load_model("--target", str(tmp_path), "bfloat16", torch.device("cpu"))


def test_a_warning_before_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linux ends a process that takes too much, and then it says nothing any more."""
    tiny_llama(1).save_pretrained(tmp_path)
    free = type(loading.psutil.virtual_memory())
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: free(*(0 for _ in free._fields)))
    load_model("--target", str(tmp_path), device=torch.device("cpu"))
    assert "and 0.0 MB are free" in capsys.readouterr().err


def test_memory_that_runs_out_later_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    monkeypatch.setattr(OnlineDraft, "from_pretrained", fails)
    assert main(["audit", str(EMBEDDED / "draft")]) == 2
    assert "out of memory" in one_line(capsys.readouterr().err)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(OnlineDraft, "from_pretrained", fails)
    with pytest.raises(ZeroDivisionError):
        main(["audit", str(EMBEDDED / "draft")])


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: the folder cannot be made"):
        check_folder(tmp_path / "file" / "folder", "--out")
    with pytest.raises(ConfigError, match=r"--out: the folder cannot be written"):
        check_folder(Path("/proc"), "--out")
    check_folder(tmp_path / "new" / "folder", "--out")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    for place in (Path("/proc/new/folder"), tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ConfigError, match=r"--out: nothing can be written there"):
            check_writable(place, "--out")
    check_writable(tmp_path / "one" / "two", "--out")
    assert not (tmp_path / "one").exists()


def test_the_dtype_is_the_checkpoints_own() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for stated, on_cpu, on_gpu in (
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
        (None, torch.float32, torch.bfloat16),
    ):
        config = LlamaConfig(dtype=stated)
        assert (best_dtype("auto", config, cpu), best_dtype("auto", config, gpu)) == (on_cpu, on_gpu)
        assert best_dtype("float16", config, cpu) == torch.float16
    quantized = LlamaConfig(dtype="float16", quantization_config={"quant_method": "gptq", "bits": 4})
    assert best_dtype("auto", quantized, cpu) == "auto"


def test_the_device_is_an_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert best_device() == torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert best_device() == torch.device("cpu") == best_device("cpu")
    with pytest.raises(ConfigError, match="--device nowhere: torch cannot use it here"):
        best_device("nowhere")


def draft_for(target: PreTrainedModel, folder: Path, name: str) -> OnlineDraft:
    """What `--draft NAME` loads beside a target, which is saved in the folder."""
    target.save_pretrained(folder / "target")
    _, draft = load_pair(str(folder / "target"), name, target.config, None, "auto", torch.device("cpu"))
    assert draft is not None
    return draft


def test_a_draft_of_any_kind_is_loaded(tmp_path: Path) -> None:
    """A model, an evolved draft, and an ordinary adapter."""
    target = tiny_llama(1, layers=2)
    tiny_llama(2).save_pretrained(tmp_path / "model")
    new = draft_for(target, tmp_path, str(tmp_path / "model"))
    assert new.metrics.requests == 0
    serve(target, new, range(2))
    new.save_pretrained(tmp_path / "evolved")
    assert draft_for(target, tmp_path, str(tmp_path / "evolved")).metrics.requests == 2
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "evolved" / name, tmp_path / "adapter")
    adapted = draft_for(target, tmp_path, str(tmp_path / "adapter"))
    assert adapted.metrics.requests == 0
    torch.testing.assert_close(adapted(TOKENS).logits, new(TOKENS).logits)
    tiny_llama(2, vocab=4096).save_pretrained(tmp_path / "other")
    with pytest.raises(DraftError, match="Use a draft with the target's own tokenizer"):
        draft_for(target, tmp_path, str(tmp_path / "other"))


def test_a_draft_with_another_tokenizer_serves_as_any_other(tmp_path: Path) -> None:
    inputs = byte_level(500)("The little dog", return_tensors="pt")
    byte_level(500).save_pretrained(tmp_path / "target")
    tiny_llama(2, vocab=400).save_pretrained(tmp_path / "draft")
    sentencepiece(400).save_pretrained(tmp_path / "draft")
    tiny_llama(1, vocab=500).save_pretrained(tmp_path / "target")
    config = tiny_llama(1, vocab=500).config
    names = str(tmp_path / "target"), str(tmp_path / "draft")
    target, draft = load_pair(*names, config, byte_level(500), "auto", torch.device("cpu"))
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    ours = target.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert draft is not None and draft.metrics.failed_drafts == 0 and draft.metrics.requests == 1
    strings("§", "¶").save_pretrained(tmp_path / "draft")
    with pytest.raises(DraftError, match="have no token in common"):
        load_pair(*names, config, byte_level(500), "auto", torch.device("cpu"))


def test_a_saved_draft_is_no_target_and_needs_its_base(tmp_path: Path) -> None:
    target = tiny_llama(1)
    tiny_llama(2).save_pretrained(tmp_path / "base")
    new = draft_for(target, tmp_path, str(tmp_path / "base"))
    new.save_pretrained(tmp_path / "evolved")
    name = str(tmp_path / "evolved")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match=rf"TARGET {name}: a saved draft lies there.* It is given as --draft"):
            load("TARGET", name)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(DraftError, match=rf"--draft {name}: the base of this adapter cannot be loaded: .*base") as told:
        draft_for(target, tmp_path, name)
    assert "Expected an evolved draft" not in str(told.value)


def test_a_checkout_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    def fails(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'peft'")

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr("hf_onlinespec.cli.measure.run_regret", fails)
    assert main(["regret", "run.safetensors"]) == 2
    assert "No module named 'peft'. hf_onlinespec is not installed: run pip install -e ." in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert "hf_onlinespec (not installed)" in capsys.readouterr().out


def test_weights_are_taken_in_a_row() -> None:
    spread = hf_onlinespec_cli.one_by_one
    assert spread(["a", "--weights", "0.25", "0.75", "--out", "x"], "--weights") == [
        "a", "--weights", "0.25", "--weights", "0.75", "--out", "x",
    ]  # fmt: skip
    assert spread(["--weights", "1", "a", "0.5"], "--weights") == ["--weights", "1", "a", "0.5"]
