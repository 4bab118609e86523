"""Where a draft came from, as its manifest and its card say it. `model_cards/schema.json` describes the JSON."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .privacy_record import PrivacyRecord
from .records import MOST, SIGNED, Record

# Of what was merged into a draft: merges of merges that a lineage keeps, and lineages in all. Chosen: a card shows them.
MOST_GENERATIONS, MOST_PARTS = 20, 200


@dataclass
class Parent(Record):
    """What a draft goes on from."""

    source: str  # a repository on the Hub, or the name of a folder
    revision: str | None  # commit on the Hub


@dataclass
class WarmStart(Record):
    """What it was trained on offline, by all warm starts together."""

    target: str | None  # of the last one; None: without a name
    texts: int
    prompts: int
    tokens: int

    def after(self, earlier: WarmStart | None) -> WarmStart:
        """Both together."""
        if earlier is None:
            return self
        texts, prompts, tokens = (
            earlier.texts + self.texts,
            earlier.prompts + self.prompts,
            earlier.tokens + self.tokens,
        )
        return replace(earlier, target=self.target, texts=texts, prompts=prompts, tokens=tokens)


@dataclass
class Alignment(Record):
    """What it learned while its target was fine-tuned, by all such trainings together."""

    target: str | None  # of the last one; None: without a name
    updates: int  # gradient steps
    tokens: int


@dataclass
class Distilled(Record):
    """Its approximation by a lower rank."""

    rank: int
    relative_error: float  # Frobenius norm of what was left out, relative to the whole change


@dataclass
class Lineage(Record):
    """Where a draft came from. What does not apply is None, and its key is left out of the JSON."""

    draft: str | None = None  # a number of its own: it tells the draft's pushes from those of others
    parent: Parent | None = None
    merged: tuple[MergedLineage, ...] = ()
    merged_left_out: int | None = None  # in place of `merged`: how many lineages a shortened one does not hold
    distilled: Distilled | None = None
    warm_start: WarmStart | None = None
    alignment: Alignment | None = None
    data_statement: str | None = None  # what its users say about what it was trained on
    license: str | None = None  # of the adapter, as the Hub names it
    privacy: PrivacyRecord | None = None

    @classmethod
    def new(cls) -> Lineage:
        """Of a draft that begins."""
        return cls(draft=uuid.uuid4().hex)

    def going_on_from(self, earlier: Lineage) -> Lineage:
        """Of a draft that begins with this lineage, and goes on from one with that lineage."""
        return replace(earlier, draft=self.draft, privacy=earlier.privacy or self.privacy)


@dataclass
class MergedLineage(Lineage):
    """The lineage of a draft that was merged into another one."""

    weight: float = field(kw_only=True, metadata=SIGNED)  # of its change


def merged_lineages(lineages: Sequence[Lineage], weights: Sequence[float]) -> tuple[MergedLineage, ...]:
    """What a merged draft tells of its parts, without the most distant ones: merges of merges would grow without bound.

    Where some are left out, `merged_left_out` says how many.
    """
    found = [MergedLineage(**vars(one), weight=w) for one, w in zip(lineages, weights, strict=True)]
    level, n = found, len(found)
    for generation in range(1, MOST_GENERATIONS + 1):
        below: list[MergedLineage] = []
        for part in level:
            if part.merged and (generation == MOST_GENERATIONS or n + len(part.merged) > MOST_PARTS):
                part.merged, part.merged_left_out = (), min(_count(part.merged), int(MOST))
            else:
                part.merged = tuple(replace(one) for one in part.merged)  # copies: these may be shortened
                below += part.merged
                n += len(part.merged)
        level = below
    return tuple(found)


def _count(merged: Sequence[MergedLineage]) -> int:
    """How many lineages there are, with those that were left out before."""
    return sum(1 + (part.merged_left_out or 0) + _count(part.merged) for part in merged)
