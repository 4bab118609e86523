"""The numbers of a trial, once: the table, the report and the JSON all show these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .exactness import FAULT, IDENTICAL, ROUNDING
from .records import PLAIN, Ratio, Record, by_arm, speed_ratio, totals
from .trial import OURS, Examined, Outcome
from .verdict import LEVEL, Verdict, judge

PARTS = 3  # the first and the last third of the prompts are compared: what was learned in between


@dataclass(frozen=True)
class ArmSummary:
    """One way of generating over all finished prompts."""

    arm: str
    new_tokens: int
    wall_time_s: float
    tokens_per_s: float  # learning included
    acceptance_length: float  # new tokens per target forward
    over_plain: Ratio | None  # with its 90 % interval; None: plain itself
    outputs: Mapping[str, int]  # identical to plain's, differing within rounding, by a fault; empty: not compared
    first_third: float  # acceptance length in the first and
    last_third: float  # in the last third of the prompts; 0: too few of them


@dataclass(frozen=True)
class KindSummary:
    """The prompts of one kind."""

    kind: str
    prompts: int
    tokens_per_s: Mapping[str, float]  # by arm
    acceptance_length: Mapping[str, float]  # by arm
    ours_over_best: float  # over the best other arm of this kind


@dataclass(frozen=True)
class Gaps:
    """The differences of one arm from plain that lie within rounding, and in float32."""

    largest_gap: float
    largest_share: float  # of what rounding allows, twice the largest difference between logits
    in_float32: int  # differences whose gap in float32 is known
    other_is_better: int  # of these: in float32 the other token is better than plain's, or as good


@dataclass(frozen=True)
class Summary:
    """All of it."""

    prompts: int
    arms: Sequence[ArmSummary]
    kinds: Sequence[KindSummary]
    gaps: Mapping[str, Gaps]  # by arm, of those whose outputs differ from plain's
    verdict: Verdict

    @property
    def faults(self) -> int:
        """Outputs of ours that differ from plain's by more than rounding."""
        return next((arm.outputs.get(FAULT, 0) for arm in self.arms if arm.arm == OURS), 0)


def summarise(outcome: Outcome) -> Summary:
    """The numbers of the finished prompts, one at least."""
    arms = by_arm(outcome.records)
    kinds: dict[str, list[Record]] = {}
    for record in outcome.records:
        kinds.setdefault(record.domain, []).append(record)
    return Summary(
        prompts=outcome.prompts,
        arms=[_arm(arm, own, arms[PLAIN]) for arm, own in arms.items()],
        kinds=[_kind(kind, own) for kind, own in kinds.items()],
        gaps={arm: _gaps(arm, outcome.examined) for arm in arms if any(e.arm == arm for e in outcome.examined)},
        verdict=judge(outcome.records),
    )


def _arm(arm: str, own: Sequence[Record], plain: Sequence[Record]) -> ArmSummary:
    total = totals(own)
    kinds = [record.output for record in own]
    third = len(own) // PARTS
    return ArmSummary(
        arm=arm,
        new_tokens=total.new_tokens,
        wall_time_s=total.wall_time_s,
        tokens_per_s=total.tokens_per_s,
        acceptance_length=total.acceptance_length,
        over_plain=None if arm == PLAIN else speed_ratio(own, plain, level=LEVEL),
        outputs={} if None in kinds else {kind: kinds.count(kind) for kind in (IDENTICAL, ROUNDING, FAULT)},
        first_third=totals(own[:third]).acceptance_length,
        last_third=totals(own[-third:]).acceptance_length if third else 0.0,
    )


def _kind(kind: str, records: Sequence[Record]) -> KindSummary:
    sums = {arm: totals(own) for arm, own in by_arm(records).items()}
    speeds = {arm: total.tokens_per_s for arm, total in sums.items()}
    best = max(speed for arm, speed in speeds.items() if arm != OURS)
    return KindSummary(
        kind=kind,
        prompts=sums[OURS].requests,
        tokens_per_s=speeds,
        acceptance_length={arm: total.acceptance_length for arm, total in sums.items()},
        ours_over_best=speeds[OURS] / best,
    )


def _gaps(arm: str, examined: Sequence[Examined]) -> Gaps:
    own = [e.difference for e in examined if e.arm == arm]
    within = [d for d in own if d.kind == ROUNDING]
    known = [d.gap_float32 for d in own if d.gap_float32 is not None]
    return Gaps(
        largest_gap=max((d.gap for d in within), default=0.0),
        largest_share=max((d.gap / (2 * d.rounding) for d in within if d.rounding), default=0.0),
        in_float32=len(known),
        other_is_better=sum(gap <= 0 for gap in known),
    )
