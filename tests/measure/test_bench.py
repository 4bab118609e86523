"""The measuring: records and ratios; what is refused of one's own prompts and models; the parts of benchmarks/."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.measure import bench
from hf_onlinespec.measure.bench import Runner
from hf_onlinespec.measure.own_prompts import load_prompts
from hf_onlinespec.measure.recording import Recording
from hf_onlinespec.measure.records import PLAIN, Prompt, Record, speed_ratio
from hf_onlinespec_cli import main
from tests.conftest import tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PNG = b"\x89PNG\r\n\x1a\n"


pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, which import each other as scripts do."""
    names = ("baselines", "break_even", "padded", "speed", "streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS / "studies"))
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def record(arm: str, request: int = 0, wall_time_s: float = 1.0, **kwargs: Any) -> Record:
    values: dict[str, Any] = dict(segment=1, domain="shell", new_tokens=10, target_forwards=5, update_time_s=0.0)
    return Record(request=request, arm=arm, wall_time_s=wall_time_s, **values | {"output": None} | kwargs)


# Numbers and words


def test_ratio_is_of_sums_and_its_interval_is_seeded() -> None:
    ours = [record("ours", i, 1.0 + i, new_tokens=10 + i) for i in range(12)]
    plain = [record(PLAIN, i, 2.0 + (7 * i) % 12, new_tokens=10 + i) for i in range(12)]
    found = speed_ratio(ours, plain)
    assert found.value == pytest.approx(90 / 78)  # the tokens are the same
    assert 0.5 < found.low < found.value < found.high < 2.0
    assert found == speed_ratio(ours, plain) != speed_ratio(ours, plain, seed=1)
    same = speed_ratio(plain, plain)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0) and str(same) == "1.00 (1.00–1.00)"


def test_ratio_needs_the_same_requests() -> None:
    with pytest.raises(ValueError, match="same requests"):
        speed_ratio([record("ours", 0)], [record(PLAIN, 1)])
    with pytest.raises(ValueError, match="shorter"):
        speed_ratio([record("ours", 0)], [])


def test_outputs_are_compared_with_plains(pair: EmbeddedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(pair.target, pair.tokenizer, 0.0, 0)
    plain = torch.tensor([[0, 5, 6, 7]])
    other = torch.tensor([[0, 5, 9, 7]])
    assert runner.compare(plain, plain.clone()) == "identical"
    assert runner.compare(plain, plain[:, :3]) == "different"
    assert runner.compare(plain, other) == "different"
    monkeypatch.setattr(bench, "TIE_GAP", float("inf"))
    assert runner.compare(plain, other) == "tie"


# The user's own prompts and models


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read (No such file or directory)"),
        (b"", "the file has no prompts"),
        (b"\n \n", "the file has no prompts"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: expected a JSON object"),
        ('{"prompt": "a\u2028"}\n{"text": "b"}\n'.encode(), "line 2: expected a JSON object"),
        (b'["a"]\n', "line 1: expected a JSON object"),
        (b'{"prompt": ""}\n', "line 1: expected a JSON object"),
        (b'{"prompt": 3}\n', "line 1: expected a JSON object"),
        (b"\xff\n", "it is not UTF-8 text"),
        (b'{"prompt": "a \\ud83d"}\n', "line 1: character 3 is \\ud83d, one half of a character alone"),
        (b'{"prompt": "a", "domain": "\\ud83d"}\n', "one half of a character alone"),
        (b"[" * 100_000, "line 1: expected a JSON object"),
        (b'{"prompt": ' + b"9" * 5_000 + b"}", "line 1: expected a JSON object"),
        (json.dumps({"prompt": "a " * 600}).encode(), "tokens: the target takes from 1 to 448, and 64 new ones"),
    ],
)
def test_bad_prompts(content: bytes | None, message: str, tmp_path: Path, refused: Any) -> None:
    file = tmp_path / "mine.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert message in refused("--embedded", "--prompts", str(file))


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b'{"prompt": "a"}\r\n\n  two words \n')
    assert load_prompts(file, None, 5) == [Prompt('{"prompt": "a"}', "mine", 5), Prompt("  two words ", "mine", 5)]
    assert len(load_prompts(file, 1, 5)) == 1


def test_the_name_of_a_domain_is_one_line_and_no_command_to_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "a", "domain": " \x1b[31mtwo\n lines "}))
    assert load_prompts(file, None, 5) == [Prompt("a", "[31mtwo lines", 5)]


def test_a_file_that_windows_wrote_begins_with_its_first_prompt(tmp_path: Path) -> None:
    for name, content in (("mine.jsonl", '{"prompt": "a"}\r\n'), ("mine.txt", "a\r\n")):
        file = tmp_path / name
        file.write_bytes(content.encode("utf-8-sig"))
        assert load_prompts(file, None, 5) == [Prompt("a", "mine", 5)]


def test_bad_models(tmp_path: Path, refused: Any) -> None:
    file = str(write(tmp_path / "mine.jsonl", ["one"]))
    for name, vocab in (("target", 32), ("draft", 2048)):
        LlamaConfig(vocab_size=vocab).save_pretrained(tmp_path / name)
    target, draft, none = (str(tmp_path / name) for name in ("target", "draft", "none"))
    words = refused("--target", target, "--draft", draft, "--prompts", file)
    assert "The target has 32 tokens in its vocabulary (config.vocab_size) and the draft 2048" in words
    assert f"--draft {none}: no such folder" in refused("--target", target, "--draft", none, "--prompts", file)
    lost = refused("--target", target, "--draft", target, "--prompts", file, "--device", "nowhere")
    assert "--device nowhere: torch cannot use it here" in lost
    for models in ([], ["--target", target], ["--embedded", "--draft", draft]):
        assert "Give both --target and --draft, or --embedded alone." in refused(*models, "--prompts", file)


@pytest.mark.parametrize(("reason", "code"), [(KeyboardInterrupt(), 130), (MemoryError("none is left"), 2)])
def test_what_was_recorded_is_written_when_recording_ends_early(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reason: BaseException,
    code: int,
) -> None:
    texts, out = tmp_path / "prompts.txt", tmp_path / "run.safetensors"
    texts.write_text("one\ntwo\nthree\n")
    generate, calls = LlamaForCausalLM.generate, []

    def fails(self: LlamaForCausalLM, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise reason
        return generate(self, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    assert main(["record", "--embedded", "--prompts", str(texts), "--new-tokens", "3", "--out", str(out)]) == code
    assert len(Recording.load(out).requests) == 2
    assert f"Written: {out}, of the first 2 of 3 prompts." in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--new-tokens", "0"), ("--limit", "0"), ("--temperature", "-1"), ("--temperature", "nan")]
)
def test_bad_values(option: tuple[str, str], tmp_path: Path, refused: Any) -> None:
    assert option[0] in refused("--embedded", "--prompts", str(tmp_path / "none"), *option)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `record`, which must refuse before it loads a model, and gives the error."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)

    def run(*arguments: str) -> str:
        assert main(["record", "--out", str(tmp_path / "run.safetensors"), *arguments]) == 2
        printed, errors = capsys.readouterr()
        assert not printed and errors.startswith("hf-onlinespec: error: ")
        return errors

    return run


# benchmarks/


def test_the_rows_of_reported_runs_are_whole() -> None:
    results = BENCHMARKS / "results"
    wanted = dict(line.split()[::-1] for line in (results / "raw.sha256").read_text().splitlines())
    with tarfile.open(results / "raw.tar.gz") as rows:
        found = {
            name: hashlib.sha256(file.read()).hexdigest()
            for name in rows.getnames()
            if (file := rows.extractfile(name))
        }
    assert found == wanted and len(found) == 15
    assert not list(results.glob("*.jsonl")) and {f"{Path(name).stem}.md" for name in found} <= set(os.listdir(results))


def test_streams_are_the_same_for_the_same_seed(scripts: SimpleNamespace, pair: EmbeddedPair) -> None:
    streams = scripts.streams
    kept = {prompt.text for prompt in streams.spare(64)}
    assert len(kept) == 3 * streams.SPARE
    for name, make in streams.STREAMS.items():
        if name == "real":
            continue
        stream = make(0, 30, 64)
        assert stream == make(0, 30, 64) != make(1, 30, 64), name
        texts = [prompt.text for prompt in stream]
        assert len(set(texts)) == len(texts) == (90 if name == "drift" else 30), name
        assert not kept & set(texts), name
    assert [p.domain for p in streams.drift(0, 2, 8)] == ["shell"] * 2 + ["orders"] * 2 + ["shell"] * 2
    assert streams.segments(streams.drift(0, 2, 8)) == [1, 1, 2, 2, 3, 3]
    assert streams.segments(streams.alternating(0, 4, 8)) == [1, 2, 3, 4]
    assert len(streams.one_off(0, 1000, 8)) == 200
    assert {p.domain for p in streams.one_off(0, 200, 8)} == {"shell", "orders", "sql"}
    for prompt in streams.short(0, 10, 64):
        assert len(pair.tokenizer(prompt.text).input_ids) == 3 and prompt.new_tokens == 8


def test_real_prompts(scripts: SimpleNamespace, data_folder: Path) -> None:
    stream = scripts.streams.real(0, 2, 8)
    assert stream == scripts.streams.real(0, 2, 8)
    assert len(stream) == 2 * len(list((data_folder / "streams").glob("*.jsonl")))


def test_real_prompts_need_their_folder(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ONLINESPEC_DATA", raising=False)
    with pytest.raises(SystemExit, match="HF_ONLINESPEC_DATA"):
        scripts.streams.real(0, 2, 8)


def test_the_padded_target_computes_the_same_function(scripts: SimpleNamespace, pair: EmbeddedPair) -> None:
    padded = scripts.padded.padded(pair.target, 20)  # more than it has: the copies start anew
    assert padded.config.num_hidden_layers == len(padded.model.layers) == 36
    assert pair.target.config.num_hidden_layers == 16
    calls = bench.ForwardClock()
    for layer in padded.model.layers:
        calls.watch(layer)
    inputs = pair.tokenizer(prompts("orders")[0], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(padded(**inputs).logits, pair.target(**inputs).logits)
    assert calls.calls == 36
    outputs = [model.generate(**inputs, max_new_tokens=6, do_sample=False) for model in (padded, pair.target)]
    assert torch.equal(*outputs)
    extra = dict(padded.model.layers[-1].named_parameters())
    assert all(bool(weight.any()) != name.startswith(scripts.padded.SILENT) for name, weight in extra.items())


def test_arms_are_made_anew(scripts: SimpleNamespace) -> None:
    settings = scripts.baselines.Settings(assistant_tokens=3, confidence=0.6, lookup_tokens=2)
    made, again = (scripts.baselines.arms(settings, seed=0) for _ in range(2))
    assert set(scripts.baselines.STATIC) < set(made)
    for name, make in made.items():
        draft = make().get("assistant_model")
        assert draft is None or draft is not again[name]().get("assistant_model"), name
    stock = {
        name: made[f"transformers {name}"]()["assistant_model"].generation_config for name in ("fixed", "heuristic")
    }
    assert stock["fixed"].num_assistant_tokens == 3 and stock["fixed"].num_assistant_tokens_schedule == "constant"
    assert stock["heuristic"].num_assistant_tokens_schedule == "heuristic"
    assert made["transformers default"]()["assistant_model"].generation_config.num_assistant_tokens is None
    assert made["prompt lookup"]() == {"prompt_lookup_num_tokens": 2}


def test_speed_writes_rows_report_and_figure(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ASSISTANT_TOKENS", "CONFIDENCES", "LOOKUP_TOKENS"):
        monkeypatch.setattr(scripts.baselines, name, getattr(scripts.baselines, name)[:1])
    arms = ["plain", "transformers fixed", "prompt lookup", "frozen k=2", "ours"]
    options = ["--prompts", "1", "--new-tokens", "4", "--seeds", "2", "--calibration", "1", "--extra-layers", "1"]
    scripts.speed.main([*options, "--arms", *arms, "--out", str(tmp_path)])
    rows = tmp_path / "speed_drift_T0_padded1.jsonl"
    header, records = scripts.speed.read(rows)
    assert header["requests"] == 6 and header["extra_layers"] == 1 and header["machine"]["threads"] == 1
    assert [(r.seed, r.request, r.arm) for r in records] == [(s, i, a) for s in (0, 1) for i in range(3) for a in arms]
    watched = {"transformers fixed", "frozen k=2"}
    assert all((r.draft_forward_s > 0) == (r.arm in watched) for r in records)
    assert all(0 < r.target_forward_s + r.draft_forward_s < r.wall_time_s for r in records)

    report = rows.with_suffix(".md").read_text(encoding="utf-8")
    titles = [line for line in report.splitlines() if line.startswith("#")]
    assert len(titles) == 5 and all("cost-padded with 1 layers" in title for title in titles)
    for words in (
        "6 of 6 requests, 2 seeds.",
        "| 2 orders | ours |",
        "best static choice in hindsight",
        "| frozen k=2 |",
    ):
        assert words in report
    assert "Interrupted" not in report
    assert rows.with_suffix(".png").read_bytes().startswith(PNG)

    # What an interrupted run leaves: whole requests and the start of another.
    lines = rows.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[: 1 + 2 * len(arms) + 2]))
    scripts.speed.main(["--report", str(cut)])
    assert "**Interrupted: only the finished requests count.**" in cut.with_suffix(".md").read_text(encoding="utf-8")
    assert "2 of 6 requests, 1 seeds." in capsys.readouterr().out


def test_break_even(scripts: SimpleNamespace) -> None:
    needed = scripts.break_even
    for k in (1, 4, 8):
        for alpha in (0.0, 0.3, 0.9, 1.0):
            tau = needed.expected_tokens(alpha, k)
            assert needed.acceptance_rate(tau, k) == pytest.approx(alpha, abs=1e-6)
        assert needed.acceptance_rate(k + 1.01, k) is None
    costs = {n: 1.0 for n in needed.POSITIONS}
    first = needed.table(costs, draft_s=0.25, update_s=0.0, new_tokens=10).splitlines()[2]
    assert first == "| 1 | 0.25 | 1.00 | 1.25 | 0.25 | 1.25 | 0.25 |"
    dear = needed.table(costs, draft_s=0.25, update_s=5.0, new_tokens=10).splitlines()[2]
    assert dear == "| 1 | 0.25 | 1.00 | 1.25 | 0.25 | 2.50 | never |"
    assert "| inf | never |" in needed.table(costs, draft_s=0.25, update_s=10.0, new_tokens=10)


def test_costs_are_measured_at_every_length(scripts: SimpleNamespace) -> None:
    times = scripts.break_even.forward_times_s(tiny_llama(1), context=5, repeats=2)
    assert list(times) == list(scripts.break_even.POSITIONS) and all(time > 0 for time in times.values())
