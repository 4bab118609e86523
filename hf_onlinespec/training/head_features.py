"""What a head is trained on: the target's hidden states along its answers, cached on disk, and batches of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .._compat.models import keeps_logits
from ..errors import DraftError
from .head_answers import Answer

BLOCK = 16  # answers in a file of the cache
READ_TOKENS = 4096  # of answers that the target reads in one forward, padding included


@dataclass(frozen=True)
class Recorded:
    """The target along one answer of N tokens, P of them the prompt."""

    features: Tensor  # (N - 2, features): behind each token but the last two
    said: Tensor  # (N - P - 1, width): its last hidden state behind each answer token but the last; or its logits there
    best: Tensor  # (N - P - 1,) its likeliest next token there, an id of its own


@dataclass(frozen=True)
class HeadBatch:
    """Answers side by side, so that a column is the same row of every answer: prompts end, and answers begin, in one column.

    p: prompt rows; n: answer rows, whose drafts are answer tokens. Row i of the answer goes with `tokens[:, i]`, which is
    answer token i; a draft of k further steps behind it is answer token i + 1 + k.
    """

    features: Tensor  # (B, p + n, features)
    prompt_tokens: Tensor  # (B, p) the tokens behind the prompt rows
    tokens: Tensor  # (B, n + 1) answer tokens
    real: Tensor  # (B, p + n) False: padding, left of the prompt or behind the answer
    said: Tensor  # (B, n, width or draft vocabulary): of the target behind answer token i, see `Recorded.said`
    best: Tensor  # (B, n)

    @property
    def read(self) -> Tensor:
        """(B, p + n) the tokens behind the rows."""
        return torch.cat([self.prompt_tokens, self.tokens[:, :-1]], dim=1)

    def to(self, device: torch.device) -> HeadBatch:
        return HeadBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class TargetReader:
    """Reads answers with the target, and says what its law is behind each token.

    Args:
        reads: indices of the hidden states that are the head's features.
        draft_ids: (Vd,) the tokens that the law is restricted to.

    Raises:
        DraftError: the target gives no hidden states.
    """

    def __init__(self, target: PreTrainedModel, reads: Sequence[int], draft_ids: Tensor) -> None:
        self.target, self.reads, self.draft_ids = target, tuple(reads), draft_ids.to(target.device)
        self._arguments = {"logits_to_keep": 1} if keeps_logits(target) else {}
        lm_head = target.get_output_embeddings()
        tokens = torch.arange(4, device=target.device)[None]
        states, logits = self._read(tokens, torch.ones_like(tokens))
        if max(self.reads) >= len(states):
            raise DraftError(f"reads={self.reads}: the target has {len(states)} hidden states, counted from 0.")
        # Not so where logits are capped or scaled behind the vocabulary head: then they are kept themselves.
        self._from_hidden = lm_head is not None and torch.allclose(
            lm_head(states[-1][:, -1]).float(), logits[:, -1].float(), rtol=1e-2, atol=1e-2
        )
        self._rows: tuple[Tensor, Tensor | None] | None = None
        if self._from_hidden and lm_head is not None:
            parts = dict(lm_head.named_parameters(recurse=False))
            weight, bias = parts["weight"].detach(), parts.get("bias")
            ids = self.draft_ids.to(weight.device)
            self._rows = (weight[ids].float(), None if bias is None else bias.detach()[ids].float())

    def logits(self, said: Tensor) -> Tensor:
        """`Recorded.said` (..., width) as the target's logits (..., Vd) of the draft vocabulary, in float32."""
        if self._rows is None:
            return said.float()
        weight, bias = (None if part is None else part.to(said.device) for part in self._rows)
        assert weight is not None
        return torch.nn.functional.linear(said.float(), weight, bias)

    @torch.no_grad()
    def read(self, answers: Sequence[Answer]) -> list[Recorded]:
        """What the target's hidden states are along these answers, in bfloat16."""
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt) + len(answers[i].tokens))
        found: dict[int, Recorded] = {}
        while order:
            longest = len(answers[order[-1]].prompt) + len(answers[order[-1]].tokens)
            size = max(1, READ_TOKENS // longest)
            batch, order = order[-size:], order[:-size]
            found |= zip(batch, self._read_batch([answers[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(answers))]

    def _read_batch(self, answers: list[Answer]) -> list[Recorded]:
        rows = [a.prompt + a.tokens for a in answers]
        longest, device = max(map(len, rows)), self.target.device
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        states, logits = self._read(tokens, mask, every=not self._from_hidden)
        lm_head = self.target.get_output_embeddings()
        found = []
        for i, answer in enumerate(answers):
            first, end = len(answer.prompt), len(rows[i]) - 1
            features = torch.cat([states[j][i, : end - 1] for j in self.reads], dim=-1)
            said = states[-1][i, first:end]
            own = logits[i, first:end] if not self._from_hidden else lm_head(said)
            if not self._from_hidden:
                said = own[:, self.draft_ids]
            parts = (features.bfloat16(), said.bfloat16(), own.argmax(-1))
            found.append(Recorded(*(part.cpu() for part in parts)))
        return found

    @torch.no_grad()
    def _read(self, tokens: Tensor, mask: Tensor, every: bool = False) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states, each (B, L, width), and logits (B, L or 1, vocab), of all positions or the last one."""
        arguments = {} if every else self._arguments
        out = self.target(
            input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False, **arguments
        )
        if out.get("hidden_states") is None:
            raise DraftError(f"{type(self.target).__name__} hands out no hidden states, which a head has to read.")
        return out.hidden_states, out.logits


class FeatureCache:
    """What the target said along answers: read once, then kept on disk, as far as the cache may grow; else read at every use.

    Args:
        folder: of the cache; a file that belongs to other answers is written anew.
        most_bytes: on disk.
    """

    def __init__(self, reader: TargetReader, answers: Sequence[Answer], folder: Path, most_bytes: int) -> None:
        self.reader, self.answers, self._folder, self._most_bytes = reader, answers, folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.answers)

    def prepare(self, block: int) -> None:
        """Reads the answers of one block and keeps them, if they are not there and there is room."""
        file, answers = self._file(block), self.answers[block * BLOCK : (block + 1) * BLOCK]
        if file.exists() or sum(f.stat().st_size for f in self._folder.iterdir()) >= self._most_bytes:
            return
        parts: dict[str, Tensor] = {}
        for i, recorded in enumerate(self.reader.read(answers)):
            parts |= {f"{name}.{i}": tensor.contiguous() for name, tensor in vars(recorded).items()}
        unfinished = file.with_suffix(".part")
        save_file(parts, unfinished)
        os.replace(unfinished, file)

    @property
    def blocks(self) -> int:
        return -(-len(self.answers) // BLOCK)

    def __getitem__(self, indices: Sequence[int]) -> list[Recorded]:
        found: dict[int, Recorded] = {}
        for index in indices:
            file = self._file(index // BLOCK)
            if file.exists():
                with safe_open(file, "pt") as parts:
                    names = ("features", "said", "best")
                    found[index] = Recorded(*(parts.get_tensor(f"{name}.{index % BLOCK}") for name in names))
        missing = [index for index in indices if index not in found]
        found |= zip(missing, self.reader.read([self.answers[i] for i in missing]), strict=True)
        return [found[index] for index in indices]

    def batch(self, indices: Sequence[int]) -> HeadBatch:
        """These answers as a batch, on the CPU."""
        return collated([self.answers[i] for i in indices], self[indices])

    def _file(self, block: int) -> Path:
        """A block's file, named by what is read of which tokens."""
        answers = self.answers[block * BLOCK : (block + 1) * BLOCK]
        key = json.dumps([self.reader.reads, [(a.prompt, a.tokens) for a in answers]])
        return self._folder / f"{block:05d}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def collated(answers: Sequence[Answer], recorded: Sequence[Recorded]) -> HeadBatch:
    """Answers and what the target said along them, side by side; each answer has two tokens or more."""
    p = max(len(a.prompt) for a in answers) - 1
    n = max(a.learned for a in answers)
    size, parts = len(answers), recorded[0]
    features = torch.zeros(size, p + n, parts.features.shape[-1], dtype=parts.features.dtype)
    said = torch.zeros(size, n, parts.said.shape[-1], dtype=parts.said.dtype)
    best, tokens = torch.zeros(size, n, dtype=torch.long), torch.zeros(size, n + 1, dtype=torch.long)
    prompt_tokens, real = torch.zeros(size, p, dtype=torch.long), torch.zeros(size, p + n, dtype=torch.bool)
    for i, (answer, one) in enumerate(zip(answers, recorded, strict=True)):
        before, behind = p - (len(answer.prompt) - 1), answer.learned
        features[i, before : p + behind] = one.features
        real[i, before : p + behind] = True
        said[i, :behind], best[i, :behind] = one.said, one.best
        tokens[i, : behind + 1] = torch.tensor(answer.tokens)
        prompt_tokens[i, before:] = torch.tensor(answer.prompt[1:])
    return HeadBatch(features, prompt_tokens, tokens, real, said, best)
