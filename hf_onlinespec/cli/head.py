"""hf-onlinespec head: a draft head for a target that has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..heads.recognising import is_head
from ..measure.own_prompts import check_lengths, load_prompts
from ..training.head_answers import Writing
from ..training.head_loop import LoopSettings
from ..training.new_head import RECORD, HeadTraining, chat_prompts, new_head
from .common import AUTO, check_folder, check_least, check_seed, quiet_libraries
from .loading import best_device, check_template, load_config, load_model, load_tokenizer


@dataclass(frozen=True)
class HeadSettings:
    """The options of `hf-onlinespec head`. Raises ConfigError on values that cannot work."""

    target: str
    out: Path
    prompts: Sequence[Path]
    work: Path | None = None
    new_tokens: int = 128
    batch_size: int = 16  # of the answers that are written
    draft_vocab: int = 8192
    epochs: int = 4
    learning_rate: float = 2e-3
    dtype: str = AUTO
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (
            ("--new-tokens", self.new_tokens - 1),
            ("--batch-size", self.batch_size),
            ("--draft-vocab", self.draft_vocab),
            ("--epochs", self.epochs),
        ):
            check_least(option, value, 1)
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate {self.learning_rate}: expected a value above 0 and below 1.")
        check_seed(self.seed)

    @property
    def training(self) -> HeadTraining:
        return HeadTraining(
            draft_vocab_size=self.draft_vocab,
            writing=Writing(self.new_tokens, self.batch_size, seed=self.seed),
            loop=LoopSettings(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed),
        )


def run_head(settings: HeadSettings) -> int:
    """Builds a head, and prints what it measured; goes on where the same command was interrupted."""
    quiet_libraries(bars=True)
    check_folder(settings.out, f"--out {settings.out}")
    if any(settings.out.iterdir()) and not is_head(settings.out):
        raise ConfigError(f"--out {settings.out}: other files lie there, and no draft head. Name a new folder.")
    found = [prompt for file in settings.prompts for prompt in load_prompts(file, None, settings.new_tokens)]
    config = load_config("TARGET", settings.target)
    tokenizer = load_tokenizer("TARGET", settings.target)
    check_template("TARGET", settings.target, tokenizer)
    prompts = chat_prompts(tokenizer, [p.text for p in found], [p.domain for p in found])
    check_lengths(found, [len(p.tokens) for p in prompts], config)
    target = load_model("TARGET", settings.target, settings.dtype, best_device(settings.device))
    new_head(target, prompts, settings.out, settings.training, work=settings.work)
    record = json.loads((settings.out / RECORD).read_text(encoding="utf-8"))
    for kind, length in record["acceptance_length"].items():
        print(f"acceptance length, {kind}: {length:.2f} (greedy drafts of {record['chain']} tokens, answers held out)")
    print(f"Written: {settings.out}, {record['parameters']:,} parameters, {record['answer_tokens']:,} answer tokens")
    return 0
