"""`hf-onlinespec try` and its parts, on the embedded pair and on a clock that the test moves: no measured time decides anything."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console
from rich.live import Live
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_onlinespec_cli
from hf_onlinespec import OnlineDraft
from hf_onlinespec.cli.trial import TrySettings, run_try, set_aside
from hf_onlinespec.embedded import (
    FOLDER,
    SEQ2SEQ_FOLDER,
    EmbeddedPair,
    load_draft,
    load_seq2seq_pair,
    prompts,
    questions,
)
from hf_onlinespec.errors import ConfigError, OnlineSpecError
from hf_onlinespec.measure import bench, shipped, trial
from hf_onlinespec.measure.bench import Answer, Runner
from hf_onlinespec.measure.budget import LEAST_PROMPTS, LONG, SHORT, SHORTEST, WANTED_PROMPTS, Budget
from hf_onlinespec.measure.exactness import FAULT, IDENTICAL, ROUNDING, Examiner
from hf_onlinespec.measure.progress import progress
from hf_onlinespec.measure.records import PLAIN, Prompt, Record
from hf_onlinespec.measure.shipped import encoder, shipped_prompts
from hf_onlinespec.measure.summary import summarise
from hf_onlinespec.measure.trial import OURS, SPARE, Outcome, Trial
from tests.tiny_models import tiny_llama

TARGET, DRAFT = str(FOLDER / "target"), str(FOLDER / "draft")
ARMS = [PLAIN, "prompt lookup 3", "prompt lookup 10", OURS]

pytestmark = pytest.mark.usefixtures("process_settings")


def ticking(step_s: float = 1.0) -> Callable[[], float]:
    """A clock that moves on by one step whenever it is looked at."""
    steps = count()
    return lambda: step_s * next(steps)


class Hand:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of warming up and calibrating."""
    monkeypatch.setattr(trial, "WARM_UP_TOKENS", 2)
    monkeypatch.setattr(trial, "DRAFT_TOKENS", (2,))
    monkeypatch.setattr(bench, "WARM_UPS", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three prompts of two kinds: fewer than are set aside for warm-up."""
    items = [("orders", prompts("orders")[0]), ("<sql>", prompts("sql")[0]), ("orders", prompts("orders")[1])]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "domain": domain}) for domain, text in items))
    return path


def settings(file: Path | None, **values: Any) -> TrySettings:
    return TrySettings(**dict(target=TARGET, prompts=file, minutes=1e6, device="cpu", new_tokens=3) | values)


# The time


def test_as_many_prompts_as_fit_and_eight_at_least() -> None:
    clock = Hand()
    clock.now_s = 40.0
    budget = Budget(1.0, 30.0, clock)
    assert (budget.elapsed_s, budget.left_s) == (10.0, 47.0) and budget.has_room()
    budget.begin()
    done = 0
    while budget.has_room():
        clock.now_s += 4.0
        budget.finish_prompt()
        done += 1
    assert done == 11 and budget.prompt_s == 4.0 and budget.elapsed_s <= 60.0 and not budget.is_exceeded
    slow = Budget(1.0, clock.now_s, clock)
    slow.begin()
    done = 0
    while slow.has_room():
        clock.now_s += 20.0
        slow.finish_prompt()
        done += 1
    assert done == LEAST_PROMPTS and slow.is_exceeded


def test_answers_are_shortened_where_the_model_is_slow() -> None:
    budget = Budget(3.0, 0.0, Hand())
    lengths = [budget.new_tokens(token_s) for token_s in (0.001, 0.08, 0.12, 0.2, 0.5, 1.0, 100.0)]
    assert lengths[0] == LONG and lengths[-1] == SHORTEST
    assert SHORT < lengths[1] < LONG and SHORT > lengths[-2] >= SHORTEST
    assert lengths == sorted(lengths, reverse=True)
    for token_s, length in ((0.08, lengths[1]), (1.0, lengths[-2])):
        fitting = budget.left_s / (length * token_s)
        assert fitting >= (WANTED_PROMPTS if length > SHORT else LEAST_PROMPTS)


# The prompts


def test_the_shipped_prompts_cover_their_kinds_in_turns_and_name_their_sources() -> None:
    found = shipped_prompts(5)
    assert len(found) == 64 + SPARE and len({prompt.text for prompt in found}) == len(found)
    kinds = {prompt.domain for prompt in found}
    assert len(kinds) == 8 and all(prompt.new_tokens == 5 for prompt in found)
    for start in range(0, 64, 8):
        assert {prompt.domain for prompt in found[start : start + 8]} == kinds
    lines = [json.loads(line) for line in (shipped.FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    words = (shipped.FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    for source in {line["source"] for line in lines}:
        (row,) = [row for row in words.splitlines() if row.startswith(f"| `{source}` |")]
        own = [line for line in lines if line["source"] == source]
        cells = [cell.strip() for cell in row.split("|")]
        assert set(cells[2].split(", ")) == {line["kind"] for line in own} and int(cells[3]) == len(own)
        assert "MIT" in cells[5] or "CC BY 4.0" in cells[5] or "Apache-2.0" in cells[5]


def test_shipped_prompts_are_their_sources_own(data_folder: Path) -> None:
    lines = [json.loads(line) for line in (shipped.FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    for source in {line["source"] for line in lines} - {"own"}:
        with open(data_folder / "streams" / f"{source}.jsonl", encoding="utf-8") as stream:
            texts = {item["id"]: item["prompt"] for item in map(json.loads, stream)}
        assert all(texts[line["id"]] == line["prompt"] for line in lines if line["source"] == source)


def test_the_chat_template_is_applied_where_there_is_one(pair: EmbeddedPair) -> None:
    plain = encoder(pair.tokenizer)("a b")
    assert plain["input_ids"].tolist() == [pair.tokenizer("a b").input_ids]
    chat = AutoTokenizer.from_pretrained(TARGET)
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    text = chat.decode(encoder(chat)("a b")["input_ids"][0])
    assert text == "<user>a b<assistant>"


def AutoTokenizerWithTemplate(pair: EmbeddedPair) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    return tokenizer


def test_the_last_prompts_are_set_aside_where_enough_are_left() -> None:
    found = [Prompt(str(i), "kind", 1) for i in range(LEAST_PROMPTS + SPARE)]
    assert set_aside(found) == (found[:LEAST_PROMPTS], found[-SPARE:])
    assert set_aside(found[:3]) == (found[:3], [*found[:3], found[0]])


# A trial


def run(pair: EmbeddedPair, draft: Any, texts: list[str], minutes: float = 1e6, **values: Any) -> Trial:
    clock = ticking(0.5)
    found = [Prompt(text, f"kind {i % 2}", 1) for i, text in enumerate(texts)]
    spare = [Prompt(text, "spare", 1) for text in prompts("shell")[-SPARE:]]
    running = Trial(
        pair.target,
        pair.tokenizer,
        draft,
        found,
        spare,
        Budget(minutes, 0.0, clock),
        Examiner(pair.target),
        clock=clock,
        **values,
    )
    running.prepare()
    running.run()
    return running


@pytest.mark.usefixtures("quick")
def test_every_prompt_goes_through_every_arm_and_the_memory_begins_empty(pair: EmbeddedPair) -> None:
    shown: list[str] = []
    running = run(pair, None, prompts("orders")[:3], new_tokens=4, show=lambda phase, outcome: shown.append(phase))
    records = running.outcome.records
    assert [(r.request, r.arm) for r in records] == [(i, arm) for i in range(3) for arm in ARMS]
    assert all(r.wall_time_s == 0.5 and 1 <= r.new_tokens <= 4 and r.target_forwards >= 1 for r in records)
    assert all((r.output is None) == (r.arm == PLAIN) for r in records)
    assert all(r.target_forwards == r.new_tokens for r in records if r.arm == PLAIN)
    assert [phase for phase in shown if phase] == ["warming up", "prompt 1", "prompt 2", "prompt 3"]
    assert running.ours.metrics.requests == 3  # those of the warm-up are forgotten
    assert running.learned.memory_bytes > 0 and running.learned.steps == 0 and running.learned.learning_bytes == 0
    summary = summarise(running.outcome)
    assert summary.prompts == 3 and [kind.prompts for kind in summary.kinds] == [2, 1] and summary.faults == 0
    for arm in summary.arms:
        assert arm.tokens_per_s == pytest.approx(arm.new_tokens / 1.5)
        assert sum(arm.outputs.values()) == (0 if arm.arm == PLAIN else 3)


@pytest.mark.usefixtures("quick")
def test_a_draft_is_calibrated_and_ours_learns_from_its_first_values(pair: EmbeddedPair) -> None:
    draft = load_draft()
    running = run(pair, draft, prompts("orders")[:2], new_tokens=6)
    assert running.outcome.calibration is not None and running.outcome.calibration.chosen == 2
    assert running.outcome.calibration.prompts == SPARE - 1
    assert {r.arm for r in running.outcome.records} == {*ARMS, "draft 2"}
    ours = running.ours
    assert isinstance(ours, OnlineDraft) and ours.metrics.requests == 2
    assert running.learned.learning_bytes > 0 and running.learned.steps == ours.metrics.updates
    assert draft.generation_config.num_assistant_tokens is None  # the user's draft is as it was
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), load_draft().parameters(), strict=True))


@pytest.mark.usefixtures("quick")
def test_a_draft_of_another_vocabulary_size_leaves_transformers_out(pair: EmbeddedPair) -> None:
    size = pair.target.config.vocab_size
    running = run(pair, tiny_llama(1, vocab=size + 64), prompts("orders")[:1], new_tokens=2)
    assert [r.arm for r in running.outcome.records] == ARMS
    assert "another size" in running.outcome.notes[0]


@pytest.mark.usefixtures("quick")
def test_sampled_outputs_are_not_compared(pair: EmbeddedPair) -> None:
    running = run(pair, None, prompts("orders")[:2], new_tokens=4, temperature=0.8)
    assert all(r.output is None for r in running.outcome.records) and not running.outcome.examined
    assert all(not arm.outputs for arm in summarise(running.outcome).arms)


@pytest.mark.usefixtures("quick")
def test_the_time_ends_a_trial_after_eight_prompts_at_the_earliest(pair: EmbeddedPair) -> None:
    running = run(pair, None, [f"<|endoftext|>{i}" for i in range(12)], minutes=0.01, new_tokens=1)
    assert running.outcome.prompts == LEAST_PROMPTS
    (note,) = running.outcome.notes
    assert note.startswith("8 prompts, the fewest that are measured, took") and "longer than the 0.01 asked for" in note


# The command


def wrong_token(monkeypatch: pytest.MonkeyPatch, arm: dict[str, Any], token: int = 1999) -> None:
    """Lets the arm's answers carry a token that the target never said."""
    answers = Runner.answers

    def broken(self: Runner, number: int, prompt: Any, arms: Any) -> Iterator[tuple[str, Answer]]:
        for name, answer in answers(self, number, prompt, arms):
            output = answer.output.clone()
            if arms[name] == arm:
                output[0, -answer.new_tokens] = token
            yield name, replace(answer, output=output)

    monkeypatch.setattr(Runner, "answers", broken)


@pytest.mark.usefixtures("quick")
def test_it_prints_and_writes_what_it_found(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, as_json = tmp_path / "report.html", tmp_path / "all.json"
    assert run_try(settings(file, out=out, json=as_json), clock=ticking()) == 0
    printed, told = capsys.readouterr()
    assert "3 prompts" in printed and f"Written: {out}" in printed.replace("\n", "")
    for arm in ARMS:
        assert arm in printed
    assert "ours: 3 of 3 outputs are identical to plain's." in printed
    assert "Not decided: ours is" in printed and "hf_onlinespec.attach(model)" in printed
    assert re.search(r"prompt 3, \d+:\d\d left; tokens/s: plain \d", told)
    assert "\x1b" not in printed + told  # not a terminal: no escape codes

    result = json.loads(as_json.read_text(encoding="utf-8"))
    assert result["summary"]["prompts"] == 3 and len(result["requests"]) == 3 * len(ARMS) and not result["interrupted"]
    assert result["verdict"] in printed and result["code"].splitlines()[-1] in printed
    assert result["settings"]["prompts"] == str(file) and result["models"]["dtype"] == "torch.float32"

    page = out.read_text(encoding="utf-8")
    seen = Page()
    seen.feed(page)
    assert not seen.open and not seen.loads and seen.counts["svg"] == 3 and seen.counts["polyline"] == 7
    assert seen.counts["circle"] == 3 * 7 + 2 * 4
    assert result["verdict"] in seen.text and "<sql>" in seen.text and "<sql>" not in page
    for line in file.read_text().splitlines():
        assert json.loads(line)["prompt"].removeprefix("<|endoftext|>")[:20] not in seen.text


class Page(HTMLParser):
    """What a page holds, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loads, self.open, self.counts = "", list[str](), list[str](), dict[str, int]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset")]
        if tag == "script":
            self.loads.append(tag)
        if tag not in ("meta", "br", "circle", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("quick")
def test_a_fault_of_ours_ends_with_exit_code_1(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong_token(monkeypatch, {"onlinespec": True})
    as_json = tmp_path / "all.json"
    assert run_try(settings(file, json=as_json), clock=ticking()) == 1
    printed = capsys.readouterr().out
    assert "FAULT: 3 outputs of ours differ from plain generation by more than rounding." in printed
    result = json.loads(as_json.read_text(encoding="utf-8"))
    outputs = {arm["arm"]: arm["outputs"] for arm in result["summary"]["arms"]}
    assert outputs[OURS] == {IDENTICAL: 0, ROUNDING: 0, FAULT: 3} and outputs["prompt lookup 3"][FAULT] == 0
    assert all(
        d["arm"] == OURS and d["kind"] == FAULT and d["difference"]["position"] == 0 for d in result["differences"]
    )


@pytest.mark.usefixtures("quick")
def test_an_encoder_decoder_is_tried_on_what_its_encoder_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair, texts, as_json = load_seq2seq_pair(), questions("wikisql")[:3], tmp_path / "all.json"
    shutil.copytree(SEQ2SEQ_FOLDER / "target", tmp_path / "target", copy_function=shutil.copyfile)
    saved = GenerationConfig.from_pretrained(SEQ2SEQ_FOLDER / "target")
    saved.num_beams = 4  # as many encoder–decoders are saved; what is measured is greedy
    saved.save_pretrained(tmp_path / "target")
    (tmp_path / "mine.txt").write_text("\n".join(texts), encoding="utf-8")
    asked = settings(tmp_path / "mine.txt", target=str(tmp_path / "target"), json=as_json, new_tokens=6)
    assert run_try(replace(asked, draft=str(SEQ2SEQ_FOLDER / "draft")), clock=ticking()) == 0
    assert "ours: 3 of 3 outputs are identical to plain's." in capsys.readouterr().out
    result = json.loads(as_json.read_text(encoding="utf-8"))
    plain = pair.target.generate(**pair.tokenizer(texts[0], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert result["requests"][0]["new_tokens"] == plain.shape[1] - 1
    names: dict[str, Any] = {}
    exec(result["code"].replace("200", "4"), names)
    assert capsys.readouterr().out.strip() == names["tokenizer"].decode(names["output"][0], skip_special_tokens=True)
    wrong_token(monkeypatch, {"onlinespec": True}, token=1000)
    assert run_try(asked, clock=ticking()) == 1
    assert "FAULT: 3 outputs of ours differ from plain generation by more than rounding." in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_fault_of_transformers_is_counted_and_is_not_ours(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_token(monkeypatch, {"prompt_lookup_num_tokens": 3})
    assert run_try(settings(file), clock=ticking()) == 0
    printed = capsys.readouterr().out
    assert (
        "prompt lookup 3: 0 of 3 outputs are identical to plain's, 3 by a fault." in printed and "FAULT" not in printed
    )


@pytest.mark.usefixtures("quick")
def test_ctrl_c_prints_what_is_known(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt(monkeypatch, at=2)
    out = tmp_path / "report.html"
    assert run_try(settings(file, out=out), clock=ticking()) == 130
    printed = capsys.readouterr().out
    assert "Interrupted: only the finished prompts count." in printed and "2 prompts" in printed
    assert "Fewer than 8 prompts decide nothing" in printed and out.exists()


@pytest.mark.usefixtures("quick")
def test_an_error_in_the_middle_costs_no_finished_prompt(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, at=1, reason=MemoryError("no memory is left"))
    with pytest.raises(MemoryError):
        run_try(settings(file), clock=ticking())
    printed = capsys.readouterr().out
    assert "Stopped by an error (no memory is left): only the finished prompts count." in printed
    assert "ours: 1 of 1 outputs are identical to plain's." in printed


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("broken", ["json", "out", "save"])
def test_an_output_that_cannot_be_written_costs_no_other(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    paths = {"json": tmp_path / "x.json", "out": tmp_path / "x.html", "save": tmp_path / "saved"}
    file.write_text(file.read_text().splitlines()[0])
    write_text = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self == paths[broken]:
            raise OSError(28, "No space left on device")
        return write_text(self, *args, **kwargs)

    def full_folder(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    if broken == "save":
        monkeypatch.setattr(OnlineDraft, "save_pretrained", full_folder)
    assert run_try(settings(file, draft=DRAFT, **paths), clock=ticking()) == 2
    printed, told = capsys.readouterr()
    assert told.endswith(f"hf-onlinespec: error: --{broken} {paths[broken]}: No space left on device\n")
    assert "ours: 1 of 1 outputs are identical to plain's." in printed
    for name, path in paths.items():
        there = (path / "adapter_model.safetensors").exists() if name == "save" else path.exists()
        assert there == (name != broken), name


@pytest.mark.usefixtures("quick")
def test_ctrl_c_before_the_first_answer_says_so(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, at=0)
    assert (
        hf_onlinespec_cli.main(["try", TARGET, "--prompts", str(file), "--device", "cpu", "--new-tokens", "2"]) == 130
    )
    printed, told = capsys.readouterr()
    assert not printed and told.rstrip().endswith("interrupted; no result was completed.")


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, reason: BaseException | None = None) -> None:
    answers = Runner.answers

    def interrupted(self: Runner, number: int, *args: Any) -> Iterator[Any]:
        for i, found in enumerate(answers(self, number, *args)):
            if number == at and i == 1:
                raise KeyboardInterrupt if reason is None else reason
            yield found

    monkeypatch.setattr(Runner, "answers", interrupted)


@pytest.mark.usefixtures("quick")
def test_the_evolved_draft_is_saved(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    file.write_text(file.read_text().splitlines()[0])
    assert run_try(settings(file, draft=DRAFT, save=folder), clock=ticking()) == 0
    assert f"Saved: the evolved draft, {folder}" in capsys.readouterr().out.replace("\n", "")
    assert OnlineDraft.from_pretrained(folder).metrics.requests == 1

    # What was saved goes on, and is not written over by another draft.
    assert run_try(settings(file, draft=str(folder), save=folder), clock=ticking()) == 0
    printed = capsys.readouterr().out
    assert "Ours goes on from the adapter of --draft" in printed and "from_pretrained" in printed
    assert OnlineDraft.from_pretrained(folder).metrics.requests == 2
    with pytest.raises(ConfigError, match="another draft was saved there"):
        run_try(settings(file, draft=DRAFT, save=folder), clock=ticking())


@pytest.mark.usefixtures("quick")
def test_without_a_draft_saving_is_refused_at_once(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--save without --draft: there is nothing to save"):
        run_try(settings(file, save=tmp_path / "saved"), clock=ticking())
    assert not (tmp_path / "saved").exists()


@pytest.mark.usefixtures("quick")
def test_a_busy_machine_is_told(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(file.read_text().splitlines()[0])
    for load, told in ((0.1, False), (1000.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        assert run_try(settings(file, new_tokens=1), clock=ticking()) == 0
        assert ("This machine was busy when it began" in capsys.readouterr().out) == told


@pytest.mark.usefixtures("quick")
def test_few_prompts_of_ones_own_are_all_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "<|endoftext|>a"}))
    assert run_try(settings(file), clock=ticking()) == 0
    printed = capsys.readouterr().out
    assert "With fewer than 12 prompts, warm-up and calibration use prompts that are measured too." in printed
    assert "over 1 prompt). Fewer than 8 prompts decide nothing: give more." in printed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minutes": -1.0}, "--minutes -1.0: expected a value of at least 0"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"new_tokens": 0}, "--new-tokens 0"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296: expected a value from 0 to 4294967295"),
        ({"device": "meta"}, "--device meta: torch cannot use it here"),
        ({"out": Path("one"), "json": Path("x/../one")}, "--out and --json are one file"),
        ({"prompts": Path("mine.jsonl"), "out": Path("mine.jsonl")}, "--prompts and --out are one file"),
        ({"target": "/none/such"}, "TARGET /none/such: "),
        ({"draft": "/none/such"}, "/none/such: no such folder"),
        ({"prompts": Path("/none/such")}, "--prompts /none/such: the file cannot be read"),
        ({"device": "nowhere"}, "--device nowhere: torch cannot use it here"),
        ({"new_tokens": 2000}, "none of the prompts fits beside 2000 new ones"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    with pytest.raises(OnlineSpecError, match=re.escape(message)):
        run_try(settings(None, **values))


def test_outputs_that_cannot_be_written_are_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for values in ({"out": tmp_path}, {"json": tmp_path}, {"out": blocked / "x"}, {"save": blocked, "draft": DRAFT}):
        (option,) = set(values) - {"draft"}
        with pytest.raises(ConfigError, match=f"--{option} "):
            run_try(settings(None, **values))


def test_a_draft_is_not_saved_among_other_files(file: Path, tmp_path: Path) -> None:
    """A README.md of its own would be overwritten, and a model would be loaded with the draft's adapter."""
    readme = tmp_path / "mine" / "README.md"
    readme.parent.mkdir()
    readme.write_text("mine")
    (tmp_path / "mine" / ".git").mkdir()
    with pytest.raises(ConfigError, match=r"--save .*mine: 'README.md' lies there, and no saved draft"):
        run_try(settings(file, draft=DRAFT, save=readme.parent))
    assert [path.name for path in sorted(readme.parent.iterdir())] == [".git", "README.md"]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("template", ["{% for m in %}", '{{ raise_exception("no such role") }}', "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails_is_named(
    template: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    folder = copied(TARGET, tmp_path)
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        about = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(about | {"chat_template": template}))
    with pytest.raises(ConfigError, match=rf"TARGET {folder}: its chat template fails at a plain message \("):
        run_try(settings(None, target=str(folder)))


def copied(folder: str, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model", copy_function=shutil.copyfile))


@pytest.mark.usefixtures("quick")
def test_ways_of_transformers_that_fail_are_left_out_and_named(
    pair: EmbeddedPair, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'is_croppable'")

    monkeypatch.setattr(type(pair.target), "_get_candidate_generator", fails)
    assert run_try(settings(file, draft=DRAFT, new_tokens=4), clock=ticking()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for arm in ("prompt lookup 3", "prompt lookup 10", "draft 2"):
        assert (
            f"Transformers' {arm} fails with these models and was not measured (AttributeError: 'NoneType'" in printed
        )
    assert "another size" not in printed


@pytest.mark.usefixtures("quick")
def test_a_target_that_cannot_generate_is_one_line(
    pair: EmbeddedPair, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("no such thing\nat all")

    monkeypatch.setattr(type(pair.target), "forward", fails)
    with pytest.raises(
        OnlineSpecError, match=r"Plain generate fails with this target \(AttributeError: no such thing\)"
    ):
        run_try(settings(file), clock=ticking())


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("a", "a " * 600)))
    with pytest.raises(ConfigError, match=r"Prompt 2 has \d+ tokens: the target takes from 1 to 509, and 3 new ones"):
        run_try(settings(file))


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(pair: EmbeddedPair, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Hand()
    budget = Budget(2.0, 0.0, clock)
    record = Record(
        0, 1, "math", OURS, new_tokens=30, target_forwards=10, wall_time_s=2.0, update_time_s=0.0, output=None
    )
    for terminal in (True, False):
        console = Console(force_terminal=terminal, width=100, highlight=False)
        with progress(budget, console) as show:
            show("prompt 1", Outcome(records=[record]))
        printed, told = capsys.readouterr()
        seen = printed if terminal else told
        assert "prompt 1" in seen and "1:57 left" in seen and "tokens/s: ours 15.0" in seen
        assert ("\x1b[" in seen) == terminal


def test_a_long_kind_leaves_room_for_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "<|endoftext|>a", "domain": "k" * 200}))
    assert run_try(settings(file), clock=ticking()) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("kkk"))
    assert len(re.findall(r"[0-9]+\.[0-9]+", line)) == 5 and line.split()[-1] == "1"


def test_an_interrupt_while_the_bar_is_drawn_leaves_the_cursor_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    screen = io.StringIO()
    monkeypatch.setattr(Live, "refresh", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        progress(Budget(2.0, 0.0, Hand()), Console(file=screen, force_terminal=True)),
    ):
        pass
    hidden, shown = (screen.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert 0 <= hidden < shown
