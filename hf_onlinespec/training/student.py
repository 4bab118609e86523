"""The draft as a module that transformers' Trainer can train: its adapter's parameters, and its loss against the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapt.feedback import Teacher
from ..adapt.losses import LOSSES
from ..draft import OnlineDraft


class Student(nn.Module):
    """The draft with parameters of its own in the place of the adapter's, and its loss against the target.

    Trainer may do with these parameters what it likes. The draft serves meanwhile as if nothing happened.
    """

    def __init__(self, draft: OnlineDraft, target: PreTrainedModel) -> None:
        super().__init__()
        start = draft.learning.adapter_params()
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
        # (batch, L - 1): by the token that is predicted
        learned = (places >= start[:, None]) & attention_mask[:, 1:].bool()
        inputs = {"input_ids": input_ids[:, :-1], "attention_mask": attention_mask[:, :-1]}
        with torch.no_grad():
            logits = target(**_on(inputs, target.device), use_cache=False).logits
            target_logits = logits[learned.to(logits.device)].to(draft.device)  # (tokens, vocab)
        inputs = inputs | {"input_ids": draft.vocabulary.readable(inputs["input_ids"])}
        adapter = dict(zip(self._files, self.parts, strict=True))
        logits = draft.trainable.logits_with(adapter, **_on(inputs, draft.device))
        teacher = Teacher.from_logits(target_logits, settings.temperature, settings.top_k, draft.vocabulary.size)
        own_logits = logits[learned.to(logits.device)]
        losses = self._loss(*teacher.compare(own_logits, settings.temperature, settings.loss != "cross_entropy"))
        return {"loss": losses.sum() / max(1, len(losses))}

    def adapter(self) -> dict[str, Tensor]:
        """What was learned, by the names of PEFT's files."""
        return {name: part.detach() for name, part in zip(self._files, self.parts, strict=True)}


def _on(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
