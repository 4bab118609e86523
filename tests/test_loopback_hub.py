"""The loopback Hub, asked by the clients that will ask it: huggingface_hub, transformers and peft as installed.

The tests of what goes wrong also hold down what huggingface_hub makes of it, because `hf_onlinespec` relies on that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import httpx2
import pytest
import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    list_repo_files,
    repo_exists,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import tiny_llama
from tests.loopback_hub import LoopbackHub

REPO = "me/adapter"
WEIGHTS = b"0123456789" * 400


@pytest.fixture
def repo(hub: LoopbackHub) -> str:
    """A public repository with a small and a large file."""
    hub.push(REPO, {"notes.txt": b"one", "model.safetensors": WEIGHTS})
    return REPO


def commit(files: dict[str, bytes | Path], *, delete: tuple[str, ...] = (), parent: str | None = None) -> CommitInfo:
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in delete]
    operations += [CommitOperationAdd(path, data) for path, data in files.items()]
    return HfApi().create_commit(REPO, operations, commit_message="Title", parent_commit=parent)


def test_a_repository_is_made_once(hub: LoopbackHub) -> None:
    api = HfApi()
    assert api.whoami()["name"] == hub.user
    assert api.create_repo(REPO, private=True) == f"{hub.endpoint}/{REPO}" == api.create_repo("adapter", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.repo_exists(REPO) and not api.repo_exists("me/other")
    assert hub.repos[REPO].private and api.model_info(REPO).private
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_every_commit_can_be_had_again(hub: LoopbackHub, repo: str) -> None:
    api = HfApi()
    first = api.model_info(repo).sha
    second = commit({"notes.txt": b"two", "a/b/new.txt": b"", "model.safetensors": b"other"}, parent=first)
    third = commit({}, delete=("notes.txt", "a/"), parent=second.oid)
    assert [c.commit_id for c in api.list_repo_commits(repo)][:3] == [third.oid, second.oid, first]
    assert api.list_repo_files(repo) == [".gitattributes", "model.safetensors"]
    below = api.list_repo_tree(repo, "a", revision=second.oid, recursive=True)
    assert [entry.path for entry in below] == ["a/b", "a/b/new.txt"]
    top = api.list_repo_tree(repo, revision=second.oid)
    assert [entry.path for entry in top] == ["a", ".gitattributes", "model.safetensors", "notes.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "a"))

    api.create_tag(repo, tag="v1/best", revision=second.oid)
    api.create_tag(repo, tag="v1/best", exist_ok=True)
    refs = api.list_repo_refs(repo)
    named = {ref.name: ref.target_commit for ref in refs.branches + refs.tags}
    assert named == {"main": third.oid, "v1/best": second.oid}
    for revision, text in (first, b"one"), (second.oid, b"two"), ("v1/best", b"two"):
        assert Path(hf_hub_download(repo, "notes.txt", revision=revision)).read_bytes() == text
        assert (Path(snapshot_download(repo, revision=revision)) / "notes.txt").read_bytes() == text
    assert not (Path(snapshot_download(repo)) / "notes.txt").exists()
    api.delete_tag(repo, tag="v1/best")
    assert not api.list_repo_refs(repo).tags


def test_large_files_travel_once_and_apart(hub: LoopbackHub, tmp_path: Path) -> None:
    HfApi().create_repo(REPO)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\nA card")
    (tmp_path / "plot.png").write_bytes(b"PNG")
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert len(hub.repos[REPO].commits) == 2
    assert {path for path, file in hub.repos[REPO].head.files.items() if file.lfs} == {"model.safetensors", "plot.png"}
    assert hub.read(REPO, "model.safetensors") == WEIGHTS
    assert hub.count("PUT", "/lfs/") == hub.count("POST", "/verify") == 2

    commit({"copy.safetensors": WEIGHTS})
    assert hub.read(REPO, "copy.safetensors") == WEIGHTS and hub.count("PUT", "/lfs/") == 2
    answer = get_session().put(f"{hub.endpoint}/lfs/{REPO}/{'0' * 64}", content=b"not this")
    assert answer.status_code == 400


def test_a_card_without_metadata_is_warned_of(repo: str) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit({"README.md": b"A card"})


def test_of_two_pushers_the_second_is_refused(hub: LoopbackHub, repo: str) -> None:
    before = HfApi().model_info(repo).sha
    now = hub.push(repo, {"notes.txt": b"someone else"}).sha
    with pytest.raises(HfHubHTTPError) as error:
        commit({"notes.txt": b"mine"}, parent=before)
    assert error.value.response.status_code == 412
    assert hub.read(repo, "notes.txt") == b"someone else"
    # Where nothing has changed the client sends no commit, so nobody looks at the parent.
    assert commit({"notes.txt": b"someone else"}, parent=before).oid == now
    assert commit({"notes.txt": b"mine"}, parent=now).oid == hub.repos[repo].head.sha


def test_a_refused_commit_needs_new_operations(hub: LoopbackHub, repo: str) -> None:
    """The old ones remember which files had not changed when they were first asked for, and leave these out."""
    mine = [CommitOperationAdd("notes.txt", b"one"), CommitOperationAdd("other.txt", b"mine")]
    before = hub.repos[repo].head.sha
    hub.push(repo, {"third.txt": b"someone else"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        HfApi().create_commit(repo, mine, commit_message="m", parent_commit=before)
    now = hub.push(repo, {"notes.txt": b"someone else"}).sha
    HfApi().create_commit(repo, mine, commit_message="m", parent_commit=now)
    assert [hub.read(repo, path) for path in ("notes.txt", "other.txt")] == [b"someone else", b"mine"]


def test_what_is_cached_is_not_asked_for_again(hub: LoopbackHub, repo: str) -> None:
    path = hf_hub_download(repo, "model.safetensors")
    assert path.startswith(constants.HF_HUB_CACHE) and Path(path).read_bytes() == WEIGHTS
    assert hf_hub_download(repo, "model.safetensors") == path
    assert [hub.count("HEAD", "/resolve/"), hub.count("GET", "/resolve/")] == [2, 1]
    hub.requests.clear()
    assert hf_hub_download(repo, "model.safetensors", revision=hub.repos[repo].head.sha) == path
    assert hub.requests == []


def test_a_part_of_a_file(hub: LoopbackHub, repo: str) -> None:
    url = f"{hub.endpoint}/{repo}/resolve/main/model.safetensors"
    for wanted, part in ("bytes=3-5", WEIGHTS[3:6]), ("bytes=3990-", WEIGHTS[-10:]):
        answer = get_session().get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, part)
    assert get_session().get(url, headers={"Range": "bytes=4000-"}).status_code == 416


# Who may do what: without a token, a private repository is as good as none.


@pytest.mark.parametrize(
    ("token", "private", "error", "status"),
    [
        (False, True, RepositoryNotFoundError, 401),
        (LoopbackHub.stranger_token, True, RepositoryNotFoundError, 404),
        ("wrong", True, HfHubHTTPError, 401),
        ("wrong", False, HfHubHTTPError, 401),
        (False, False, None, None),
        (LoopbackHub.stranger_token, False, None, None),
    ],
)
def test_reading_needs_the_right_token(
    hub: LoopbackHub, repo: str, token: str | bool, private: bool, error: type[Exception] | None, status: int | None
) -> None:
    hub.repos[repo].private = private
    for call in (
        lambda: HfApi(token=token).model_info(repo),
        lambda: hf_hub_download(repo, "notes.txt", token=token),
        lambda: snapshot_download(repo, token=token),
    ):
        if error is None:
            call()
        else:
            with pytest.raises(HfHubHTTPError) as caught:
                call()
            assert (type(caught.value), caught.value.response.status_code) == (error, status)


@pytest.mark.parametrize(
    ("token", "error", "status"),
    [
        (False, RepositoryNotFoundError, 401),
        ("wrong", HfHubHTTPError, 401),
        (LoopbackHub.stranger_token, HfHubHTTPError, 403),
    ],
)
def test_writing_needs_the_owners_token(
    hub: LoopbackHub, repo: str, token: str | bool, error: type[Exception], status: int
) -> None:
    api, head = HfApi(token=token), hub.repos[repo].head
    for call in (
        lambda: api.create_commit(repo, [CommitOperationAdd("x.txt", b"x")], commit_message="m"),
        lambda: api.create_tag(repo, tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert (type(caught.value), caught.value.response.status_code) == (error, status)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("me/new")
    assert (type(caught.value), caught.value.response.status_code) == (HfHubHTTPError, status)
    assert hub.repos[repo].head is head and not hub.repos[repo].tags and "me/new" not in hub.repos


def test_the_token_of_the_environment_is_read_at_each_call(
    hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[repo].private = True
    assert repo_exists(repo) and list_repo_files(repo)
    monkeypatch.delenv("HF_TOKEN")
    assert get_token() is None and not repo_exists(repo)


def test_what_is_not_there(hub: LoopbackHub, repo: str) -> None:
    api = HfApi()
    for error, call in [
        (RepositoryNotFoundError, lambda: hf_hub_download("me/none", "notes.txt")),
        (RepositoryNotFoundError, lambda: snapshot_download("me/none")),
        (RepositoryNotFoundError, lambda: api.upload_file(repo_id="me/none", path_in_repo="a", path_or_fileobj=b"a")),
        (RevisionNotFoundError, lambda: hf_hub_download(repo, "notes.txt", revision="none")),
        (RevisionNotFoundError, lambda: snapshot_download(repo, revision="none")),
        (RevisionNotFoundError, lambda: snapshot_download(repo, revision="0" * 40)),
        (RevisionNotFoundError, lambda: api.create_tag(repo, tag="v1", revision="none")),
        (RevisionNotFoundError, lambda: api.delete_tag(repo, tag="none")),
        (RevisionNotFoundError, lambda: api.delete_file("notes.txt", repo, revision="none")),
        (RemoteEntryNotFoundError, lambda: hf_hub_download(repo, "none.txt")),
        (RemoteEntryNotFoundError, lambda: commit({}, delete=("none.txt",))),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, HfHubHTTPError) and caught.value.response.status_code == 404
    assert not api.file_exists(repo, "none.txt") and not api.revision_exists(repo, "none")
    answer = get_session().get(f"{hub.endpoint}/api/spaces")
    assert answer.status_code == 404 and "Unknown to the loopback Hub" in answer.text


# What goes wrong, and who tries again.

CALLS: dict[str, tuple[str, str, Callable[[], object], bool]] = {
    "whoami": ("GET", "/whoami", lambda: HfApi().whoami(), False),
    "create_repo": ("POST", "/create", lambda: HfApi().create_repo("me/new"), False),
    "model_info": ("GET", "/api/models/", lambda: HfApi().model_info(REPO), False),
    "list_repo_refs": ("GET", "/refs", lambda: HfApi().list_repo_refs(REPO), False),
    "list_repo_files": ("GET", "/tree/", lambda: HfApi().list_repo_files(REPO), True),
    "create_tag": ("POST", "/tag/", lambda: HfApi().create_tag(REPO, tag="v1"), False),
    "validate-yaml": ("POST", "/validate-yaml", lambda: commit({"README.md": b"---\na: 1\n---\n"}), False),
    "preupload": ("POST", "/preupload/", lambda: commit({"a.txt": b"a"}), True),
    "lfs batch": ("POST", "/batch", lambda: commit({"a.bin": b"a"}), True),
    "lfs upload": ("PUT", "/lfs/", lambda: commit({"a.bin": b"a"}), True),
    "lfs verify": ("POST", "/verify", lambda: commit({"a.bin": b"a"}), True),
    "commit": ("POST", "/commit/", lambda: commit({"a.txt": b"a"}), False),
    "file_exists": ("HEAD", "/resolve/", lambda: HfApi().file_exists(REPO, "notes.txt"), False),
    "download": ("GET", "/resolve/", lambda: hf_hub_download(REPO, "notes.txt"), False),
    "snapshot": ("GET", "/revision/", lambda: snapshot_download(REPO), False),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_who_tries_again_after_a_failure(hub: LoopbackHub, repo: str, name: str, status: int) -> None:
    method, part, call, again = CALLS[name]
    again = again or (name, status) == ("download", 429)
    hub.fail(method, part, status=status)
    if again:
        call()
        assert hub.waits == [1]
    else:
        with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)) as caught:
            call()
        error = caught.value.__cause__ if name == "snapshot" else caught.value
        assert isinstance(error, HfHubHTTPError) and error.response.status_code == status and hub.waits == []
    assert hub.count(method, part) == 1 + again


def test_a_failure_that_lasts_costs_23_seconds(hub: LoopbackHub, repo: str) -> None:
    hub.fail("PUT", "/lfs/", status=503, times=100)
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        commit({"a.bin": b"a"})
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert hub.waits == [1, 2, 4, 8, 8] and hub.count("PUT", "/lfs/") == 6

    hub.waits.clear()
    hub.fail("HEAD", "/resolve/", status=503, times=100)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repo, "notes.txt")
    assert hub.waits == [1, 2, 4, 8, 8] and hub.count("HEAD", "/resolve/") == 7
    hub.heal()
    hf_hub_download(repo, "notes.txt")


def test_the_hub_says_how_long_to_wait(hub: LoopbackHub, repo: str) -> None:
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "300"})
    commit({"a.txt": b"a"})
    assert hub.waits == [301]


@pytest.mark.parametrize("how", ["middle", "reset", "answer"])
def test_an_upload_that_breaks_off_is_begun_again(hub: LoopbackHub, repo: str, how: str) -> None:
    data = bytes(range(256)) * 8000
    hub.cut("PUT", "/lfs/", how=how)
    commit({"big.bin": data})
    assert hub.read(repo, "big.bin") == data and hub.waits == [1] and hub.count("PUT", "/lfs/") == 2


@pytest.mark.parametrize("how", ["middle", "reset"])
def test_a_commit_that_breaks_off_is_not_made(hub: LoopbackHub, repo: str, how: str) -> None:
    head = hub.repos[repo].head
    hub.cut("POST", "/commit/", how=how)
    with pytest.raises(httpx2.TransportError) as caught:
        commit({"a.txt": b"a"}, parent=head.sha)
    assert not isinstance(caught.value, OSError)
    assert hub.repos[repo].head is head and hub.waits == []
    commit({"a.txt": b"a"}, parent=head.sha)


def test_a_commit_may_be_made_without_its_pusher_knowing(hub: LoopbackHub, repo: str) -> None:
    before = hub.repos[repo].head.sha
    hub.cut("POST", "/commit/", how="answer")
    with pytest.raises(httpx2.RemoteProtocolError):
        commit({"a.txt": b"a", "b.txt": b"b"}, parent=before)
    assert hub.read(repo, "a.txt") == b"a"
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit({"a.txt": b"other"}, parent=before)
    # The same again is nothing to commit.
    assert commit({"a.txt": b"a", "b.txt": b"b"}, parent=before).oid == hub.repos[repo].head.sha


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut("GET", "/resolve/", times=2)
    assert Path(hf_hub_download(repo, "model.safetensors")).read_bytes() == WEIGHTS
    assert hub.waits == [1, 1] and hub.count("GET", "/resolve/") == 3
    # But a reset is not among what huggingface_hub expects.
    hub.push(repo, {"model.safetensors": WEIGHTS[::-1]})
    hub.cut("GET", "/resolve/", how="reset")
    with pytest.raises(httpx2.ReadError):
        hf_hub_download(repo, "model.safetensors")
    assert Path(hf_hub_download(repo, "model.safetensors")).read_bytes() == WEIGHTS[::-1]


def test_what_is_cached_serves_when_the_hub_fails_but_not_when_it_breaks_off(hub: LoopbackHub, repo: str) -> None:
    file, folder = hf_hub_download(repo, "notes.txt"), snapshot_download(repo)
    hub.fail("HEAD", "/resolve/", status=503)
    hub.fail("GET", "/revision/", status=503)
    assert (hf_hub_download(repo, "notes.txt"), snapshot_download(repo)) == (file, folder)
    hub.cut("HEAD", "/resolve/")
    hub.cut("GET", "/revision/")
    for call in (lambda: hf_hub_download(repo, "notes.txt"), lambda: snapshot_download(repo)):
        with pytest.raises(httpx2.RemoteProtocolError):
            call()
    assert hub.waits == []


def test_a_hub_that_is_late(hub: LoopbackHub, repo: str) -> None:
    hub.delay("GET", "/api/models/", seconds=3600)  # ends when the fixture closes the Hub
    with pytest.raises(httpx2.TimeoutException):
        HfApi().model_info(repo, timeout=0.05)
    hub.delay("GET", "/api/models/", seconds=0.001)
    assert HfApi().model_info(repo).id == repo


def test_a_request_can_be_held(hub: LoopbackHub, repo: str) -> None:
    before, held = hub.repos[repo].head.sha, hub.hold("POST", "/commit/")
    pusher = Thread(target=commit, args=({"a.txt": b"a"},))
    pusher.start()
    assert held.reached.wait(10)
    assert pusher.is_alive() and HfApi().model_info(repo).sha == before
    held.release.set()
    pusher.join(10)
    assert hub.read(repo, "a.txt") == b"a"


def test_without_the_hub(hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api, file, folder = HfApi(), hf_hub_download(repo, "notes.txt"), snapshot_download(repo)
    hub.push("me/unknown", {"notes.txt": b"one"})

    def check(error: type[Exception]) -> None:
        for call in (
            lambda: api.model_info(repo),
            lambda: commit({"a.txt": b"a"}),
            lambda: api.create_tag(repo, tag="v"),
        ):
            with pytest.raises(error):
                call()
        assert (hf_hub_download(repo, "notes.txt"), snapshot_download(repo)) == (file, folder)
        for call in (lambda: hf_hub_download("me/unknown", "notes.txt"), lambda: snapshot_download("me/unknown")):
            with pytest.raises(LocalEntryNotFoundError) as caught:
                call()
            assert isinstance(caught.value.__cause__, error)

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        check(OfflineModeIsEnabled)
        assert hub.waits == []
    hub.close()
    check(httpx2.ConnectError)
    assert hub.waits == [1, 2, 4, 8, 8] * 2  # preupload and the one HEAD; the others give up at once
    hub.start()
    assert api.model_info(repo).sha == hub.repos[repo].head.sha
    hub.close()  # the fixture closes it again


def test_a_large_file_that_was_not_uploaded_is_refused(hub: LoopbackHub, repo: str) -> None:
    operation = CommitOperationAdd("a.bin", b"a")
    HfApi().preupload_lfs_files(repo, [operation])
    hub.repos[repo].objects.clear()
    with pytest.raises(BadRequestError, match="was not uploaded"):
        HfApi().create_commit(repo, [operation], commit_message="m")


# The libraries above.


def adapter(model: PreTrainedModel, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_transformers_and_peft_push_and_load(hub: LoopbackHub, prompt: torch.Tensor) -> None:
    base = tiny_llama(1)
    base.push_to_hub("me/base")
    loaded = AutoModelForCausalLM.from_pretrained("me/base").eval()
    assert torch.equal(loaded(prompt).logits, base(prompt).logits)

    model = adapter(loaded, 1).eval()
    model.push_to_hub(REPO, private=True)
    first = hub.repos[REPO].head.sha
    assert hub.repos[REPO].private and hub.repos[REPO].head.files["adapter_model.safetensors"].lfs
    expected = model(prompt).logits
    again = PeftModel.from_pretrained(tiny_llama(1), REPO).eval()
    assert torch.equal(again(prompt).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(REPO).eval()(prompt).logits, expected)

    other = adapter(tiny_llama(1), 2).eval()
    other.push_to_hub(REPO)
    old = PeftModel.from_pretrained(tiny_llama(1), REPO, revision=first).eval()
    assert torch.equal(old(prompt).logits, expected)
    assert not torch.equal(PeftModel.from_pretrained(tiny_llama(1), REPO).eval()(prompt).logits, expected)


def test_a_child_process_talks_to_the_same_hub(hub: LoopbackHub, repo: str) -> None:
    code = f"from huggingface_hub import *; print(whoami()['name'], hf_hub_download({repo!r}, 'notes.txt'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.split() == ["me", hf_hub_download(repo, "notes.txt")]
