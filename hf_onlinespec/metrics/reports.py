"""What is reported of requests and gradient steps, and to whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .counts import Counts
from .draft_metrics import DraftMetrics


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
    verified_per_kept: float  # candidates that were verified for one that was kept; 0: none was kept
    kept: dict[str, int]  # candidates by where they came from: "memory", "recycled", "model"
    expert_weights: tuple[float, ...]  # of an ensemble; the last is the base draft's
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
            verified_per_kept=call.verified_per_kept,
            kept={source: int(n["kept"]) for source, n in call.candidates.by_source().items()},
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
