"""The commands that measure on a recording or the embedded pair: `demo` shows what a learning draft gains and costs, `record` and `regret` why."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import OnlineSpecConfig
from ..embedded import FOLDER
from ..errors import ConfigError
from ..measure.bench import Calibration
from ..measure.demo import Bench, Settings, choose_prompts, intervals, summarise
from ..measure.own_prompts import check_lengths, load_prompts
from ..measure.recording import Recorded, Recording, record
from ..measure.records import Prompt, Record
from ..measure.regret import evaluate
from ..models.tokenizer_pair import check_vocabularies
from ..share import card
from ..share.heads import head_folder, load_head, names_head
from ..share.provenance import provenance
from .common import (
    AUTO,
    INTERRUPTED,
    check_extra,
    check_files,
    check_folder,
    check_least,
    check_seed,
    finite,
    quiet_libraries,
)
from .loading import best_device, is_head_for, load_config, load_model, load_tokenizer

EVOLVED = "evolved"  # folder of the demo's evolved draft, beside its result


def run_demo(settings: Settings, out: Path, as_json: bool) -> int:
    """Measures the embedded pair; writes demo.json, demo.png and the evolved draft into `out`."""
    check_extra("demo", "demo")
    from ..measure import plots  # only now: it needs the optional packages

    check_folder(out, f"--out {out}")
    quiet_libraries()
    torch.set_num_threads(settings.threads)

    stream, spare = choose_prompts(settings)
    bench = Bench(settings)
    calibration = _calibrate(bench, spare)
    print(calibration, file=sys.stderr if as_json else sys.stdout, flush=True)
    bench.load_arms(calibration.chosen)
    records: list[Record] = []
    stopped: BaseException | None = None
    try:
        with plots.progress(len(stream), live=sys.stdout.isatty() and not as_json) as show:
            for request in stream:
                records += bench.measure(request)
                show(records)
    except (KeyboardInterrupt, Exception) as reason:  # what is finished is written
        if not records:
            raise
        stopped = reason
    card.write(bench.evolved.artifact(), out / EVOLVED)

    result = {
        "settings": asdict(settings),
        "machine": provenance().to_dict(),
        "calibration": asdict(calibration),
        "interrupted": stopped is not None,
        "requests": [asdict(record) for record in records],
        "summary": summarise(records),
        "intervals": {arm: asdict(ratio) for arm, ratio in intervals(records).items()},
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    plots.stream_figure(records).savefig(out / "demo.png", dpi=150)
    if as_json:
        print(text)
    else:
        print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}; the evolved draft, with its card: {out / EVOLVED}")
        plots.report(result)
    if isinstance(stopped, Exception):
        raise stopped
    return 0 if stopped is None else INTERRUPTED


def _calibrate(bench: Bench, spare: list[str]) -> Calibration:
    """Warms up and chooses the static draft's number of tokens, with a bar."""
    what, calls = "Warming up and calibrating", bench.preparations(spare)
    if not sys.stderr.isatty():
        print(f"{what}: {calls} calls of generate …", file=sys.stderr, flush=True)
    with tqdm(total=calls, desc=what, unit=" call", leave=False, disable=None) as bar:
        bench.warm_up(spare, bar)
        return bench.calibrate(spare, bar)


@dataclass(frozen=True)
class OwnModels:
    """The user's target and draft, as the options of `record` name them."""

    target: str | None
    draft: str | None
    embedded: bool
    dtype: str = AUTO
    device: str | None = None

    def load(self, prompts: Sequence[Prompt]) -> tuple[PreTrainedModel, Tensor | None, PreTrainedTokenizerBase]:
        """Target, the ids that a draft head proposes (m,; None: all), and tokenizer.

        Whatever can be refused is refused before weights are read; the draft is loaded once, so that it is known to be one.

        Raises:
            ConfigError, DraftError: in one line.
        """
        names, dtype = {"--target": self.target or "", "--draft": self.draft or ""}, self.dtype
        if sum(name is not None for name in (self.target, self.draft)) != (0 if self.embedded else 2):
            raise ConfigError("Give both --target and --draft, or --embedded alone.")
        if self.embedded:
            names = {"--target": str(FOLDER / "target"), "--draft": str(FOLDER / "draft")}
            dtype = "float32" if dtype == AUTO else dtype  # it is stored in half of its precision
        device = best_device(self.device)
        quiet_libraries(bars=True)
        config = load_config("--target", names["--target"])
        head = names_head(names["--draft"])
        if head:
            is_head_for(names["--draft"], config)  # raises where it is another target's
        else:
            check_vocabularies(config, load_config("--draft", names["--draft"]))
        tokenizer = load_tokenizer("--target", names["--target"])
        check_lengths(prompts, [len(tokenizer(prompt.text).input_ids) for prompt in prompts], config)
        target = load_model("--target", names["--target"], dtype, device)
        if head:
            return target, load_head(names["--draft"], head_folder(names["--draft"]), target).draft_ids, tokenizer
        load_model("--draft", names["--draft"], dtype, device)
        return target, None, tokenizer


def run_record(
    models: OwnModels, prompts_file: Path, out: Path, new_tokens: int, limit: int | None, temperature: float, seed: int
) -> int:
    """Records what the user's target says to their prompts."""
    check_least("--new-tokens", new_tokens, 1)
    check_least("--limit", limit, 1)
    check_least("--temperature", temperature, 0)
    check_seed(seed)
    check_files(prompts=prompts_file, out=out)
    check_folder(out.parent, f"--out {out}")
    if out.is_dir():
        raise ConfigError(f"--out {out}: it is a folder. Name a file.")
    prompts = load_prompts(prompts_file, limit, new_tokens)
    target, draft_ids, tokenizer = models.load(prompts)
    found: list[Recorded] = []
    stopped: BaseException | None = None
    try:
        for recorded in record(target, tokenizer, prompts, temperature, seed, draft_ids=draft_ids):
            found.append(recorded)
            if len(found) % 10 == 0 and not sys.stderr.isatty():  # else there is a bar
                print(f"{len(found)} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    except (KeyboardInterrupt, Exception) as reason:  # what is recorded is written
        if not found:
            raise
        stopped = reason
    Recording(found, temperature, models.draft or "", models.target or "", draft_ids).save(out)
    some = "" if stopped is None else f", of the first {len(found)} of {len(prompts)} prompts"
    print(f"Written: {out}{some}. It holds your prompts and the answers as tokens.")
    if isinstance(stopped, Exception):
        raise stopped
    return 0 if stopped is None else INTERRUPTED


def run_regret(
    run_file: Path,
    draft: str | None,
    target: str | None,
    settings_json: str,
    lookahead: int,
    out: Path,
    dtype: str,
    device: str | None,
) -> int:
    """Replays a recording; writes regret.json and regret.png into `out`.

    Args:
        draft, target: None: those of the recording. A target is asked for where the draft is a head of it.
    """
    check_extra("regret", "demo")
    from ..measure import plots  # only now: it needs the optional packages

    recording = Recording.load(run_file)
    try:
        settings = json.loads(settings_json)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config {settings_json}: it is no JSON ({error.msg}).") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {settings_json}: expected a JSON object of settings.")
    config = OnlineSpecConfig.from_dict(settings)
    check_folder(out, f"--out {out}")
    place = best_device(device)
    quiet_libraries(bars=True)
    name = draft or recording.draft or str(FOLDER / "draft")
    if name == str(FOLDER / "draft") and dtype == AUTO:
        dtype = "float32"  # it is stored in half of its precision

    reads: PreTrainedModel | None = None  # what a draft head reads the hidden states of
    if names_head(name):
        said = target or recording.target
        if not said:
            raise ConfigError(f"--draft {name}: a draft head, whose target the recording does not name. Give --target.")
        is_head_for(name, load_config("--target", said))  # raises where it is another one's
        reads = load_model("--target", said, dtype, place)

    def model() -> PreTrainedModel:
        return load_model("--draft", name, dtype, place) if reads is None else load_head(name, head_folder(name), reads)

    def show(text: str) -> None:
        if not sys.stderr.isatty():  # else there are bars
            print(f"{text} …", file=sys.stderr, flush=True)

    report = evaluate(recording, model, config, lookahead, show=show, target=reads)
    plots.regret_figure(report).savefig(out / "regret.png", dpi=150)
    (out / "regret.json").write_text(
        json.dumps(finite(asdict(report)), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    print(report.text())
    print(f"Written: {out / 'regret.json'}, {out / 'regret.png'}")
    return 0
