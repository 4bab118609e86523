"""What was measured of a request by one way of generating, and ratios of such records with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..metrics import Counts

PLAIN = "plain"  # the arm whose outputs the others are compared with
OUTPUTS = ("identical", "tie", "different")  # what an output can be against plain's


class Prompt(NamedTuple):
    """One request of a stream."""

    text: str
    domain: str
    new_tokens: int  # at most


@dataclass(frozen=True)
class Record:
    """One request through one arm."""

    request: int  # from 0, over the whole stream
    segment: int  # from 1: a run of requests of one domain
    domain: str
    arm: str
    new_tokens: int
    target_forwards: int
    wall_time_s: float  # around generate, learning included
    update_time_s: float  # learning alone
    output: str | None  # against plain's: "identical", "tie" or "different"; None: plain itself, or sampled
    seed: int = 0
    loop_time_s: float = 0.0  # in our decoding loop, learning included; 0: another's loop
    target_forward_s: float = 0.0  # inside the target's bare forwards (on an accelerator: launching them)
    draft_forward_s: float = 0.0  # inside the bare forwards of a draft that is watched


def totals(records: Sequence[Record]) -> Counts:
    """The sums over the requests of one arm; each target forward counts as a round."""
    return Counts(
        requests=len(records),
        rounds=sum(record.target_forwards for record in records),
        new_tokens=sum(record.new_tokens for record in records),
        wall_time_s=sum(record.wall_time_s for record in records),
        update_time_s=sum(record.update_time_s for record in records),
    )


def by_arm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each arm, in order of appearance."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    return arms


@dataclass(frozen=True)
class Ratio:
    """One arm's net tokens/s over another's: of the sums, and its bootstrap interval over requests."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"

    @property
    def is_decided(self) -> bool:
        """Whether the interval lies on one side of 1."""
        return not self.low <= 1 <= self.high

    def more_requests(self, requests: int, most: int = 2000) -> int | None:
        """About how many more requests than these it takes until the interval leaves out 1, if the value stays.

        An interval narrows with the root of their number. None: more than `most` in all; the two are equally fast.
        """
        half, effect = math.log(self.high / self.low) / 2, abs(math.log(self.value))
        if effect == 0 or half * half * requests > most * effect * effect:
            return None
        return max(1, math.ceil(requests * (half / effect) ** 2) - requests)


def speed_ratio(
    ours: Sequence[Record], other: Sequence[Record], draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Ratio:
    """Compares two arms over the same requests in the same order.

    The interval tells how much the choice of requests matters. Requests of a stream that is learned from are no
    independent draws: how much runs differ, only several seeds tell.

    Args:
        level: of the interval.
    """
    pairs = list(zip(ours, other, strict=True))
    if any((a.seed, a.request) != (b.seed, b.request) for a, b in pairs):
        raise ValueError("speed_ratio compares two arms over the same requests in the same order.")
    # Per request: tokens and seconds of ours, tokens and seconds of the other.
    numbers = torch.tensor(
        [(a.new_tokens, a.wall_time_s, b.new_tokens, b.wall_time_s) for a, b in pairs], dtype=torch.float64
    )
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(pairs), (draws, len(pairs)), generator=rng)
    sums = torch.cat([numbers.sum(0)[None], numbers[drawn].sum(1)])  # (1 + draws, 4)
    ratios = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    low, high = torch.quantile(
        ratios[1:], torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    ).tolist()
    return Ratio(ratios[0].item(), low, high)
