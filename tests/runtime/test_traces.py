"""Requests are reported where they were asked to be; what a trace does costs no answer; without traces nothing is done."""

from __future__ import annotations

import copy
import json
import logging
import os
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hf_onlinespec import (
    ArtifactError,
    ConfigError,
    MissingExtraError,
    OnlineDraft,
    OnlineSpecConfig,
    RequestReport,
    Trace,
    UpdateReport,
    online_memory,
)
from hf_onlinespec.config import allowed
from hf_onlinespec.runtime.traces import Traces
from tests.conftest import tiny_llama

LEARNS = dict(lookahead=3, update_every=1, replay_passes=1, rank=4, lr=1e-3)


class Kept(Trace):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.requests: list[RequestReport] = []
        self.updates: list[UpdateReport] = []
        self.order: list[str] = []

    def on_request(self, report: RequestReport) -> None:
        self.requests.append(report)
        self.order.append("request")

    def on_update(self, report: UpdateReport) -> None:
        self.updates.append(report)
        self.order.append(report.kind)


class Failing(Kept):
    """Raises while `raises` is set."""

    raises: type[BaseException] | None = OSError

    def on_request(self, report: RequestReport) -> None:
        super().on_request(report)
        if self.raises is not None:
            raise self.raises("the disk is full")


def generate(target, prompt, draft, new_tokens=8, **kwargs) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    return target.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, **kwargs
    )


# What is reported


def test_an_object_is_told_of_every_gradient_step_and_then_of_the_request(target, draft_model, prompt) -> None:
    kept = Kept()
    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=kept, **LEARNS))
    for _ in range(2):
        generate(target, prompt, draft)
    assert kept.order == ["new", "replay", "request"] * 2
    assert [report.step for report in kept.updates] == [1, 2, 3, 4]
    assert all(report.loss > 0 and report.time_s > 0 for report in kept.updates)
    first, last = kept.requests
    call = draft.metrics.last
    assert (first.request, last.request) == (1, 2)
    assert (last.new_tokens, last.rounds, last.updates) == (8, call.rounds, 2)
    assert last.acceptance_length == 8 / call.rounds and last.acceptance_rate == call.acceptance_rate
    assert 0 < last.tokens_per_s < last.decode_tokens_per_s and 0 < last.update_share < 1
    assert last.loss == pytest.approx(kept.updates[2].loss)
    assert set(last.sources) == {"plain", "memory", "model", "memory+model"}
    assert sum(last.sources.values()) == call.rounds
    assert "lookahead=3 was asked for" in last.drafting and last.learning
    assert draft.metrics.failed_reports == 0


def test_sources_say_who_drafted(target, draft_model, prompt) -> None:
    kept = Kept()
    model = OnlineDraft(draft_model, OnlineSpecConfig(report_to=kept, memory_tokens=0, recycle=False, **LEARNS))
    generate(target, prompt, model)
    rounds = model.metrics.last.rounds
    # A round for the last token alone has no room for a draft.
    assert kept.requests[0].sources["model"] >= rounds - 1 and kept.requests[0].sources["memory"] == 0
    config = OnlineSpecConfig(report_to=kept, lookahead=3)  # a number: no clock decides
    for _ in range(2):
        target.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, onlinespec=config
        )
    assert kept.requests[-1].sources["memory"] > 0 and kept.requests[-1].sources["model"] == 0
    total = online_memory(target).metrics
    assert total.sources["memory"] == sum(report.sources["memory"] for report in kept.requests[1:])


def test_an_ensemble_reports_its_weights_and_learning_when_idle_its_steps(target, draft_model, prompt) -> None:
    kept = Kept()
    config = OnlineSpecConfig(report_to=[kept], learner="ensemble", experts=2, update_when="idle", **LEARNS)
    draft = OnlineDraft(draft_model, config)
    generate(target, prompt, draft)
    assert draft.catch_up(60)
    assert kept.order[0] == "request" and {report.kind for report in kept.updates} == {"new", "replay"}
    assert len(kept.updates) == draft.metrics.idle_updates > 0
    assert draft.metrics.mean_loss is not None and kept.requests[0].loss is None
    generate(target, prompt, draft)
    assert len(kept.requests[-1].expert_weights) == 3
    assert sum(kept.requests[-1].expert_weights) == pytest.approx(1.0)


def test_a_call_that_is_broken_off_is_reported_too(target, draft_model, prompt) -> None:
    kept = Kept()
    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=kept, **LEARNS))

    def breaks(tokens: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if tokens.shape[1] > prompt.shape[1] + 3:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        generate(target, prompt, draft, stopping_criteria=[breaks])
    assert len(kept.requests) == 1 and kept.requests[0].new_tokens < 8


def test_requests_are_one_line_each_in_the_log_at_info_without_their_text(target, draft_model, prompt, caplog) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**LEARNS))
    generate(target, prompt, draft)
    assert "hf_onlinespec.requests" not in {record.name for record in caplog.records}
    with caplog.at_level(logging.INFO, "hf_onlinespec"):
        generate(target, prompt, draft)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_onlinespec.requests"]
    assert len(lines) == 1 and lines[0].startswith("request 2: 8 tokens in ") and "\n" not in lines[0]
    assert "tokens per target forward" in lines[0] and "tokens/s" in lines[0] and "loss" in lines[0]


# Nothing that a trace does costs an answer


@pytest.mark.failures
def test_a_trace_that_raises_costs_no_answer_and_is_left_out_for_a_while(target, draft_model, prompt, caplog) -> None:
    plain = generate(target, prompt, None)
    failing, kept = Failing(), Kept()
    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=[failing, kept], **LEARNS))
    for _ in range(8):
        assert torch.equal(generate(target, prompt, draft), plain)
    assert len(kept.requests) == 8  # the other one goes on
    assert len(failing.requests) == 3  # 1, 3 and 6: after pauses of 1 and 2 requests
    assert draft.metrics.failed_reports == 3 and draft.metrics.failed_updates == 0
    told = [record.getMessage() for record in caplog.records if "Reporting to Failing" in record.getMessage()]
    assert len(told) == 1 and "the disk is full" in told[0]
    failing.raises = None
    for _ in range(8):
        generate(target, prompt, draft)
    assert draft.metrics.failed_reports == 3 and len(failing.requests) > 4


def test_whoever_stops_the_program_in_a_trace_stops_it(target, draft_model, prompt) -> None:
    failing = Failing()
    failing.raises = KeyboardInterrupt
    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=failing, **LEARNS))
    with pytest.raises(KeyboardInterrupt):
        generate(target, prompt, draft)


def test_a_trace_may_save_the_draft(target, draft_model, prompt, tmp_path) -> None:
    class Saving(Kept):
        def on_request(self, report: RequestReport) -> None:
            draft.save_pretrained(tmp_path / "saved")

    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=Saving(), **LEARNS))
    generate(target, prompt, draft)
    assert (tmp_path / "saved" / "adapter_config.json").is_file() and draft.metrics.failed_reports == 0


# Off by default


def test_nothing_is_written_or_called_by_default(target, draft_model, prompt, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Traces, "flush", lambda *arguments: pytest.fail("reported"))
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**LEARNS))
    generate(target, prompt, draft)
    assert OnlineSpecConfig().report_to == () and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", [None, "none", ["none"], [], ()])
def test_none_is_none_as_in_the_trainer(wanted) -> None:
    assert OnlineSpecConfig(report_to=wanted).report_to == ()


# Settings


@pytest.mark.parametrize("wanted", ["wandb", ["jsonl", "tensorbord"], 3, Kept, object(), ["all", "jsonl"], [["jsonl"]]])
def test_what_is_no_trace_is_refused_by_name(wanted) -> None:
    with pytest.raises(ConfigError, match=r"report_to=.*'tensorboard', 'trackio', 'jsonl'.*hf_onlinespec\.Trace"):
        OnlineSpecConfig(report_to=wanted)


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(name, monkeypatch) -> None:
    monkeypatch.setattr(allowed, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=rf"{name}.*pip install") as caught:
        OnlineSpecConfig(report_to=("jsonl", name))
    assert isinstance(caught.value, ImportError)
    assert OnlineSpecConfig(report_to="all").report_to == ("jsonl",)


@pytest.mark.parametrize(
    ("name", "value"), [("logging_dir", 3), ("logging_dir", ""), ("project", None), ("run_name", 5)]
)
def test_bad_names_are_refused(name, value) -> None:
    with pytest.raises(ConfigError, match=name):
        OnlineSpecConfig(**{name: value})


@pytest.mark.skipif(os.name != "posix", reason="folders of POSIX")
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(draft_model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging_dir=.*file"):
        OnlineDraft(draft_model, OnlineSpecConfig(report_to="jsonl", logging_dir=tmp_path / "file" / "runs"))


def test_settings_travel_through_json_without_objects() -> None:
    config = OnlineSpecConfig(report_to=["jsonl", Kept()], logging_dir=Path("runs/a"), project="p", run_name="r")
    values = json.loads(config.to_json())
    assert (values["report_to"], values["logging_dir"]) == (["jsonl"], "runs/a")
    assert OnlineSpecConfig.from_dict(values) == OnlineSpecConfig(
        report_to="jsonl", logging_dir="runs/a", project="p", run_name="r"
    )


def test_where_a_process_reports_is_no_part_of_a_saved_draft(target, draft_model, prompt, tmp_path) -> None:
    kept = Kept()
    config = OnlineSpecConfig(report_to=[kept, "jsonl"], logging_dir=tmp_path / "secret_runs", **LEARNS)
    draft = OnlineDraft(draft_model, config)
    generate(target, prompt, draft)
    folder = tmp_path / "saved"
    draft.save_pretrained(folder)
    for file in folder.iterdir():
        assert b"secret_runs" not in file.read_bytes() and b"report_to" not in file.read_bytes(), file.name
    lines = len((tmp_path / "secret_runs" / "onlinespec.jsonl").read_text().splitlines())
    again = OnlineDraft.from_pretrained(folder, base_model=tiny_llama(2))
    generate(target, prompt, again)
    assert again.settings == OnlineSpecConfig(**LEARNS)
    assert len(kept.requests) == 1, "its audit, its copy or its successor reported"
    assert len((tmp_path / "secret_runs" / "onlinespec.jsonl").read_text().splitlines()) == lines
    again.report_to(kept)
    generate(target, prompt, again)
    assert len(kept.requests) == 2 and kept.requests[-1].request == 3


def test_a_folder_from_elsewhere_cannot_say_where_this_machine_writes(draft_model, tmp_path) -> None:
    from hf_onlinespec.share.folder import CONFIG
    from hf_onlinespec.share.manifest import own_checksum

    OnlineDraft(draft_model, OnlineSpecConfig(**LEARNS)).save_pretrained(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / CONFIG).read_text())
    manifest["settings"] |= {"report_to": ["jsonl"], "logging_dir": str(tmp_path / "elsewhere")}
    manifest["checksum"] = own_checksum({name: value for name, value in manifest.items() if name != "checksum"})
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"logging_dir.*not taken from files"):
        OnlineDraft.from_pretrained(tmp_path / "saved", base_model=tiny_llama(2))
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ConfigError, match="not taken from files"):
        GenerationConfig.from_dict({"onlinespec": {"report_to": ["jsonl"]}})


def test_a_generation_config_keeps_the_object_in_the_process_and_out_of_files(target, prompt, tmp_path) -> None:
    kept = Kept()
    config = OnlineSpecConfig(report_to=kept, logging_dir=tmp_path / "secret_runs")
    target.generation_config.onlinespec = config
    target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert len(kept.requests) == 1
    copied = copy.deepcopy(GenerationConfig(onlinespec=config))
    assert copied.onlinespec.report_to[0] is kept
    copied.save_pretrained(tmp_path)
    assert "secret_runs" not in (tmp_path / "generation_config.json").read_text()
    assert GenerationConfig.from_pretrained(tmp_path).onlinespec == OnlineSpecConfig()


def test_another_wish_is_told_how_to_be_made(target, draft_model, prompt) -> None:
    kept = Kept()
    draft = OnlineDraft(draft_model, OnlineSpecConfig(report_to=kept, **LEARNS))
    generate(target, prompt, draft, onlinespec=draft.settings)
    with pytest.raises(ConfigError, match=r"report_to\(\.\.\.\)"):
        generate(target, prompt, draft, onlinespec=OnlineSpecConfig(report_to=Kept(), **LEARNS))
    draft.report_to("none")
    generate(target, prompt, draft)
    assert len(kept.requests) == 1


# Where it goes


def test_json_lines_hold_every_request_and_step(target, draft_model, prompt, tmp_path) -> None:
    config = OnlineSpecConfig(report_to="jsonl", logging_dir=tmp_path / "runs", **LEARNS)
    draft = OnlineDraft(draft_model, config)
    for _ in range(2):
        generate(target, prompt, draft)
    text = (tmp_path / "runs" / "onlinespec.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["update", "update", "request"] * 2
    assert lines[-1]["request"] == 2 and lines[-1]["acceptance_length"] == draft.metrics.last.acceptance_length
    assert lines[-1]["loss"] == pytest.approx(lines[-3]["loss"]) and lines[-3]["kind"] == "new"


def test_without_a_folder_a_new_one_under_runs_is_made(target, prompt, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = OnlineSpecConfig(report_to="jsonl")
    target.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, onlinespec=config
    )
    assert len(list(tmp_path.glob("runs/*/onlinespec.jsonl"))) == 1
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "named"))
    online_memory(target).report_to("jsonl")
    target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, onlinespec=True)
    assert (tmp_path / "named" / "onlinespec.jsonl").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_a_forked_child_appends_to_the_same_file(target, draft_model, prompt, tmp_path) -> None:
    config = OnlineSpecConfig(report_to="jsonl", logging_dir=tmp_path, **LEARNS)
    draft = OnlineDraft(draft_model, config)
    generate(target, prompt, draft)
    child = os.fork()
    if not child:
        code = 1
        try:
            generate(target, prompt, draft)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    generate(target, prompt, draft)
    lines = [json.loads(line) for line in (tmp_path / "onlinespec.jsonl").read_text().splitlines()]
    assert [line["request"] for line in lines if line["event"] == "request"] == [1, 2, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_curves_and_decisions(target, draft_model, prompt, tmp_path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "hf_onlinespec[report]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = OnlineSpecConfig(report_to=("tensorboard",), logging_dir=tmp_path, **LEARNS)
    draft = OnlineDraft(draft_model, config)
    for _ in range(3):
        generate(target, prompt, draft)
    assert draft.metrics.failed_reports == 0
    found = EventAccumulator(str(tmp_path)).Reload()  # before the writer is closed: every request is flushed
    curve = found.Scalars("request/acceptance_length")
    assert [point.step for point in curve] == [1, 2, 3]
    assert curve[-1].value == pytest.approx(draft.metrics.last.acceptance_length)
    assert [point.step for point in found.Scalars("update/loss_new")] == [1, 3, 5]
    assert {"request/tokens_per_s", "request/decode_tokens_per_s", "request/update_share", "request/loss"} <= set(
        found.Tags()["scalars"]
    )
    said = found.Tensors("decisions/drafting/text_summary")
    assert len(said) == 1 and b"lookahead=3 was asked for" in said[0].tensor_proto.string_val[0]
    draft.report_to("none")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_trackio_keeps_the_numbers_in_its_local_database(target, draft_model, prompt, tmp_path, monkeypatch) -> None:
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason='trackio is not installed: pip install "hf_onlinespec[report]"')
    config = OnlineSpecConfig(report_to="trackio", project="hf-onlinespec-test", run_name="one", **LEARNS)
    draft = OnlineDraft(draft_model, config)
    for _ in range(2):
        generate(target, prompt, draft)
    assert draft.metrics.failed_reports == 0
    draft.report_to("none")  # ends the run, and writes what is left
    folder = Path(trackio.utils.TRACKIO_DIR)
    with sqlite3.connect(folder / "hf-onlinespec-test.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    requests = [row for row in rows if "request/acceptance_length" in row]
    assert requests[-1]["request/acceptance_length"] == pytest.approx(draft.metrics.last.acceptance_length)
    assert len(requests) == 2 and "lookahead=3" in requests[-1]["decisions/drafting"]
