"""All counters of a draft since it was made, their history, and what of them is saved."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import ArtifactError, brief
from ..state import State
from .counts import NUMBERS, Counts
from .decisions import Decisions
from .summary import Summary, counted, parts, size

LARGEST = 1e15  # of any counter that is saved: seconds, tokens, requests
HISTORY_BUCKETS = 64  # of a draft's life that are told apart


@dataclass(repr=False)
class DraftMetrics(Counts):
    """Everything since the draft was made; `last` is the latest call alone."""

    last: Counts = field(default_factory=Counts)
    history: list[Counts] = field(default_factory=list)  # stretches of equally many requests, the last may be shorter
    replay_bytes: int = 0
    replay_refused: int = 0  # requests longer than the replay has room
    memory_bytes: int = 0  # of the suffix memory
    idle_updates: int = 0  # gradient steps taken while nothing was generated; not among `updates`
    idle_time_s: float = 0.0  # time of these; in no speed
    idle_failures: int = 0  # times that learning when idle raised
    idle_dropped: int = 0  # requests that were handed over for that and not learned: no room was left, or it raised
    decisions: Decisions = field(default_factory=Decisions)  # what the governor decided, and why
    expert_weights: tuple[float, ...] = (1.0,)  # of the experts in an ensemble's mixture; the last is the base draft's
    removed_experts: int = 0  # that diverged; a single learner begins anew
    rollbacks: int = 0  # times that an earlier state of the adapter took over; why: decisions.rollback
    averages: int = 0  # exchanges with other processes that learn the same adapter; why: decisions.averaging
    averaging_time_s: float = 0.0  # that they took between requests; in no speed
    failed_reports: int = 0  # times that a trace raised, see `Trace`; no answer needs one

    def summary(self) -> Summary:
        """The numbers in a few lines with units: `print(metrics.summary())`. As values: `metrics.summary().to_dict()`."""
        loss = "" if self.mean_loss is None else f"; loss {self.mean_loss:.3f} per token"
        rows = [
            (
                "speed",
                f"{self.tokens_per_s:.1f} tokens/s, {self.decode_tokens_per_s:.1f} with the learning time left out",
            ),
            ("acceptance length", f"{self.acceptance_length:.2f} tokens per target forward"),
            ("acceptance rate", f"{self.acceptance_rate:.2f} over {counted(self.verified_positions, 'position')}"),
            ("rounds", parts(self.sources)),
            (
                "candidates",
                f"{self.verified_per_kept:.1f} verified for one that is kept; kept: "
                f"{parts({source: n['kept'] for source, n in self.candidates.by_source().items()}) or 'none'}",
            ),
            (
                "learning",
                f"{self.update_share:.1%} of the time, {counted(self.updates, 'gradient step')}, "
                f"{counted(self.learned_tokens, 'token')}{loss}",
            ),
            ("memory", f"suffix memory {size(self.memory_bytes)}, replay {size(self.replay_bytes)}"),
        ]
        if self.idle_updates or self.idle_dropped:
            idle = f"{counted(self.idle_updates, 'gradient step')} in {self.idle_time_s:.2f} s"
            rows.append(("when idle", f"{idle}, {counted(self.idle_dropped, 'request')} dropped"))
        if self.averages:
            told = f"{counted(self.averages, 'exchange')} with other processes, {self.averaging_time_s:.2f} s between requests"
            rows.append(("averaging", told))
        if len(self.expert_weights) > 1:
            weights = [f"{weight:.2f}" for weight in self.expert_weights]
            rows.append(("expert weights", f"{', '.join(weights[:-1])}; the base draft {weights[-1]}"))
        failed = {
            "updates": self.failed_updates,
            "drafts": self.failed_drafts,
            "when idle": self.idle_failures,
            "reports": self.failed_reports,
        }
        if any(failed.values()):
            rows.append(("failed", parts(failed)))
        left_out = {
            "skipped updates": self.skipped_updates,
            "experts": self.removed_experts,
            "rollbacks": self.rollbacks,
        }
        if any(left_out.values()):
            rows.append(("left out", parts(left_out)))
        if self.last.requests:
            rows.append(("last request", self.last.line()))
        rows += [("drafting", self.decisions.drafting), ("why learning", self.decisions.learning)]
        title = f"DraftMetrics: {counted(self.requests, 'request')}, {counted(self.new_tokens, 'new token')} in {self.wall_time_s:.1f} s"
        return Summary(title, tuple(rows), self.to_dict())

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def close(self, call: Counts) -> None:
        """Takes a finished call in."""
        call.requests = 1
        self.add(call)
        self.last = call
        whole = self.history[0].requests if len(self.history) > 1 else 1
        if self.history and self.history[-1].requests < whole:
            self.history[-1].add(call)
        else:
            self.history.append(replace(call))
        if len(self.history) > HISTORY_BUCKETS:
            for first, second in zip(self.history[::2], self.history[1::2], strict=False):
                first.add(second)
            self.history = self.history[::2]

    def part(self, start: float, end: float) -> Counts:
        """The stretches from one share of the requests to another one, such as the last tenth; one at least."""
        n = len(self.history)
        found = Counts()
        for stretch in self.history[min(int(start * n), n - 1) : max(int(end * n), int(start * n) + 1)]:
            found.add(stretch)
        return found

    def state(self) -> State:
        """The counters, and their history."""
        names = (*(f.name for f in NUMBERS), *KEPT)
        values = {name: getattr(self, name) for name in names}
        history = [[getattr(stretch, f.name) for f in HISTORY] for stretch in self.history]
        return State(values=values | {"history": history})

    def resume(self, saved: State) -> None:
        """The inverse of `saved`."""
        kinds = {f.name: type(f.default) for f in fields(DraftMetrics)}
        for name in (*(f.name for f in NUMBERS), *KEPT):
            if name in ADDED and name not in saved.values:
                continue
            value = saved.value(name, kinds[name])
            if not 0 <= value <= LARGEST:
                raise ArtifactError(f"The saved counters have {name}={brief(value)}: expected a number of at least 0.")
            setattr(self, name, value)
        history = saved.value("history", list)
        if len(history) > HISTORY_BUCKETS:
            raise ArtifactError(f"The saved history has {len(history)} stretches: expected at most {HISTORY_BUCKETS}.")
        self.history = [_counts(values) for values in history]


KEPT = (
    "replay_refused",
    "idle_updates",
    "idle_time_s",
    "idle_failures",
    "idle_dropped",
    "removed_experts",
    "rollbacks",
)


# Counters that drafts saved before they were counted lack.
ADDED = (
    "failed_updates",
    "failed_drafts",
    "idle_dropped",
    "plain_rounds",
    "memory_rounds",
    "model_rounds",
    "mixed_rounds",
    "loss_sum",
)


HISTORY = [f for f in NUMBERS if f.name not in ADDED]  # of a stretch in a file


def _counts(values: Any) -> Counts:
    kinds = [type(f.default) for f in HISTORY]
    whole = isinstance(values, list) and list(map(type, values)) == kinds
    if not whole or not all(0 <= value <= LARGEST for value in values):
        raise ArtifactError(f"The saved history has {brief(values)}: expected {len(kinds)} numbers.")
    return Counts(**{f.name: value for f, value in zip(HISTORY, values, strict=True)})
