"""Recorded streams and regret: exact counts against brute force, comparators that are better, bounds, bad files."""

import importlib
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_onlinespec import ConfigError, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, load_pair, prompts
from hf_onlinespec.measure.recording import Recording, record
from hf_onlinespec.measure.records import Prompt
from hf_onlinespec.measure.regret import Curve, RegretReport, evaluate, expected_rounds, kept_chances
from tests.conftest import tiny_llama
from tests.test_entry_point import entry_point

_MODULE, _FUNCTION = entry_point()
main = vars(importlib.import_module(_MODULE))[_FUNCTION]


def brute_force(kept: list[float], lookahead: int) -> float:
    """Rounds of every outcome, weighted by its chance."""
    expected = 0.0
    for outcome in itertools.product((True, False), repeat=len(kept)):
        chance = math.prod(k if same else 1 - k for k, same in zip(kept, outcome, strict=True))
        rounds, at = 0, 0
        while at < len(kept):
            run = 0
            while run < lookahead and at + run < len(kept) and outcome[at + run]:
                run += 1
            at += run + 1
            rounds += 1
        expected += chance * rounds
    return expected


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
def test_expected_rounds_against_all_outcomes(lookahead: int) -> None:
    generator = torch.Generator().manual_seed(lookahead)
    for n in (1, 2, 5, 9):
        kept = torch.rand(n, generator=generator).tolist()
        assert expected_rounds(kept, lookahead) == pytest.approx(brute_force(kept, lookahead))
    assert expected_rounds([1.0] * 12, 5) == 2 and expected_rounds([0.0] * 12, 5) == 12


@pytest.fixture(scope="module", params=[0.0, 0.8])
def recording(request: pytest.FixtureRequest) -> Recording:
    pair = load_pair()
    stream = [Prompt(text, domain, 24) for domain in ("shell", "orders") for text in prompts(domain)[:6]]
    return Recording(list(record(pair.target, pair.tokenizer, stream, request.param, seed=3)), request.param)


def test_a_recording_says_what_the_target_says(recording: Recording, tmp_path) -> None:
    """Laws, chances of the text, and all of it again from the file."""
    pair = load_pair()
    recording.save(tmp_path / "run.safetensors")
    again = Recording.load(tmp_path / "run.safetensors")
    assert again.temperature == recording.temperature and len(again.requests) == 12
    for one, other in zip(recording.requests, again.requests, strict=True):
        assert one.domain == other.domain and torch.equal(one.feedback.tokens, other.feedback.tokens)
        assert torch.equal(one.log_p, other.log_p)
        assert torch.equal(one.feedback.teacher.log_probs, other.feedback.teacher.log_probs)
        n = len(one.log_p)
        with torch.no_grad():
            logits = pair.target(one.feedback.tokens[None, :-1]).logits[0, -n:]
        log_p = (logits / (recording.temperature or 1.0)).log_softmax(-1)
        chosen = log_p.gather(-1, one.feedback.tokens[-n:, None]).squeeze(-1)
        torch.testing.assert_close(one.log_p, chosen, atol=1e-3, rtol=1e-3)
        values = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(one.feedback.teacher.log_probs[:, 0], values, atol=1e-3, rtol=1e-3)
        # The target as its own draft is always right.
        assert min(kept_chances(one, logits, recording.temperature)) > 0.999


def test_comparators_and_bounds(recording: Recording) -> None:
    report = evaluate(recording, load_draft, OnlineSpecConfig(rank=8, alpha=8.0), lookahead=4, epochs=6)
    mean = {name: sum(curve.losses) / 12 for name, curve in report.curves().items()}
    assert mean["best fixed adapter"] < mean["served"] and mean["best fixed adapter"] < mean["frozen"]
    assert report.static_regret()[-1] == pytest.approx(12 * (mean["served"] - mean["best fixed adapter"]))
    assert report.served.losses[0] == report.frozen.losses[0]  # before anything was learned
    assert report.path_length > 0 and 0 < report.gradient_variation
    assert len(report.static_regret()) == len(report.dynamic_regret()) == 12
    fixed, frozen = (report.acceptance_length(curve) for curve in (report.fixed, report.frozen))
    assert 1 <= frozen < fixed <= 5
    for curve in report.curves().values():
        assert report.bound(curve) <= report.tv_bound(curve) + 1e-9  # Pinsker
        # Where the recorded positions are all there is, the mean number of kept tokens follows from TV alone.
        assert 1 <= report.tv_bound(curve) <= 5
    assert "Static regret" in report.text()
    if recording.temperature == 0:
        assert report.bound(report.fixed) == 1.0 and math.isinf(report.fixed.kl[0])


def test_a_draft_that_says_what_the_target_says_is_accepted_whatever_part_was_recorded() -> None:
    """At a temperature at which most of what is said is not among the eight tokens that are kept."""
    stream = [Prompt(text, "orders", 16) for text in prompts("orders")[:2]]
    requests = list(record(load_draft(), load_pair().tokenizer, stream, 2.0, seed=3, top_k=8))
    report = evaluate(Recording(requests, 2.0), load_draft, OnlineSpecConfig(rank=2, alpha=2.0), lookahead=4, epochs=1)
    assert max(report.frozen.tv) < 1e-3 and max(report.frozen.kl) < 1e-3


def test_a_comparator_is_never_worse_than_the_original(recording: Recording, monkeypatch) -> None:
    """Whatever the step sizes are: these ruin the adapter, the learner's and the comparator's."""
    monkeypatch.setattr("hf_onlinespec.measure.regret.COMPARATOR_LR", 100.0)
    few = Recording(recording.requests[:4], recording.temperature)
    wild = OnlineSpecConfig(rank=4, alpha=4.0, preconditioner="none", lr=50.0, gradient_cap=None, snapshots=0)
    report = evaluate(few, load_draft, wild, lookahead=4, epochs=2)
    assert sum(report.fixed.losses) <= sum(report.frozen.losses) + 1e-6
    assert report.static_regret()[-1] > 0


def test_a_draft_that_cannot_read_the_stream_is_refused(recording: Recording) -> None:
    with pytest.raises(ConfigError, match="Request 1"):
        evaluate(recording, lambda: tiny_llama(2), OnlineSpecConfig(rank=2, alpha=2.0))


def test_the_bound_by_hand() -> None:
    curve = Curve([0.1], [0.02], [0.0008], [2.0])
    report = RegretReport(["a"], [8], 4, curve, curve, curve, curve, 0.0, 0.0, 1.0)
    assert report.tv_bound(curve) == pytest.approx(5 * (1 - 2 * 0.02))
    assert report.bound(curve) == pytest.approx(5 * (1 - 2 * 0.02))  # √(0.0008 / 2) = 0.02
    assert report.acceptance_length(curve) == 4.0


def test_half_way_by_hand() -> None:
    """Ten requests of ten tokens; frozen takes ten rounds, the best adapter five, and what serves learns at once after the fourth."""

    def curve(rounds: list[float]) -> Curve:
        return Curve([0.0] * 30, [0.0] * 30, [0.0] * 30, rounds)

    served = curve([10.0] * 4 + [5.0] * 26)
    report = RegretReport(["a"] * 30, [10] * 30, 4, served, curve([10.0] * 30), served, curve([5.0] * 30), 0, 0, 1)
    # Of eight requests, 80 tokens, half-way is 1.5 per round: at most 53.3 rounds, so at most two slow ones.
    assert report.tokens_to_half_way() == 100  # the third to the tenth request
    never = RegretReport(["a"] * 30, [10] * 30, 4, curve([10.0] * 30), *[served] * 3, 0, 0, 1)
    assert never.tokens_to_half_way() is None and "never" in never.text()


def test_the_command_line(tmp_path, capsys) -> None:
    file, run, out = tmp_path / "p.jsonl", tmp_path / "run.safetensors", tmp_path / "out"
    lines = [{"prompt": text, "domain": "shell"} for text in prompts("shell")[:2]]
    lines += [{"prompt": text} for text in prompts("orders")[:2]]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(["record", "--embedded", "--prompts", str(file), "--new-tokens", "8", "--out", str(run)]) == 0
    assert [r.domain for r in Recording.load(run).requests] == ["shell", "shell", "p", "p"]
    config = json.dumps({"rank": 2, "alpha": 2.0, "learner": "optimistic"})
    assert main(["regret", str(run), "--config", config, "--out", str(out)]) == 0
    assert "dynamic regret" in capsys.readouterr().out
    assert (out / "regret.png").stat().st_size > 1000
    assert len(json.loads((out / "regret.json").read_text(encoding="utf-8"))["served"]["losses"]) == 4
    assert "Infinity" not in (out / "regret.json").read_text(encoding="utf-8")
    assert main(["regret", str(run), "--lookahead", "0", "--out", str(out)]) == 2
    for bad in ("[1]", "{", '{"learning_rate": 1}', '{"temperature": 2.0}', '{"top_k": 8}'):
        assert main(["regret", str(run), "--config", bad, "--out", str(out)]) == 2
        assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["missing", "text", "cut", "other", "parts", "domains", "format"])
def test_files_that_are_no_recordings(recording: Recording, tmp_path, broken: str) -> None:
    path = tmp_path / "run.safetensors"
    if broken == "text":
        path.write_text("not safetensors", encoding="utf-8")
    elif broken == "other":
        save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    elif broken != "missing":
        recording.save(path)
        if broken == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            tensors = load_file(path)
            about = {"format": "1", "temperature": "0.0", "draft": "", "domains": json.dumps(["a"] * 12)}
            if broken in ("domains", "format"):
                save_file(tensors, path, metadata=about | {broken: "3"})
            else:
                save_file(tensors | {"lengths": tensors["lengths"] + 1}, path, metadata=about)
    with pytest.raises(ConfigError, match=r"run\.safetensors"):
        Recording.load(path)
