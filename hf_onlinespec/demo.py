"""The demo: four ways of generating, on one stream of prompts that leaves the draft's home domain and returns.

Every request goes through all four arms, in a rotating order, before the next one starts, so that the noise of the
machine hits all alike. Each arm has a draft of its own.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

from .draft import OnlineDraft
from .embedded import HOME_DOMAIN, load_draft, load_pair, prompts
from .errors import ConfigError
from .metrics import Counts

ARMS = {
    "plain": "plain",
    "transformers": "transformers assisted",
    "frozen": "ours frozen",
    "learning": "ours learning",
}
ASSISTANT_TOKENS = (1, 2, 3, 5, 8)  # the numbers that transformers' arm may choose from
CALIBRATION_PROMPTS = 4  # per domain, none of them in the stream
WARM_UPS = 2  # unmeasured prompts through every arm
OUTPUTS = ("identical", "tie", "different")  # what an output can be against plain's
TIE_GAP = 1e-4  # two logits closer than this may swap places between kernels

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the demo runs. Raises ConfigError on values that cannot work."""

    prompts: int
    domain: str
    new_tokens: int
    temperature: float
    seed: int
    threads: int

    def __post_init__(self) -> None:
        most = (len(prompts(HOME_DOMAIN)) - CALIBRATION_PROMPTS) // 2  # two segments and the calibration share them
        for name, value, low, high in (
            ("--prompts", self.prompts, 1, most),
            ("--new-tokens", self.new_tokens, 1, 256),
            ("--temperature", self.temperature, 0, 100),
            ("--seed", self.seed, 0, 2**32 - 1),
            ("--threads", self.threads, 1, os.cpu_count() or 1),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} {value}: expected a value from {low} to {high}.")


@dataclass(frozen=True)
class Request:
    """One prompt of the stream."""

    number: int  # from 0, over the whole stream
    segment: int  # 1, 2 or 3
    domain: str
    prompt: str


@dataclass(frozen=True)
class Record:
    """One request through one arm."""

    request: int
    segment: int
    domain: str
    arm: str
    new_tokens: int
    target_forwards: int
    wall_time_s: float  # around generate, learning included
    update_time_s: float  # learning alone
    output: str | None  # against plain's: "identical", "tie" or "different"; None: plain itself, or sampled


@dataclass(frozen=True)
class Calibration:
    """How transformers' arm got its number of assistant tokens."""

    prompts: int
    tokens_per_s: dict[int, float]  # by number of assistant tokens
    chosen: int

    def __str__(self) -> str:
        speeds = ", ".join(f"{k}: {speed:.0f}" for k, speed in self.tokens_per_s.items())
        return (
            f"Calibration of transformers' assisted generation on {self.prompts} prompts outside the stream, "
            f"tokens/s by number of assistant tokens: {speeds}. Chosen: {self.chosen}."
        )


def choose_prompts(settings: Settings) -> tuple[list[Request], list[str]]:
    """The stream, and prompts of both domains in turn for warm-up and calibration; no prompt is used twice."""
    rng = random.Random(settings.seed)
    home, away = (rng.sample(pool, len(pool)) for pool in (prompts(HOME_DOMAIN), prompts(settings.domain)))
    kept = zip(home[-CALIBRATION_PROMPTS:], away[-CALIBRATION_PROMPTS:], strict=True)
    n = settings.prompts
    segments = ((HOME_DOMAIN, home[:n]), (settings.domain, away[:n]), (HOME_DOMAIN, home[n : 2 * n]))
    stream = [(segment, domain, text) for segment, (domain, some) in enumerate(segments, 1) for text in some]
    return [Request(number, *item) for number, item in enumerate(stream)], [text for both in kept for text in both]


class Bench:
    """The target with a count of its forwards, and each arm as the arguments it adds to `generate`."""

    def __init__(self, settings: Settings) -> None:
        pair = load_pair()
        self._target, self._tokenizer, self._seed = pair.target, pair.tokenizer, settings.seed
        self._sample = settings.temperature > 0
        self._options: dict[str, Any] = {"max_new_tokens": settings.new_tokens, "do_sample": self._sample}
        if self._sample:
            self._options |= {"temperature": settings.temperature, "top_k": 0}
        self._forwards = 0
        self._target.register_forward_hook(self._count)
        self._arms: dict[str, dict[str, Any]] = {}

    def _count(self, *_: Any) -> None:
        self._forwards += 1

    def load_arms(self, assistant_tokens: int) -> None:
        """Loads fresh drafts, one per arm: none has learned anything."""
        self._arms = {
            "plain": {},
            "transformers": {"assistant_model": stock_draft(assistant_tokens)},
            "frozen": {"assistant_model": OnlineDraft(load_draft()), "onlinespec": False},
            "learning": {"assistant_model": OnlineDraft(load_draft()), "onlinespec": True},
        }

    def warm_up(self, spare: list[str]) -> None:
        """Runs every arm on a few prompts; its drafts are thrown away by the next `load_arms`."""
        self.load_arms(ASSISTANT_TOKENS[0])
        for prompt in spare[:WARM_UPS]:
            for arm in self._arms.values():
                self._generate(self._encode(prompt), self._seed, arm)

    def calibrate(self, spare: list[str]) -> Calibration:
        """Finds the number of assistant tokens with the most tokens per second; the numbers take turns."""
        drafts = {k: stock_draft(k) for k in ASSISTANT_TOKENS}
        sums = {k: Counts() for k in ASSISTANT_TOKENS}
        for i, prompt in enumerate(spare):
            inputs = self._encode(prompt)
            for k in rotated(ASSISTANT_TOKENS, i):
                output, wall_time_s = self._generate(inputs, self._seed + i, {"assistant_model": drafts[k]})
                sums[k].add(Counts(new_tokens=output.shape[1] - inputs["input_ids"].shape[1], wall_time_s=wall_time_s))
        speeds = {k: counts.tokens_per_s for k, counts in sums.items()}
        return Calibration(len(spare), speeds, max(speeds, key=lambda k: speeds[k]))

    def measure(self, request: Request) -> list[Record]:
        """Sends one request through all arms; the records in the order of ARMS."""
        inputs = self._encode(request.prompt)
        outputs: dict[str, Tensor] = {}
        records: dict[str, Record] = {}
        for arm in rotated(tuple(ARMS), request.number):
            before = self._forwards
            outputs[arm], wall_time_s = self._generate(inputs, self._seed + request.number, self._arms[arm])
            draft = self._arms[arm].get("assistant_model")
            records[arm] = Record(
                request=request.number,
                segment=request.segment,
                domain=request.domain,
                arm=arm,
                new_tokens=outputs[arm].shape[1] - inputs["input_ids"].shape[1],
                target_forwards=self._forwards - before,
                wall_time_s=wall_time_s,
                update_time_s=draft.metrics.last.update_time_s if isinstance(draft, OnlineDraft) else 0.0,
                output=None,
            )
        if not self._sample:
            for arm in ARMS:
                if arm != "plain":
                    records[arm] = replace(records[arm], output=self._compare(outputs["plain"], outputs[arm]))
        return [records[arm] for arm in ARMS]

    def _encode(self, prompt: str) -> BatchEncoding:
        return self._tokenizer(prompt, return_tensors="pt")

    def _generate(self, inputs: BatchEncoding, seed: int, arm: dict[str, Any]) -> tuple[Tensor, float]:
        torch.manual_seed(seed)
        started = time.perf_counter()
        output = self._target.generate(**inputs, **self._options, **arm)
        return output, time.perf_counter() - started

    def _compare(self, plain: Tensor, other: Tensor) -> str:
        """Compares token by token; "tie": where they part, the target's own logits cannot tell the two tokens apart."""
        if torch.equal(plain, other):
            return "identical"
        shared = min(plain.shape[1], other.shape[1])
        parted = (plain[0, :shared] != other[0, :shared]).nonzero()
        if len(parted) == 0:
            return "different"
        at = int(parted[0])
        with torch.no_grad():
            logits = self._target(plain[:, :at]).logits[0, -1]
        gap = logits.max() - torch.minimum(logits[plain[0, at]], logits[other[0, at]])
        return "tie" if gap < TIE_GAP else "different"


def stock_draft(assistant_tokens: int) -> PreTrainedModel:
    """A draft that transformers asks for a fixed number of tokens per round."""
    draft = load_draft()
    draft.generation_config.num_assistant_tokens = assistant_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    return draft


def rotated(items: tuple[T, ...], by: int) -> tuple[T, ...]:
    by %= len(items)
    return items[by:] + items[:by]


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of the tables: every segment, the whole stream, and how many outputs are plain's own."""
    outputs: dict[str, dict[str, int]] = {}
    for arm in ARMS:
        found = [record.output for record in records if record.arm == arm and record.output is not None]
        if found:
            outputs[arm] = {"compared": len(found)} | {kind: found.count(kind) for kind in OUTPUTS}
    segments = groupby(records, key=lambda record: (record.segment, record.domain))
    return {
        "segments": [{"segment": number, "domain": domain} | _block(list(some)) for (number, domain), some in segments],
        "whole": _block(records),
        "outputs": outputs,
    }


def _block(records: Sequence[Record]) -> dict[str, Any]:
    """Sums per arm, and the learning arm's net speed over each other arm's: of the sums, and its median over requests."""
    arms: dict[str, dict[str, float]] = {}
    speeds: dict[str, list[float]] = {}
    for arm in ARMS:
        own = [record for record in records if record.arm == arm]
        total = Counts(
            requests=len(own),
            rounds=sum(record.target_forwards for record in own),
            new_tokens=sum(record.new_tokens for record in own),
            wall_time_s=sum(record.wall_time_s for record in own),
            update_time_s=sum(record.update_time_s for record in own),
        )
        arms[arm] = {
            "requests": total.requests,
            "new_tokens": total.new_tokens,
            "wall_time_s": total.wall_time_s,
            "update_time_s": total.update_time_s,
            "acceptance_length": total.acceptance_length,
            "decode_tokens_per_s": total.decode_tokens_per_s,
            "tokens_per_s": total.tokens_per_s,
            "update_share": total.update_share,
        }
        speeds[arm] = [record.new_tokens / record.wall_time_s for record in own]
    ratios = {
        arm: {
            "total": arms["learning"]["tokens_per_s"] / arms[arm]["tokens_per_s"],
            "median": statistics.median(
                ours / other for ours, other in zip(speeds["learning"], speeds[arm], strict=True)
            ),
        }
        for arm in ARMS
        if arm != "learning"
    }
    return {"arms": arms, "learning_over": ratios}
