"""The numbers, each defined once.

acceptance_length   tokens emitted per target forward (accepted + 1, less where a request ends), averaged over rounds
acceptance_rate     mean Σ min(p, q) over verified positions, p and q as in the accept test (greedy: argmax agreement)
tokens_per_s        new tokens over wall time, learning included
decode_tokens_per_s the same with the learning time left out: always shown beside the other
update_share        learning time over wall time
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import ArtifactError, brief
from .state import Saved

LARGEST = 1e15  # of any counter that is saved: seconds, tokens, requests
STRETCHES = 64  # of a draft's life that are told apart


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


@dataclass
class Counts:
    """What is counted while a request is decoded; sums over requests are counts again."""

    requests: int = 0
    rounds: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verified_positions: int = 0
    overlap: float = 0.0  # sum of Σ min(p, q) over the verified positions
    updates: int = 0  # gradient steps taken, replay included
    learned_tokens: int = 0  # new tokens that a gradient step took; what only the replay took is not among them
    skipped_updates: int = 0  # steps left out because something was not finite: a loss, a gradient, a moment
    wall_time_s: float = 0.0  # inside generate's decoding loop, learning included
    draft_time_s: float = 0.0
    target_time_s: float = 0.0
    update_time_s: float = 0.0
    failed_updates: int = 0  # times that learning raised, see failures.py; the call went on without it
    failed_drafts: int = (
        0  # times that drafting raised; the call went on without what raised: draft model, memory or both
    )

    @property
    def acceptance_length(self) -> float:
        return _ratio(self.new_tokens, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        return _ratio(self.overlap, self.verified_positions)

    @property
    def tokens_per_s(self) -> float:
        return _ratio(self.new_tokens, self.wall_time_s)

    @property
    def decode_tokens_per_s(self) -> float:
        return _ratio(self.new_tokens, self.wall_time_s - self.update_time_s)

    @property
    def update_share(self) -> float:
        return _ratio(self.update_time_s, self.wall_time_s)

    def add(self, other: Counts) -> None:
        for f in fields(Counts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class Decisions:
    """What the governor decided since the draft was made, and why it decides so now."""

    rounds: dict[str, int] = field(
        default_factory=lambda: {"plain": 0, "neural": 0, "memory": 0, "memory+neural": 0}
    )  # by what was proposed
    probes: int = 0
    updates_put_off: int = 0  # requests that were not learned from at once: that was not affordable
    serves_frozen: bool = False  # the original draft served the latest request: what was learned does worse there
    effort: float = 1.0  # part of update_budget that learning may use
    acceptance: float = 0.0  # estimated, of the neural draft's tokens
    draft_step: float = 0.0  # time of one more drafted token over a plain target step
    verify_step: float = 0.0  # time of one more verified position over a plain target step
    drafting: str = "nothing was decided yet"
    learning: str = "nothing was decided yet"
    replay_passes: int = 0  # after a request, as far as they are affordable
    rollback: str = ""  # why an earlier state of the adapter took over, the last time


@dataclass
class DraftMetrics(Counts):
    """Everything since the draft was made; `last` is the latest call alone."""

    last: Counts = field(default_factory=Counts)
    history: list[Counts] = field(default_factory=list)  # stretches of equally many requests, the last may be shorter
    replay_bytes: int = 0
    replay_refused: int = 0  # requests longer than `replay_tokens`
    memory_bytes: int = 0  # of the suffix memory
    idle_updates: int = 0  # gradient steps taken while nothing was generated; not among `updates`
    idle_time_s: float = 0.0  # time of these; in no speed
    idle_failures: int = 0  # times that learning when idle raised
    idle_dropped: int = 0  # requests that were handed over for that and not learned: no room was left, or it raised
    decisions: Decisions = field(default_factory=Decisions)  # what the governor decided, and why
    expert_weights: tuple[float, ...] = (
        1.0,
    )  # of the experts in an ensemble's mixture; the last is the original draft's
    removed_experts: int = 0  # that diverged; a single learner begins anew
    rollbacks: int = 0  # times that an earlier state of the adapter took over; why: decisions.rollback

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
        if len(self.history) > STRETCHES:
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

    def saved(self) -> Saved:
        """The counters, and their history."""
        names = (*(f.name for f in fields(Counts)), *KEPT)
        values = {name: getattr(self, name) for name in names}
        history = [[getattr(stretch, f.name) for f in HISTORY] for stretch in self.history]
        return Saved(values=values | {"history": history})

    def resume(self, saved: Saved) -> None:
        """The inverse of `saved`."""
        kinds = {f.name: type(f.default) for f in fields(DraftMetrics)}
        for name in (*(f.name for f in fields(Counts)), *KEPT):
            if name in ADDED and name not in saved.values:
                continue
            value = saved.value(name, kinds[name])
            if not 0 <= value <= LARGEST:
                raise ArtifactError(f"The saved counters have {name}={brief(value)}: expected a number of at least 0.")
            setattr(self, name, value)
        history = saved.value("history", list)
        if len(history) > STRETCHES:
            raise ArtifactError(f"The saved history has {len(history)} stretches: expected at most {STRETCHES}.")
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
ADDED = ("failed_updates", "failed_drafts", "idle_dropped")  # counters that drafts saved before they were counted lack
HISTORY = [f for f in fields(Counts) if f.name not in ADDED]  # of a stretch in a file


def _counts(values: Any) -> Counts:
    kinds = [type(f.default) for f in HISTORY]
    whole = isinstance(values, list) and list(map(type, values)) == kinds
    if not whole or not all(0 <= value <= LARGEST for value in values):
        raise ArtifactError(f"The saved history has {brief(values)}: expected {len(kinds)} numbers.")
    return Counts(**{f.name: value for f, value in zip(HISTORY, values, strict=True)})
