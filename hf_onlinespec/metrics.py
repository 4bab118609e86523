"""The numbers, each defined once.

acceptance_length   tokens emitted per target forward (accepted + 1, less where a request ends), averaged over rounds
acceptance_rate     mean Σ min(p, q) over verified positions, p and q as in the accept test (greedy: argmax agreement)
tokens_per_s        new tokens over wall time, learning included
decode_tokens_per_s the same with the learning time left out: always shown beside the other
update_share        learning time over wall time
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .errors import ArtifactError, brief
from .state import State
from .summary import Summary, counted, parts, size

LARGEST = 1e15  # of any counter that is saved: seconds, tokens, requests
HISTORY_BUCKETS = 64  # of a draft's life that are told apart


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _as_json(value: Any) -> Any:
    if isinstance(value, Counts):
        return value.to_dict()
    if isinstance(value, Decisions):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(repr=False)
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
    plain_rounds: int = 0  # in which nobody drafted
    memory_rounds: int = 0  # in which the suffix memory alone drafted
    model_rounds: int = 0  # in which the draft model alone drafted
    mixed_rounds: int = 0  # in which both drafted
    loss_sum: float = 0.0  # over `learned_tokens`: the loss at each before it was learned

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

    @property
    def mean_loss(self) -> float | None:
        """Per learned token, before it was learned; None: nothing was learned."""
        return self.loss_sum / self.learned_tokens if self.learned_tokens else None

    @property
    def sources(self) -> dict[str, int]:
        """Rounds by who drafted."""
        return {
            "plain": self.plain_rounds,
            "memory": self.memory_rounds,
            "model": self.model_rounds,
            "memory+model": self.mixed_rounds,
        }

    def drafted_by(self, memory: bool, model: bool) -> None:
        """Notes who drafted in a round."""
        self.plain_rounds += not memory and not model
        self.memory_rounds += memory and not model
        self.model_rounds += model and not memory
        self.mixed_rounds += memory and model

    def line(self) -> str:
        """The numbers in one line."""
        drafted = ", ".join(f"{source} {n}" for source, n in self.sources.items() if n)
        learning = f"learning {self.update_share:.1%} of the time in {self.updates} updates"
        if self.mean_loss is not None:
            learning += f", loss {self.mean_loss:.3f}"
        return (
            f"{self.new_tokens} tokens in {self.wall_time_s:.2f} s ({self.tokens_per_s:.1f} tokens/s, {self.decode_tokens_per_s:.1f} "
            f"without learning), {self.acceptance_length:.2f} tokens per target forward, acceptance rate {self.acceptance_rate:.2f}, "
            f"rounds: {drafted or 'none'}; {learning}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All counters, and the numbers that follow from them, as plain JSON values."""
        found = {f.name: _as_json(getattr(self, f.name)) for f in fields(self) if f.name != "history"}
        return found | {
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "update_share": self.update_share,
            "mean_loss": self.mean_loss,
            "sources": self.sources,
        }

    def __repr__(self) -> str:
        return f"{counted(self.requests, 'request')}: {self.line()}"

    def add(self, other: Counts) -> None:
        for f in fields(Counts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(repr=False)
class Decisions:
    """What the governor decided since the draft was made, and why it decides so now."""

    rounds: dict[str, int] = field(
        default_factory=lambda: {"plain": 0, "model": 0, "memory": 0, "memory+model": 0}
    )  # by what was proposed
    probes: int = 0
    deferred_updates: int = 0  # requests that were not learned from at once: that was not affordable
    serves_base: bool = False  # the original draft served the latest request: what was learned does worse there
    effort: float = 1.0  # part of update_budget that learning may use
    acceptance: float = 0.0  # estimated, of the neural draft's tokens
    draft_step: float = 0.0  # time of one more drafted token over a plain target step
    verify_step: float = 0.0  # time of one more verified position over a plain target step
    drafting: str = "nothing was decided yet"
    learning: str = "nothing was decided yet"
    replay_passes: int = 0  # after a request, as far as they are affordable
    rollback: str = ""  # why an earlier state of the adapter took over, the last time

    def summary(self) -> Summary:
        """What was decided, in lines with units, and as values."""
        rows = [
            ("drafting", self.drafting),
            ("learning", self.learning),
            ("rounds", f"{parts(self.rounds)}; {counted(self.probes, 'probe')} of a draft that was idle"),
            ("acceptance", f"{self.acceptance:.2f}, estimated, of the draft model's tokens"),
            (
                "costs",
                f"{self.draft_step:.2f} plain target steps for one more drafted token, {self.verify_step:.2f} for one more "
                "verified position",
            ),
            (
                "effort",
                f"learning may use {self.effort:.3g} of update_budget; {self.replay_passes} replay passes a request",
            ),
            ("put off", f"{counted(self.deferred_updates, 'request')} not learned from at once"),
            ("served by", "the original draft" if self.serves_base else "the learned draft"),
        ]
        if self.rollback:
            rows.append(("rollback", self.rollback))
        return Summary("Decisions", tuple(rows), asdict(self))

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


@dataclass(repr=False)
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
                "learning",
                f"{self.update_share:.1%} of the time, {counted(self.updates, 'gradient step')}, "
                f"{counted(self.learned_tokens, 'token')}{loss}",
            ),
            ("memory", f"suffix memory {size(self.memory_bytes)}, replay {size(self.replay_bytes)}"),
        ]
        if self.idle_updates or self.idle_dropped:
            idle = f"{counted(self.idle_updates, 'gradient step')} in {self.idle_time_s:.2f} s"
            rows.append(("when idle", f"{idle}, {counted(self.idle_dropped, 'request')} dropped"))
        if len(self.expert_weights) > 1:
            weights = [f"{weight:.2f}" for weight in self.expert_weights]
            rows.append(("expert weights", f"{', '.join(weights[:-1])}; the original draft {weights[-1]}"))
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
        names = (*(f.name for f in fields(Counts)), *KEPT)
        values = {name: getattr(self, name) for name in names}
        history = [[getattr(stretch, f.name) for f in HISTORY] for stretch in self.history]
        return State(values=values | {"history": history})

    def resume(self, saved: State) -> None:
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
HISTORY = [f for f in fields(Counts) if f.name not in ADDED]  # of a stretch in a file


def _counts(values: Any) -> Counts:
    kinds = [type(f.default) for f in HISTORY]
    whole = isinstance(values, list) and list(map(type, values)) == kinds
    if not whole or not all(0 <= value <= LARGEST for value in values):
        raise ArtifactError(f"The saved history has {brief(values)}: expected {len(kinds)} numbers.")
    return Counts(**{f.name: value for f, value in zip(HISTORY, values, strict=True)})


@dataclass(frozen=True)
class RequestReport:
    """What is reported of one call of `generate`, finished or broken off. No text of the request is in it."""

    request: int  # its number since the draft was made
    new_tokens: int
    rounds: int  # target forwards
    acceptance_length: float  # tokens per target forward
    acceptance_rate: float
    tokens_per_s: float  # learning included
    decode_tokens_per_s: float  # learning time left out
    update_share: float  # of the wall time
    wall_time_s: float
    updates: int  # gradient steps inside the call
    loss: float | None  # per learned token, before it was learned; None: nothing was learned inside the call
    sources: dict[str, int]  # rounds by who drafted: "plain", "memory", "model", "memory+model"
    expert_weights: tuple[float, ...]  # of an ensemble; the last is the original draft's
    drafting: str  # what the governor decided about drafting, and why
    learning: str  # and about learning

    @classmethod
    def of(cls, metrics: DraftMetrics, call: Counts) -> RequestReport:
        """Of the call that `metrics` took in last."""
        return cls(
            request=metrics.requests,
            new_tokens=call.new_tokens,
            rounds=call.rounds,
            acceptance_length=call.acceptance_length,
            acceptance_rate=call.acceptance_rate,
            tokens_per_s=call.tokens_per_s,
            decode_tokens_per_s=call.decode_tokens_per_s,
            update_share=call.update_share,
            wall_time_s=call.wall_time_s,
            updates=call.updates,
            loss=call.mean_loss,
            sources=call.sources,
            expert_weights=metrics.expert_weights,
            drafting=metrics.decisions.drafting,
            learning=metrics.decisions.learning,
        )


@dataclass(frozen=True)
class UpdateReport:
    """What is reported of one gradient step."""

    step: int  # its number for the adapter
    kind: str  # "new": on tokens that were just generated; "replay": on remembered requests
    loss: float  # mean over the tokens, before the step
    time_s: float


class Trace(ABC):
    """Where requests and gradient steps are reported, as `OnlineSpecConfig(report_to=...)` takes it.

    Both methods are called at the end of a request, from the thread that called `generate`: first the gradient steps since the last
    report, then the request. What is learned when idle is reported by the thread that learns. Only one call is made at a time. What
    a method raises costs no answer: it is counted (`metrics.failed_reports`), logged, and the trace is left out for some requests.

    Example:
        >>> class Slow(Trace):
        ...     def on_request(self, report):
        ...         if report.acceptance_length < 1.1:
        ...             print(report.request, report.drafting)
        ...     def on_update(self, report): ...
        >>> config = OnlineSpecConfig(report_to=["tensorboard", Slow()])       # doctest: +SKIP
    """

    @abstractmethod
    def on_request(self, report: RequestReport) -> None: ...

    @abstractmethod
    def on_update(self, report: UpdateReport) -> None: ...
