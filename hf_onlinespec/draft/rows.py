"""The rows of one call, each with the adapter that serves it and learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..adapt.idle import IdleLearning
from ..adapt.schedule import Comparison, ExpectedAnswers, LearningSchedule
from ..adapt.schedules import AdapterRows, AnswersOfRows, Schedule, Schedules
from ..adapt.service import LearningService
from ..commit.base import Call
from ..commit.draft_model import DraftModel
from ..commit.row_model import RowModel
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..metrics import Counts, DraftMetrics
from ..runtime.failures import Failures
from ..runtime.forks import Lock
from .routing import Routing


class Adapted(Protocol):
    """A draft with one adapter, as far as a row needs it."""

    trainable: DraftModel
    learning: LearningService
    idle: IdleLearning
    governor: Governor
    failures: Failures
    lock: Lock
    metrics: DraftMetrics


def models_of_rows(drafts: Sequence[Adapted], call: Call, stats: Sequence[RequestStats]) -> list[RowModel]:
    """The draft model's part in each row, whose drafts these are."""
    return [
        RowModel(own.trainable, own.governor, own.lock, call, i, stats[i], own.learning.router)
        for i, own in enumerate(drafts)
    ]


def schedule_of(
    draft: Adapted,
    rows: Sequence[RowModel],
    call: Call,
    memory: ExpectedAnswers,
    counts: Counts,
    comparison: Comparison | None = None,
) -> LearningSchedule:
    """When these rows of a call are learned, by one adapter; `comparison`: of all adapters on these rows."""
    return LearningSchedule(
        draft.learning,
        draft.idle,
        draft.failures,
        rows,
        memory,
        counts,
        call.temperature,
        learns=call.learns,
        timed=call.timed,
        waits=call.waits,
        comparison=comparison,
    )


def schedule_of_names(
    draft: Adapted,
    routing: Routing,
    drafts: Sequence[Adapted],
    rows: Sequence[RowModel],
    call: Call,
    memory: ExpectedAnswers,
    closed: Callable[[], None],
) -> Schedule:
    """When the rows of a call are learned some of which have an adapter with a name.

    Args:
        draft: that has the adapters.
        routing: the adapters of the rows, by name.
        drafts: per row, whose adapter serves it.
        closed: called at the end of the call.
    """
    parts, names = [], routing.names
    for name in dict.fromkeys(names):
        numbers = tuple(i for i, other in enumerate(names) if other == name)
        own, counts = drafts[numbers[0]], Counts()
        answers = AnswersOfRows(memory, numbers)
        schedule = schedule_of(own, [rows[i] for i in numbers], call, answers, counts, routing.comparison(numbers))
        parts.append(AdapterRows(name, numbers, schedule, counts, None if own is draft else own.metrics))
    return Schedules(parts, draft.failures, call.counts, closed)
