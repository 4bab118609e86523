"""DraftAlignment: a draft goes on fitting a target that is fine-tuned, with nothing but what the training computes anyway."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat.models import model_name
from ..adapt.feedback import Feedback, Teacher
from ..draft import OnlineDraft
from ..errors import ConfigError, DraftError, require_whole
from ..metrics import Counts
from ..models.identity import public_name
from ..models.opening import opening_tokens
from ..models.tokenizer_pair import check_vocabularies
from ..share.lineage import Alignment

IGNORED = -100  # the label of a token that is not trained on


class DraftAlignment(TrainerCallback):
    """Keeps a draft aligned with a target while a Trainer fine-tunes the target.

    A forward hook looks at the training batches: the draft learns the logits that the target has just computed for them, at the
    tokens that the target is trained on. They are those before the optimizer's step, and with the dropout of training. The
    target's training is the same to the bit, evaluation is not learned from. With every checkpoint the draft is saved
    into its folder `draft`; `OnlineDraft.from_pretrained` resumes it.

    Args:
        draft: learns by one gradient step at a time.
        every: optimizer steps of the target between two steps of the draft.
        max_tokens: of a batch that one step of the draft reads: the first rows that fit; of a row that is longer, its end.

    Attributes:
        updates, tokens: gradient steps of the draft, and the tokens that they learned.
        time_s: seconds they took.

    Raises:
        ConfigError: a number is below 1; in training: it runs in several processes.
        DraftError, in training: target and draft have different tokenizers, or the target gives no logits at all positions.

    Example:
        >>> trainer = Trainer(model=target, ..., callbacks=[DraftAlignment(draft)])          # doctest: +SKIP
    """

    def __init__(self, draft: OnlineDraft, every: int = 1, max_tokens: int = 512) -> None:
        for name, value in (("every", every), ("max_tokens", max_tokens)):
            require_whole(name, value)
        self.draft, self.every, self.max_tokens = draft, every, max_tokens
        self.updates, self.tokens, self.time_s = 0, 0, 0.0
        self._hook: RemovableHandle | None = None
        self._records_next = False  # whether the next training batch is to be learned
        self._recorded: list[Feedback] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        if args.world_size > 1:
            raise ConfigError(
                f"Training runs in {args.world_size} processes: each would teach a draft of its own, and only the first one's would be "
                "saved. Align the draft in a run of one process."
            )
        model = kwargs["model"]
        check_vocabularies(model, self.draft.model)
        self._hook = model.register_forward_hook(self._record_batch, with_kwargs=True)
        name = public_name(model_name(model.config)) or None
        before = self.draft.lineage.alignment or Alignment(name, 0, 0)  # of an earlier one, which goes on counting
        self.draft.lineage.alignment = replace(before, target=name)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorded = []
        due = (state.global_step + 1) % self.every == 0
        self._records_next = due and self.draft.failures.learning.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._records_next = False
        batch, self._recorded = self._recorded, []
        if batch:
            self._learn(batch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.draft.save_pretrained(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "draft")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._records_next, self._recorded = None, False, []

    def _learn(self, batch: list[Feedback]) -> None:
        draft, started, counts = self.draft, time.perf_counter(), Counts()
        with draft.failures.learning.attempt():  # a step that fails is no reason to end a training
            draft.learning.learn(batch, counts)
        if counts.updates:
            draft.failures.learning.worked()
        tokens = counts.updates * sum(len(feedback.teacher) for feedback in batch)
        self.updates += counts.updates
        self.tokens += tokens
        self.time_s += time.perf_counter() - started
        total = draft.lineage.alignment or Alignment(None, 0, 0)  # a draft that has begun anew has none
        draft.lineage.alignment = replace(total, updates=total.updates + counts.updates, tokens=total.tokens + tokens)

    @torch.no_grad()
    def _record_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keeps what the first batch of a step teaches; the other batches of an accumulated step are left out."""
        if not (self._records_next and model.training):
            return
        self._records_next = False
        tokens = args[0] if args else kwargs.get("input_ids")
        logits = output.get("logits") if isinstance(output, dict) else None
        if tokens is None or logits is None or logits.shape[:-1] != tokens.shape:
            seen = "none" if logits is None else tuple(logits.shape)
            vocabulary = "vocabulary" if logits is None else logits.shape[-1]
            raise DraftError(
                f"{type(model).__name__} gave logits {seen} in training: expected (batch, length, {vocabulary}), one for every "
                "token of input_ids, as transformers' causal models give them. Leave out what replaces or skips them."
            )
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        trained = real if labels is None else real & (labels != IGNORED)
        left = self.max_tokens
        for row, kept in enumerate(real):
            feedback = self._feedback(tokens[row][kept], trained[row][kept], logits[row][kept])
            if feedback is None:
                continue
            left -= len(feedback.tokens)
            if left < 0:
                break
            self._recorded.append(feedback)

    def _feedback(self, tokens: Tensor, trained: Tensor, logits: Tensor) -> Feedback | None:
        """What one row without its padding teaches: from the first token that is trained on to the last one.

        Args:
            tokens, trained: (L,)
            logits: (L, vocab)
        """
        draft, settings = self.draft, self.draft.settings
        at = trained[1:].nonzero()[:, 0] + 1  # nothing predicts the first token
        if len(at) == 0:
            return None
        end = int(at[-1]) + 1
        begin = max(0, end - min(self.max_tokens, draft.trainable.positions))
        opening = opening_tokens(draft.config, tokens[:1].tolist()) if begin else []
        begin += len(opening)
        first = max(int(at[0]), begin + 1)
        predicted = logits[first - 1 : end - 1].detach()
        teacher = Teacher.from_logits(predicted, settings.temperature, settings.top_k, draft.vocabulary.size)
        if not teacher.teaches:
            return None
        read = draft.vocabulary.readable(torch.cat([tokens[: len(opening)], tokens[begin:end]]))
        return Feedback(read.to(draft.device), teacher.to(draft.device))
