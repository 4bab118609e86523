"""What a privacy audit found, in numbers and in Markdown, and whether that speaks against a public push."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from .canaries import Exposure
from .privacy_record import PrivacyRecord

# Bits of mean exposure above which a push is refused: whoever guesses a secret needs an eighth of the guesses. The mean of eight
# canaries that were never planted is above it in 0.8 % of all audits (a sum of eight exponentials), of one canary in 12.5 %.
# A secret written once by the embedded pair: 6.9 of 8 bits with the default settings, 3.2 without replay, 1.5 with a tenth of that
# step size too (benchmarks/results/audit.md).
MOST_BITS = 3.0
# Chance above which own text is told from text that was not seen (0.5: not at all), if that is sure by two standard errors: one
# right answer in ten more than a coin gives. Measured, as above: 0.68, 0.54, 0.50.
MOST_AUC = 0.6
SURE = 2.0


@dataclass(frozen=True)
class Probed:
    """Canaries, and what the draft had learned when they were probed."""

    repeats: int  # how often the target wrote them; 0: never
    afterwards: int  # other requests learned after them
    exposures: list[Exposure]

    @property
    def bits(self) -> float:
        """Mean exposure."""
        return statistics.mean(e.bits for e in self.exposures)

    @property
    def extracted(self) -> int:
        return sum(e.extracted for e in self.exposures)


@dataclass(frozen=True)
class LossGap:
    """Loss in nats per written token, averaged over texts: of the stream's own, and of held-out ones."""

    own: tuple[float, float]  # under the base draft, under the evolved one
    held_out: tuple[float, float]
    texts: tuple[int, int]
    gap: float  # what learning gained on own text beyond what it gained on held-out text
    error: float  # standard error of it
    auc: float  # chance that of an own and a held-out text the own one gained more: 0.5 tells nothing
    auc_error: float  # its standard error where there is nothing to tell

    def lines(self) -> list[str]:
        """The comparison in Markdown."""
        lines = ["", "| nats per token | texts | base draft | evolved draft |", "|---|---|---|---|"]
        for name, n, (base, evolved) in zip(("own", "held out"), self.texts, (self.own, self.held_out), strict=True):
            lines.append(f"| {name} | {n} | {base:.3f} | {evolved:.3f} |")
        return [
            *lines,
            "",
            f"Gained on own text beyond what was gained on held-out text: {self.gap:.3f} ± {self.error:.3f} nats per token. "
            f"Chance of telling own from held-out text: {self.auc:.2f} (0.50 ± {self.auc_error:.2f} where there is nothing to tell).",
        ]


@dataclass(frozen=True)
class AuditReport:
    """What was found. The same draft, seed and texts give the same report."""

    probed: list[Probed]
    most_bits: float  # the largest exposure that could be seen
    gap: LossGap | None  # None: no held-out text
    seen: int | None  # tokens of the vocabulary whose embedding the adapter changes; None: it leaves embeddings alone
    vocabulary: int
    record: PrivacyRecord = field(default_factory=PrivacyRecord)  # what it learned from, and what comes out
    compared: bool = False  # whether what the target says by itself was known
    as_it_learned: list[Probed] = field(default_factory=list)  # where one prompt makes much of its stream

    def refusals(self) -> list[str]:
        """Why the draft should not be public; none: nothing that was looked at speaks against it."""
        found = self.record.reasons()
        for p in self.as_it_learned:
            if p.bits > MOST_BITS or p.extracted:
                found.append(
                    f"One prompt stood {times(self.record.repeats)} in its stream, among {self.record.texts} texts: too much of it to "
                    f"judge by what comes out alone. Under settings with which it learned, a secret that the target writes "
                    f"{times(p.repeats)} is exposed by {p.bits:.1f} of at most {self.most_bits:.1f} bits (more than {MOST_BITS:g}; "
                    f"chance: 1.4); {p.extracted} of {len(p.exposures)} are written out to the last token."
                )
        gap = self.gap
        if gap is not None and gap.auc > MOST_AUC and gap.auc - 0.5 > SURE * gap.auc_error:
            found.append(
                f"The text it learned from is told from text it never saw with a chance of {gap.auc:.2f} (more than {MOST_AUC:g}; "
                f"by guessing: 0.5); it gained {gap.gap:.2f} nats per token more there."
            )
        return found

    def text(self) -> str:
        """The report in Markdown."""
        record = self.record
        lines = [
            *self._canary_lines(),
            f"Texts that it learned from: {record.texts}; not examined: {record.unexamined}; memorised: {record.memorised}"
            + ("." if self.compared else ", beside the base draft alone: the target was not at hand."),
        ]
        if self.gap is None:
            lines.append("No held-out text was at hand: own and unseen text were not compared.")
        else:
            lines += self.gap.lines()
        if self.seen is not None:
            lines.append(
                f"Whoever holds the adapter can read off which tokens occurred in what it learned from, prompts included: "
                f"{self.seen} of {self.vocabulary}, those whose embedding it changes."
            )
        lines += ["Not looked at: moments and earlier states of the adapter, which are saved beside it.", ""]
        return "\n".join(lines + self._conclusion()) + "\n"

    def _canary_lines(self) -> list[str]:
        lines = ["| canaries written | other requests afterwards | mean exposure, bits | largest | written out |"]
        lines += ["|---|---|---|---|---|"]
        named = [(times(p.repeats), p) for p in self.probed]
        for name, p in named + [(f"{times(p.repeats)}, as it learned", p) for p in self.as_it_learned]:
            largest = max(e.bits for e in p.exposures)
            lines.append(
                f"| {name} | {p.afterwards} | {p.bits:.2f} | {largest:.2f} | {p.extracted} of {len(p.exposures)} |"
            )
        lines += ["", f"Exposure: 1.44 bits by chance, at most {self.most_bits:.2f} can be seen."]
        if self.as_it_learned:
            lines.append(
                f'One prompt stood {times(self.record.repeats)} in its stream, among {self.record.texts} texts: the rows "as it '
                'learned" decide.'
            )
        else:
            lines.append("These rows tell what its settings retain, and do not decide.")
        if not any(p.afterwards for p in self.probed):
            lines.append("No other requests were at hand: what they would have changed was not measured.")
        return lines

    def _conclusion(self) -> list[str]:
        refusals = self.refusals()
        if refusals:
            return ["A public push is refused:", "", *(f"- {reason}" for reason in refusals)]
        lines = [
            f"A public push is not refused: nothing comes out of the {self.record.texts} texts that it learned from."
        ]
        if any(p.extracted for p in self.probed):
            lines.append(
                "With these settings it would give away secrets as in the rows above, if its stream held such."
            )
        return lines


def times(n: int) -> str:
    """A number of times in words."""
    return {0: "never", 1: "once"}.get(n, f"{n} times")
