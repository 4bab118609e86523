"""What a warm start trains on: pieces of texts, and prompts with what the target writes after them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from .._compat.generation import generative, sampled_at
from ..models.opening import opening_tokens
from ..runtime.progress import each
from ..runtime.seeding import seeded


@dataclass(frozen=True)
class Passage:
    """Tokens of a text, and from which of them on the draft learns."""

    tokens: list[int]
    start: int  # the first token that is learned, at least 1: nothing predicts the token before it


class Passages(torch.utils.data.Dataset[Passage]):
    """As Trainer takes them."""

    def __init__(self, passages: list[Passage]) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> Passage:
        return self._passages[index]


def collate(passages: list[Passage]) -> dict[str, Tensor]:
    """One batch, padded on the right with token 0."""
    longest = max(len(p.tokens) for p in passages)
    return {
        "input_ids": torch.tensor([p.tokens + [0] * (longest - len(p.tokens)) for p in passages]),
        "attention_mask": torch.tensor([[1] * len(p.tokens) + [0] * (longest - len(p.tokens)) for p in passages]),
        "start": torch.tensor([p.start for p in passages]),
    }


def pieces(tokens: list[int], length: int, config: PretrainedConfig) -> list[Passage]:
    """A text in pieces of at most `length` tokens; each opens as the text does, and one with nothing to tell teaches nothing."""
    opening = opening_tokens(config, tokens) if length > 2 else []
    n, tokens = len(opening), tokens[len(opening) :]
    cut = (opening + tokens[at : at + length - n] for at in range(0, len(tokens), length - n))
    return [Passage(piece, 1) for piece in cut if len(piece) > max(1, n)]


@torch.no_grad()
def continuations(
    target: PreTrainedModel, prompts: list[list[int]], new_tokens: int, temperature: float, args: TrainingArguments
) -> Iterator[Passage]:
    """What the target writes after each prompt; the process's random state is left as it was."""
    sampling = sampled_at(temperature)
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
                tokens, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **sampling
            )
            for prompt, row in zip(batch, out[:, longest:].tolist(), strict=True):
                n = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                yield Passage(prompt + row[:n], len(prompt))
