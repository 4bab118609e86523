"""Saved drafts: resuming goes on as if nothing had happened, other libraries read them, damage is told, kills lose nothing."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_onlinespec import ArtifactError, DraftError, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.metrics import HISTORY_BUCKETS
from hf_onlinespec.share.artifact import Artifact, checksum
from hf_onlinespec.share.folder import ADAPTER, ADAPTER_CONFIG, CONFIG, STAGING, STATE
from hf_onlinespec.share.lineage import Alignment, Parent, WarmStart
from hf_onlinespec.share.manifest import Manifest, own_checksum
from hf_onlinespec.share.replacing import finish_interrupted_write
from hf_onlinespec.state import State
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params, move

# Numbers instead of "auto", and nothing that holds users' tokens: then a resumed draft has to do the very same.
REPEATABLE: dict[str, Any] = {
    "rank": 2,
    "alpha": 2.0,
    "lookahead": 2,
    "update_every": 1,
    "update_when": "round",
    "replay_tokens": 0,
    "memory_tokens": 0,
}
LEARNERS: dict[str, dict[str, Any]] = {
    "optimistic": {},
    "ogd, plain": {"learner": "ogd", "preconditioner": "none", "lr": 0.05},
    "heavy ball in a ball": {"learner": "heavy_ball", "radius": 0.5},
    "optimistic in a ball, long hint": {"radius": 0.5, "hint_memory": 0.5},
    "ensemble": {"learner": "ensemble"},
    "ensemble of optimistic": {"learner": "ensemble", "expert_learner": "optimistic", "hedge": "cumulative"},
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "untied": lambda: tiny_llama(2),
    "tied": lambda: tiny_llama(2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(2),
}
TOKENS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(3))


def serve(target: PreTrainedModel, draft: OnlineDraft, seeds: range, new_tokens: int = 12) -> list[torch.Tensor]:
    found = []
    for seed in seeds:
        prompt = torch.randint(32, (1, 5), generator=torch.Generator().manual_seed(seed))
        found.append(target.generate(prompt, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft))
    return found


def same_state(a: OnlineDraft, b: OnlineDraft) -> bool:
    """Everything that is saved, to the last bit; times apart."""
    one, two = a.artifact(), b.artifact()
    for left, right in ((one.adapter, two.adapter), (one.state.tensors, two.state.tensors)):
        assert sorted(left) == sorted(right)
        if not all(torch.equal(left[name], right[name]) for name in left):
            return False
    values = [dict(artifact.state.values) for artifact in (one, two)]
    counters = [value.pop("metrics") for value in values]
    counts = [{k: v for k, v in c.items() if not k.endswith("_s") and k != "history"} for c in counters]
    return values[0] == values[1] and counts[0] == counts[1]


@pytest.mark.parametrize("settings", LEARNERS.values(), ids=LEARNERS)
def test_resumed_is_uninterrupted(settings: dict[str, Any], target: PreTrainedModel, tmp_path: Path) -> None:
    config = OnlineSpecConfig(**(REPEATABLE | settings))
    whole = OnlineDraft(tiny_llama(2), config)
    serve(target, whole, range(24))
    assert whole.metrics.updates >= 200
    parts = OnlineDraft(tiny_llama(2), config)
    for begin in (0, 7, 15):  # also in the middle of what the guard tries
        serve(target, parts, range(begin, {0: 7, 7: 15, 15: 24}[begin]))
        parts.save_pretrained(tmp_path)
        parts = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert same_state(whole, parts)
    assert torch.equal(whole(TOKENS).logits, parts(TOKENS).logits)
    assert parts.metrics.requests == 24 and sum(stretch.requests for stretch in parts.metrics.history) == 24


def with_earlier_states(draft: OnlineDraft, n: int, **values: Any) -> Artifact:
    """What a draft saves whose guard has kept n earlier states, and is where these values say."""
    artifact = draft.artifact()
    of_an_expert = flat_params(draft)[:: draft.settings.blocks].bfloat16()
    states = {f"guard.states.{i}": torch.randn_like(of_an_expert) for i in range(n)}
    guard = artifact.state.values["guard"] | {"states": n} | values
    return replace(
        artifact, state=State({**artifact.state.tensors, **states}, artifact.state.values | {"guard": guard})
    )


def test_the_guard_resumes_in_the_middle_of_a_trial(tmp_path: Path) -> None:
    """States that are tried, their leads, and the latest state are kept."""
    trial = {"tried": [[1, [0.5, 0.25]], [None, [-0.125]]], "trials": 2, "level": 0.3, "latest": [[0.5, None]]}
    saved = with_earlier_states(OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)), 2, reason="why", **trial)
    saved.write(tmp_path)
    found = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2)).artifact().state
    assert found.values["guard"] == saved.state.values["guard"]
    states = [name for name in found.tensors if name.startswith("guard.states.")]
    assert len(states) == 2 and all(torch.equal(found.tensors[name], saved.state.tensors[name]) for name in states)


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_reloaded_and_loaded_by_peft_it_says_the_same(
    make: Callable[[], PreTrainedModel], learner: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    draft = OnlineDraft(make(), OnlineSpecConfig(**(REPEATABLE | {"learner": learner})))
    serve(target, draft, range(6))
    draft.save_pretrained(tmp_path)
    live = draft(TOKENS).logits
    assert not torch.equal(live, make()(TOKENS).logits)
    assert torch.equal(OnlineDraft.from_pretrained(tmp_path, make())(TOKENS).logits, live)
    with warnings_of_tied_models():
        by_peft = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(by_peft(TOKENS).logits, live, atol=1e-5, rtol=1e-5)
    base = by_peft.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head.get_base_layer().weight is embedding.get_base_layer().weight:
        head.get_base_layer().weight = torch.nn.Parameter(head.get_base_layer().weight.clone())
        base.config.tie_word_embeddings = False
    assert torch.equal(by_peft.merge_and_unload()(TOKENS).logits, live)  # folded as PEFT merges


@contextmanager
def warnings_of_tied_models() -> Iterator[None]:
    """PEFT remarks on adapters of tied layers, and on Conv1D layers, whose layout it then sets by itself."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|fan_in_fan_out|is_gradient_checkpointing).*")
        yield


def test_sizes(tmp_path: Path) -> None:
    """The adapter's file holds the adapter; the state two moments, and two earlier states in half of the precision."""
    for learner in ("optimistic", "ensemble"):
        config = OnlineSpecConfig(**(REPEATABLE | {"learner": learner, "rank": 64, "alpha": 64.0}))
        draft = OnlineDraft(tiny_llama(2, hidden=64), config)
        with_earlier_states(draft, config.snapshots).write(tmp_path)
        size = flat_params(draft).nbytes
        assert (tmp_path / ADAPTER).stat().st_size <= 1.1 * size
        assert (tmp_path / STATE).stat().st_size <= 3.2 * size


def test_nothing_of_the_text_is_saved(target: PreTrainedModel, tmp_path: Path) -> None:
    """Neither tokens nor their bytes, whatever the draft still remembers of them in the process."""
    config = OnlineSpecConfig(**(REPEATABLE | {"replay_tokens": 4096, "memory_tokens": 4096}))
    draft = OnlineDraft(tiny_llama(2), config)
    serve(target, draft, range(4))
    remembered = draft.learning.replayed()
    assert remembered and draft.memory is not None and len(draft.memory) > 0
    draft.save_pretrained(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert {ADAPTER, ADAPTER_CONFIG, CONFIG, STATE} <= {path.name for path in files}
    for feedback in remembered:
        tokens = feedback.tokens.tolist()
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
            needle = feedback.tokens[-6:].to(dtype).numpy().tobytes()
            assert not any(needle in path.read_bytes() for path in files)
        for text in (
            ", ".join(map(str, tokens[-6:])),
            ",".join(map(str, tokens[-6:])),
            " ".join(map(str, tokens[-6:])),
        ):
            assert not any(text.encode() in path.read_bytes() for path in files)
    again = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert again.learning.replayed() == [] and again.memory is not None and len(again.memory) == 0


def test_another_base_is_refused(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError) as error:
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(5))
    assert (
        draft.identity.weights in str(error.value) and "given" in str(error.value) and "force=True" in str(error.value)
    )
    forced = OnlineDraft.from_pretrained(tmp_path, tiny_llama(5), force=True)
    assert torch.equal(flat_params(forced), flat_params(draft))
    for other in (tiny_llama(2, hidden=32), tiny_llama(2, layers=2)):  # where it does not even fit
        with pytest.raises(ArtifactError, match=r"expected|differ"):
            OnlineDraft.from_pretrained(tmp_path, other, force=True)


def test_the_same_base_in_half_of_the_precision_is_the_same(tmp_path: Path) -> None:
    base = tiny_llama(2).half().float()
    OnlineDraft(base, OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path)
    assert OnlineDraft.from_pretrained(tmp_path, tiny_llama(2).half()).identity.weights


def test_settings_that_do_not_fit_the_state(tmp_path: Path) -> None:
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="expected"):
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"rank": 3})))
    with pytest.raises(ArtifactError, match="settings"):
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"learner": "ensemble"})))
    slower = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"lr": 1e-4})))
    assert slower.settings.lr == 1e-4


# Damage


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def damage_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


class Trap:
    """What a file must never get to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("name", [ADAPTER, STATE, ADAPTER_CONFIG, CONFIG])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_pickle, Path.unlink])
def test_damage_is_told(
    name: str, damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "draft"
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(folder)
    damage(folder / name)
    if damage is Path.unlink and name == CONFIG:  # what is left is an ordinary adapter: it begins anew
        assert OnlineDraft.from_pretrained(folder, tiny_llama(2)).metrics.requests == 0
        return
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        OnlineDraft.from_pretrained(folder, tiny_llama(2))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", [ADAPTER, STATE])
def test_a_pickle_with_the_right_checksum_is_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "draft"
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(folder)
    damage_pickle(folder / name)
    manifest = json.loads((folder / CONFIG).read_text())
    manifest["files"][name] = checksum((folder / name).read_bytes())
    manifest["checksum"] = own_checksum(manifest)
    (folder / CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="safetensors"):
        OnlineDraft.from_pretrained(folder, tiny_llama(2))
    assert not (tmp_path / "trapped").exists()


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda m: m.update(extra=1), "unknown keys"),
    "missing key": (lambda m: m.pop("base"), "missing keys"),
    "newer format": (lambda m: m.update(format=2), "format 2"),
    "no format": (lambda m: m.pop("format"), "format None"),
    "settings of another type": (lambda m: m.update(settings=[1]), "settings"),
    "unknown setting": (lambda m: m["settings"].update(speed=11), "speed"),
    "impossible setting": (lambda m: m["settings"].update(rank=0), "rank"),
    "unnamed base": (lambda m: m["base"].pop("weights"), "identity"),
    "base of numbers": (lambda m: m["base"].update(name=3), "name=3"),
    "file outside": (lambda m: m["files"].update({"../../etc/passwd": "00000000"}), "passwd"),
    "absolute file": (lambda m: m["files"].update({"/etc/passwd": "00000000"}), "passwd"),
    "file unlisted": (lambda m: m["files"].pop(STATE), STATE),
}


@pytest.mark.parametrize(("change", "told"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_changed_manifest_is_told(change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path) -> None:
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / CONFIG).read_text())
    change(manifest)
    manifest["checksum"] = own_checksum(manifest)
    (tmp_path / CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=told.replace(".", r"\.")):
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no steps": lambda v: v["adaptation"].pop("steps"),
    "steps of text": lambda v: v["adaptation"].update(steps="many"),
    "another number of experts": lambda v: v["adaptation"].update(alive=[True, True]),
    "no such row": lambda v: v["adaptation"].update(serving=7),
    "a state that is not there": lambda v: v["guard"].update(tried=[[4, [0.1]]]),
    "too many states": lambda v: v["guard"].update(states=3),
    "counters of text": lambda v: v["metrics"].update(requests="all"),
    "a history of lists": lambda v: v["metrics"].update(history=[[1]]),
    "a part that is a number": lambda v: v.update(guard=3),
    "losses of numbers": lambda v: v["adaptation"].update(losses=[3]),
    "losses of text": lambda v: v["adaptation"].update(losses=[["a", "b", "c"]]),
    "weights that are none": lambda v: v["adaptation"].update(weights=[float("nan"), 0.5]),
    "alive by word": lambda v: v["adaptation"].update(alive=["yes"]),
    "latest of text": lambda v: v["guard"].update(latest=[["a", "b"]]),
    "leads of text": lambda v: v["guard"].update(tried=[[None, ["a"]]]),
    "less than no requests": lambda v: v["metrics"].update(requests=-5),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_values_that_do_not_fit_are_told(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    from dataclasses import replace

    from hf_onlinespec.state import State

    artifact = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).artifact()
    values = json.loads(json.dumps(artifact.state.values))
    change(values)
    replace(artifact, state=State(artifact.state.tensors, values)).write(tmp_path)
    with pytest.raises(ArtifactError):
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))


def test_neither_adapter_nor_model(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match="the folder holds no model"):
        OnlineDraft.from_pretrained(tmp_path)
    with pytest.raises(DraftError, match="no such folder"):
        OnlineDraft.from_pretrained(tmp_path / "nowhere")


def test_a_plain_model_begins_a_new_draft(tmp_path: Path) -> None:
    model = tiny_llama(2)
    model.save_pretrained(tmp_path)
    draft = OnlineDraft.from_pretrained(tmp_path, config=OnlineSpecConfig(rank=3))
    assert draft.settings.rank == 3 and draft.metrics.requests == 0
    assert torch.equal(draft(TOKENS).logits, model(TOKENS).logits)


def test_a_base_in_a_folder_is_found_again(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(2).save_pretrained(tmp_path / "base")
    draft = OnlineDraft.from_pretrained(tmp_path / "base", config=OnlineSpecConfig(**REPEATABLE))
    serve(target, draft, range(2))
    draft.save_pretrained(tmp_path / "evolved")
    again = OnlineDraft.from_pretrained(tmp_path / "evolved")
    assert same_state(draft, again)
    assert again.lineage.parent is None and again.lineage.draft != draft.lineage.draft
    assert again.identity.name == "base"  # without the folders of this machine
    (tmp_path / "base").rename(tmp_path / "moved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DraftError, match="base_model="):
        OnlineDraft.from_pretrained(tmp_path / "evolved")


# Writing


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    """The limit on the size of a file stands for a disk that is full."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    before = flat_params(draft)
    move(draft)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(ArtifactError, match="could not be saved"):
            draft.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(flat_params(OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))), before)
    draft.save_pretrained(tmp_path)
    assert torch.equal(flat_params(OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))), before + 1)


def test_the_folder_of_a_model_is_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    """Transformers would load the model with this adapter, which was made for another one."""
    target.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="a model lies there"):
        OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, target(TOKENS).logits)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ArtifactError, match="could not be saved"):
        OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("moved", range(4))
def test_what_was_complete_is_found_wherever_it_lies(moved: int, tmp_path: Path) -> None:
    """Killed after so many files were moved into place: the new state is read, by us from both places."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path / "a")
    move(draft)
    draft.save_pretrained(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a" / STAGING)
    for name in (ADAPTER_CONFIG, ADAPTER, STATE)[:moved]:
        (tmp_path / "a" / STAGING / name).replace(tmp_path / "a" / name)
    found = Artifact.read(tmp_path / "a")
    assert all(torch.equal(t, draft.artifact().adapter[name]) for name, t in found.adapter.items())
    finish_interrupted_write(tmp_path / "a")
    assert not (tmp_path / "a" / STAGING).exists()
    assert Artifact.read(tmp_path / "a").state.values == found.state.values


def test_a_save_that_fails_keeps_what_was_complete_aside(tmp_path: Path) -> None:
    """Killed while its files were moved; then the disk is full: the complete set is not thrown away for the new one."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path / "a")
    move(draft)
    draft.save_pretrained(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a" / STAGING)
    (tmp_path / "a" / STAGING / ADAPTER).replace(tmp_path / "a" / ADAPTER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(ArtifactError, match="could not be saved"):
            draft.save_pretrained(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = OnlineDraft.from_pretrained(tmp_path / "a", tiny_llama(2))
    assert torch.equal(flat_params(found), flat_params(draft))


def test_what_was_not_complete_is_forgotten(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / ADAPTER).write_bytes(b"half of")
    finish_interrupted_write(tmp_path)
    assert OnlineDraft.from_pretrained(tmp_path, tiny_llama(2)).metrics.requests == 0
    draft.save_pretrained(tmp_path)
    assert not (tmp_path / STAGING).exists()


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """Two hundred processes that learn and save in a loop are killed: every folder loads, and at most one update is lost."""
    script = Path(__file__).with_name("kill_loop.py")
    found = subprocess.run(
        [sys.executable, script, str(tmp_path / "draft"), "200"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["kills"] == 200 and report["unloadable"] == 0 and report["most_updates_lost"] <= 1
    assert report["killed_inside_a_save"] > 0  # else it was no test


def test_inspect_reads_without_a_model(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    found = Manifest.read(tmp_path)
    assert found.settings == draft.settings.to_dict() and found.base.weights == draft.identity.weights
    assert found.versions["torch"] == torch.__version__


def test_a_history_stays_bounded(target: PreTrainedModel) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.metrics.history.clear()
    from hf_onlinespec.metrics import Counts

    for i in range(1000):
        draft.metrics.close(Counts(new_tokens=i, rounds=1))
    history = draft.metrics.history
    assert len(history) <= HISTORY_BUCKETS and sum(c.requests for c in history) == 1000
    assert sum(c.new_tokens for c in history) == sum(range(1000))
    assert len({c.requests for c in history[:-1]}) == 1
    first, last = draft.metrics.part(0, 0.1), draft.metrics.part(0.9, 1)
    assert first.new_tokens / first.requests < 60 and last.new_tokens / last.requests > 900


# After a review


def test_a_reader_beside_a_writer_gets_one_state_or_the_other(tmp_path: Path) -> None:
    """The adapter and the state that are read belong together, while another thread saves one state after the other."""
    start = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).artifact()

    def write(number: int) -> None:
        adapter = {name: torch.full_like(part, number) for name, part in start.adapter.items()}
        replace(start, adapter=adapter, state=State(start.state.tensors, {"number": number})).write(tmp_path)

    write(0)
    writer = threading.Thread(target=lambda: [write(number) for number in range(1, 61)])
    writer.start()
    seen = set()
    while writer.is_alive():
        found = Artifact.read(tmp_path)
        number = found.state.values["number"]
        assert all(bool((part == number).all()) for part in found.adapter.values())
        seen.add(number)
    writer.join()
    assert len(seen) > 1


def test_two_writers_take_turns(tmp_path: Path) -> None:
    drafts = [OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)) for _ in range(2)]
    failed: list[Exception] = []

    def work(number: int) -> None:
        move(drafts[number], lambda part: torch.full_like(part, number))
        try:
            for _ in range(20):
                drafts[number].save_pretrained(tmp_path)
        except ArtifactError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    values = torch.cat([t.flatten() for t in Artifact.read(tmp_path).adapter.values()]).unique()
    assert values.tolist() in ([0.0], [1.0])


def test_an_artifact_is_a_copy(target: PreTrainedModel) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"learner": "ensemble"})))
    draft.lineage.alignment = Alignment(None, updates=1, tokens=1)
    artifact = draft.artifact()
    before = json.dumps(artifact.state.values)
    draft.artifact().state.values["adaptation"]["alive"][1] = False
    draft.lineage.alignment.tokens = 2
    serve(target, draft, range(2))
    assert json.dumps(artifact.state.values) == before and artifact.lineage.alignment.tokens == 1


def test_a_history_of_what_it_was_trained_on_survives(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    start = WarmStart(None, texts=3, prompts=0, tokens=90)
    draft.lineage.warm_start, draft.lineage.parent = start, Parent("me/draft", "abc")
    for _ in range(2):
        draft.save_pretrained(tmp_path)
        draft = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert draft.lineage.warm_start == start and draft.lineage.parent == Parent("me/draft", "abc")


def test_the_same_base_with_other_words_around_it(tmp_path: Path) -> None:
    """What people set on a loaded model, and what saving fills in, makes no other base of it."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path / "draft")
    tiny_llama(2).save_pretrained(tmp_path / "base")
    again = OnlineDraft.from_pretrained(tmp_path / "draft", base_model=tmp_path / "base")
    assert again.identity.is_same(draft.identity)
    other = tiny_llama(2)
    other.config.pad_token_id = other.config.eos_token_id = 3
    assert OnlineDraft.from_pretrained(tmp_path / "draft", base_model=other).metrics.requests == 0
    assert OnlineDraft.from_pretrained(tmp_path / "draft", base_model=tiny_llama(2).bfloat16()).metrics.requests == 0
    turned = tiny_llama(2, rope_theta=500.0)  # the same weights, another function
    with pytest.raises(ArtifactError, match="another base"):
        OnlineDraft.from_pretrained(tmp_path / "draft", base_model=turned)


def test_resumed_after_an_interrupted_call(target: PreTrainedModel, tmp_path: Path) -> None:
    """What the broken request had shown is judged before it is saved."""
    config = OnlineSpecConfig(**(REPEATABLE | {"learner": "ensemble"}))
    drafts = []
    for resumes in (False, True):
        draft = OnlineDraft(tiny_llama(2), config)
        serve(target, draft, range(3))
        with pytest.raises(KeyboardInterrupt):
            target.generate(
                TOKENS[:1], max_new_tokens=20, assistant_model=draft, do_sample=False, stopping_criteria=[_Stop()]
            )
        if resumes:
            draft.save_pretrained(tmp_path)
            draft = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
        serve(target, draft, range(3, 6))
        drafts.append(draft)
    assert same_state(*drafts)


class _Stop:
    """Ctrl-C in the middle of a request."""

    def __call__(self, tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] > 18:
            raise KeyboardInterrupt
        return torch.zeros(len(tokens), dtype=torch.bool)


def test_loaded_under_inference_mode_it_goes_back_to_earlier_states(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"radius": 0.5})))
    draft.save_pretrained(tmp_path)
    with torch.inference_mode():
        again = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    move(again)
    assert not any(part.is_inference() for part in again.learning.adapter_params().values())
    serve(tiny_llama(1, layers=2), again, range(2))
    assert again.metrics.updates > 0 and again.metrics.failed_updates == 0


def test_what_an_ensemble_says_of_itself_is_back(target: PreTrainedModel, tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**(REPEATABLE | {"learner": "ensemble"})))
    serve(target, draft, range(3))
    with_earlier_states(draft, 0, reason="why").write(tmp_path)
    again = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert len(again.metrics.expert_weights) == 4 and again.metrics.expert_weights == draft.metrics.expert_weights
    assert again.metrics.decisions.rollback == "why"


def test_one_bit_of_a_number_in_the_settings(tmp_path: Path) -> None:
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE)).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert '"lr": 0.002' in text
    (tmp_path / CONFIG).write_text(text.replace('"lr": 0.002', '"lr": 0.006'))
    with pytest.raises(ArtifactError, match="damaged or changed"):
        OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))


@pytest.mark.parametrize("name", ["save_file", "checksum"])
def test_a_save_that_fails_leaves_none_of_its_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it would keep a full disk full."""
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    move(draft)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"hf_onlinespec.share.artifact.{name}", full)
    with pytest.raises(ArtifactError, match="No space left"):
        draft.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert all((tmp_path / file).read_bytes() == data for file, data in before.items())


def test_a_draft_without_its_state_takes_the_place_of_one_with_it(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    move(draft)
    replace(draft.artifact(), state=State()).write(tmp_path)
    assert not (tmp_path / STATE).exists() and not (tmp_path / STAGING).exists()
    again = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert torch.equal(flat_params(again), flat_params(draft)) and again.metrics.requests == 0


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    draft = OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE))
    draft.save_pretrained(tmp_path)
    before = flat_params(draft)
    move(draft)
    statement = draft.lineage.data_statement = "x" * (9 << 20)
    with pytest.raises(ArtifactError, match="can be read again"):
        draft.save_pretrained(tmp_path)
    assert torch.equal(flat_params(OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))), before)
    draft.lineage.data_statement = statement[:1000]
    draft.save_pretrained(tmp_path)
    assert OnlineDraft.from_pretrained(tmp_path, tiny_llama(2)).lineage.data_statement == statement[:1000]
