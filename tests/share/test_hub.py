"""Pushing and pulling through the real client, against a Hub in memory that fails on demand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel

from hf_onlinespec import ConfigError, DraftError, HubError, OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.share.folder import ADAPTER, ADAPTER_CONFIG, CARD, CONFIG, STATE
from hf_onlinespec.share.lineage import Parent, WarmStart
from hf_onlinespec.share.resuming import adopt
from tests.conftest import tiny_llama
from tests.drafts import flat_params
from tests.loopback_hub import LoopbackHub
from tests.share.test_artifact import REPEATABLE, TOKENS, same_state, serve, warnings_of_tied_models

REPO = "me/draft"
SAYS = "Made-up prompts, written for this test."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that has learned from three requests."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    serve(tiny_llama(1, layers=2), draft, range(3))
    folder = tmp_path_factory.mktemp("saved")
    draft.save_pretrained(folder)
    return folder


@pytest.fixture
def draft(saved: Path) -> OnlineDraft:
    return OnlineDraft.from_pretrained(saved, tiny_llama(2))


def again(**options: Any) -> OnlineDraft:
    return OnlineDraft.from_pretrained(REPO, base_model=tiny_llama(2), **options)


def test_what_is_pushed_comes_back(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    commit = draft.push_to_hub(REPO)
    assert hub.repos[REPO].private
    assert [c.title for c in hub.repos[REPO].commits.values()][1:] == [
        f"Evolved draft after {draft.metrics.new_tokens} new tokens"
    ]  # one commit
    assert {ADAPTER, ADAPTER_CONFIG, CONFIG, STATE} <= set(hub.repos[REPO].head.files)
    found = again()
    assert same_state(found, draft) and torch.equal(found(TOKENS).logits, draft(TOKENS).logits)
    assert found.lineage.parent == Parent(REPO, commit)
    serve(target, found, range(3, 5))
    later = found.push_to_hub(REPO, tag="v2", message="Two requests more")
    assert list(hub.repos[REPO].commits)[-2:] == [commit, later]
    assert same_state(again(revision=commit), draft)
    assert same_state(again(revision="v2"), found)
    assert json.loads(hub.read(REPO, CONFIG))["lineage"]["parent"]["revision"] == commit


# The arguments of transformers' push_to_hub


def test_a_name_alone_is_a_repository_of_ones_own(hub: LoopbackHub, draft: OnlineDraft) -> None:
    commit = draft.push_to_hub("draft")
    assert list(hub.repos) == [REPO] and hub.repos[REPO].private
    assert draft.lineage.parent == Parent(REPO, commit)
    draft.push_to_hub(REPO)  # the same repository: it goes on from there
    assert same_state(again(), draft)


def test_a_commit_message_by_transformers_name(hub: LoopbackHub, draft: OnlineDraft) -> None:
    draft.push_to_hub(REPO, commit_message="After the first day")
    assert hub.repos[REPO].head.title == "After the first day"
    with pytest.raises(ConfigError, match=r"commit_message=.*message="):
        draft.push_to_hub(REPO, commit_message="one", message="other")


def test_private_none_is_private_here(hub: LoopbackHub, draft: OnlineDraft) -> None:
    draft.push_to_hub(REPO, private=None)
    assert hub.repos[REPO].private


def test_a_branch_is_made_and_pushed_to_and_main_stays(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel
) -> None:
    first = draft.push_to_hub(REPO)
    serve(target, draft, range(3, 4))
    later = draft.push_to_hub(REPO, revision="night")
    assert hub.repos[REPO].head.sha == first and hub.repos[REPO].branches["night"].sha == later
    assert same_state(again(revision="night"), draft)
    serve(target, draft, range(4, 5))
    draft.push_to_hub(REPO, revision="night")  # it goes on from there
    other = again(revision=later)
    with pytest.raises(HubError, match="another push came first"):
        other.push_to_hub(REPO, revision="night")


def test_a_pull_request_leaves_main_and_where_the_draft_goes_on_from(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel
) -> None:
    first = draft.push_to_hub(REPO)
    serve(target, draft, range(3, 4))
    commit = draft.push_to_hub(REPO, create_pr=True, commit_message="Better on orders")
    assert hub.repos[REPO].head.sha == first and hub.repos[REPO].branches["refs/pr/1"].sha == commit
    assert draft.lineage.parent == Parent(REPO, first)
    assert same_state(again(revision="refs/pr/1"), draft)
    draft.push_to_hub(REPO)
    assert same_state(again(), draft)


def test_a_pull_request_overwrites_nobody(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    draft.push_to_hub(REPO)
    other = again()
    serve(target, other, range(7, 8))
    head = other.push_to_hub(REPO)
    draft.push_to_hub(REPO, create_pr=True)  # main has moved on: a pull request is a proposal
    assert hub.repos[REPO].head.sha == head and "refs/pr/1" in hub.repos[REPO].branches


@pytest.mark.parametrize(
    "options",
    [
        {"revision": ""},
        {"revision": 3},
        {"create_pr": True, "revision": "night"},
        {"create_pr": True, "checkpoint_every": 2},
    ],
)
def test_branches_and_pull_requests_that_are_none(options: Any, hub: LoopbackHub, draft: OnlineDraft) -> None:
    with pytest.raises(ConfigError, match=r"revision=|create_pr="):
        draft.push_to_hub(REPO, **options)
    assert not hub.requests


def test_folders_of_this_machine_are_not_shown(hub: LoopbackHub, tmp_path: Path, target: PreTrainedModel) -> None:
    tiny_llama(2).save_pretrained(tmp_path / "base")
    draft = OnlineDraft.from_pretrained(tmp_path / "base", config=OnlineSpecConfig(**REPEATABLE))
    draft.push_to_hub(REPO)
    for path in hub.repos[REPO].head.files:
        assert str(tmp_path).encode() not in hub.read(REPO, path)


@pytest.mark.parametrize("name", ["a draft", "/draft", "me/", "a/b/c", "", "me/with space", "me/--x"])
def test_names_that_are_none(name: str, hub: LoopbackHub, draft: OnlineDraft) -> None:
    with pytest.raises((ConfigError, HubError)):
        draft.push_to_hub(name)
    assert not hub.repos


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_intervals_that_are_none(every: Any, hub: LoopbackHub, draft: OnlineDraft) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every"):
        draft.push_to_hub(REPO, checkpoint_every=every)
    assert not hub.requests


def test_a_public_push_needs_a_statement(hub: LoopbackHub, draft: OnlineDraft) -> None:
    for statement in (None, "", "  "):
        with pytest.raises(PrivacyError, match="data_statement"):
            draft.push_to_hub(REPO, private=False, data_statement=statement)
    with pytest.raises(PrivacyError, match="checkpoint_every"):
        draft.push_to_hub(REPO, private=False, data_statement=SAYS, checkpoint_every=4)
    assert not hub.requests
    draft.push_to_hub(REPO, private=False, data_statement=SAYS, skip_audit=True)
    assert not hub.repos[REPO].private
    assert SAYS in hub.read(REPO, CARD).decode()


def test_a_private_push_never_goes_into_a_public_repository(hub: LoopbackHub, draft: OnlineDraft) -> None:
    before = hub.push(REPO, {"README.md": b"mine"})
    with pytest.raises(PrivacyError, match="is public"):
        draft.push_to_hub(REPO)
    assert hub.repos[REPO].head.sha == before.sha


def test_another_push_is_not_overwritten(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    draft.push_to_hub(REPO)
    other = again()
    serve(target, other, range(7, 8))
    other.push_to_hub(REPO)
    with pytest.raises(HubError, match="another push came first"):
        draft.push_to_hub(REPO)
    assert same_state(again(), other)
    draft.push_to_hub(REPO, force=True)
    assert same_state(again(), draft)


@pytest.mark.parametrize("part", ["/preupload/", ".git/info/lfs", "/commit/", "/repos/create"])
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_push_that_fails_loses_nothing(status: int, part: str, hub: LoopbackHub, draft: OnlineDraft) -> None:
    hub.fail("POST", part, status=status, times=100)
    before = flat_params(draft)
    with pytest.raises(HubError, match="not pushed"):
        draft.push_to_hub(REPO)
    assert torch.equal(flat_params(draft), before)
    hub.heal()
    draft.push_to_hub(REPO)
    assert same_state(again(), draft)


@pytest.mark.parametrize("fault", ["fail", "cut"])
def test_a_large_file_that_is_not_taken(fault: str, hub: LoopbackHub, draft: OnlineDraft) -> None:
    if fault == "fail":
        hub.fail("PUT", "/", status=500, times=100)
    else:
        hub.cut("PUT", "/", times=100)
    with pytest.raises(HubError, match="not pushed"):
        draft.push_to_hub(REPO)
    hub.heal()
    draft.push_to_hub(REPO)
    assert same_state(again(), draft)


@pytest.mark.parametrize("how", ["middle", "reset"])
def test_an_upload_that_breaks_off(how: str, hub: LoopbackHub, draft: OnlineDraft) -> None:
    hub.cut("POST", "/commit/", how=how)
    with pytest.raises(HubError, match="not pushed"):
        draft.push_to_hub(REPO)
    draft.push_to_hub(REPO)
    assert same_state(again(), draft)


def test_a_commit_whose_answer_was_lost_is_recognised(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel
) -> None:
    draft.push_to_hub(REPO)
    serve(target, draft, range(3, 4))
    hub.cut("POST", "/commit/", how="answer")
    with pytest.raises(HubError):
        draft.push_to_hub(REPO)
    serve(target, draft, range(4, 5))
    draft.push_to_hub(REPO)  # not "another push came first": it was its own
    assert same_state(again(), draft)


def test_reading_what_is_not_there(hub: LoopbackHub, draft: OnlineDraft) -> None:
    with pytest.raises(HubError, match="not downloaded"):
        again()
    draft.push_to_hub(REPO)
    with pytest.raises(HubError, match="not downloaded"):
        again(revision="v9")
    with pytest.raises(HubError, match="token"):
        again(token="wrong")
    hub.push("me/empty", {"README.md": b"nothing"})
    with pytest.raises(DraftError, match="an adapter or a language model"):
        OnlineDraft.from_pretrained("me/empty")


def test_damage_on_the_way_is_told(hub: LoopbackHub, draft: OnlineDraft) -> None:
    from hf_onlinespec import ArtifactError

    draft.push_to_hub(REPO)
    data = bytearray(hub.read(REPO, STATE))
    data[-1] ^= 1
    hub.push(REPO, {STATE: bytes(data)})
    with pytest.raises(ArtifactError, match="checksum"):
        again()


def test_without_a_network(hub: LoopbackHub, draft: OnlineDraft, tmp_path: Path) -> None:
    draft.push_to_hub(REPO)
    found = again()
    hub.close()
    try:
        assert same_state(again(revision=found.lineage.parent.revision), found)  # from the cache
        with pytest.raises(HubError):
            draft.push_to_hub(REPO)
        draft.save_pretrained(tmp_path)
        assert same_state(OnlineDraft.from_pretrained(tmp_path, tiny_llama(2)), draft)
    finally:
        hub.start()


# Checkpoints


def test_checkpoints_never_block_a_call(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    draft.push_to_hub(REPO, checkpoint_every=2)
    assert draft.checkpoints is not None
    held = hub.hold("POST", "/commit/")
    serve(target, draft, range(3, 5))
    assert held.reached.wait(20)  # the push is under way, and the Hub does not answer
    serve(target, draft, range(5, 9))  # calls go on, and more comes due
    assert draft.checkpoints.pushed == 0
    held.release.set()
    assert draft.checkpoints.wait(20)
    assert 1 <= draft.checkpoints.pushed <= 2  # what came due meanwhile is one push
    assert same_state(again(), draft)
    draft.checkpoints.close()


def test_checkpoints_that_fail_are_tried_again(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.share.checkpoints.FIRST_WAIT_S", 0.01)
    draft.push_to_hub(REPO, checkpoint_every=1)
    assert draft.checkpoints is not None
    hub.fail("POST", "/commit/", status=503, times=3)
    serve(target, draft, range(3, 4))
    assert draft.checkpoints.wait(20)
    assert draft.checkpoints.failures >= 1 and draft.checkpoints.pushed == 1 and not draft.checkpoints.error
    assert same_state(again(), draft)
    draft.checkpoints.close()


def test_a_draft_that_is_gone_ends_its_thread(hub: LoopbackHub) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.push_to_hub(REPO)
    before = {thread for thread in threading.enumerate() if "checkpoints" in thread.name}
    draft.push_to_hub(REPO, checkpoint_every=1)
    (thread,) = {thread for thread in threading.enumerate() if "checkpoints" in thread.name} - before
    del draft
    thread.join(20)
    assert not thread.is_alive()


# After a review


def test_a_draft_that_was_kept_in_a_folder_goes_on_pushing(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel, tmp_path: Path
) -> None:
    first = draft.push_to_hub(REPO)
    draft.save_pretrained(tmp_path)
    later = OnlineDraft.from_pretrained(tmp_path, base_model=tiny_llama(2))
    serve(target, later, range(3, 5))
    second = later.push_to_hub(REPO)
    assert list(hub.repos[REPO].commits)[-2:] == [first, second]


def test_a_tag_that_is_taken(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    draft.push_to_hub(REPO, tag="v1")
    serve(target, draft, range(3, 4))
    with pytest.raises(HubError, match="but not tagged"):
        draft.push_to_hub(REPO, tag="v1")
    before = len(hub.repos[REPO].commits)
    draft.push_to_hub(REPO, tag="v2")  # it knows the commit that was made
    assert len(hub.repos[REPO].commits) <= before + 1


def test_a_statement_stays_with_the_draft(hub: LoopbackHub, draft: OnlineDraft, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_statement"):
        draft.push_to_hub(REPO, data_statement={"what": "prompts"})  # type: ignore[arg-type]
    draft.push_to_hub(REPO, data_statement=SAYS)
    again().save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lineage"]["data_statement"] == SAYS


def test_a_public_push_into_a_private_repository(hub: LoopbackHub, draft: OnlineDraft) -> None:
    draft.push_to_hub(REPO)
    with pytest.raises(PrivacyError, match="new repository"):
        draft.push_to_hub(REPO, private=False, data_statement=SAYS, skip_audit=True)


def test_force_does_not_skip_the_audit(hub: LoopbackHub, draft: OnlineDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(draft: OnlineDraft) -> None:
        raise PrivacyError("too much")

    monkeypatch.setattr("hf_onlinespec.share.pushing.check_privacy", refuses)
    with pytest.raises(PrivacyError, match="too much"):
        draft.push_to_hub(REPO, private=False, data_statement=SAYS, force=True)
    assert not hub.requests


def test_milestones_and_failures_leave_checkpoints_on(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel
) -> None:
    draft.push_to_hub(REPO, checkpoint_every=1)
    checkpoints = draft.checkpoints
    assert checkpoints is not None
    draft.push_to_hub(REPO, tag="milestone")
    hub.fail("POST", "/repos/create", status=500)
    with pytest.raises(HubError):
        draft.push_to_hub(REPO)
    serve(target, draft, range(3, 4))
    assert checkpoints.wait(20) and checkpoints.pushed == 1 and draft.checkpoints is checkpoints
    assert same_state(again(), draft)
    checkpoints.close()


def test_checkpoints_survive_what_nobody_thought_of(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_onlinespec.share.checkpoints.FIRST_WAIT_S", 0.01)
    draft.push_to_hub(REPO, checkpoint_every=1)
    assert draft.checkpoints is not None
    times = iter([1])

    def breaks(*args: Any, **kwargs: Any) -> None:
        if next(times, None):
            raise KeyError("a bug")
        return write(*args, **kwargs)

    from hf_onlinespec.share import card

    write = card.write
    monkeypatch.setattr(card, "write", breaks)
    serve(target, draft, range(3, 4))
    assert draft.checkpoints.wait(20) and draft.checkpoints.failures == 1 and draft.checkpoints.pushed == 1
    draft.checkpoints.close()


def test_requests_that_teach_nothing_cause_no_push(
    hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel
) -> None:
    draft.push_to_hub(REPO, checkpoint_every=1)
    assert draft.checkpoints is not None
    before = len(hub.repos[REPO].commits)
    target.generate(TOKENS[:1], max_new_tokens=4, assistant_model=draft, onlinespec=False)
    assert draft.checkpoints.wait(20) and draft.checkpoints.pushed == 0
    assert len(hub.repos[REPO].commits) == before
    draft.checkpoints.close()


def test_a_push_that_comes_in_between(hub: LoopbackHub, draft: OnlineDraft) -> None:
    """After the question what the repository holds, and before the commit."""
    draft.push_to_hub(REPO)
    held, told = hub.hold("POST", "/preupload/"), []

    def push() -> None:
        try:
            draft.push_to_hub(REPO, message="too late")
        except HubError as error:
            told.append(str(error))

    thread = threading.Thread(target=push)
    thread.start()
    assert held.reached.wait(20)
    between = hub.push(REPO, {"notes.txt": b"somebody else's"})
    held.release.set()
    thread.join(20)
    assert len(told) == 1 and "not pushed" in told[0]
    assert hub.repos[REPO].head.sha == between.sha


def test_a_statement_is_kept_once_its_push_has_succeeded(hub: LoopbackHub, draft: OnlineDraft, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=500, times=100)
    with pytest.raises(HubError):
        draft.push_to_hub(REPO, data_statement=SAYS)
    draft.save_pretrained(tmp_path)
    assert "data_statement" not in json.loads((tmp_path / CONFIG).read_text())["lineage"]
    hub.heal()
    draft.push_to_hub(REPO, data_statement=SAYS)
    draft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lineage"]["data_statement"] == SAYS


# What a public version tells


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
def test_a_public_version_carries_what_serving_needs(
    learner: str, hub: LoopbackHub, target: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_llama(2).save_pretrained(tmp_path / "secret-base")
    (tmp_path / "secret-target").mkdir()
    target.config._name_or_path = str(tmp_path / "secret-target")
    config = OnlineSpecConfig(**REPEATABLE | {"learner": learner})
    draft = OnlineDraft.from_pretrained(tmp_path / "secret-base", config=config)
    draft.lineage.warm_start = WarmStart("secret-teacher", texts=1, prompts=0, tokens=5)
    serve(target, draft, range(3))
    draft.push_to_hub(REPO, private=False, data_statement=SAYS, skip_audit=True)
    files = hub.repos[REPO].head.files
    assert STATE not in files and {ADAPTER, ADAPTER_CONFIG, CONFIG, CARD} <= set(files)
    machine = draft.artifact().serving.machine
    for path in files:
        data = hub.read(REPO, path)
        for told in ("secret-", str(tmp_path), machine.platform, machine.cpu):
            assert told.encode() not in data
    # It serves, for us and for PEFT, and learns anew.
    found = again()
    assert torch.allclose(found(TOKENS).logits, draft(TOKENS).logits, atol=1e-5)
    assert found.metrics.requests == 0 and found.lineage.data_statement == SAYS
    serve(target, found, range(3, 5))
    assert found.metrics.updates > 0
    with warnings_of_tied_models():
        by_peft = PeftModel.from_pretrained(tiny_llama(2), REPO).eval()
    assert torch.allclose(by_peft(TOKENS).logits, draft(TOKENS).logits, atol=1e-5)
    # The draft itself has lost nothing, and a private push is complete.
    draft.push_to_hub("me/private")
    assert same_state(OnlineDraft.from_pretrained("me/private", base_model=tiny_llama(2)), draft)


def test_the_rest_goes_along_on_request(hub: LoopbackHub, draft: OnlineDraft) -> None:
    with pytest.raises(PrivacyError, match="with_state"):  # the audit does not judge it
        draft.push_to_hub(REPO, with_state=True, private=False, data_statement=SAYS)
    public: dict[str, Any] = dict(private=False, data_statement=SAYS, skip_audit=True)
    draft.push_to_hub(REPO, with_state=True, **public)
    assert same_state(again(), draft)
    draft.push_to_hub(REPO, **public)  # what lay there before goes
    assert STATE not in hub.repos[REPO].head.files and again().metrics.requests == 0
    draft.push_to_hub("me/private", with_state=False)
    assert STATE not in hub.repos["me/private"].head.files


def test_a_licence_is_stated(hub: LoopbackHub, draft: OnlineDraft) -> None:
    draft.push_to_hub(REPO)
    assert "No licence of the adapter is stated." in hub.read(REPO, CARD).decode()
    assert ModelCard(hub.read(REPO, CARD).decode()).data.license is None
    draft.push_to_hub(REPO, license="apache-2.0")
    for _ in range(2):
        assert ModelCard(hub.read(REPO, CARD).decode()).data.license == "apache-2.0"
        draft.push_to_hub(REPO)  # it stays with the draft
    for wrong in ("", "Apache 2.0\n---", 3):
        with pytest.raises(ConfigError, match="license="):
            draft.push_to_hub(REPO, license=wrong)  # type: ignore[arg-type]


def test_an_adapter_that_was_adopted_is_pushed(hub: LoopbackHub, draft: OnlineDraft, target: PreTrainedModel) -> None:
    """After as many steps as the one before."""
    adapter = draft.artifact().adapter
    adopt(draft, adapter)
    draft.push_to_hub(REPO, checkpoint_every=1)
    assert draft.checkpoints is not None
    steps = draft.steps
    adopt(draft, {name: tensor + 1 for name, tensor in adapter.items()})
    assert draft.steps == steps
    target.generate(TOKENS[:1], max_new_tokens=4, assistant_model=draft, onlinespec=False)
    assert draft.checkpoints.wait(20) and draft.checkpoints.pushed == 1
    draft.checkpoints.close()
