"""A draft's folder that somebody else has made: it loads and serves correctly, or it is refused; nothing else ever happens."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_onlinespec import ArtifactError, DraftError, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.share import card as cards
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.folder import ADAPTER, ADAPTER_CONFIG, CONFIG, LOCK, STAGING, STATE
from hf_onlinespec.share.lineage import Lineage
from hf_onlinespec.share.manifest import own_checksum
from hf_onlinespec.training.combining import combine, read_evolved
from tests.conftest import tiny_llama
from tests.drafts import flat_params, move
from tests.hostile import (
    BLOCKED_S,
    EMPTY_SHAPES,
    FILES,
    MOST_BYTES,
    MOST_S,
    Trial,
    add_empty,
    change_rank,
    enlarge,
    forge,
    inspect,
    memory_limit,
    pull,
    time_limit,
)
from tests.share.test_artifact import REPEATABLE, TOKENS

CASES, SEED = 100, 12
# What PEFT and transformers say to any adapter on such layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@functools.cache
def template() -> dict[str, bytes]:
    """The files of a saved draft."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


def save(folder: Path, **settings: Any) -> Path:
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(**REPEATABLE | settings)).save_pretrained(folder)
    return folder


def saved(folder: Path) -> Path:
    """A folder with a saved draft."""
    folder.mkdir(exist_ok=True)
    for name, data in template().items():
        (folder / name).write_bytes(data)
    return folder


def ending(use: Callable[[], object], most_bytes: int = MOST_BYTES) -> str:
    """How something ends within some seconds and some memory: "done", "refused", or the name of another exception."""
    try:
        with time_limit(BLOCKED_S), memory_limit(most_bytes):
            use()
    except ArtifactError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "done"


def load(folder: Path) -> OnlineDraft:
    return OnlineDraft.from_pretrained(folder, tiny_llama(2))


def test_changed_folders_serve_correctly_or_are_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    """The rest, by the thousand: benchmarks/hostile_folders.py."""
    trials = []
    for learner in ("optimistic", "ensemble"):
        (tmp_path / learner).mkdir()
        trials.append(Trial(tmp_path / learner, lambda: tiny_llama(2), target, learner))
    ended = Counter(trials[number % 2].case(SEED * 1_000_000 + number).partition(": ")[2] for number in range(CASES))
    assert ended["served"] >= 5 and ended["ArtifactError"] >= 40, ended  # else it was no test


# What lies in the place of a file


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_lock_that_is_anothers_file_is_not_emptied(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    saved(tmp_path / "draft")
    link(tmp_path / "draft" / LOCK, tmp_path / "victim")
    ending(lambda: save(tmp_path / "draft"))
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_set_aside_that_is_anothers_folder_is_left_there(tmp_path: Path) -> None:
    saved(tmp_path / "draft")
    save(tmp_path / "other", alpha=3.0)
    (tmp_path / "draft" / STAGING).symlink_to(tmp_path / "other")
    assert load(tmp_path / "draft").settings.alpha == 2.0
    assert ending(lambda: save(tmp_path / "draft")) == "refused"
    assert load(tmp_path / "other").settings.alpha == 3.0


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 36)


def nowhere(path: Path) -> None:
    path.symlink_to("/nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [pipe, endless, holes, nowhere, circle, Path.mkdir])
def test_what_is_no_file_of_a_draft_is_refused_at_once(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).unlink()
    make(tmp_path / name)
    assert ending(lambda: load(tmp_path)) == "refused"


def test_a_set_aside_that_is_not_ours_is_kept_and_saving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Complete by its names or not: a save would lose what a live draft has learned."""
    draft = load(saved(tmp_path))
    for number, name in enumerate((CONFIG, "notes.txt"), 1):
        (tmp_path / STAGING).mkdir()
        (tmp_path / STAGING / name).write_text("mine")
        move(draft)
        assert ending(lambda: draft.save_pretrained(tmp_path)) == "done"
        assert torch.equal(flat_params(load(tmp_path)), flat_params(draft))
        assert [path.read_text() for path in tmp_path.glob(f"*/{name}")] == ["mine"]
        assert len(caplog.records) == number and STAGING in caplog.text


def test_a_set_aside_that_cannot_be_read_is_kept_and_saving_goes_on(tmp_path: Path) -> None:
    draft = load(saved(tmp_path / "draft"))
    (tmp_path / "draft" / STAGING).mkdir()
    (tmp_path / "draft" / STAGING / "notes.txt").write_text("mine")
    (tmp_path / "draft" / STAGING).chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        for path in tmp_path.parents:  # as deep as the test runner has put it
            if path == Path(tempfile.gettempdir()):
                break
            path.chmod(0o755)
        for path in (tmp_path, tmp_path / "draft", *(tmp_path / "draft").iterdir()):
            os.chown(path, 65534, -1)
        os.seteuid(65534)
    try:
        assert ending(lambda: draft.save_pretrained(tmp_path / "draft")) == "done"
    finally:
        os.seteuid(user)
    assert torch.equal(flat_params(load(tmp_path / "draft")), flat_params(draft))
    (kept,) = tmp_path.glob(f"draft/{STAGING}*")
    kept.chmod(0o700)
    assert (kept / "notes.txt").read_text() == "mine"


def test_links_to_files_are_read(tmp_path: Path) -> None:
    """The cache of the Hub is made of them, and a folder may be one."""
    saved(tmp_path / "draft")
    (tmp_path / "snapshot").mkdir()
    for name in FILES:
        (tmp_path / name).write_bytes((tmp_path / "draft" / name).read_bytes())
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / name)
    (tmp_path / "linked").symlink_to(tmp_path / "draft")
    for name in ("snapshot", "linked"):
        load(tmp_path / name).save_pretrained(tmp_path / name)
        assert torch.equal(load(tmp_path / name)(TOKENS).logits, tiny_llama(2)(TOKENS).logits)
    assert (tmp_path / CONFIG).is_file() and not (tmp_path / "snapshot" / CONFIG).is_symlink()


# What the files say


FORGED: dict[str, tuple[str, Any]] = {
    "rank": ("settings", {"rank": 10**6}),
    "experts": ("settings", {"learner": "ensemble", "experts": 10**7}),
    "memory": ("settings", {"memory_tokens": 10**10}),
    "seed": ("settings", {"seed": 10**400}),
    "number": ("settings", {"lr": 10**400}),
    "ratio": ("settings", {"expert_ratio": 1e300}),
    "layers": ("settings", {"target_modules": 5}),
    "target": ("run", {"targets": ["x", 5]}),
    "counter": ("run", {"new_tokens": 10**400}),
    "machine": ("run", {"machine": None}),
    "parent": ("lineage", {"parent": "me/draft"}),
    "weight": ("lineage", {"merged": [{"weight": 10**400}]}),
    "half a character": ("lineage", {"data_statement": "\ud800"}),
}


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"weight": 1.0}
    for _ in range(levels):
        found = {"merged": [found], "weight": 1.0}
    return found


@pytest.mark.parametrize(("part", "values"), [*FORGED.values(), ("lineage", deep(400))], ids=[*FORGED, "deep"])
def test_forged_values_are_refused_before_anything_is_made(part: str, values: Any, tmp_path: Path) -> None:
    manifest = json.loads((saved(tmp_path) / CONFIG).read_text())
    manifest[part] |= values
    (tmp_path / CONFIG).write_text(json.dumps(manifest))
    forge(tmp_path)
    assert ending(lambda: load(tmp_path).save_pretrained(tmp_path)) == "refused"
    for use in ("inspect", "merge", "card"):
        assert ending(functools.partial(USES[use], tmp_path)) == "refused"


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "400 digits": lambda v: v["metrics"].update(requests=10**400),
    "steps": lambda v: v["adaptation"].update(steps=-(10**400)),
    "losses": lambda v: v["adaptation"].update(losses=[[1e308] * 3, [-1e308] * 3]),
    "leads": lambda v: v["guard"].update(tried=[[None, [1e308, -1e308, 1e308]]]),
    "history": lambda v: v["metrics"].update(history=[[-1] * 14]),
    "half a place": lambda v: v["guard"].update(states=1, tried=[[0.5, [0.1]]]),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_forged_states_are_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    from safetensors import safe_open

    saved(tmp_path)
    with safe_open(tmp_path / STATE, "pt") as file:
        values = json.loads(file.metadata()["values"])
    change(values)
    save_file(load_file(tmp_path / STATE), tmp_path / STATE, {"values": json.dumps(values)})
    forge(tmp_path)
    assert ending(lambda: load(tmp_path)) == "refused"


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int32])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(saved(tmp_path) / ADAPTER).items()}
    save_file(tensors, tmp_path / ADAPTER)
    forge(tmp_path)
    assert ending(lambda: load(tmp_path)) == "refused"


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_an_empty_tensor_of_endless_shape_is_refused(shape: list[int], tmp_path: Path) -> None:
    """It takes no bytes, and the shape itself may be more than torch can count."""
    add_empty(saved(tmp_path) / STATE, shape, "adaptation.x")
    forge(tmp_path)
    assert ending(lambda: load(tmp_path)) == "refused"
    assert ending(lambda: Artifact.read(tmp_path)) == "refused"


def test_a_layer_that_the_base_does_not_have(tmp_path: Path) -> None:
    """Large tensors that are really there, on a layer that nothing explains: they are not even read."""
    tensors = load_file(saved(tmp_path) / ADAPTER)
    tensors["base_model.model.more.lora_A.weight"] = torch.zeros(2, 7)
    tensors["base_model.model.more.lora_B.weight"] = torch.zeros(7, 2)
    save_file(tensors, tmp_path / ADAPTER)
    forge(tmp_path)
    assert ending(lambda: load(tmp_path)) == "refused"


# What is claimed is not allocated


USES: dict[str, Callable[[Path], object]] = {
    "load": load,
    "inspect": inspect,
    "pull": lambda at: pull(at, at.parent / "pulled"),
    "merge": lambda at: combine([read_evolved(at), read_evolved(at)], tiny_llama(2)),
    "card": lambda at: cards.write(Artifact.read(at), at.parent / "card", draw=False),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("name", [ADAPTER, STATE])
def test_a_file_of_many_gigabytes_takes_little_memory_and_time(
    name: str, use: Callable[[Path], object], tmp_path: Path
) -> None:
    """Its header and its checksum are sound, and nearly all of it is a hole."""
    enlarge(saved(tmp_path / "draft") / name, 6 << 30)
    forge(tmp_path / "draft")
    told = use is inspect and name == ADAPTER  # from its header alone
    started = time.process_time()
    assert ending(lambda: use(tmp_path / "draft"), 1 << 28) == ("done" if told else "refused")
    assert time.process_time() - started < MOST_S


def test_a_draft_of_zeros_is_saved_where_the_file_system_makes_holes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ZFS does; on this one no file that we write has holes, so its answer is given in its place."""
    draft = load(saved(tmp_path))

    def seek(descriptor: int, at: int, how: int) -> int:
        raise OSError(errno.ENXIO, "nothing but a hole")

    with monkeypatch.context() as patch:
        patch.setattr(os, "lseek", seek)
        patch.setattr("hf_onlinespec.share.files.MOST_HOLES", 1000)
        assert ending(lambda: draft.save_pretrained(tmp_path / "again")) == "done"
        assert ending(lambda: load(tmp_path / "again")) == "refused"  # it might be anybody's
    assert torch.equal(flat_params(load(tmp_path / "again")), flat_params(draft))  # as on another file system


def test_a_rank_that_fits_and_takes_gigabytes_is_refused(tmp_path: Path) -> None:
    change_rank(saved(tmp_path), Fixed())
    forge(tmp_path)
    assert ending(lambda: load(tmp_path)) == "refused"


class Fixed(random.Random):
    """Chooses the last."""

    def choice(self, values: Sequence[Any]) -> Any:
        return values[-1]


def test_tensors_are_copied_without_being_held(tmp_path: Path) -> None:
    """A large draft is sent on by who has not the memory to serve it."""
    enlarge(saved(tmp_path / "draft") / ADAPTER, 48 << 20)
    forge(tmp_path / "draft")

    def copy() -> None:
        replace(Artifact.read(tmp_path / "draft"), lineage=Lineage()).write(tmp_path / "pulled")

    assert ending(copy, 1 << 25) == "done"
    assert (tmp_path / "pulled" / ADAPTER).stat().st_size > 48 << 20
    before, after = (Artifact.read(tmp_path / name) for name in ("draft", "pulled"))
    assert list(before.adapter) == list(after.adapter)
    for one, other in ((before.adapter, after.adapter), (before.state.tensors, after.state.tensors)):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert before.state.values == after.state.values


def test_as_many_values_as_fit_into_a_file_are_refused(tmp_path: Path) -> None:
    """A few megabytes of numbers would take seconds, whenever they are read."""
    manifest = json.loads((saved(tmp_path) / CONFIG).read_text())
    manifest["lineage"]["more"] = [1] * 600_000
    manifest["checksum"] = own_checksum(manifest)
    (tmp_path / CONFIG).write_text(json.dumps(manifest))
    assert ending(lambda: load(tmp_path)) == "refused"


def test_a_file_that_several_threads_read_at_once_gives_each_its_own_numbers(tmp_path: Path) -> None:
    adapter = Artifact.read(saved(tmp_path)).adapter
    expected = load_file(tmp_path / ADAPTER)

    def is_read(name: str) -> bool:
        try:
            return torch.equal(adapter[name], expected[name])
        except ArtifactError:
            return False

    def wrong(names: Sequence[str]) -> list[str]:
        return [name for _ in range(50) for name in names if not is_read(name)]

    names = sorted(expected)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(wrong, [names, names[::-1]] * 2))
    finally:
        sys.setswitchinterval(before)
    assert found == [[]] * 4


# What PEFT would serve and what we serve is one model


OPTIONS: dict[str, Any] = {
    "lora_alpha": 200.0,
    "use_dora": True,
    "use_rslora": True,
    "layers_to_transform": 0,
    "init_lora_weights": "pissa_niter_4",
    "init_lora_weights ": "OLoRA",
    "bias": "lora_only",
    "alora_invocation_tokens": [1],
    "target_modules": ".*",
    "target_modules ": ["q_proj"],
    "rank_pattern": {"q_proj": 1},
    "exclude_modules": ["q_proj"],
    "lora_bias": True,
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "task_type": "SEQ_CLS",
    "an_option_of_tomorrow": "on",
}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items(), ids=OPTIONS)
def test_an_option_that_makes_it_another_model_is_named(name: str, value: Any, tmp_path: Path) -> None:
    name = name.strip()
    about = json.loads((saved(tmp_path) / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(about | {name: value}))
    forge(tmp_path)
    with pytest.raises(ArtifactError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, v in OPTIONS.items() if n not in ("lora_alpha", "target_modules ")]  # there they are its own
    + [("peft_type", kind) for kind in ("IA3", "LOHA", "VERA", "LOKR", "PREFIX_TUNING")],
)
def test_an_ordinary_adapter_with_such_an_option_is_named(name: str, value: Any, tmp_path: Path) -> None:
    name = name.strip()
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(2), settings).save_pretrained(tmp_path)
    assert load(tmp_path).settings.rank == 2
    about = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    if name == "peft_type":
        del about["r"], about["lora_alpha"]  # other kinds have none
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(about | {name: value}))
    with pytest.raises(ArtifactError, match=f"{name}="):
        load(tmp_path)


def test_weights_of_the_base_beside_an_ordinary_adapter_have_to_be_the_bases(tmp_path: Path) -> None:
    """PEFT would load them over those of the base."""
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(2), settings)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    (name,) = [name for name in load_file(tmp_path / ADAPTER) if ".base_layer." in name]
    torch.testing.assert_close(load(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    tensors = load_file(tmp_path / ADAPTER)
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / ADAPTER)
    assert not torch.equal(PeftModel.from_pretrained(tiny_llama(2), tmp_path)(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ArtifactError, match="base_layer"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_coarse_copy_of_a_weight_of_the_base_is_another_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(2), settings)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / ADAPTER)
    save_file({n: t.to(dtype) if ".base_layer." in n else t for n, t in tensors.items()}, tmp_path / ADAPTER)
    change = PeftModel.from_pretrained(tiny_llama(2), tmp_path)(TOKENS).logits - model(TOKENS).logits
    assert change.abs().max() > 1e-3
    with pytest.raises(ArtifactError, match="base_layer"):
        load(tmp_path)


# Code


def test_an_adapter_makes_nobody_run_the_code_of_its_base(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny_llama(2).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    about = json.loads((saved(tmp_path / "draft") / ADAPTER_CONFIG).read_text())
    (tmp_path / "draft" / ADAPTER_CONFIG).write_text(json.dumps(about | {"base_model_name_or_path": str(base)}))
    forge(tmp_path / "draft")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    error: Exception | None = None
    try:
        OnlineDraft.from_pretrained(tmp_path / "draft")
    except Exception as raised:
        error = raised
    assert not (tmp_path / "ran").exists(), "the code ran"
    assert isinstance(error, DraftError) and "trust_remote_code" in str(error) and "base_model=" in str(error)
