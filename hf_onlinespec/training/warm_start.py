"""Warm start: a draft is distilled from its target before it serves, offline, from texts or prompts, with transformers' Trainer.

It is the loss that the draft learns by online, on text that is at hand already. The result is the same OnlineDraft: it
serves, learns on, and is saved as ever.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .._compat.generation import generative
from .._compat.models import max_positions, model_name
from ..adapt.feedback import Teacher
from ..adapt.losses import LOSSES
from ..config import ENSEMBLE
from ..draft import OnlineDraft
from ..errors import ConfigError
from ..models.identity import public_name
from ..models.opening import opening_tokens
from ..models.vocabulary import check_vocabularies
from ..runtime.progress import Bar, NoBar, each, progress
from ..runtime.seeding import seeded
from .corpus import check_text, parse_line, read_lines

# Of the default arguments: the best of six settings on 60 prompts of the embedded pair.
EPOCHS, BATCH, LEARNING_RATE = 8, 4, 2e-3


@dataclass(frozen=True)
class Passage:
    """Tokens of a text, and from which of them on the draft learns."""

    tokens: list[int]
    start: int  # the first token that is learned, at least 1: nothing predicts the token before it


def warm_start(
    draft: OnlineDraft,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = (),
    prompts: Sequence[str] = (),
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    max_length: int = 512,
    training_args: TrainingArguments | None = None,
) -> OnlineDraft:
    """Teaches a draft what the target says to texts, and to prompts that the target writes on; returns the same draft.

    On a text the draft learns the target's law at every token, on a prompt at those that the target wrote. The loss and its
    temperature are those of the draft's settings. Training begins at what the draft has learned already, and ends in
    its adapter with a new state of the learner. Until then the draft serves as before.

    Args:
        texts: tokenised as they are; one that is longer than `max_length` is cut into pieces that are read on their own, each behind
            the token that opens the text, where the model has one.
        prompts: the target writes up to `new_tokens` tokens after each.
        temperature: of these continuations; 0: greedy. Take the one at which the draft will serve.
        max_length: tokens of a piece, prompt and continuation included; no more than both models take.
        training_args: of transformers' Trainer, on one device; None: `default_arguments(draft)`, which writes no file.

    Raises:
        ConfigError: there is no text, a prompt is too long, the draft is an ensemble, or training came to no finite adapter.
        DraftError: target and draft have different tokenizers, see `vocabulary.py`.

    Example:
        >>> draft = warm_start(OnlineDraft(model), target, tokenizer, prompts=prompts)     # doctest: +SKIP
        >>> draft.save_pretrained("warm-draft")                                            # doctest: +SKIP
    """
    _check(draft, target, tokenizer, texts, prompts)
    max_length = min(max_length, draft.positions, max_positions(target.config))
    asked = [_tokens(tokenizer, prompt) for prompt in prompts]
    _check_prompts(asked, max_length - new_tokens, new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        args = training_args if training_args is not None else default_arguments(draft, folder)
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} accelerators are visible, and the draft is on one. Show one alone: CUDA_VISIBLE_DEVICES=0."
            )
        was_training = target.training
        target.eval()
        try:
            passages = [p for text in texts for p in _pieces(_tokens(tokenizer, text), max_length, draft.config)]
            passages += _written(target, asked, new_tokens, temperature, args)
            if not passages:
                raise ConfigError(f"None of {len(texts)} texts has two tokens. A draft learns to tell the next one.")
            student = Student(draft, target)
            trainer = Trainer(model=student, args=args, train_dataset=_Passages(passages), data_collator=_collate)
            if training_args is None:
                trainer.remove_callback(PrinterCallback)
                trainer.add_callback(_Progress())
            trainer.train()
        finally:
            target.train(was_training)
    learned = student.adapter()
    if not all(bool(torch.isfinite(part).all()) for part in learned.values()):
        raise ConfigError(
            f"Training came to numbers that are not finite; the draft is as it was. learning_rate={args.learning_rate}: take less."
        )
    draft.adopt(learned, _sample(draft, passages), len(passages))
    draft.keep_at_hand(target)
    taught = {
        "texts": len(texts),
        "prompts": len(prompts),
        "tokens": sum(len(p.tokens) - p.start for p in passages),
    }
    before = draft.lineage.get("warm_start", {})  # of an earlier one, which goes on counting
    draft.lineage["warm_start"] = {
        "target": public_name(model_name(target.config)) or None,
        **{name: n + before.get(name, 0) for name, n in taught.items()},
    }
    return draft


def default_arguments(draft: OnlineDraft, output_dir: str) -> TrainingArguments:
    """How a warm start trains if it is not told: quietly, on the draft's device, with the draft's seed."""
    return TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        seed=draft.settings.seed,
        use_cpu=draft.device.type == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def read_corpus(path: str | Path) -> tuple[list[str], list[str]]:
    """Texts and prompts of a file, as `warm_start` takes them.

    A .txt file holds texts with empty lines between them; a .jsonl file on every line {"text": "..."} or {"prompt": "..."}.

    Raises:
        ConfigError: the file cannot be read, holds nothing, is of another kind, or has a line that is malformed.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path}: expected a .txt or a .jsonl file.")
    lines = read_lines(path, str(path))
    found: dict[str, list[str]] = {"text": [], "prompt": []}
    if path.suffix == ".txt":
        found["text"] = list(_documents(lines))
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                key, value = _item(line, f"{path}, line {number}")
                found[key].append(value)
    if not any(found.values()):
        raise ConfigError(f"{path}: the file holds no text.")
    return found["text"], found["prompt"]


def _documents(lines: Sequence[str]) -> Iterator[str]:
    """Runs of lines that are not empty."""
    document: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []


def _item(line: str, where: str) -> tuple[str, str]:
    """Whether a line of JSON holds a "text" or a "prompt", and its text."""
    wanted = 'expected {"text": "..."} or {"prompt": "..."}'
    item = parse_line(line, where, wanted)
    keys = [key for key in ("text", "prompt") if isinstance(item, dict) and key in item]
    if len(keys) != 1 or not isinstance(item[keys[0]], str) or not item[keys[0]]:
        raise ConfigError(f"{where}: {wanted}; found {line.strip()[:60]}")
    check_text(item[keys[0]], where)
    return keys[0], item[keys[0]]


def _sample(draft: OnlineDraft, passages: Sequence[Passage]) -> list[Tensor]:
    """What the privacy audit will look at: passages at random, of at most half of the tokens that it keeps."""
    found, room = [], draft.settings.audit_tokens // 2
    for passage in random.Random(draft.settings.seed).sample(passages, len(passages)):
        room -= len(passage.tokens)
        if room < 0:
            break
        found.append(torch.tensor(passage.tokens))
    return found


class Student(nn.Module):
    """The draft with parameters of its own in the place of the adapter's, and its loss against the target.

    Trainer may do with these parameters what it likes. The draft serves meanwhile as if nothing happened.
    """

    def __init__(self, draft: OnlineDraft, target: PreTrainedModel) -> None:
        super().__init__()
        start = draft.adapter_params()
        self._files = list(start)  # names of the parts in PEFT's files
        self.parts = nn.ParameterList(start.values())
        # In a tuple: their weights are no parameters of the student.
        self._pair = (draft, target)
        self._loss = LOSSES[draft.settings.loss]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, start: Tensor) -> dict[str, Tensor]:
        """The mean loss over the tokens that are learned.

        Args:
            input_ids, attention_mask: (batch, L), padded on the right.
            start: (batch,) the first token of each row that is learned.
        """
        draft, target = self._pair
        settings = draft.settings
        places = torch.arange(1, input_ids.shape[1], device=start.device)
        learned = (places >= start[:, None]) & attention_mask[
            :, 1:
        ].bool()  # (batch, L - 1): by the token that is predicted
        inputs = {"input_ids": input_ids[:, :-1], "attention_mask": attention_mask[:, :-1]}
        with torch.no_grad():
            logits = target(**_on(inputs, target.device), use_cache=False).logits
            law = logits[learned.to(logits.device)].to(draft.device)  # (tokens, vocab)
        inputs = inputs | {"input_ids": draft.vocabulary.readable(inputs["input_ids"])}
        own = dict(zip(self._files, self.parts, strict=True))
        logits = draft.logits_with(own, **_on(inputs, draft.device))
        teacher = Teacher.from_logits(law, settings.temperature, settings.top_k, draft.vocabulary.size)
        said = logits[learned.to(logits.device)]
        losses = self._loss(*teacher.compare(said, settings.temperature, settings.loss != "cross_entropy"))
        return {"loss": losses.sum() / max(1, len(losses))}

    def adapter(self) -> dict[str, Tensor]:
        """What was learned, by the names of PEFT's files."""
        return {name: part.detach() for name, part in zip(self._files, self.parts, strict=True)}


def _on(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class _Progress(TrainerCallback):
    """A bar over the steps. Trainer's own also prints what it logs at the end, even where it is to log nothing."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Bar = NoBar()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar = self._stack.enter_context(progress(state.max_steps, "Warm start", "step"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stack.close()


class _Passages(torch.utils.data.Dataset[Passage]):
    def __init__(self, passages: list[Passage]) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> Passage:
        return self._passages[index]


def _collate(passages: list[Passage]) -> dict[str, Tensor]:
    """One batch, padded on the right with token 0."""
    longest = max(len(p.tokens) for p in passages)
    return {
        "input_ids": torch.tensor([p.tokens + [0] * (longest - len(p.tokens)) for p in passages]),
        "attention_mask": torch.tensor([[1] * len(p.tokens) + [0] * (longest - len(p.tokens)) for p in passages]),
        "start": torch.tensor([p.start for p in passages]),
    }


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def _pieces(tokens: list[int], length: int, config: PretrainedConfig) -> list[Passage]:
    """A text in pieces of at most `length` tokens; each opens as the text does, and one with nothing to tell teaches nothing."""
    opening = opening_tokens(config, tokens) if length > 2 else []
    n, tokens = len(opening), tokens[len(opening) :]
    cut = (opening + tokens[at : at + length - n] for at in range(0, len(tokens), length - n))
    return [Passage(piece, 1) for piece in cut if len(piece) > max(1, n)]


@torch.no_grad()
def _written(
    target: PreTrainedModel, prompts: list[list[int]], new_tokens: int, temperature: float, args: TrainingArguments
) -> Iterator[Passage]:
    """What the target writes after each prompt; the process's random state is left as it was."""
    law: dict[str, Any] = {"do_sample": False}
    if temperature:
        law = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = target.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    size = args.per_device_train_batch_size
    with seeded(target, args.seed):
        for at in each(range(0, len(prompts), size), "The target writes", "batch"):
            batch = prompts[at : at + size]
            longest = max(map(len, batch))
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=target.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=target.device)
            out = generative(target).generate(
                tokens, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **law
            )
            for prompt, row in zip(batch, out[:, longest:].tolist(), strict=True):
                n = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                yield Passage(prompt + row[:n], len(prompt))


def _check(
    draft: OnlineDraft,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> None:
    for name, given in (("texts", texts), ("prompts", prompts)):
        if isinstance(given, str):
            raise ConfigError(f"{name} is one text: expected a list of them, {name}=[...].")
    if not texts and not prompts:
        raise ConfigError("Neither texts nor prompts: a warm start needs some of what the draft will serve.")
    if draft.settings.learner == ENSEMBLE:
        raise ConfigError(
            "learner='ensemble': a warm start trains one adapter. Warm-start a draft with another learner."
        )
    check_vocabularies(target, draft.model, tokenizer)


def _check_prompts(prompts: list[list[int]], most: int, new_tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= most:
            raise ConfigError(
                f"prompts[{number}] has {len(prompt)} tokens: expected 1 to {most}, which leaves room for new_tokens={new_tokens}."
            )
