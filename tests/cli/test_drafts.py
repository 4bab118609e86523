"""The commands for evolved drafts, from the command line to the files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.share.folder import ADAPTER, CARD, CONFIG
from tests.conftest import tiny_llama
from tests.loopback_hub import LoopbackHub
from tests.share.test_artifact import REPEATABLE, TOKENS, same_state, serve
from tests.test_entry_point import entry_point

_MODULE, _FUNCTION = entry_point()
main = vars(importlib.import_module(_MODULE))[
    _FUNCTION
]  # by the name that setup.cfg has, so that these tests can be run against earlier packages
FOUND, FAILED = 1, 2  # exit codes, as the help states them
REPO = "me/draft"


@pytest.fixture
def saved(tmp_path: Path, target: PreTrainedModel) -> Path:
    """A folder with an evolved draft, whose base lies in a folder too."""
    tiny_llama(2).save_pretrained(tmp_path / "base")
    draft = OnlineDraft.from_pretrained(tmp_path / "base", config=OnlineSpecConfig(**REPEATABLE))
    serve(target, draft, range(3))
    draft.save_pretrained(tmp_path / "evolved")
    return tmp_path / "evolved"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == FAILED
    return capsys.readouterr().err


def test_inspect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", saved)
    assert "base: name base" in out and "'rank': 2" in out and "served: 3 requests, 36 new tokens" in out
    assert "acceptance length" in out and ADAPTER in out
    assert "no such folder" in refused(capsys, "inspect", saved / "nowhere")
    assert "no evolved draft" in refused(capsys, "inspect", saved.parent / "base")


def test_push_and_pull(hub: LoopbackHub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Pushed: {REPO}" in said(capsys, "push", saved, REPO, "--tag", "first", "--message", "Three requests")
    assert hub.repos[REPO].private and hub.repos[REPO].head.title == "Three requests"
    said(capsys, "push", saved, REPO)  # once more: it knows its own commit
    for folder, revision in (("a", ["--revision", "first"]), ("b", [])):
        said(capsys, "pull", REPO, tmp_path / folder, *revision)
        there = OnlineDraft.from_pretrained(tmp_path / folder, base_model=tmp_path / "base")
        assert same_state(there, OnlineDraft.from_pretrained(saved))
        assert (tmp_path / folder / CARD).is_file()
    # Two pulled the same: the second to push is told, and the first one's commit stays.
    said(capsys, "push", tmp_path / "b", REPO)
    before = hub.repos[REPO].head.sha
    assert "another push came first" in refused(capsys, "push", tmp_path / "a", REPO)
    assert hub.repos[REPO].head.sha == before
    assert "served: 3 requests" in said(capsys, "inspect", REPO)


def test_a_public_push_is_refused_without_a_statement(
    hub: LoopbackHub, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "push", saved, REPO, "--public")
    assert "--data-statement" in told and "--public" in told and "=" not in told
    assert not hub.requests


def test_merge(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = OnlineDraft.from_pretrained(saved)
    said(capsys, "merge", saved, saved, "--weights", "0.25", "0.75", "--out", tmp_path / "both")
    both = OnlineDraft.from_pretrained(tmp_path / "both")
    assert both.settings.rank == 2 * one.settings.rank and len(both.lineage.merged) == 2
    torch.testing.assert_close(both(TOKENS).logits, one(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert "left out" in said(capsys, "merge", saved, saved, "--rank", "2", "--out", tmp_path / "small")
    small = OnlineDraft.from_pretrained(tmp_path / "small")  # the same twice has the rank of one
    assert small.settings.rank == 2
    torch.testing.assert_close(small(TOKENS).logits, one(TOKENS).logits, atol=1e-4, rtol=1e-3)
    said(capsys, "merge", saved, "--export", "--out", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(TOKENS).logits, one(TOKENS).logits)
    assert not (tmp_path / "plain" / CONFIG).exists()


def test_merges_that_make_no_sense(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to do" in refused(capsys, "merge", saved, "--out", tmp_path / "x")
    assert "weights" in refused(capsys, "merge", saved, saved, "--weights", "1", "--out", tmp_path / "x")
    assert "rank=0" in refused(capsys, "merge", saved, "--rank", "0", "--out", tmp_path / "x")
    assert "not empty" in refused(capsys, "merge", saved, saved, "--out", saved)
    assert not (tmp_path / "x").exists()
    assert "nothing can be written there" in refused(capsys, "merge", saved, saved, "--out", "/proc/x")


def test_audit(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["audit", str(saved), "--canaries", "2"])
    out = capsys.readouterr().out
    assert "| once | 0 |" in out and "No held-out text was at hand" in out
    assert code == (FOUND if "A public push is refused" in out else 0)
    assert "together" in refused(capsys, "audit", saved, "--own", tmp_path / "texts.txt")
    assert "canaries=0" in refused(capsys, "audit", saved, "--canaries", "0")


def test_inspect_names_where_a_draft_came_from(
    hub: LoopbackHub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the folder that it lies in."""
    assert "came from: a new adapter" in said(capsys, "inspect", saved)
    said(capsys, "push", saved, REPO)
    said(capsys, "pull", REPO, tmp_path / "pulled")
    commit = hub.repos[REPO].head.sha
    assert f"came from: {REPO} at {commit}" in said(capsys, "inspect", tmp_path / "pulled")
    assert "came from: a new adapter" in said(capsys, "inspect", REPO)


def test_errors_name_options_of_the_command(
    hub: LoopbackHub, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statement = ("--data-statement", "Made-up prompts.", "--skip-audit")
    told = refused(capsys, "push", saved, "me/public", "--public")
    assert "--data-statement" in told and "data_statement=" not in told
    said(capsys, "push", saved, REPO)
    told = refused(capsys, "push", saved, REPO, "--public", *statement)
    assert "private=" not in told and "Push to a new repository" in told
    said(capsys, "push", saved, "me/public", "--public", *statement, "--license", "mit")
    assert "license: mit" in hub.read("me/public", CARD).decode()
    told = refused(capsys, "push", saved, "me/public")
    assert "is public" in told and "--public" in told and "--data-statement" in told and "=" not in told
    assert "--license" in refused(capsys, "push", saved, REPO, "--license", "My own")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    told = refused(capsys, "audit", saved)
    assert "--base" in told and "base_model=" not in told


def test_another_base_is_one_line_without_a_way_out_that_the_command_has_not(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(7).save_pretrained(tmp_path / "other")
    told = refused(capsys, "audit", saved, "--base", tmp_path / "other")
    assert "made for: name base" in told and told.count("\n") == 1
    assert told.endswith("Give the right one as --base.\n")


def test_a_seed_that_torch_does_not_take_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (-1, 2**64):
        assert f"--seed {seed}: expected a value from 0" in refused(capsys, "audit", saved, "--seed", seed)


def test_a_draft_is_not_pulled_among_other_files(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine" / CARD
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"'{CARD}' lies there" in refused(capsys, "pull", saved, mine.parent)
    assert mine.read_text() == "mine"
    assert said(capsys, "pull", saved, tmp_path / "copy") == f"Written: {tmp_path / 'copy'}, {saved}\n"


def test_a_draft_that_the_hub_does_not_have_is_one_line(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refused(capsys, "inspect", "nobody/nothing")
    assert "nobody/nothing" in told and "the Hub has no model of this name" in told and told.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = refused(capsys, "pull", "nobody/nothing", "folder")
    assert "HF_HUB_OFFLINE is set" in told and told.count("\n") == 1
