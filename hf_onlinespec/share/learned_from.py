"""The privacy record of a draft: of one at hand, of one that goes on from an artifact, of one that was combined from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..adapt.learned_texts import Learned
from ..config import ENSEMBLE, OnlineSpecConfig, one_expert
from .audited import Audited
from .lineage import Lineage
from .privacy_record import (
    EARLIER_STATE,
    LEARNING_SETTINGS,
    NO_RECORD,
    OTHER_EXPERT_WEIGHTS,
    OTHER_PROCESSES,
    SCALED_UP,
    PrivacyRecord,
    Settings,
)


def examined_state(learned: Learned, before: int) -> tuple[int, int, int, int, int]:
    """Like `Examined.state`; `before`: see `LearnedText.stands_often`."""
    return learned.steps, learned.rollbacks, learned.seen, learned.often(before), learned.stood


def privacy_record(draft: Audited) -> PrivacyRecord:
    """What a draft has learned from, in this process and before."""
    with draft.learning.at_rest() as learned:
        before, examined = draft.lineage.privacy, learned.examined
        went_back = learned.rollbacks > learned.loaded_rollbacks
    if before is None:
        before = PrivacyRecord(unknown=(NO_RECORD,) if learned.steps and not learned.seen else ())
    if before.texts and went_back:
        before = before.plus(EARLIER_STATE)
    if before.texts and learned.seen and draft.settings.learner == ENSEMBLE:
        before = before.plus(OTHER_EXPERT_WEIGHTS)
    if learned.elsewhere:
        before = before.plus(OTHER_PROCESSES)
    if not learned.seen or not learned.steps:
        return before
    if examined is not None and examined.state != examined_state(learned, before.repeats):
        examined = None  # that was another adapter, or other texts
    settings = draft.settings.to_dict()
    own = PrivacyRecord(
        texts=learned.seen,
        unexamined=learned.seen - (0 if examined is None else examined.texts),
        memorised=0 if examined is None else examined.memorised,
        repeats=max(1, learned.repeats),
        settings=({name: settings[name] for name in LEARNING_SETTINGS},),
    )
    return before.joined(own)


def loaded_record(lineage: Lineage, then: float, now: float) -> PrivacyRecord:
    """The record of a draft that goes on from an artifact of this lineage.

    Args:
        then, now: alpha over rank of the artifact, and of the draft.
    """
    found = lineage.privacy or PrivacyRecord(unknown=(NO_RECORD,))
    return found.plus(SCALED_UP) if now > then * (1 + 1e-6) else found


def merged_record(lineages: Sequence[Lineage], weights: Sequence[float]) -> PrivacyRecord:
    """The record of a draft that was combined from others."""
    found = PrivacyRecord()
    for lineage in lineages:
        found = found.joined(lineage.privacy or PrivacyRecord(unknown=(NO_RECORD,)))
    return found.plus(SCALED_UP) if sum(map(abs, weights)) > 1 + 1e-6 else found


def learned_settings(draft: Audited, learned: Settings) -> OnlineSpecConfig | None:
    """A draft's settings with those of learning that a record holds; None: the adapter has not the experts that they ask for."""
    many = draft.settings.learner == ENSEMBLE
    if learned["learner"] == ENSEMBLE:
        return replace(draft.settings, **learned) if many else None
    return replace(one_expert(draft.settings), **learned)
