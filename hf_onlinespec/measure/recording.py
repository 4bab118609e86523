"""Recorded streams: what a target said to a list of prompts, with its distributions, so that learning can be replayed without it.

A recording holds the prompts and the answers as tokens. It is written where you say and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.generation import generative, sampled_at
from ..adapt.feedback import Feedback, Teacher
from ..errors import ConfigError
from ..runtime.progress import each
from ..share.files import check_regular

FORMAT = "1"
TENSORS = ("tokens", "lengths", "new", "log_probs", "ids", "log_tail", "log_p")
TAIL_POWER = "log_tail_power"  # at temperatures other than 0 and 1; recordings made before 2026-11-26 lack it
DRAFT_IDS = "draft_ids"  # of recordings for a draft head that proposes some of the target's tokens


@dataclass(frozen=True)
class Recorded:
    """One request."""

    domain: str
    feedback: Feedback  # its tokens, and the target's distributions at the n new ones
    log_p: Tensor  # (n,) log-probability of each new token, at the temperature of the recording


@dataclass(frozen=True)
class Recording:
    """A stream of requests at one temperature, 0 for greedy."""

    requests: list[Recorded]
    temperature: float
    draft: str = ""  # the draft that the stream is meant for: a folder or a name on the Hub; "": the embedded one
    target: str = ""  # that said it: a folder or a name on the Hub; "": the embedded one, or it is not known
    # (m,) ids of the target that a draft head proposes: the distributions are over these alone; None: over all of them.
    draft_ids: Tensor | None = None

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        teachers = [r.feedback.teacher for r in self.requests]
        tensors = {
            "tokens": torch.cat([r.feedback.tokens for r in self.requests]),
            "lengths": torch.tensor([len(r.feedback.tokens) for r in self.requests]),
            "new": torch.tensor([len(teacher) for teacher in teachers]),
            "log_probs": torch.cat([teacher.log_probs for teacher in teachers]),
            "ids": torch.cat([teacher.tokens for teacher in teachers if teacher.tokens is not None]),
            "log_tail": torch.cat([teacher.log_tail for teacher in teachers if teacher.log_tail is not None]),
            "log_p": torch.cat([r.log_p for r in self.requests]),
        }
        about = {
            "format": FORMAT,
            "temperature": json.dumps(self.temperature),
            "draft": self.draft,
            "target": self.target,
            "vocabulary": json.dumps(teachers[0].vocabulary if teachers else None),
            "domains": json.dumps([r.domain for r in self.requests]),
        }
        powers = [teacher.log_tail_power for teacher in teachers if teacher.log_tail_power is not None]
        if powers:
            tensors[TAIL_POWER] = torch.cat(powers)
        if self.draft_ids is not None:
            tensors[DRAFT_IDS] = self.draft_ids
        aside = path.with_name(path.name + ".part")
        aside.unlink(missing_ok=True)  # what a process that was killed has left, and no link is followed
        try:
            save_file(tensors, aside, metadata=about)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds something else.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(f"{path}: format {about.get('format')!r} is no recording of format {FORMAT}.")
                t = {name: file.get_tensor(name) for name in TENSORS}
                draft_ids = file.get_tensor(DRAFT_IDS) if DRAFT_IDS in file.keys() else None
                if TAIL_POWER in file.keys():
                    t[TAIL_POWER] = file.get_tensor(TAIL_POWER)
            domains, temperature = json.loads(about["domains"]), float(json.loads(about["temperature"]))
            vocabulary = json.loads(
                about.get("vocabulary", "null")
            )  # older ones do not say how many ids the target had
            vocabulary = None if vocabulary is None else int(vocabulary)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not a recording ({error}). Make one with hf-onlinespec record.") from error
        if not isinstance(domains, list) or any(int(t[name].min()) < 1 for name in ("lengths", "new") if len(t[name])):
            raise ConfigError(f"{path}: the parts of the recording do not fit together. Record the stream anew.")
        n = len(domains)
        whole = len(t["lengths"]) == len(t["new"]) == n and n > 0
        rows = int(t["new"].sum())
        if (
            not whole
            or len(t["tokens"]) != int(t["lengths"].sum())
            or any(len(v) != rows for k, v in t.items() if k not in TENSORS[:3])
            or (draft_ids is not None and (draft_ids.dim() != 1 or len(draft_ids) != vocabulary))
        ):
            raise ConfigError(f"{path}: the parts of the recording do not fit together. Record the stream anew.")
        tokens = t["tokens"].split(t["lengths"].tolist())
        parts = [t[name].split(t["new"].tolist()) for name in TENSORS[3:]]
        powers: list[Tensor | None] = [None] * n
        if TAIL_POWER in t and temperature:
            powers = list(t[TAIL_POWER].split(t["new"].tolist()))
        requests = [
            Recorded(
                domain,
                Feedback(
                    text,
                    Teacher(
                        log_probs,
                        ids,
                        tail,
                        vocabulary,
                        bool((log_probs == -torch.inf).all(-1).any()),
                        _power(power, temperature),
                        power,
                    ),
                ),
                log_p,
            )
            for domain, text, power, log_probs, ids, tail, log_p in zip(domains, tokens, powers, *parts, strict=True)
        ]
        return cls(requests, temperature, about.get("draft", ""), about.get("target", ""), draft_ids)


def _power(log_tail_power: Tensor | None, temperature: float) -> float:
    return 1.0 if log_tail_power is None else 1 / temperature


@torch.no_grad()
def record(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    temperature: float,
    seed: int = 0,
    top_k: int = 512,
    draft_ids: Tensor | None = None,
) -> Iterator[Recorded]:
    """What the target says to each prompt, with the `top_k` most probable tokens of every distribution and the mass of the others.

    Args:
        prompts: with a text, a domain and a number of new tokens, see `records.Prompt`.
        draft_ids: ids (m,) of the target that a draft head proposes; None: all. The distributions are over these alone.
    """
    sampling = sampled_at(temperature)
    for number, prompt in enumerate(each(prompts, "Recording", "prompt")):
        inputs = tokenizer(prompt.text, return_tensors="pt").to(target.device)
        torch.manual_seed(seed + number)
        out = generative(target).generate(
            **inputs,
            **sampling,
            max_new_tokens=prompt.new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        logits = torch.cat(out.logits).float()  # (n, vocab)
        tokens = out.sequences[0]
        chosen = tokens[-len(logits) :, None]
        log_p = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, chosen).squeeze(-1)
        ids = None if draft_ids is None else draft_ids.to(logits.device)
        k = min(top_k, (logits.shape[-1] if ids is None else len(ids)) - 1)
        teacher = Teacher.from_logits(logits, 1.0, k, ids, temperature)
        feedback = Feedback(tokens.cpu(), teacher.to(torch.device("cpu")))
        yield Recorded(prompt.domain, feedback, log_p.cpu())
