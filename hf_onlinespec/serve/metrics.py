"""What the server tells about itself: one record per request without its text, for `/metrics` and for the page.

Speeds and lengths are those of `hf_onlinespec.metrics`: tokens per second with learning included, acceptance length as tokens per
target forward.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..commit.base import Draft

SHOWN = 600  # latest requests that the page can draw; chosen: an hour of one request every six seconds
SOURCES = ("plain", "memory", "model", "memory+model")  # who proposed a round's tokens, see metrics.Decisions
DONE, STOPPED, FAILED, REFUSED = "done", "stopped", "failed", "refused"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
LENGTHS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 24)
SPEEDS = (1, 3, 10, 20, 30, 50, 75, 100, 150, 200, 300, 1000)


@dataclass(frozen=True)
class ServedRequest:
    """One request that is over."""

    number: int  # from 1 on
    endpoint: str  # "chat", "completions" or "responses"
    status: str  # DONE; STOPPED: the client hung up; FAILED: an error while it was generated
    ended_at_s: float  # since the epoch
    prompt_tokens: int
    new_tokens: int
    waited_s: float  # until it began
    wall_time_s: float  # from then until it ended, learning included; others may have run beside it
    generate_s: float  # its share of the time that the server generated: of a round of n requests an n-th
    update_time_s: float  # of that, spent on learning
    rounds: int  # target forwards of our loop; 0: transformers' own loop served it
    drafted_tokens: int
    accepted_tokens: int
    sources: dict[str, int]  # rounds by who proposed, the keys are SOURCES

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.wall_time_s if self.wall_time_s else 0.0

    @property
    def acceptance_length(self) -> float:
        return self.new_tokens / self.rounds if self.rounds else 0.0

    def line(self) -> str:
        """The request in the log."""
        per_forward = f", {self.acceptance_length:.2f} per target forward" if self.rounds else ""
        return (
            f"{self.endpoint} {self.status}: {self.prompt_tokens} prompt tokens, {self.new_tokens} new ones in "
            f"{self.wall_time_s:.2f} s ({self.tokens_per_s:.1f} tokens/s{per_forward}), waited {self.waited_s:.2f} s"
        )


@dataclass
class Totals:
    """Since the server started."""

    requests: int = 0
    stopped: int = 0
    failed: int = 0
    outside: int = 0  # done by transformers' own loop: ours does not take them
    prompt_tokens: int = 0
    new_tokens: int = 0
    looped_tokens: int = 0  # of the new tokens, those of our loop
    rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    generate_s: float = 0.0
    update_time_s: float = 0.0
    sources: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))

    def add(self, request: ServedRequest) -> None:
        self.requests += 1
        self.stopped += request.status == STOPPED
        self.failed += request.status == FAILED
        self.outside += request.status == DONE and not request.rounds
        self.looped_tokens += request.new_tokens if request.rounds else 0
        for name in ("prompt_tokens", "new_tokens", "rounds", "drafted_tokens", "accepted_tokens"):
            vars(self)[name] += vars(request)[name]
        self.generate_s += request.generate_s
        self.update_time_s += request.update_time_s
        for name, rounds in request.sources.items():
            self.sources[name] += rounds


class ServerMetrics:
    """Counts requests, for Prometheus and for the page. Safe with several threads."""

    def __init__(self, draft: Draft) -> None:
        self.totals = Totals()
        self.started_at_s = time.time()
        self.saves = False  # whether the draft is saved anywhere
        self._draft = draft
        self._lock = threading.Lock()
        self._recent: deque[ServedRequest] = deque(maxlen=SHOWN)
        self._waiting = self._running = 0
        self._save_failures = self._saves = 0
        self._saved_at_s: float | None = None
        self.registry = CollectorRegistry()
        made: dict[str, Any] = dict(namespace="onlinespec", registry=self.registry)
        self._requests = Counter("requests", "requests that are over", ["endpoint", "status"], **made)
        self._tokens = Counter("tokens", "tokens, by kind: prompt, new, drafted, accepted", ["kind"], **made)
        self._rounds = Counter("rounds", "target forwards, by who proposed tokens", ["source"], **made)
        self._generate_s = Counter("generate_seconds", "time spent on generating, learning included", **made)
        self._update_s = Counter("update_seconds", "time of that which learning took", **made)
        self._wait_s = Histogram("wait_seconds", "time until generation began", buckets=SECONDS, **made)
        self._request_s = Histogram(
            "request_seconds", "time from a request's beginning to its end", buckets=SECONDS, **made
        )
        self._lengths = Histogram("acceptance_length", "tokens per target forward", buckets=LENGTHS, **made)
        self._speeds = Histogram("tokens_per_second", "new tokens over that time", buckets=SPEEDS, **made)
        self._saves_total = Counter("saves", "times that the draft was saved", ["status"], **made)
        self._last_save = Gauge("last_save_timestamp_seconds", "when the draft was last saved", **made)
        for name, text, value in (
            ("requests_waiting", "requests that wait for their turn", lambda: self._waiting),
            ("requests_running", "requests that are generated now", lambda: self._running),
            ("failed_updates", "times that learning failed", lambda: draft.metrics.failed_updates),
            ("failed_drafts", "times that drafting failed", lambda: draft.metrics.failed_drafts),
            ("updates", "gradient steps of the draft since it was made", lambda: draft.metrics.updates),
        ):
            Gauge(name, text, **made).set_function(value)

    def queued(self) -> None:
        """A request waits for its turn."""
        with self._lock:
            self._waiting += 1

    def left(self) -> None:
        """A request that waited will have no turn."""
        with self._lock:
            self._waiting -= 1

    def begun(self) -> None:
        """A request's turn has come."""
        with self._lock:
            self._waiting -= 1
            self._running += 1

    def ended(self, request: ServedRequest) -> None:
        """A request whose turn had come is over."""
        with self._lock:
            self._running -= 1
            self.totals.add(request)
            self._recent.append(request)
        self._requests.labels(request.endpoint, request.status).inc()
        for kind in ("prompt", "new", "drafted", "accepted"):
            self._tokens.labels(kind).inc(vars(request)[f"{kind}_tokens"])
        for source, rounds in request.sources.items():
            self._rounds.labels(source).inc(rounds)
        self._generate_s.inc(request.generate_s)
        self._update_s.inc(request.update_time_s)
        self._wait_s.observe(request.waited_s)
        self._request_s.observe(request.wall_time_s)
        if request.rounds:
            self._lengths.observe(request.acceptance_length)
        if request.new_tokens:
            self._speeds.observe(request.tokens_per_s)

    def refused(self, endpoint: str) -> None:
        """A request that was answered with an error before it was generated."""
        self._requests.labels(endpoint, REFUSED).inc()

    def saved(self, worked: bool) -> None:
        """The draft was saved, or that failed."""
        with self._lock:
            self._saves += worked
            self._save_failures += not worked
            self._saved_at_s = time.time() if worked else self._saved_at_s
        self._saves_total.labels("done" if worked else "failed").inc()
        if worked:
            self._last_save.set_to_current_time()

    def page(self, after: int = 0) -> dict[str, Any]:
        """What the page shows, as JSON values.

        Args:
            after: number of the last request that the page knows.
        """
        decisions = self._draft.metrics.decisions
        with self._lock:
            totals, recent = self.totals, [one for one in self._recent if one.number > after]
            return {
                "now_s": time.time(),
                "started_at_s": self.started_at_s,
                "waiting": self._waiting,
                "running": self._running,
                "totals": asdict(totals),
                "acceptance_length": totals.looped_tokens / totals.rounds if totals.rounds else 0.0,
                "tokens_per_s": totals.new_tokens / totals.generate_s if totals.generate_s else 0.0,
                "update_share": totals.update_time_s / totals.generate_s if totals.generate_s else 0.0,
                "decisions": {
                    "drafting": decisions.drafting,
                    "learning": "" if self._draft.model is None else decisions.learning,
                    "rollback": decisions.rollback,
                },
                "saves": {
                    "wanted": self.saves,
                    "done": self._saves,
                    "failed": self._save_failures,
                    "at_s": self._saved_at_s,
                },
                "requests": [_row(one) for one in recent],
            }


def _row(request: ServedRequest) -> dict[str, Any]:
    row = {f.name: getattr(request, f.name) for f in fields(ServedRequest)}
    return row | {"tokens_per_s": request.tokens_per_s, "acceptance_length": request.acceptance_length}
