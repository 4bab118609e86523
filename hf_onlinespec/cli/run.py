"""`hf-onlinespec run`: answers a file of prompts, and goes on where it was interrupted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.generation import sampled_at
from ..commit.base import Draft
from ..draft import OnlineDraft
from ..generation import attach, generate_stream
from ..runtime.progress import progress
from ..share.folder import is_artifact
from ..share.loading import locate
from .answer_files import AnswerFile, Line, PromptFile
from .common import (
    AUTO,
    FOUND,
    INTERRUPTED,
    check_files,
    check_folder,
    check_least,
    check_saving,
    check_seed,
    quiet_libraries,
)
from .loading import best_device, check_template, load_config, load_pair, load_tokenizer


@dataclass(frozen=True)
class RunSettings:
    """The options of `hf-onlinespec run`. Raises ConfigError on values that cannot work."""

    target: str
    prompts: Path
    out: Path
    draft: str | None = None
    batch_size: int = 8
    new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    save: Path | None = None
    save_every: int = 500  # prompts between two saves; 0: only at the end
    dtype: str = AUTO
    device: str | None = None
    retry_failed: bool = False  # whether prompts that failed in an earlier run are tried again

    def __post_init__(self) -> None:
        check_least("--batch-size", self.batch_size, 1)
        check_least("--new-tokens", self.new_tokens, 1)
        check_least("--temperature", self.temperature, 0)
        check_least("--save-every", self.save_every, 0)
        check_seed(self.seed)

    @property
    def of_answers(self) -> dict[str, Any]:
        """Those that decide what is answered: the draft, the size of batches and the device do not."""
        folder = Path(self.target)
        target = str(folder.resolve()) if folder.is_dir() else self.target
        names = ("dtype", "new_tokens", "temperature", "seed")
        return {"target": target} | {name: vars(self)[name] for name in names}


def run_prompts(settings: RunSettings) -> int:
    """Answers what is not answered yet, and saves the draft; the exit code."""
    check_folder(settings.out.absolute().parent, f"--out {settings.out}")
    check_files(prompts=settings.prompts, out=settings.out)
    check_saving(settings.save, settings.draft, resumes=True)
    quiet_libraries(bars=True)
    prompts = PromptFile(settings.prompts, settings.of_answers)
    with AnswerFile(settings.out, settings.retry_failed) as answers:
        total = answers.check(prompts)
        if len(answers) == total:
            failed = (
                f", {answers.failed:,} of them with an error: --retry-failed tries these again"
                if answers.failed
                else ""
            )
            print(f"All {total:,} prompts were answered before{failed}. {settings.out}")
            return FOUND if answers.failed else 0
        if len(answers):
            _say(f"{len(answers):,} of {total:,} prompts were answered before: going on.")
        target, tokenizer, drafts = _loaded(settings)
        torch.manual_seed(settings.seed + len(answers))  # a run that goes on does not draw the same numbers again
        work = _Work(settings, answers, drafts, total)
        try:
            work.answer(target, tokenizer, prompts)
        except KeyboardInterrupt:
            work.save(examined=False)
            _say(
                f"\nInterrupted: {len(answers):,} of {total:,} prompts are answered. The same command goes on from there."
            )
            return INTERRUPTED
        except BaseException:
            work.save(examined=False)
            raise
    work.save(examined=True)
    work.tell()
    return FOUND if answers.failed else 0


def _say(text: str) -> None:
    """For whoever waits; stdout has results alone."""
    print(text, file=sys.stderr, flush=True)


def _loaded(settings: RunSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Draft]:
    """The target with what drafts attached to it. What can be refused is refused before weights are read."""
    device = best_device(settings.device)
    config = load_config("TARGET", settings.target, encoder_decoders=True)
    tokenizer = load_tokenizer("TARGET", settings.target)
    check_template("TARGET", settings.target, tokenizer)
    draft, base = settings.draft, None
    if draft is not None and settings.save is not None and is_artifact(settings.save):  # what was saved before goes on
        draft, base = str(settings.save), draft if locate(draft).folder is None else None
    target, found = load_pair(settings.target, draft, config, tokenizer, settings.dtype, device, base)
    return target, tokenizer, attach(target, found)


class _Work:
    """One run, from its beginning or from where an earlier one ended."""

    def __init__(self, settings: RunSettings, answers: AnswerFile, drafts: Draft, total: int) -> None:
        self._settings, self._answers, self._drafts, self._total = settings, answers, drafts, total
        self.failed = 0
        self._answered, self._tokens, self._seconds = 0, 0, 0.0
        self._unsaved = 0  # answers since the last save

    def answer(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptFile) -> None:
        settings, started = self._settings, time.perf_counter()
        stream = generate_stream(
            target,
            self._left(prompts, tokenizer.chat_template is not None),
            settings.batch_size,
            tokenizer=tokenizer,
            ordered=False,
            max_new_tokens=settings.new_tokens,
            **sampled_at(settings.temperature),
        )
        with progress(self._total, "Answers", "prompt") as bar:
            bar.update(len(self._answers))
            for answer in stream:
                self._answers.write(answer.prompt["line"], answer)
                self._answered += 1
                self._tokens += 0 if answer.tokens is None else len(answer.tokens)
                self.failed += answer.error is not None
                self._seconds = time.perf_counter() - started
                self._save_now_and_then()
                bar.update()

    def _left(self, prompts: PromptFile, is_chat: bool) -> Iterator[dict[str, Any]]:
        """The prompts that are not answered yet, as the target is to read them."""
        for line in prompts:
            if not self._answers.has(line):
                yield _asked(line, is_chat) | {"line": line}

    def _save_now_and_then(self) -> None:
        self._unsaved += 1
        if self._settings.save_every and self._unsaved >= self._settings.save_every:
            self.save(examined=False)

    def save(self, examined: bool) -> None:
        """Saves the draft, if that was asked for.

        Args:
            examined: whether it is examined for what comes out of it, too, which may take twenty seconds.
        """
        folder, self._unsaved = self._settings.save, 0
        if folder is None or not isinstance(self._drafts, OnlineDraft):
            return
        self._drafts.save_unexamined(folder)
        if examined and self._drafts.steps:
            _say(f"Saving the draft in {folder} …")
            self._drafts.save_pretrained(folder)

    def tell(self) -> None:
        """What was done, on stdout."""
        speed = self._tokens / self._seconds if self._seconds else 0.0
        print(
            f"Answered {self._answered:,} prompts, {self._tokens:,} tokens in {self._seconds:.1f} s: {speed:.1f} tokens/s."
        )
        metrics = self._drafts.metrics
        if metrics.rounds:
            print(
                f"Drafting: {metrics.acceptance_length:.2f} tokens per target forward and row; {metrics.decisions.drafting}."
            )
        if self.failed:
            print(
                f"Failed: {self.failed:,} prompts, which have an error in the place of a text in {self._settings.out}."
            )


def _asked(line: Line, is_chat: bool) -> dict[str, Any]:
    """A prompt as `generate_stream` takes it: a text is a user's message where the model has a chat template."""
    if "messages" in line.content:
        return {"messages": line.content["messages"]}
    if is_chat:
        return {"messages": [{"role": "user", "content": line.content["prompt"]}]}
    return {"prompt": line.content["prompt"]}
