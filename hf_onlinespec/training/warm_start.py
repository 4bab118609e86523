"""Warm start: a draft is distilled from its target before it serves, offline, from texts or prompts, with transformers' Trainer.

It is the loss that the draft learns by online, on text that is at hand already. The result is the same OnlineDraft: it
serves, learns on, and is saved as ever.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .._compat.models import max_positions, model_name
from ..config import ENSEMBLE
from ..draft import OnlineDraft
from ..errors import ConfigError, UnsupportedError
from ..models.identity import public_name
from ..models.tokenizer_pair import check_vocabularies
from ..runtime.progress import Bar, NoBar, progress
from ..share.lineage import WarmStart
from ..share.resuming import adopt
from .passages import Passage, Passages, collate, continuations, pieces
from .student import Student

# Of the default arguments: the best of six settings on 60 prompts of the embedded pair.
EPOCHS, BATCH, LEARNING_RATE = 8, 4, 2e-3


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
    """Distils the target into a draft, on texts and on what the target writes after prompts; returns the same draft.

    On a text the draft learns the target's distribution at every token, on a prompt at those that the target wrote. The loss and its
    temperature are those of the draft's settings. Training begins at what the draft has learned already, and ends in
    its adapter with a new state of the learner. Until then the draft serves as before.

    Args:
        texts: tokenised as they are; a longer one is cut into pieces, each behind the token that opens a text, if the model has one.
        prompts: the target writes up to `new_tokens` tokens after each.
        temperature: of these continuations; 0: greedy. Take the one at which the draft will serve.
        max_length: tokens of a piece, prompt and continuation included; no more than both models take.
        training_args: of transformers' Trainer, on one device; None: `default_arguments(draft)`, which writes no file.

    Raises:
        ConfigError: there is no text, a prompt is too long, the draft is an ensemble, or training came to no finite adapter.
        DraftError: target and draft have different tokenizers, see `vocabulary.py`.
        UnsupportedError: the draft is a head.

    Example:
        >>> draft = warm_start(OnlineDraft(model), target, tokenizer, prompts=prompts)     # doctest: +SKIP
    """
    _check(draft, target, tokenizer, texts, prompts)
    max_length = min(max_length, draft.trainable.positions, max_positions(target.config))
    asked = [_tokens(tokenizer, prompt) for prompt in prompts]
    _check_prompts(asked, max_length - new_tokens, new_tokens)
    with tempfile.TemporaryDirectory() as folder, evaluating(target):
        args = training_args if training_args is not None else default_arguments(draft, folder)
        _check_devices(args)
        passages = [p for text in texts for p in pieces(_tokens(tokenizer, text), max_length, draft.config)]
        passages += continuations(target, asked, new_tokens, temperature, args)
        if not passages:
            raise ConfigError(f"None of {len(texts)} texts has two tokens. A draft learns to tell the next one.")
        learned = _train(draft, target, passages, args, quiet=training_args is None)
    adopt(draft, learned, _sample(draft, passages), len(passages))
    draft.targets.keep_at_hand(target)
    learned_tokens = sum(len(p.tokens) - p.start for p in passages)
    here = WarmStart(public_name(model_name(target.config)) or None, len(texts), len(prompts), learned_tokens)
    draft.lineage.warm_start = here.after(draft.lineage.warm_start)
    return draft


def default_arguments(draft: OnlineDraft, output_dir: str) -> TrainingArguments:
    """How a warm start trains by default: quietly, on the draft's device, with the draft's seed."""
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


@contextmanager
def evaluating(target: PreTrainedModel) -> Iterator[None]:
    """The target without dropout, for the time of the `with`."""
    was_training = target.training
    target.eval()
    try:
        yield
    finally:
        target.train(was_training)


def _train(
    draft: OnlineDraft, target: PreTrainedModel, passages: list[Passage], args: TrainingArguments, quiet: bool
) -> dict[str, Tensor]:
    """The draft's adapter after training, by the names of PEFT's files. Raises ConfigError where it is not finite."""
    student = Student(draft, target)
    trainer = Trainer(model=student, args=args, train_dataset=Passages(passages), data_collator=collate)
    if quiet:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress())
    trainer.train()
    learned = student.adapter()
    if not all(bool(torch.isfinite(part).all()) for part in learned.values()):
        raise ConfigError(
            f"Training came to numbers that are not finite; the draft is as it was. learning_rate={args.learning_rate}: take less."
        )
    return learned


def _sample(draft: OnlineDraft, passages: Sequence[Passage]) -> list[Tensor]:
    """What the privacy audit will look at: passages at random, of at most half of the tokens that it keeps."""
    found, room = [], draft.settings.audit_tokens // 2
    for passage in random.Random(draft.settings.seed).sample(passages, len(passages)):
        room -= len(passage.tokens)
        if room < 0:
            break
        found.append(torch.tensor(passage.tokens))
    return found


def _check(
    draft: OnlineDraft,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> None:
    if draft.reads:
        raise UnsupportedError(
            "warm_start trains draft models, and a draft head reads hidden states of its target. Train one with hf-onlinespec head, or "
            "let it learn while it serves."
        )
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


def _check_devices(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} accelerators are visible, and the draft is on one. Show one alone: CUDA_VISIBLE_DEVICES=0."
        )


def _check_prompts(prompts: list[list[int]], most: int, new_tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= most:
            raise ConfigError(
                f"prompts[{number}] has {len(prompt)} tokens: expected 1 to {most}, which leaves room for new_tokens={new_tokens}."
            )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


class _Progress(TrainerCallback):
    """A bar over the steps. Trainer's own also prints what it logs at the end, even where it is to log nothing."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Bar = NoBar()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._bar = self._stack.enter_context(progress(state.max_steps, "Warm start", "step"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._stack.close()
