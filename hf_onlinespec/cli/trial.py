"""`hf-onlinespec try`: whether it pays for one's own model, on prompts that ship with the package or on one's own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .._compat.models import auto_class, max_positions, model_name
from ..draft import OnlineDraft
from ..errors import ConfigError
from ..measure.budget import LEAST_PROMPTS, LONG, Budget
from ..measure.exactness import Examiner, float32_copy
from ..measure.own_prompts import check_lengths, fits, load_prompts
from ..measure.progress import progress
from ..measure.records import Prompt
from ..measure.report import Report
from ..measure.shipped import encoder, shipped_prompts
from ..measure.summary import summarise
from ..measure.tables import show_result
from ..measure.trial import SPARE, Outcome, Trial
from ..measure.verdict import Models, code_for
from ..runtime.version import __version__
from ..share.heads import shipped_head_for
from ..share.loading import load_beside
from ..share.provenance import provenance
from .common import (
    AUTO,
    FOUND,
    INTERRUPTED,
    check_files,
    check_folder,
    check_least,
    check_saving,
    check_seed,
    finite,
    quiet_libraries,
)
from .loading import (
    best_device,
    check_template,
    free_bytes,
    is_head_for,
    load_config,
    load_draft_model,
    load_model,
    load_tokenizer,
)
from .outputs import Outputs

BUSY = 0.75  # load per core from which other work is likely to decide the speeds (chosen)


@dataclass(frozen=True)
class TrySettings:
    """The options of `hf-onlinespec try`. Raises ConfigError on values that cannot work."""

    target: str
    draft: str | None = None
    prompts: Path | None = None  # None: those that ship with the package
    minutes: float = 3.5  # loading included
    out: Path | None = None
    json: Path | None = None
    save: Path | None = None
    device: str | None = None
    dtype: str = AUTO
    new_tokens: int | None = None  # None: as many as let enough prompts fit
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("--minutes", self.minutes, 0)
        check_least("--new-tokens", self.new_tokens, 1)
        check_least("--temperature", self.temperature, 0)
        check_seed(self.seed)

    def check_outputs(self) -> None:
        """Raises ConfigError where a result could not be written."""
        for option, path in (("--out", self.out), ("--json", self.json)):
            if path is None:
                continue
            check_folder(path.absolute().parent, f"{option} {path}")
            if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
                raise ConfigError(f"{option} {path}: a file cannot be written there. Name another one.")
        check_files(prompts=self.prompts, out=self.out, json=self.json)
        check_saving(self.save, self.draft)


def run_try(
    settings: TrySettings, started_s: float | None = None, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Measures, prints what it found, and writes what was asked for; returns the exit code.

    What is known is printed and written too where Ctrl-C or an error ends the measuring early; the error is raised after that.

    Args:
        started_s: when the command started, by `clock`; None: now.
    """
    budget = Budget(settings.minutes, clock() if started_s is None else started_s, clock)
    settings.check_outputs()
    quiet_libraries()
    busy = _busy()
    with progress(budget) as show:
        show("loading", Outcome())
        trial, models = _prepared(settings, budget, clock, show)
        trial.outcome.notes += busy
        stopped = _measure(trial)
    learned = trial.learned
    outputs = Outputs()
    if settings.save is not None:
        print(f"Saving the draft in {settings.save} …", file=sys.stderr, flush=True)  # it may take some 20 s
    go_on = f"OnlineDraft.from_pretrained({str(settings.save)!r}{', target=target' if models.is_head else ''})"
    saved = f"Saved: the evolved draft, {settings.save}. Go on from it with {go_on}."
    outputs.write("--save", settings.save, lambda folder: _save(trial, folder), saved)
    summary = summarise(trial.outcome)
    code = code_for(summary.verdict, models)
    console = Console(highlight=False)
    show_result(console, trial.outcome, summary, learned, code)
    report = Report(models, trial.outcome, summary, learned, code)

    def write_json(path: Path) -> None:
        result = _values(settings, report, stopped is not None, budget.elapsed_s)
        path.write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def write_report(path: Path) -> None:
        path.write_text(report.html(), encoding="utf-8")

    outputs.write("--json", settings.json, write_json, f"Written: {settings.json}")
    outputs.write("--out", settings.out, write_report, f"Written: {settings.out}")
    outputs.tell(console)
    if isinstance(stopped, Exception):
        raise stopped
    if stopped is not None:
        return INTERRUPTED
    return outputs.exit_code or (FOUND if summary.faults else 0)


def _measure(trial: Trial) -> BaseException | None:
    """Runs a trial; what ended it early, once some prompts were finished."""
    try:
        trial.prepare()
        trial.run()
    except (KeyboardInterrupt, Exception) as reason:
        if not trial.outcome.records:
            raise
        words = "Interrupted" if isinstance(reason, KeyboardInterrupt) else f"Stopped by an error ({reason})"
        trial.outcome.notes.append(f"{words}: only the finished prompts count.")
        return reason
    return None


def _values(settings: TrySettings, report: Report, interrupted: bool, elapsed_s: float) -> dict[str, Any]:
    """All numbers, as `--json` writes them."""
    outcome = report.outcome
    return {
        "version": __version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "models": asdict(report.models),
        "machine": provenance().to_dict(),
        "interrupted": interrupted,
        "elapsed_s": elapsed_s,
        "new_tokens": outcome.new_tokens,
        "prompt_s": outcome.prompt_s,
        "notes": outcome.notes,
        "calibration": None if outcome.calibration is None else asdict(outcome.calibration),
        "summary": asdict(report.summary),
        "verdict": report.summary.verdict.text(outcome.prompt_s),
        "learned": asdict(report.learned),
        "differences": [asdict(e) | {"kind": e.difference.kind} for e in outcome.examined],
        "requests": [asdict(record) for record in outcome.records],
        "code": report.code,
    }


def _busy() -> list[str]:
    """What is to be said where other work runs on this machine: the intervals do not know of it."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # Windows has none
        return []
    if load < BUSY * cores:
        return []
    return [
        f"This machine was busy when it began (load {load:.1f} on {cores} cores): do not trust these speeds, try again when it is quiet."
    ]


def _save(trial: Trial, folder: Path) -> None:
    assert isinstance(trial.ours, OnlineDraft)  # see check_saving
    trial.ours.save_pretrained(folder)


def _prepared(
    settings: TrySettings,
    budget: Budget,
    clock: Callable[[], float],
    show: Callable[[str, Outcome], None],
) -> tuple[Trial, Models]:
    """The trial, its models loaded, and how they were loaded. What can be refused is refused before weights are read."""
    device = best_device(settings.device)
    config = load_config("TARGET", settings.target, encoder_decoders=True)
    tokenizer = load_tokenizer("TARGET", settings.target)
    check_template("TARGET", settings.target, tokenizer)
    longest = LONG if settings.new_tokens is None else settings.new_tokens
    prompts, notes = _prompts(settings.prompts, tokenizer, config, longest)
    prompts, spare = set_aside(prompts)
    if spare[0] in prompts:
        notes.append(
            f"With fewer than {LEAST_PROMPTS + SPARE} prompts, warm-up and calibration use prompts that are measured too."
        )
    draft, make = None, None
    is_head = settings.draft is not None and is_head_for(settings.draft, config)
    if settings.draft is not None and not is_head:
        draft, is_adapter = load_draft_model("--draft", settings.draft, config, tokenizer, settings.dtype, device)
        if is_adapter:
            make = partial(OnlineDraft.from_pretrained, settings.draft, base_model=draft)
            notes.append(
                "Ours goes on from the adapter of --draft; transformers' assisted generation drafts with its base model."
            )
    shipped = None if settings.draft is not None else shipped_head_for(config)
    if shipped is not None:
        notes.append(f"A draft head for this target ships with the package and was not tried: --draft {shipped}.")
    target = load_model("TARGET", settings.target, settings.dtype, device, encoder_decoders=True)
    if settings.draft is not None and is_head:
        make = partial(OnlineDraft.of, load_beside(settings.draft, target))
        notes.append(
            "Transformers' assisted generation runs no draft heads as ours does: it is not among the other ways."
        )
    examiner = Examiner(target, lambda: float32_copy(target, free_bytes(device)))
    trial = Trial(
        target,
        tokenizer,
        draft,
        prompts,
        spare,
        budget,
        examiner,
        make,
        settings.new_tokens,
        settings.temperature,
        settings.seed,
        clock,
        show,
    )
    trial.outcome.notes += notes
    base = settings.draft if draft is None or make is None else model_name(draft.config)
    saved = settings.draft if draft is not None and make is not None else None
    if settings.draft is not None and settings.save is not None:
        saved = str(settings.save)
    is_chat = tokenizer.chat_template is not None
    loads, draft_loads = (auto_class(c).__name__ for c in (config, config if draft is None else draft.config))
    return trial, Models(
        settings.target, base, str(target.dtype), str(device), is_chat, saved, loads, draft_loads, is_head
    )


def set_aside(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that are measured, and `SPARE` ones for warm-up and calibration: the last ones, where enough are left without."""
    if len(prompts) >= LEAST_PROMPTS + SPARE:
        return prompts[:-SPARE], prompts[-SPARE:]
    return prompts, [prompts[i % len(prompts)] for i in range(SPARE)]


def _prompts(
    file: Path | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, new_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """The prompts, and what has to be said about them. Raises ConfigError: one of the user's does not fit."""
    prompts = shipped_prompts(new_tokens) if file is None else load_prompts(file, None, new_tokens)
    encode = encoder(tokenizer)
    lengths = [encode(prompt.text)["input_ids"].shape[1] for prompt in prompts]
    if file is not None:
        check_lengths(prompts, lengths, config)
        return prompts, []
    fitting = [prompt for prompt, length in zip(prompts, lengths, strict=True) if fits(length, config, new_tokens)]
    if not fitting:
        raise ConfigError(
            f"The target takes {max_positions(config)} tokens: none of the prompts fits beside {new_tokens} new ones. Use --new-tokens."
        )
    left_out = len(prompts) - len(fitting)
    return fitting, [f"{left_out} prompts are longer than the target takes, and were left out."] if left_out else []
