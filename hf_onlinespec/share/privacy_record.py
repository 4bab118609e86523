"""What a draft has learned from, in numbers that travel in its lineage, and why it should not be public or cannot be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapt.learned_texts import FEW
from ..config import OnlineSpecConfig
from ..errors import ConfigError
from .records import JsonObject

# How much likelier the end has to be than for whoever never saw it. By chance 2^-GAIN_BITS per window (Markov's inequality);
# measured on the embedded pair: at most 15.3 in 20 streams without secrets (benchmarks/results/audit.md).
GAIN_BITS = 20.0
# The same of a text whose prompt stands often: a secret of three digits. By chance in 2 % of such texts, of twenty windows each.
OFTEN_BITS = 10.0
MOST_SHARE = 0.1  # of the texts: a prompt that stands often, and more often than that, makes much of the stream; chosen
MOST_SETTINGS = 8  # that a record holds
LEARNING_SETTINGS = (
    "learner", "preconditioner", "lr", "hint_memory", "radius", "max_grad_norm", "gradient_cap", "loss", "temperature", "top_k",
    "replay_passes", "replay_batch", "replay_tokens", "replay_top_k",
)  # fmt: skip
# Why a draft cannot be judged.
NO_RECORD = "it comes from a version that kept no record of what it learned from"
TRAINED_ELSEWHERE = "its adapter was trained elsewhere"
SCALED_UP = "its adapter was scaled up: what was hidden under the old scale may come out under the new one"
EARLIER_STATE = "an earlier state of the adapter took over, which was not examined while its texts were at hand"
OTHER_EXPERT_WEIGHTS = "its experts were examined as they served, and weigh otherwise by now"
OTHER_PROCESSES = "other processes have learned the same adapter, from texts that are not at hand in this one"
UNREADABLE = "the record of what it learned from cannot be read"
TOO_MANY_SETTINGS = "it learned with more settings than a record tells apart"
OTHER_EXPERTS = (
    "it learned with other experts than its adapter has now, so that canaries cannot be planted as it learned"
)
COUNTS = ("texts", "unexamined", "memorised", "repeats")
Settings = dict[str, Any]  # LEARNING_SETTINGS of a draft


@dataclass(frozen=True)
class PrivacyRecord(JsonObject):
    """What a draft has learned from, in numbers."""

    texts: int = 0
    unexamined: int = 0  # of which it is not known whether they come out
    memorised: int = 0
    repeats: int = 0  # how often the most frequent prompt stood in the stream, at most
    settings: tuple[Settings, ...] = ()  # of learning, every one that was in use
    unknown: tuple[str, ...] = ()  # why it cannot be judged
    other: Mapping[str, object] = field(default_factory=dict)  # values of keys that are not known here

    def to_dict(self) -> dict[str, object]:
        counts: dict[str, object] = {name: getattr(self, name) for name in COUNTS}
        return {**self.other, **counts, "settings": list(self.settings), "unknown": list(self.unknown)}

    @classmethod
    def from_dict(cls, found: object, where: str = "") -> PrivacyRecord:
        """From JSON. A malformed record is no error: it says that the draft cannot be judged."""
        unreadable = cls(unknown=(UNREADABLE,))
        if not isinstance(found, Mapping):
            return unreadable
        known = set(COUNTS) | {"settings", "unknown"}
        try:
            if any(type(found[name]) is not int or not 0 <= found[name] < 2**63 for name in COUNTS):
                return unreadable
            settings = tuple({name: one[name] for name in LEARNING_SETTINGS} for one in found["settings"])
            for one in settings:
                OnlineSpecConfig.from_dict(one)
            unknown = tuple(found["unknown"])
        except (KeyError, TypeError, ConfigError):
            return unreadable
        if not all(isinstance(reason, str) for reason in unknown):
            return unreadable
        other = {name: value for name, value in found.items() if name not in known}
        return cls(**{name: found[name] for name in COUNTS}, settings=settings, unknown=unknown, other=other)

    def plus(self, *reasons: str) -> PrivacyRecord:
        """The same with more reasons why it cannot be judged."""
        return replace(self, unknown=tuple(dict.fromkeys((*self.unknown, *reasons))))

    def joined(self, other: PrivacyRecord) -> PrivacyRecord:
        """Of a draft that learned from what both learned from. One prompt may have stood in both streams."""
        both = [*self.settings, *other.settings]
        settings = [one for n, one in enumerate(both) if one not in both[:n]]
        found = PrivacyRecord(
            texts=self.texts + other.texts,
            unexamined=self.unexamined + other.unexamined,
            memorised=self.memorised + other.memorised,
            repeats=self.repeats + other.repeats,
            settings=tuple(settings[:MOST_SETTINGS]),
            unknown=self.unknown,
        )
        return found.plus(*other.unknown, *([TOO_MANY_SETTINGS] if len(settings) > MOST_SETTINGS else []))

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
