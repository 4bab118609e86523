"""The demo: four ways of generating, on one stream of prompts that leaves the draft's home domain and returns.

Every request goes through all four arms, in a rotating order, before the next one starts, so that the noise of the
machine hits all alike. Each arm has a draft of its own.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..embedded import HOME_DOMAIN, load_draft, load_pair, prompts
from ..errors import ConfigError
from ..runtime.progress import Bar
from .bench import ASSISTANT_TOKENS, WARM_UPS, Arm, Calibration, Runner, calibrate, stock_draft
from .records import OUTPUTS, PLAIN, Prompt, Ratio, Record, speed_ratio, totals

ARMS = {
    "plain": "plain",
    "transformers": "transformers assisted",
    "frozen": "ours frozen",
    "learning": "ours learning",
}
FROZEN = OnlineSpecConfig(memory_tokens=0)  # the draft as it came, and nothing that remembers
CALIBRATION_PROMPTS = 4  # per domain, none of them in the stream


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
    """The embedded target, and each arm as the arguments it adds to `generate`."""

    def __init__(self, settings: Settings) -> None:
        pair = load_pair()
        self._runner = Runner(pair.target, pair.tokenizer, settings.temperature, settings.seed)
        self._new_tokens = settings.new_tokens
        self._arms: dict[str, Arm] = {}

    def load_arms(self, assistant_tokens: int) -> None:
        """Loads fresh drafts, one per arm: none has learned anything."""
        self._arms = {
            PLAIN: {},
            "transformers": {"assistant_model": stock_draft(assistant_tokens)},
            "frozen": {"assistant_model": OnlineDraft(load_draft(), FROZEN), "onlinespec": False},
            "learning": {"assistant_model": OnlineDraft(load_draft()), "onlinespec": True},
        }

    @property
    def evolved(self) -> OnlineDraft:
        """The draft of the learning arm."""
        draft: OnlineDraft = self._arms["learning"]["assistant_model"]
        return draft

    @staticmethod
    def preparations(spare: list[str]) -> int:
        """Calls of `generate` in `warm_up` and `calibrate`."""
        return len(ARMS) * len(spare[:WARM_UPS]) + len(ASSISTANT_TOKENS) * len(spare)

    def warm_up(self, spare: list[str], bar: Bar | None = None) -> None:
        """Runs every arm on a few prompts; its drafts are thrown away by the next `load_arms`. `bar` is told of each call."""
        self.load_arms(ASSISTANT_TOKENS[0])
        self._runner.warm_up(self._prompts(spare), self._arms, bar)

    def calibrate(self, spare: list[str], bar: Bar | None = None) -> Calibration:
        """Finds the number of assistant tokens with the most tokens per second. `bar` is told of each call."""
        return calibrate(self._runner, self._prompts(spare), stock_draft, ASSISTANT_TOKENS, bar=bar)

    def measure(self, request: Request) -> list[Record]:
        """Sends one request through all arms; the records in the order of ARMS."""
        prompt = Prompt(request.prompt, request.domain, self._new_tokens)
        return self._runner.measure(request.number, request.segment, prompt, self._arms)

    def _prompts(self, texts: list[str]) -> list[Prompt]:
        return [Prompt(text, "spare", self._new_tokens) for text in texts]


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


def intervals(records: Sequence[Record]) -> dict[str, Ratio]:
    """The learning arm's net speed over each other arm's, with its 95 % interval."""
    own = {arm: [record for record in records if record.arm == arm] for arm in ARMS}
    return {arm: speed_ratio(own["learning"], own[arm]) for arm in ARMS if arm != "learning"}


def _block(records: Sequence[Record]) -> dict[str, Any]:
    """Sums per arm, and the learning arm's net speed over each other arm's: of the sums, and its median over requests."""
    arms: dict[str, dict[str, float]] = {}
    speeds: dict[str, list[float]] = {}
    for arm in ARMS:
        own = [record for record in records if record.arm == arm]
        total = totals(own)
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
