"""What a draft has learned from, in numbers that travel in the lineage, and why it cannot be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..adapt.learned_texts import FEW, Learned
from ..config import ENSEMBLE, OnlineSpecConfig, one_expert
from ..errors import ConfigError
from .audited import Audited

KEY = "privacy"  # of the record in the lineage
# How much likelier the end has to be than for whoever never saw it. By chance 2^-GAIN_BITS per window (Markov's inequality);
# measured on the embedded pair: at most 15.3 in 20 streams without secrets (benchmarks/results/audit.md).
GAIN_BITS = 20.0
# The same of a text whose prompt stands often: a secret of three digits. By chance in 2 % of such texts, of twenty windows each.
OFTEN_BITS = 10.0
MOST_SHARE = 0.1  # of the texts: a prompt that stands often, and more often than that, makes much of the stream; chosen
MOST_SETTINGS = 8  # that a history tells apart
LEARNING = (
    "learner", "preconditioner", "lr", "hint_memory", "radius", "max_grad_norm", "gradient_cap", "loss", "temperature", "top_k",
    "replay_passes", "replay_batch", "replay_tokens", "replay_top_k",
)  # fmt: skip
# Why a draft cannot be judged.
OLDER = "it comes from a version that kept no record of what it learned from"
ELSEWHERE = "its adapter was trained elsewhere"
AMPLIFIED = "its adapter was scaled up: what was hidden under the old scale may come out under the new one"
EARLIER = "an earlier state of the adapter took over, which was not examined while its texts were at hand"
EXPERTS = "its experts were examined as they served, and weigh otherwise by now"
CONFUSED = "the record of what it learned from cannot be read"
CROWDED = "it learned with more settings than a record tells apart"
ONE_ADAPTER = "it learned with other experts than its adapter has now, so that canaries cannot be planted as it learned"


def examined_state(here: Learned, before: int) -> tuple[int, int, int, int, int]:
    """Like `Examined.state`; `before`: see `LearnedText.stands_often`."""
    return here.steps, here.rollbacks, here.seen, here.often(before), here.stood


@dataclass(frozen=True)
class History:
    """What a draft has learned from, in numbers."""

    texts: int = 0
    unexamined: int = 0  # of which it is not known whether they come out
    memorised: int = 0
    repeats: int = 0  # how often the most frequent prompt stood in the stream, at most
    settings: tuple[dict[str, Any], ...] = ()  # of learning, every one that was in use
    unknown: tuple[str, ...] = ()  # why it cannot be judged

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"settings": list(self.settings), "unknown": list(self.unknown)}

    @classmethod
    def of(cls, lineage: Mapping[str, Any]) -> History | None:
        """From a lineage; None: it has none. One that is malformed counts as unknown."""
        found = lineage.get(KEY)
        if found is None:
            return None
        counts = ("texts", "unexamined", "memorised", "repeats")
        try:
            if any(type(found[name]) is not int or not 0 <= found[name] < 2**63 for name in counts):
                return cls(unknown=(CONFUSED,))
            learned = tuple({name: one[name] for name in LEARNING} for one in found["settings"])
            for one in learned:
                OnlineSpecConfig.from_dict(one)
            if not all(isinstance(reason, str) for reason in found["unknown"]):
                return cls(unknown=(CONFUSED,))
            unknown = tuple(found["unknown"])
        except (KeyError, TypeError, ConfigError):
            return cls(unknown=(CONFUSED,))
        return cls(**{name: found[name] for name in counts}, settings=learned, unknown=unknown)

    def plus(self, *reasons: str) -> History:
        """The same with more reasons why it cannot be judged."""
        return replace(self, unknown=tuple(dict.fromkeys((*self.unknown, *reasons))))

    def joined(self, other: History) -> History:
        """Of a draft that learned from what both learned from. One prompt may have stood in both streams."""
        both = [*self.settings, *other.settings]
        settings = [one for n, one in enumerate(both) if one not in both[:n]]
        found = History(
            self.texts + other.texts,
            self.unexamined + other.unexamined,
            self.memorised + other.memorised,
            self.repeats + other.repeats,
            tuple(settings[:MOST_SETTINGS]),
            self.unknown,
        )
        return found.plus(*other.unknown, *([CROWDED] if len(settings) > MOST_SETTINGS else []))

    @property
    def has_main_prompt(self) -> bool:
        """Whether one prompt makes much of the stream: then the adapter tells more of it than its own text shows."""
        return self.repeats > max(FEW, MOST_SHARE * self.texts)

    def reasons(self) -> list[str]:
        """Why it should not be public, as far as the numbers tell."""
        found = []
        if self.memorised:
            found.append(
                f"It has memorised {self.memorised} of the {self.texts} texts that it learned from: given the beginning of a part "
                f"of them, it writes the end, at least 2^{GAIN_BITS:g} times as likely as whoever never saw the text "
                f"(2^{OFTEN_BITS:g} where its prompt may have stood, or the target have written that part, more than {FEW} times)."
            )
        if self.unexamined:
            found.append(
                f"It cannot be judged: of the {self.texts} texts that it learned from, {self.unexamined} were not examined while "
                "they were at hand (they are never saved). `check_privacy(draft)` before saving examines all of them; "
                "`audit_tokens` says how many stay at hand."
            )
        return found + [f"It cannot be judged: {reason}." for reason in self.unknown]


def history(draft: Audited) -> History:
    """What a draft has learned from, here and before."""
    with draft.at_rest() as here:
        before, done = History.of(draft.lineage), draft.examined
        went_back = here.rollbacks > draft.loaded_rollbacks
    if before is None:
        before = History(unknown=(OLDER,) if here.steps and not here.seen else ())
    if before.texts and went_back:
        before = before.plus(EARLIER)
    if before.texts and here.seen and draft.settings.learner == ENSEMBLE:
        before = before.plus(EXPERTS)
    if not here.seen or not here.steps:
        return before
    known = done is not None and done.state == examined_state(here, before.repeats)
    settings = draft.settings.to_dict()
    own = History(
        here.seen,
        here.seen - (done.texts if known and done is not None else 0),
        done.memorised if known and done is not None else 0,
        max(1, here.repeats),
        ({name: settings[name] for name in LEARNING},),
    )
    return before.joined(own)


def loaded_history(lineage: Mapping[str, Any], then: float, now: float) -> dict[str, Any]:
    """The record of a draft that goes on from an artifact of this lineage.

    Args:
        then, now: alpha over rank of the artifact, and of the draft.
    """
    found = History.of(lineage) or History(unknown=(OLDER,))
    return (found.plus(AMPLIFIED) if now > then * (1 + 1e-6) else found).to_dict()


def merged_history(lineages: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The record of a draft that was combined from others."""
    found = History()
    for lineage in lineages:
        found = found.joined(History.of(lineage) or History(unknown=(OLDER,)))
    return (found.plus(AMPLIFIED) if sum(map(abs, weights)) > 1 + 1e-6 else found).to_dict()


def learned_settings(draft: Audited, learned: Mapping[str, Any]) -> OnlineSpecConfig | None:
    """A draft's settings with those of learning that a record holds; None: the adapter has not the experts that they ask for."""
    many = draft.settings.learner == ENSEMBLE
    if learned["learner"] == ENSEMBLE:
        return replace(draft.settings, **learned) if many else None
    return replace(one_expert(draft.settings), **learned)
