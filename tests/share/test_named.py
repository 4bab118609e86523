"""Adapters with names are saved beside the one without a name, each as a draft that could stand alone, and pushed with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_onlinespec import ArtifactError, ConfigError, OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.folder import ADAPTER, CONFIG, STATE
from hf_onlinespec_cli import main
from tests.drafts import flat_params
from tests.loopback_hub import LoopbackHub
from tests.share.test_artifact import REPEATABLE
from tests.test_adapters import inputs_of, params
from tests.tiny_models import tiny_llama

CALL: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
NAMES = ["sql", None, "orders"]


def learn(draft: OnlineDraft, target: PreTrainedModel, seed: int, names: Any = None) -> None:
    target.generate(**inputs_of(seed, (6, 6, 6)), assistant_model=draft, adapter=names or NAMES, **CALL)


def again(folder: Path, **options: Any) -> OnlineDraft:
    return OnlineDraft.from_pretrained(folder, tiny_llama(2), **options)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


@pytest.fixture(scope="module")
def learned(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnlineDraft, Path]:
    """A draft with two names, of which one is away, and where it was saved."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE, resident_adapters=1))
    for seed in range(2):
        learn(draft, target, seed)
    folder = tmp_path_factory.mktemp("named") / "draft"
    draft.save_pretrained(folder)
    return draft, folder


def test_a_draft_comes_back_with_its_names_and_learns_on_as_if_it_had_never_stopped(learned, target, tmp_path) -> None:
    draft, folder = learned
    assert sorted(os.listdir(folder / "adapters")) == ["orders", "sql"]
    found = again(folder)
    assert sorted(found.adapters) == ["orders", "sql"]
    for name in ("sql", "orders"):
        assert found.adapters[name].steps == draft.adapters[name].steps > 0
        assert found.adapters[name].metrics.new_tokens == draft.adapters[name].metrics.new_tokens == 16
        assert torch.equal(params(found, name), params(draft, name))
    assert torch.equal(flat_params(found), flat_params(draft))
    assert not torch.equal(params(found, "sql"), params(found, "orders"))
    for one in (draft, found):
        learn(one, target, 5)
    assert torch.equal(params(found, "sql"), params(draft, "sql"))
    assert torch.equal(params(found, "orders"), params(draft, "orders"))


def test_each_can_stand_alone_with_a_record_of_what_it_learned_from(learned) -> None:
    _, folder = learned
    saved = Artifact.read(folder / "adapters" / "sql")
    alone = again(folder / "adapters" / "sql")
    assert torch.equal(
        alone.learning.adapter_params()[next(iter(saved.adapter))], saved.adapter[next(iter(saved.adapter))]
    )
    assert len(alone.adapters) == 0 and alone.steps == saved.state.part("adaptation").count("steps") > 0
    assert saved.lineage.privacy is not None and saved.lineage.privacy.texts == 2
    assert saved.lineage.draft != Artifact.read(folder).lineage.draft


def test_saving_removes_the_names_of_an_earlier_draft_and_nothing_else(learned, target, tmp_path) -> None:
    _, folder = learned
    place = tmp_path / "draft"
    shutil.copytree(folder, place)
    (place / "adapters" / "notes").mkdir()
    (place / "adapters" / "notes" / "mine.txt").write_text("kept")
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    learn(draft, target, 0, ["sql", "fresh", None])
    draft.save_unexamined(place)
    assert sorted(os.listdir(place / "adapters")) == ["fresh", "notes", "sql"]
    assert sorted(again(place).adapters) == ["fresh", "sql"]
    assert (place / "adapters" / "notes" / "mine.txt").read_text() == "kept"


def test_folders_that_are_none_of_ours_are_left_alone_or_refused(learned, target, tmp_path) -> None:
    draft, folder = learned
    place = tmp_path / "draft"
    shutil.copytree(folder, place)
    os.rename(place / "adapters" / "sql", place / "adapters" / "SQL")
    os.symlink(folder / "adapters" / "sql", place / "adapters" / "linked")
    assert list(again(place).adapters) == ["orders"]
    shutil.rmtree(place / "adapters" / "orders")
    os.symlink(tmp_path, place / "adapters" / "orders")
    with pytest.raises(ArtifactError, match=r"orders: a link or a file in the place"):
        draft.save_unexamined(place)
    assert CONFIG not in os.listdir(tmp_path)


def test_a_damaged_adapter_or_one_of_another_base_is_refused_by_its_folder(learned, tmp_path) -> None:
    _, folder = learned
    place = tmp_path / "draft"
    shutil.copytree(folder, place)
    data = bytearray((place / "adapters" / "sql" / ADAPTER).read_bytes())
    data[-1] ^= 1
    (place / "adapters" / "sql" / ADAPTER).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"adapters/sql/adapter_model.safetensors: damaged"):
        again(place)
    other = OnlineDraft(tiny_llama(7), OnlineSpecConfig(**REPEATABLE))
    other.save_unexamined(tmp_path / "other")
    shutil.rmtree(place / "adapters" / "sql")
    shutil.copytree(tmp_path / "other", place / "adapters" / "sql")
    with pytest.raises(ArtifactError, match="base"):
        again(place)


def test_a_push_sends_adapters_with_names_and_they_come_back(learned, hub: LoopbackHub, target) -> None:
    draft, folder = learned
    draft = again(folder)
    first = draft.push_to_hub("me/draft")
    repo = hub.repos["me/draft"]
    assert repo.private and len(repo.commits) == 2  # one for the repository, one for all of it
    files = set(repo.head.files)
    assert {f"adapters/{name}/{file}" for name in ("sql", "orders") for file in (CONFIG, ADAPTER, "README.md")} <= files
    card = repo.head.files["README.md"].data.decode()
    assert "| adapter `sql` | " in card and "learned from 2 texts; in [adapters/sql](adapters/sql/README.md)" in card
    found = OnlineDraft.from_pretrained("me/draft", base_model=tiny_llama(2))
    assert sorted(found.adapters) == ["orders", "sql"]
    for name in ("sql", "orders"):
        assert torch.equal(params(found, name), params(draft, name))
    with found.adapters.using("sql") as sql:
        assert sql.lineage.parent is not None and sql.lineage.parent.revision == first
    # What goes on from there may be pushed, without a name that it has no more.
    learn(found, target, 3)
    with_sql = found.push_to_hub("me/draft", selected_adapters=["sql"])
    assert f"adapters/orders/{CONFIG}" in repo.head.files and repo.head.sha == with_sql
    other = OnlineDraft.from_pretrained("me/draft", base_model=tiny_llama(2))
    assert torch.equal(params(other, "sql"), params(found, "sql"))
    with pytest.raises(
        ConfigError, match=r"selected_adapters='notes': this draft has no such adapter\. There are: orders, sql"
    ):
        found.push_to_hub("me/draft", selected_adapters=["notes"])


def test_a_push_removes_the_names_of_an_earlier_draft(learned, hub: LoopbackHub, tmp_path) -> None:
    _, folder = learned
    again(folder).push_to_hub("me/draft")
    place = tmp_path / "draft"
    shutil.copytree(folder, place)
    shutil.rmtree(place / "adapters" / "orders")
    again(place).push_to_hub("me/draft", force=True)
    names = {file.split("/")[1] for file in hub.repos["me/draft"].head.files if file.startswith("adapters/")}
    assert names == {"sql"}


def test_a_public_push_judges_every_adapter(learned, hub: LoopbackHub, monkeypatch) -> None:
    _, folder = learned
    draft, judged = again(folder), list[object]()

    def check(adapter: OnlineDraft) -> None:
        judged.append(adapter)
        if len(judged) == 3:
            raise PrivacyError("of a test.")

    monkeypatch.setattr("hf_onlinespec.share.pushing.check_privacy", check)
    with pytest.raises(PrivacyError, match="data_statement"):
        draft.push_to_hub("me/public", private=False)
    assert judged == []
    with pytest.raises(PrivacyError, match=r"The adapter '(sql|orders)': of a test. To push the others, leave it out"):
        draft.push_to_hub("me/public", private=False, data_statement="Made for a test.")
    assert "me/public" not in hub.repos
    names = list(draft.adapters)
    judged.clear()
    draft.push_to_hub("me/public", private=False, data_statement="Made for a test.", selected_adapters=names[:1])
    files = hub.repos["me/public"].head.files
    with draft.adapters.using(names[0]) as own:
        assert judged == [draft, own] and own.lineage.data_statement == "Made for a test."
    assert f"adapters/{names[0]}/{CONFIG}" in files and f"adapters/{names[1]}/{CONFIG}" not in files
    assert not any(file.endswith(STATE) for file in files)
    assert "Made for a test." in files[f"adapters/{names[0]}/README.md"].data.decode()


def test_checkpoints_have_what_adapters_with_names_learned(learned, hub: LoopbackHub, target) -> None:
    _, folder = learned
    draft = again(folder)
    draft.push_to_hub("me/draft", checkpoint_every=1)
    learn(draft, target, 7, ["sql", "sql", "sql"])
    assert draft.checkpoints is not None and draft.checkpoints.wait(60)
    draft.checkpoints.close()
    found = OnlineDraft.from_pretrained("me/draft", base_model=tiny_llama(2))
    assert draft.checkpoints.pushed == 1 and torch.equal(params(found, "sql"), params(draft, "sql"))


def test_the_commands_push_and_pull_them(learned, hub: LoopbackHub, tmp_path, capsys) -> None:
    _, folder = learned
    assert main(["push", str(folder), "me/draft"]) == 0
    assert main(["pull", "me/draft", str(tmp_path / "pulled")]) == 0
    capsys.readouterr()
    found = again(tmp_path / "pulled")
    assert sorted(found.adapters) == ["orders", "sql"] and torch.equal(
        params(found, "sql"), params(again(folder), "sql")
    )
