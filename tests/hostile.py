"""Folders of a draft that somebody else has made: a saved one, changed in a way that a seed chooses, its checksums made right again.

`python -m tests.hostile --cases 100 --seed 0` tries some and tells how they ended. A folder either loads and serves correctly, or is
refused with one of our errors: ArtifactError, or DraftError and HubError where it names a base that cannot be found. Every case goes
through loading, saving, inspecting and the card, some through merging and pulling.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_onlinespec import ArtifactError, DraftError, HubError, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.share import card as cards
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.folder import ADAPTER, ADAPTER_CONFIG, CONFIG, STAGING, STATE
from hf_onlinespec.share.manifest import own_checksum
from hf_onlinespec.training.combining import combine, read_evolved

MOST_S, MOST_BYTES = 10, 1 << 30  # of one case: of the processor, and of memory
BLOCKED_S = 60  # by the clock: on a busy machine a case may have to wait
NEW_TOKENS = 5
REFUSALS = (ArtifactError, DraftError, HubError)
FILES = (ADAPTER_CONFIG, ADAPTER, STATE, CONFIG)
SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 2.0, "lookahead": 2, "update_every": 1, "update_when": "round"}
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    10**6,
    2**62,
    10**400,
    -(10**400),
    0.5,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\n---\n# b|`c`<img src=x>",
    "\ud800",
    "\0",
    "../../../../etc/passwd",
    "x" * 5000,
    [],
    [None],
    [1, "a", {}],
    {},
    {"a": 1},
)
ODD_OPTIONS: dict[str, Any] = {
    "lora_alpha": 200.0,
    "use_dora": True,
    "use_rslora": True,
    "layers_to_transform": 0,
    "layers_pattern": "layers",
    "init_lora_weights": "pissa",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "alora_invocation_tokens": [1],
    "target_modules": ".*",
    "rank_pattern": {"q_proj": 1},
    "alpha_pattern": {"q_proj": 1},
    "peft_type": "IA3",
    "exclude_modules": ["q_proj"],
    "r": 10**6,
    "lora_bias": True,
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
}
ODD_SETTINGS: dict[str, Any] = {
    "rank": 10**6,
    "experts": 10**9,
    "memory_tokens": 10**12,
    "replay_tokens": 10**18,
    "seed": 2**200,
    "learner": "ensemble",
    "snapshots": 10**9,
    "expert_ratio": 1e300,
    "target_modules": ["q_proj"],
    "alpha": 1e-300,
    "lr": 1e308,
}
EMPTY_SHAPES = ([2**62, 4, 0], [0, 2**62, 4], [2**40, 0], [2**63 - 1, 0], [0] + 7 * [2**62])


class TooLong(Exception):
    """A case took more than its time."""


# What a folder is changed by


def checksum_of(path: Path) -> str:
    """The checksum of a file, at once also where it ends in a hole of many gigabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        written = size if size < 1 << 28 else os.lseek(file.fileno(), 0, os.SEEK_HOLE)
        file.seek(0)
        return f"{_with_zeros(zlib.crc32(file.read(written)), size - written):08x}"


def _with_zeros(crc: int, n: int) -> int:
    """The CRC-32 of the same data and n zero bytes: its remainder times x^(8n), as zlib's crc32_combine."""

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(31, -1, -1):
            product ^= b if a >> bit & 1 else 0
            b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        return product

    power, factor = 1 << 23, 1 << 31  # x^8, and 1
    while n:
        factor = times(factor, power) if n & 1 else factor
        power, n = times(power, power), n >> 1
    return times(factor, crc ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def forge(folder: Path) -> None:
    """Makes the checksums right, so that what was changed is not merely taken for damage."""
    path = folder / CONFIG
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 28:
        return
    try:
        manifest = json.loads((folder / CONFIG).read_text())
        for name in manifest["files"]:
            path = folder / name
            if path.is_file() and not path.is_symlink():
                manifest["files"][name] = checksum_of(path)
        manifest["checksum"] = own_checksum(manifest)
        (folder / CONFIG).write_text(json.dumps(manifest))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: its holder, and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _twist(value: Any, rng: random.Random) -> Any:
    """Changes one place of a JSON value: to another type, to an odd number, away, twice, or deep."""
    holder, key = rng.choice(list(_places(value)))
    what = rng.randrange(8)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[f"{key}2"] = holder.pop(key)
    elif what == 2:
        deep: Any = holder[key]
        for _ in range(rng.choice((3, 45, 200))):
            deep = {"merged": [deep], "weight": 1.0}
        holder[key] = deep
    elif what == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = rng.choice((-holder[key], holder[key] * 10**6, holder[key] + 1, 0))
    else:
        holder[key] = rng.choice(ODD_VALUES)
    return value


def change_bits(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_length(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = path.read_bytes()
    what = rng.randrange(4)
    if what == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif what == 1:
        path.write_bytes(data + bytes(rng.randrange(1, 999)))
    elif what == 2:
        os.truncate(path, 1 << 36)  # a file with holes: 64 GiB, and none of them on the disk
    else:
        path.write_bytes(b"\xef\xbb\xbf" + data)


def change_json(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((CONFIG, CONFIG, ADAPTER_CONFIG))
    value = _twist(json.loads(path.read_text()), rng)
    text = json.dumps(value)
    if rng.random() < 0.1:
        text = text.replace("{", '{"lr": 1, "lr": 2, ', 1)
    path.write_text(text)


def change_section(folder: Path, rng: random.Random) -> None:
    """A value of the run or the lineage."""
    manifest = json.loads((folder / CONFIG).read_text())
    name = rng.choice(("run", "lineage", "settings", "base"))
    if name == "lineage":
        manifest[name] |= {
            "parent": {"source": "me/x", "revision": "ab"},
            "merged": [{"weight": 0.5, "parent": {"source": "y", "revision": None}}],
            "warm_start": {"target": None, "texts": 1, "prompts": 2, "tokens": 3},
            "distilled": {"rank": 2, "relative_error": 0.1},
            "data_statement": "text",
        }
    _twist(manifest[name], rng)
    (folder / CONFIG).write_text(json.dumps(manifest))


def change_option(folder: Path, rng: random.Random) -> None:
    path = folder / ADAPTER_CONFIG
    name = rng.choice(sorted(ODD_OPTIONS))
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: ODD_OPTIONS[name]}))


def change_setting(folder: Path, rng: random.Random) -> None:
    manifest = json.loads((folder / CONFIG).read_text())
    name = rng.choice(sorted(ODD_SETTINGS))
    manifest["settings"][name] = ODD_SETTINGS[name]
    (folder / CONFIG).write_text(json.dumps(manifest))


def change_state(folder: Path, rng: random.Random) -> None:
    """A value of what learning goes on from."""
    path = folder / STATE
    header, data = _parts(path)
    values = json.loads(header["__metadata__"]["values"])
    for _ in range(rng.choice((1, 1, 3))):
        _twist(values, rng)
    header["__metadata__"]["values"] = json.dumps(values)
    _write(path, header, data)


def change_numbers(folder: Path, rng: random.Random) -> None:
    """The numbers of one tensor: none, endless, huge, or any bits."""
    path = folder / rng.choice((ADAPTER, STATE))
    header, data = _parts(path)
    begin, end = header[rng.choice([n for n in header if n != "__metadata__"])]["data_offsets"]
    new = bytearray(data)
    word = rng.choice(
        (b"\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x00", rng.randbytes(64))
    )
    new[begin:end] = (word * (end - begin))[: end - begin]
    _write(path, header, bytes(new))


def change_header(folder: Path, rng: random.Random) -> None:
    """Shapes, dtypes, names and places of the tensors."""
    path = folder / rng.choice((ADAPTER, STATE))
    header, data = _parts(path)
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    what = rng.randrange(8)
    if what == 0:
        header[name]["dtype"] = rng.choice(("F64", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "I32", "BF16", 3))
    elif what == 1:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [10**6, 10**6], [2**62, 4], [-1], [], [0], "x"))
    elif what == 2:
        header[f"{name}.x"] = header.pop(name)
    elif what == 3:
        header[rng.choice(names)] = dict(header[name])
    elif what == 4:
        header[name]["data_offsets"] = rng.choice(([0, 2**63], [8, 4], [0], ["a", 1]))
    elif what == 5:  # an empty tensor with dimensions that overflow, or without end
        add_empty(path, rng.choice(EMPTY_SHAPES), f"{name}.x")
        return
    elif what == 6:  # a large tensor that is really there, in holes
        big = 10**7
        end = len(data)
        header[f"{name.split('.lora_')[0]}.more.lora_A.weight"] = dict(
            dtype="F32", shape=[2, big], data_offsets=[end, end + 8 * big]
        )
        _write(path, header, data)
        os.truncate(path, path.stat().st_size + 8 * big)
        return
    else:
        _write(path, header, data, json.dumps(header).encode().replace(b"{", b'{"' + name.encode() + b'":{},', 1))
        return
    _write(path, header, data)


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def _write(path: Path, header: dict[str, Any], data: bytes, text: bytes | None = None) -> None:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def add_empty(path: Path, shape: list[int], name: str) -> None:
    """Adds a tensor without numbers to a file of tensors."""
    header, data = _parts(path)
    header[name] = dict(dtype="F32", shape=shape, data_offsets=[len(data), len(data)])
    _write(path, header, data)


def enlarge(path: Path, nbytes: int, dtype: str = "F32", itemsize: int = 4) -> None:
    """Adds layers of so many bytes to a file of tensors, whose numbers are a hole."""
    header, data = _parts(path)
    width, end, number = 1 << 22, len(data), 0
    rank = (
        next(entry["shape"][0] for name, entry in header.items() if ".lora_A." in name) if path.name == ADAPTER else 2
    )
    while end - len(data) < nbytes:
        for part, shape in (("A", [rank, width]), ("B", [width, rank])):
            place = [end, end + itemsize * rank * width]
            header[f"base_model.model.more.{number}.lora_{part}.weight"] = dict(
                dtype=dtype, shape=shape, data_offsets=place
            )
            end = place[1]
        number += 1
    _write(path, header, data)
    os.truncate(path, path.stat().st_size + end - len(data))


def change_size(folder: Path, rng: random.Random) -> None:
    """Tensors of many gigabytes, with sound headers and checksums; none of them on the disk."""
    enlarge(
        folder / rng.choice((ADAPTER, STATE)),
        rng.choice((1, 3, 5, 12)) << 30,
        *rng.choice((("F32", 4), ("BF16", 2), ("F64", 8))),
    )


def change_rank(folder: Path, rng: random.Random) -> None:
    """A draft of many ranks that fits its base: every file of it says so, and its numbers are holes."""
    manifest = json.loads((folder / CONFIG).read_text())
    settings = manifest["settings"]
    blocks = settings["experts"] if settings["learner"] == "ensemble" else 1
    before, rank = blocks * settings["rank"], rng.choice((64, 16384)) // blocks
    settings |= {"rank": rank, "alpha": float(rank), "snapshots": 64}
    about = json.loads((folder / ADAPTER_CONFIG).read_text())
    about |= {"r": blocks * rank, "lora_alpha": float(blocks * rank)}
    (folder / CONFIG).write_text(json.dumps(manifest))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(about))
    header, _ = _parts(folder / ADAPTER)
    end = 0
    for name in [name for name in header if name != "__metadata__"]:
        shape = [blocks * rank if n == before else n for n in header[name]["shape"]]
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[end, end + 4 * math.prod(shape)])
        end += 4 * math.prod(shape)
    _write(folder / ADAPTER, header, b"")
    os.truncate(folder / ADAPTER, (folder / ADAPTER).stat().st_size + end)
    header, data = _parts(folder / STATE)
    header["more"] = dict(dtype="F32", shape=[16 * end], data_offsets=[len(data), len(data) + 64 * end])
    _write(folder / STATE, header, data)
    os.truncate(folder / STATE, (folder / STATE).stat().st_size + 64 * end)


def change_kind(folder: Path, rng: random.Random) -> None:
    """Something else in the place of a file: a link, a pipe, a device, a folder, a name of somebody else's file."""
    name = rng.choice((*FILES, STAGING, ".onlinespec_lock", f"{STAGING}/{CONFIG}"))
    path, victim = folder / name, folder.parent / "victim"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.unlink()
    what = rng.randrange(7)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/tty", "/nowhere", "/proc/kmsg", "/", str(folder))))
    elif what == 2:
        path.symlink_to(victim)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        os.link(victim, path)
    elif what == 5:
        path.symlink_to(path.name)
    else:
        path.symlink_to(folder.parent / "other")


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    change_bits,
    change_length,
    change_json,
    change_section,
    change_option,
    change_setting,
    change_state,
    change_state,
    change_numbers,
    change_header,
    change_kind,
    change_size,
    change_rank,
)


# What becomes of it


class Trial:
    """A saved draft, and copies of it that are changed.

    Args:
        folder: an empty one.
        base, target: make the models anew.
    """

    def __init__(
        self, folder: Path, base: Callable[[], PreTrainedModel], target: PreTrainedModel, learner: str = "optimistic"
    ) -> None:
        self.folder, self.base, self.target = folder, base, target
        self.prompt = torch.tensor([[3, 14, 15, 9, 2, 6]])
        self.plain = self._generate()
        draft = OnlineDraft(base(), OnlineSpecConfig(learner=learner, **SETTINGS))
        for _ in range(3):
            self._generate(assistant_model=draft)
        for name in ("saved", "other"):
            draft.save_pretrained(folder / name)
        (folder / "victim").write_text("mine")

    def _generate(self, **arguments: Any) -> torch.Tensor:
        return self.target.generate(self.prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **arguments)

    def case(self, seed: int) -> str:
        """One changed folder; how it ended: "served", or the name of the error that refused it.

        Raises:
            AssertionError, or whatever went wrong: it served wrongly, or cost too much.
        """
        rng = random.Random(seed)
        at = self.folder / f"case-{seed}"
        shutil.copytree(self.folder / "saved", at)
        change = rng.choice(CHANGES)
        change(at, rng)
        if rng.random() < 0.9:
            forge(at)
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with time_limit(BLOCKED_S), memory_limit(MOST_BYTES):
                ended = self._use(at, merges=seed % 4 < 2, pulls=seed % 8 < 2)
        finally:
            for path in (at, *at.parent.glob(f"{at.name}-*")):
                shutil.rmtree(path, ignore_errors=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        spent = time.process_time() - started
        assert spent < MOST_S and grown < MOST_BYTES, f"{spent} s, {grown} bytes"
        assert (self.folder / "victim").read_text() == "mine", "another's file was changed"
        assert (self.folder / "other" / CONFIG).is_file(), "another's file was moved"
        return f"{change.__name__}: {ended}"

    def _use(self, at: Path, merges: bool, pulls: bool) -> str:
        ended = []
        dear = [self._merge] * merges + [self._pull] * pulls  # which draws a figure
        for use in (self._load, self._inspect, self._card, *dear):
            try:
                use(at)
                ended.append("served")
            except REFUSALS as error:
                ended.append(type(error).__name__)
        return ended[0]

    def _load(self, at: Path) -> None:
        draft = OnlineDraft.from_pretrained(at, self.base())
        assert torch.equal(self._generate(assistant_model=draft), self.plain), "another text"
        draft.save_pretrained(at)
        Artifact.read(at)

    def _inspect(self, at: Path) -> None:
        inspect(at)

    def _pull(self, at: Path) -> None:
        """From a folder, which takes the place of a repository."""
        pull(at, at.with_name(f"{at.name}-pulled"))

    def _merge(self, at: Path) -> None:
        draft = combine([read_evolved(at), read_evolved(self.folder / "other")], self.base())
        assert torch.equal(self._generate(assistant_model=draft), self.plain), "another text after merging"

    def _card(self, at: Path) -> None:
        cards.write(Artifact.read(at), at.with_name(f"{at.name}-out"), draw=False)


def inspect(folder: Path) -> None:
    """The command of this name."""
    from hf_onlinespec.cli.drafts import run_inspect

    with quiet():
        run_inspect(str(folder))


def pull(folder: Path, into: Path) -> None:
    """The command of this name."""
    from hf_onlinespec.cli.drafts import run_pull

    with quiet():
        run_pull(str(folder), into, None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in what blocks, by the clock."""

    def ring(*_: Any) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(most_bytes: int) -> Iterator[None]:
    """Raises MemoryError, or torch's RuntimeError, in what takes more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def quiet() -> Iterator[None]:
    """What a command prints is not shown; it has to be writable as UTF-8."""
    streams = sys.stdout, sys.stderr
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams


def main(arguments: list[str] | None = None) -> int:
    """Tries some folders; exit code 1: one of them did what it must not."""
    from tests.conftest import tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ended: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        trials = []
        for learner in ("optimistic", "ensemble"):
            (Path(folder) / learner).mkdir()
            trials.append(Trial(Path(folder) / learner, lambda: tiny_llama(2), tiny_llama(1, layers=2), learner))
        for number in range(options.cases):
            if number and number % 100 == 0:
                print(f"after {number}: {dict(ended)}, {len(wrong)} otherwise", flush=True)
            seed = options.seed * 1_000_000 + number
            try:
                ended[trials[number % 2].case(seed)] += 1
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]} ({at.filename}:{at.lineno})")
                print(wrong[-1], flush=True)
    for name, count in sorted(ended.items()):
        print(f"{count:6} {name}")
    print(f"{options.cases} cases, seed {options.seed}: {len(wrong)} ended otherwise")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
