"""Draft heads in every command that takes --draft or a saved draft."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_onlinespec import DraftError, OnlineDraft
from hf_onlinespec.adapt.feedback import Feedback, Teacher
from hf_onlinespec.cli import common
from hf_onlinespec.cli.loading import load_config, load_pair, load_tokenizer
from hf_onlinespec.cli.trial import TrySettings, run_try
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.heads.config import Eagle1Config, Eagle3Config, HydraConfig
from hf_onlinespec.heads.eagle1 import Eagle1Head
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.hydra import HydraHead
from hf_onlinespec.heads.outline import HeadOutline
from hf_onlinespec.heads.reading import read_head
from hf_onlinespec.heads.writing import write_head
from hf_onlinespec.measure import bench, trial
from hf_onlinespec.measure.recording import Recorded, Recording
from hf_onlinespec.measure.regret import kept_chances
from hf_onlinespec.models.identity import GROWN, PACKAGED, SMOLLM2_HEAD
from hf_onlinespec.serve import run
from hf_onlinespec.share.folder import ADAPTER, CARD
from hf_onlinespec_cli import main
from tests.conftest import tiny_llama
from tests.loopback_hub import LoopbackHub
from tests.measure.test_trial import ticking

pytestmark = pytest.mark.usefixtures("process_settings")

VOCABULARY, IDS = 2048, 300
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": VOCABULARY}


@pytest.fixture
def target(pair: EmbeddedPair, tmp_path: Path) -> Path:
    model = tiny_llama(3, vocab=VOCABULARY, layers=6, hidden=32)
    model.save_pretrained(tmp_path / "target")
    pair.tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def head(target: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = Eagle3Config(**SIZES, draft_vocab_size=IDS, reads=(2, 3, 4))
    ids = torch.randperm(VOCABULARY)[:IDS].sort().values
    write_head(Eagle3Head(config, ids), tmp_path / "head", "eagle3", target_config=load_config("TARGET", str(target)))
    return tmp_path / "head"


@pytest.fixture
def evolved(target: Path, head: Path, tmp_path: Path) -> Path:
    """What the head learned from two requests."""
    model, draft = pair_of(target, head)
    draft.save_pretrained(tmp_path / "fresh")
    served(model, draft)
    draft.save_pretrained(tmp_path / "evolved")
    return tmp_path / "evolved"


def pair_of(target: Path, draft: Path, base: Path | None = None) -> tuple[Any, OnlineDraft]:
    config, tokenizer = load_config("TARGET", str(target)), load_tokenizer("TARGET", str(target))
    model, found = load_pair(
        str(target), str(draft), config, tokenizer, "auto", CPU, None if base is None else str(base)
    )
    assert found is not None
    return model, found


def served(model: Any, draft: OnlineDraft) -> None:
    for i in range(2):
        prompt = torch.arange(5 + i, 15 + i)[None]
        model.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=draft)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def test_chat_drafts_with_a_head_saves_what_it_learned_and_goes_on_from_it(
    target: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    arguments = ("chat", target, "--new-tokens", "24", "--temperature", "0", "--device", "cpu", "--save", saved)
    for draft, requests in ((head, 1), (saved, 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO("order 12 boxes\n"))
        assert said(capsys, *arguments, "--draft", draft).strip()
        model = pair_of(target, saved)[0]
        resumed = OnlineDraft.from_pretrained(saved, target=model)
        assert resumed.metrics.requests == requests and resumed.metrics.drafted_tokens > 0


def test_a_saved_head_goes_on_with_the_head_that_an_option_names(target: Path, head: Path, evolved: Path) -> None:
    """As `serve --draft HEAD --save FOLDER` resumes."""
    _, named = pair_of(target, evolved)
    head.rename(head.parent / "elsewhere")
    model, moved = pair_of(target, evolved, head.parent / "elsewhere")
    assert moved.steps == named.steps > 0 and moved.device == model.device


def test_serve_drafts_with_a_head_and_goes_on_from_what_it_saved(
    target: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, steps = tmp_path / "saved", []

    def one_request(model: Any, tokenizer: Any, drafts: OnlineDraft, *_: object) -> int:
        served(model, drafts)
        drafts.save_pretrained(saved)
        steps.append(drafts.steps)
        return 0

    monkeypatch.setattr(run, "serve_model", one_request)  # the server's packages may not be here
    monkeypatch.setitem(common.PACKAGES, "serve", ())
    monkeypatch.setitem(sys.modules, "hf_onlinespec.serve.app", ModuleType("app"))
    arguments = ("serve", target, "--draft", head, "--save", saved, "--port", "0", "--device", "cpu")
    said(capsys, *arguments)
    assert f"The draft saved in {saved} goes on: 2 requests" in said(capsys, *arguments)
    assert steps[1] > steps[0] > 0


def test_a_head_of_another_target_is_refused_before_weights_are_read(
    head: Path, evolved: Path, pair: EmbeddedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_llama(3, vocab=VOCABULARY, layers=6, hidden=48).save_pretrained(other)
    pair.tokenizer.save_pretrained(other)
    (other / "model.safetensors").write_bytes(b"")  # not to be read
    for draft in (head, evolved):
        capsys.readouterr()
        told = refused(capsys, "chat", other, "--draft", draft)
        assert "hidden_size=32" in told and "belongs to another one" in told and f"--draft {draft}" in told
    with pytest.raises(DraftError, match="hidden_size"):
        run_try(TrySettings(str(other), str(head), device="cpu"))


def test_a_head_is_no_whole_model(target: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "given as --draft" in refused(capsys, "chat", head)


@pytest.fixture
def recorded(target: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A recording for the head, of two sampled answers."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "run.safetensors"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts("orders")[:2]))
    files = ("--prompts", file, "--out", out, "--new-tokens", "6", "--temperature", "0.8")
    said(capsys, "record", "--target", target, "--draft", head, *files, "--device", "cpu")
    return out


def test_a_stream_is_recorded_for_a_head_and_its_regret_is_told(
    target: Path, head: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = Recording.load(recorded)
    model, draft = pair_of(target, head)
    ids, trainable = recording.draft_ids, draft.trainable
    assert ids is not None and trainable.ids is not None and torch.equal(ids, trainable.ids)
    settings = json.dumps({"rank": 4, "alpha": 4.0})
    told = said(capsys, "regret", recorded, "--config", settings, "--out", tmp_path / "out", "--device", "cpu")
    assert "dynamic regret" in told
    report = json.loads((tmp_path / "out" / "regret.json").read_text(encoding="utf-8"))
    assert sum(report["fixed"]["losses"]) < sum(report["frozen"]["losses"])
    draft.serves(model)
    for i, request in enumerate(recording.requests):
        text = request.feedback.tokens[None]
        with torch.no_grad():
            log_p = model(text[:, :-1]).logits[0, -6:].float()
        best_is_known = torch.isin(log_p.argmax(-1), ids)  # elsewhere a head learns nothing, and is taken to be wrong
        log_p, log_q = log_p[:, ids] / 0.8, trainable.logits(text[:, :-1], 6)[0].float() / 0.8
        p, q = log_p.softmax(-1), log_q.softmax(-1)
        overlap = torch.where(best_is_known, torch.minimum(p, q).sum(-1), 0.0)
        assert report["frozen"]["tv"][i] == pytest.approx(1 - float(overlap.mean()), abs=1e-4)


def test_a_stream_is_replayed_for_the_head_and_the_target_that_it_was_recorded_for(
    target: Path, head: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = Recording.load(recorded)
    assert (recording.target, recording.draft) == (str(target), str(head))
    out = ("--out", tmp_path / "out", "--device", "cpu")
    replace(recording, target="").save(tmp_path / "nameless")
    assert "Give --target" in refused(capsys, "regret", tmp_path / "nameless", *out)
    assert recording.draft_ids is not None
    replace(recording, draft_ids=recording.draft_ids.flip(0)).save(tmp_path / "other")
    assert f"a head that proposes {IDS} tokens" in refused(capsys, "regret", tmp_path / "other", *out)
    assert f"a head that proposes {IDS} tokens; the draft is a draft that proposes all" in refused(
        capsys, "regret", recorded, "--draft", target, *out
    )


def test_a_token_that_a_head_does_not_propose_is_never_drafted() -> None:
    teacher = Teacher.from_logits(torch.zeros(2, 8), 1.0, 2, torch.tensor([2, 5, 6]))
    request = Recorded("", Feedback(torch.tensor([1, 5, 3]), teacher), torch.tensor([0.5, 0.5]).log())
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])  # of the ids 2, 5, 6
    ids = torch.tensor([2, 5, 6])
    assert kept_chances(request, logits, 0.0, ids) == [1.0, 0.0]
    chance = float(logits[0].softmax(-1)[1]) / 0.5
    assert kept_chances(request, logits, 1.0, ids) == pytest.approx([min(1.0, chance), 0.0])


def test_try_measures_a_head_without_transformers_assisted_generation(
    target: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "WARM_UP_TOKENS", 2)
    monkeypatch.setattr(bench, "WARM_UPS", 1)
    file, out, saved = tmp_path / "mine.jsonl", tmp_path / "out.json", tmp_path / "saved"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts("orders")[:2]))
    settings = TrySettings(str(target), str(head), file, 1e6, None, out, saved, "cpu", new_tokens=6)
    assert run_try(settings, clock=ticking()) == 0
    found = json.loads(out.read_text())
    assert {record["arm"] for record in found["requests"]} == {"plain", "prompt lookup 3", "prompt lookup 10", "ours"}
    assert any("runs no draft heads" in note for note in found["notes"])
    assert found["models"]["is_head"] and f"hf_onlinespec.attach(model, {str(saved)!r})" in found["code"]
    assert pair_of(target, saved)[1].metrics.requests == 2


def test_the_head_of_the_package_is_a_draft_by_its_name(
    target: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGED, SMOLLM2_HEAD, head)
    saved = tmp_path / "saved"
    monkeypatch.setattr("sys.stdin", io.StringIO("order 12 boxes\n"))
    said(capsys, "chat", target, "--new-tokens", "24", "--device", "cpu", "--save", saved, "--draft", SMOLLM2_HEAD)
    assert f"base: name {SMOLLM2_HEAD}" in said(capsys, "inspect", saved)
    assert "EAGLE-3, in the form 'eagle3'" in said(capsys, "inspect", SMOLLM2_HEAD)
    assert pair_of(target, saved)[1].metrics.drafted_tokens > 0


def test_a_grown_head_is_saved_and_goes_on(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    for draft, requests in ((GROWN, 1), (saved, 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO("order 12 boxes\n"))
        said(capsys, "chat", target, "--new-tokens", "8", "--device", "cpu", "--save", saved, "--draft", draft)
        assert pair_of(target, saved)[1].metrics.requests == requests


def test_try_says_that_a_head_for_the_target_ships_with_the_package(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "WARM_UP_TOKENS", 2)
    monkeypatch.setattr(bench, "WARM_UPS", 1)
    monkeypatch.setitem(PACKAGED, SMOLLM2_HEAD, head)
    named = target.rename(target.parent / "SmolLM2-135M-Instruct")
    file, option = named.parent / "mine.jsonl", f"--draft {SMOLLM2_HEAD}"
    file.write_text(json.dumps({"prompt": "order"}) + "\n")

    def report(model: Path, draft: str | None = None) -> str:
        settings = TrySettings(str(model), draft, file, 1e6, device="cpu", new_tokens=2)
        assert run_try(settings, clock=ticking()) == 0
        return capsys.readouterr().out

    assert option in report(named)
    assert option not in report(named, SMOLLM2_HEAD)
    tiny_llama(3, vocab=VOCABULARY, layers=6, hidden=48).save_pretrained(named)
    assert option not in report(named)


def test_inspect_says_what_a_head_is(
    target: Path, head: Path, evolved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = said(capsys, "inspect", head)
    assert "EAGLE-3, in the form 'eagle3'" in out and "hidden_states[2, 3, 4]" in out
    size = sum(p.numel() for p in read_head(head, load_config("TARGET", str(target))).parameters())
    assert "300 of the target's 2,048 tokens" in out and f"{size:,} parameters" in out
    out = said(capsys, "inspect", evolved)
    assert "base: name head" in out and "learned for the target: name target" in out
    assert "EAGLE-3, reads hidden_states[2, 3, 4] of a target of 6 layers" in out and ADAPTER in out


def test_the_outline_of_a_head_is_that_of_its_kind(head: Path, tmp_path: Path) -> None:
    write_head(Eagle1Head(Eagle1Config(**SIZES)), tmp_path / "one")
    write_head(HydraHead(HydraConfig(**SIZES, num_heads=2)), tmp_path / "hydra")
    one, hydra = HeadOutline.read(tmp_path / "one"), HeadOutline.read(tmp_path / "hydra")
    assert (one.kind, one.reads, one.draft_vocabulary, one.vocabulary) == ("EAGLE-1", (-1,), None, VOCABULARY)
    assert (hydra.kind, hydra.reads, hydra.draft_vocabulary) == ("Hydra", (-1,), VOCABULARY)
    config = json.loads((head / "config.json").read_text())
    for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids"):
        config.pop(key, None)
    (head / "config.json").write_text(json.dumps(config | {"draft_vocab_size": IDS}))
    assert HeadOutline.read(head).reads is None


@pytest.mark.parametrize("form", ["eagle3", "speculators"])
def test_merge_exports_a_head_in_a_form(
    target: Path, evolved: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "merge", evolved, "--export", "--out", tmp_path / "x")
    assert "--target target: " in told  # a folder's name: where it lies is not in the file
    out = tmp_path / form
    said(capsys, "merge", evolved, "--export", "--form", form, "--target", target, "--out", out)
    assert HeadOutline.read(out).form == form
    assert pair_of(target, out)[1].steps == 0
    told = refused(capsys, "merge", evolved, evolved, "--form", form, "--target", target, "--out", tmp_path / "y")
    assert f"--form {form}" in told and "--export" in told


def test_heads_are_combined_for_their_target(
    target: Path, evolved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "merge", evolved, evolved, "--rank", "2", "--target", target, "--out", tmp_path / "both")
    both, one = pair_of(target, tmp_path / "both")[1], pair_of(target, evolved)[1]
    assert both.settings.rank == 2 and len(both.lineage.merged) == 2
    assert both.artifact().target == one.artifact().target is not None


def test_a_head_is_pushed_and_pulled_and_audited_where_its_target_is_at_hand(
    hub: LoopbackHub, target: Path, evolved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "push", evolved, "me/head")
    assert hub.repos["me/head"].private
    said(capsys, "pull", "me/head", tmp_path / "pulled")
    assert "learned for the target" in said(capsys, "inspect", tmp_path / "pulled")
    capsys.readouterr()
    assert main(["audit", str(evolved), "--target", str(target), "--canaries", "1"]) in (0, 1)
    assert "| once | 0 |" in capsys.readouterr().out
    statement = ("--public", "--data-statement", "Made-up prompts.", "--target", target)
    said(capsys, "push", evolved.parent / "fresh", "me/public", *statement)
    assert "A draft head (EAGLE-3)" in hub.read("me/public", CARD).decode()
