"""What was measured while a draft served: the part of its manifest that its card tells. It holds no text of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ArtifactError
from ..metrics import Counts, DraftMetrics
from .provenance import Provenance, provenance
from .records import SIGNED, Record

BEFORE_AFTER_SHARE = 0.1  # of the requests: the first are "before", the last "after"
MIN_REQUESTS_TO_COMPARE = 20  # of fewer the first and the last are the same handful
HISTORY = ("requests", "new_tokens", "rounds", "wall_time_s", "update_time_s")  # of each bucket
DIGITS = 4  # behind the point, of what is recorded


@dataclass
class Figures(Record):
    """Of some requests."""

    requests: int
    new_tokens: int
    acceptance_length: float = field(metadata=SIGNED)
    acceptance_rate: float = field(metadata=SIGNED)
    tokens_per_s: float = field(metadata=SIGNED)
    decode_tokens_per_s: float = field(metadata=SIGNED)
    update_share: float = field(metadata=SIGNED)

    @classmethod
    def of(cls, counts: Counts) -> Figures:
        return cls(
            counts.requests,
            counts.new_tokens,
            round(counts.acceptance_length, DIGITS),
            round(counts.acceptance_rate, DIGITS),
            round(counts.tokens_per_s, DIGITS),
            round(counts.decode_tokens_per_s, DIGITS),
            round(counts.update_share, DIGITS),
        )


@dataclass
class ServingHistory(Record):
    """The key "run" of the manifest; `model_cards/schema.json` describes it."""

    targets: tuple[str, ...]  # names of the models that it drafted for
    machine: Provenance  # where the draft was saved; it may have served elsewhere before
    requests: int
    rounds: int
    new_tokens: int
    learned_tokens: int
    updates: int
    idle_updates: int
    idle_time_s: float
    rollbacks: int
    total: Figures | None  # None: no request was served
    before: Figures | None  # of the first tenth of the requests
    after: Figures | None  # of the last tenth
    history: tuple[tuple[float, ...], ...]  # HISTORY of equally many requests each, the last may be of fewer

    def __post_init__(self) -> None:
        parts = {"total": self.total, "before": self.before, "after": self.after}
        missing = [name for name, part in parts.items() if part is None]
        if missing and len(missing) < len(parts):
            raise ArtifactError(f"A serving history has {missing[0]}=None beside other figures: expected all or none.")
        for bucket in self.history:
            if len(bucket) != len(HISTORY):
                raise ArtifactError(f"A serving history has a bucket {bucket}: expected the numbers {HISTORY}.")

    @classmethod
    def of(cls, metrics: DraftMetrics, targets: Sequence[str]) -> ServingHistory:
        """What a draft has measured so far."""
        served = metrics.requests > 0
        return cls(
            targets=tuple(targets),
            machine=provenance(),
            requests=metrics.requests,
            rounds=metrics.rounds,
            new_tokens=metrics.new_tokens,
            learned_tokens=metrics.learned_tokens,
            updates=metrics.updates,
            idle_updates=metrics.idle_updates,
            idle_time_s=round(metrics.idle_time_s, DIGITS),
            rollbacks=metrics.rollbacks,
            total=Figures.of(metrics) if served else None,
            before=Figures.of(metrics.part(0, BEFORE_AFTER_SHARE)) if served else None,
            after=Figures.of(metrics.part(1 - BEFORE_AFTER_SHARE, 1)) if served else None,
            history=tuple(
                tuple(round(getattr(bucket, name), DIGITS) for name in HISTORY) for bucket in metrics.history
            ),
        )

    @property
    def before_and_after(self) -> tuple[Figures, Figures] | None:
        """Figures of the first and of the last tenth of the requests; None: too few, or not different ones, to be compared."""
        if self.total is None or self.before is None or self.after is None:
            return None
        requests = self.total.requests
        if requests < MIN_REQUESTS_TO_COMPARE or self.before.requests + self.after.requests > requests:
            return None
        return self.before, self.after
