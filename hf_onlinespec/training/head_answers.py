"""What a target answers to prompts, for a head to learn from: written in batches, appended to a file that an interruption leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .._compat.generation import generative, sampled_at
from ..errors import ConfigError, require_whole
from ..heads.starting import ends_of
from ..runtime.progress import progress
from ..runtime.seeding import seeded

SORTED_BATCHES = 8  # batches whose prompts are sorted by length together, so that little is padded; chosen


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the target reads it, chat template included, and what kind of request it is."""

    tokens: list[int]
    kind: str = ""


@dataclass(frozen=True)
class Answer:
    """What the target wrote after a prompt."""

    prompt: list[int]
    tokens: list[int]
    kind: str = ""
    sampled: bool = False

    @property
    def learned(self) -> int:
        """Tokens that a head can be asked for: all but the first one, which the target says itself before the head drafts."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Writing:
    """How a target writes answers.

    Attributes:
        new_tokens: most tokens of an answer.
        batch_size: answers that are written at once.
        sampled_share: part of the batches that are sampled, at `temperature`; the others are greedy.
    """

    new_tokens: int = 128
    batch_size: int = 16
    sampled_share: float = 1 / 3
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("new_tokens", self.new_tokens, 2)  # the first one is the target's own: nothing drafts it
        require_whole("batch_size", self.batch_size)
        if not 0 <= self.sampled_share < 1:
            raise ConfigError(
                f"sampled_share={self.sampled_share}: expected 0 or more, and below 1: greedy answers are held out."
            )
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature={self.temperature}: expected a value above 0; sampled_share=0 samples nothing."
            )


def read_answers(file: Path) -> list[Answer]:
    """The answers in a file of JSON lines, as `write_answers` left it; a last line that an interruption has cut off does not count.

    Raises:
        ConfigError: another line is no answer.
    """
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    found = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last line feed stands nothing, or what was cut off
        try:
            item = json.loads(line)
            found.append(Answer(item["prompt"], item["answer"], item["kind"], item["sampled"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{file}, line {number}: no answer that this package wrote. Remove the file to start anew."
            ) from error
    return found


def write_answers(
    target: PreTrainedModel, prompts: Sequence[EncodedPrompt], file: Path, writing: Writing
) -> list[Answer]:
    """The target answers every prompt; what the file holds already is kept, so that an interruption costs one batch.

    The process's random state is left as it was.

    Raises:
        ConfigError: the file holds answers to other prompts.
    """
    order = _in_batches(prompts, writing.batch_size)
    _drop_cut_off(file)
    done = read_answers(file)
    if [a.prompt for a in done] != [p.tokens for p in order[: len(done)]]:
        raise ConfigError(f"{file} holds answers to other prompts. Remove it, or name a new folder for this work.")
    with progress(len(order), "The target answers", "prompt") as bar, seeded(target, writing.seed):
        bar.update(len(done))
        for at in range(len(done), len(order), writing.batch_size):
            number = at // writing.batch_size
            torch.default_generator.manual_seed(writing.seed + number)  # a batch does not depend on those before it
            sampled = int(number * writing.sampled_share) < int((number + 1) * writing.sampled_share)
            answers = list(_answered(target, order[at : at + writing.batch_size], writing, sampled))
            with open(file, "a", encoding="utf-8") as out:
                out.write("".join(_line(answer) for answer in answers))
            done += answers
            bar.update(len(answers))
    return done


def _line(answer: Answer) -> str:
    fields = {"kind": answer.kind, "prompt": answer.prompt, "answer": answer.tokens, "sampled": answer.sampled}
    return json.dumps(fields) + "\n"


def _in_batches(prompts: Sequence[EncodedPrompt], batch_size: int) -> list[EncodedPrompt]:
    """The prompts in the order of writing: sorted by length within a few batches."""
    block = batch_size * SORTED_BATCHES
    blocks = (prompts[at : at + block] for at in range(0, len(prompts), block))
    return [prompt for block in blocks for prompt in sorted(block, key=lambda p: len(p.tokens))]


def _drop_cut_off(file: Path) -> None:
    """Removes what stands behind the last line feed of a file."""
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with open(file, "r+b") as out:
                out.truncate(whole)


@torch.no_grad()
def _answered(
    target: PreTrainedModel, prompts: list[EncodedPrompt], writing: Writing, sampled: bool
) -> Iterator[Answer]:
    longest = max(len(p.tokens) for p in prompts)
    tokens = torch.tensor([[0] * (longest - len(p.tokens)) + p.tokens for p in prompts], device=target.device)
    mask = torch.tensor([[0] * (longest - len(p.tokens)) + [1] * len(p.tokens) for p in prompts], device=target.device)
    out = generative(target).generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=writing.new_tokens,
        pad_token_id=0,
        **sampled_at(writing.temperature if sampled else 0.0),
    )
    ends = ends_of(target)
    for prompt, row in zip(prompts, out[:, longest:].tolist(), strict=True):
        n = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        yield Answer(prompt.tokens, row[:n], prompt.kind, sampled)
