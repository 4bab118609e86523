"""The privacy audit: what comes out of an evolved draft, and what its settings retain of secrets that are planted in a copy.

A public push is decided by the adapter itself: by what comes out of the texts that it learned from (`memorization.py`), and, where
one prompt makes much of its stream, by canaries that are planted as often (`canaries.py`) under every setting that it learned with.
The other rows of canaries tell what its present settings would retain of a secret: they do not decide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..adapt.feedback import Feedback
from ..errors import ConfigError, PrivacyError
from ..runtime.progress import progress
from .audited import Audited
from .canaries import REFERENCES, Exposure, check_text, is_count, learn, make_canaries, plant, probe, read
from .learned_from import ONE_ADAPTER, History, history, learned_settings
from .memorization import examine

BEHIND = 40  # requests learned behind the canaries, at most: whether they are forgotten
# Bits of mean exposure above which a push is refused: whoever guesses a secret needs an eighth of the guesses. The mean of eight
# canaries that were never planted is above it in 0.8 % of all audits (a sum of eight exponentials), of one canary in 12.5 %.
# A secret written once by the embedded pair: 6.9 of 8 bits with the default settings, 3.2 without replay, 1.5 with a tenth of that
# step size too (benchmarks/results/audit.md).
MOST_BITS = 3.0
# Chance above which own text is told from text that was not seen (0.5: not at all), if that is sure by two standard errors: one
# right answer in ten more than a coin gives. Measured, as above: 0.68, 0.54, 0.50.
MOST_AUC = 0.6
SURE = 2.0
CANARIES = 8  # of a check
MOST_REPEATS = (
    16  # that canaries are planted, at most: from there on all of them come out (benchmarks/results/audit.md)
)


@dataclass(frozen=True)
class Probed:
    """Canaries, and what the draft had learned when they were probed."""

    repeats: int  # how often the target wrote them; 0: never
    behind: int  # other requests learned behind them
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

    own: tuple[float, float]  # under the original draft, under the evolved one
    held_out: tuple[float, float]
    texts: tuple[int, int]
    gap: float  # what learning gained on own text beyond what it gained on held-out text
    error: float  # standard error of it
    auc: float  # chance that of an own and a held-out text the own one gained more: 0.5 tells nothing
    auc_error: float  # its standard error where there is nothing to tell


@dataclass(frozen=True)
class AuditReport:
    """What was found. The same draft, seed and texts give the same report."""

    probed: list[Probed]
    most_bits: float  # the largest exposure that could be seen
    gap: LossGap | None  # None: no held-out text
    seen: int | None  # tokens of the vocabulary whose embedding the adapter changes; None: it leaves embeddings alone
    vocabulary: int
    history: History = field(default_factory=History)  # what it learned from, and what comes out
    compared: bool = False  # whether what the target says by itself was known
    as_it_learned: list[Probed] = field(default_factory=list)  # where one prompt makes much of its stream

    def refusals(self) -> list[str]:
        """Why the draft should not be public; none: nothing that was looked at speaks against it."""
        found = self.history.reasons()
        for p in self.as_it_learned:
            if p.bits > MOST_BITS or p.extracted:
                found.append(
                    f"One prompt stood {times(self.history.repeats)} in its stream, among {self.history.texts} texts: too much of it to "
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
        lines = ["| canaries written | other requests behind | mean exposure, bits | largest | written out |"]
        lines += ["|---|---|---|---|---|"]
        named = [(times(p.repeats), p) for p in self.probed]
        for name, p in named + [(f"{times(p.repeats)}, as it learned", p) for p in self.as_it_learned]:
            largest = max(e.bits for e in p.exposures)
            lines.append(
                f"| {name} | {p.behind} | {p.bits:.2f} | {largest:.2f} | {p.extracted} of {len(p.exposures)} |"
            )
        lines += ["", f"Exposure: 1.44 bits by chance, at most {self.most_bits:.2f} can be seen."]
        if self.as_it_learned:
            lines.append(
                f'One prompt stood {times(self.history.repeats)} in its stream, among {self.history.texts} texts: the rows "as it '
                'learned" decide.'
            )
        else:
            lines.append("These rows tell what its settings retain, and do not decide.")
        if not any(p.behind for p in self.probed):
            lines.append("No other requests were at hand: what they would have changed was not measured.")
        h = self.history
        lines.append(
            f"Texts that it learned from: {h.texts}; not examined: {h.unexamined}; memorised: {h.memorised}"
            + ("." if self.compared else ", beside the original draft alone: the target was not at hand.")
        )
        if self.gap is None:
            lines.append("No held-out text was at hand: own and unseen text were not compared.")
        else:
            g = self.gap
            lines += ["", "| nats per token | texts | original draft | evolved draft |", "|---|---|---|---|"]
            for name, n, (original, evolved) in zip(("own", "held out"), g.texts, (g.own, g.held_out), strict=True):
                lines.append(f"| {name} | {n} | {original:.3f} | {evolved:.3f} |")
            lines += [
                "",
                f"Gained on own text beyond what was gained on held-out text: {g.gap:.3f} ± {g.error:.3f} nats per token. "
                f"Chance of telling own from held-out text: {g.auc:.2f} (0.50 ± {g.auc_error:.2f} where there is nothing to tell).",
            ]
        if self.seen is not None:
            lines.append(
                f"Whoever holds the adapter can read off which tokens occurred in what it learned from, prompts included: "
                f"{self.seen} of {self.vocabulary}, those whose embedding it changes."
            )
        lines += ["Not looked at: moments and earlier states of the adapter, which are saved beside it.", ""]
        refusals = self.refusals()
        if refusals:
            lines += ["A public push is refused:", "", *(f"- {reason}" for reason in refusals)]
        else:
            lines.append(
                f"A public push is not refused: nothing comes out of the {h.texts} texts that it learned from."
            )
            if any(p.extracted for p in self.probed):
                lines.append(
                    "With these settings it would give away secrets as in the rows above, if its stream held such."
                )
        return "\n".join(lines) + "\n"


@torch.inference_mode(False)
def audit(
    draft: Audited,
    canaries: int = 8,
    repeats: Sequence[int] = (1, 4, 16),
    own: Sequence[Feedback] | None = None,
    held_out: Sequence[Feedback] | None = None,
    behind: Sequence[Feedback] | None = None,
    seed: int = 0,
) -> AuditReport:
    """What a draft gives away. It is not touched: everything happens in a copy that shares its base's weights.

    For the embedded draft about 20 s of one CPU core; most of it is learning canaries and the requests behind them.

    Args:
        repeats: how often the target writes each canary; one measurement each.
        own: what the draft learned from, see `written` for plain text; None: what its replay remembers.
        held_out: text of the same kind that it never saw; None: no comparison.
        behind: what is learned behind the canaries in one more measurement; None: the last `BEHIND` of `own`.
        seed: of canaries and references.

    Raises:
        ConfigError: nothing to plant, canaries that are too long or of too large an alphabet, too few or too long texts.
        DraftError: the draft's numbers are not finite.
    """
    if not repeats or any(not is_count(r) for r in repeats):
        raise ConfigError(f"repeats={repeats!r}: expected whole numbers of at least 1.")
    vocabulary = draft.vocabulary.size
    secrets = make_canaries(vocabulary, canaries, seed)
    if own is None:
        own = draft.replayed()
    behind = own[-BEHIND:] if behind is None else behind
    for text in (*own, *(held_out or ()), *behind):
        check_text(draft, text, vocabulary)
    gap = None if held_out is None else loss_gap(draft, own, held_out)

    copied = draft.clone_for_audit()
    probed, planted = [Probed(0, 0, probe(copied, secrets, seed=seed))], 0
    with progress(canaries * (max(repeats) + min(repeats) * bool(behind)) + len(behind), "Planting", "text") as bar:
        for often in sorted(set(repeats)):
            plant(copied, secrets, often - planted, bar)
            planted = often
            probed.append(Probed(often, 0, probe(copied, secrets, seed=seed)))
        if behind:
            copied = draft.clone_for_audit()
            plant(copied, secrets, min(repeats), bar)
            learn(copied, behind, bar)
            probed.append(Probed(min(repeats), len(behind), probe(copied, secrets, seed=seed)))
    examine(draft)
    known, decisive = _as_it_learned(draft, history(draft))
    compared = draft.target_at_hand is not None
    return AuditReport(probed, math.log2(REFERENCES + 1), gap, _seen(draft), vocabulary, known, compared, decisive)


def _as_it_learned(draft: Audited, known: History) -> tuple[History, list[Probed]]:
    """Canaries planted as often as the main prompt stood in the stream, under every setting that ever learned; none without one.

    Where that cannot be done, the history says so.
    """
    found: list[Probed] = []
    if not known.has_main_prompt or not draft.changed:
        return known, found
    often, secrets = min(known.repeats, MOST_REPEATS), make_canaries(draft.vocabulary.size, CANARIES)
    for learned in known.settings:
        settings = learned_settings(draft, learned)
        if settings is None:
            known = known.plus(ONE_ADAPTER)
            continue
        copied = draft.clone_for_audit(settings)
        with progress(often * len(secrets), "Planting as it learned", "text") as bar:
            plant(copied, secrets, often, bar)
        found.append(Probed(often, 0, probe(copied, secrets)))
    return known, found


@torch.inference_mode(False)
def check_privacy(draft: Audited) -> None:
    """Raises PrivacyError where a public push would give away too much, or where that cannot be told.

    A draft that never learned has nothing to give. The adapter is judged, not its present settings: see `memorization.py`.
    """
    if not draft.changed:
        return
    examine(draft)
    known = history(draft)
    refusals = known.reasons()
    if not refusals:
        known, decisive = _as_it_learned(draft, known)
        most, vocabulary = math.log2(REFERENCES + 1), draft.vocabulary.size
        refusals = AuditReport([], most, None, None, vocabulary, known, as_it_learned=decisive).refusals()
    if refusals:
        raise PrivacyError(
            "The privacy audit speaks against a public push:\n"
            + "\n".join(f"- {reason}" for reason in refusals)
            + "\nPush it privately, or with skip_audit=True if nothing that it learned from is private. Loading it with other settings "
            "changes nothing of what it has learned. `hf-onlinespec audit` tells more."
        )


def loss_gap(draft: Audited, own: Sequence[Feedback], held_out: Sequence[Feedback]) -> LossGap:
    """How much more learning gained on the stream's own text than on text that it never saw, at the written tokens.

    Raises:
        ConfigError: fewer than two texts of either kind, or one that the draft cannot read.
        DraftError: the draft's log-likelihoods are not finite.
    """
    if min(len(own), len(held_out)) < 2:
        raise ConfigError(f"{len(own)} own and {len(held_out)} held-out texts: expected at least two of each.")
    losses = []
    for texts in (own, held_out):
        rows = []
        for text in texts:
            check_text(draft, text, draft.vocabulary.size)
            n = len(text.teacher)
            rows.append([-float(read(draft, text.tokens[None], n, base)[0].mean()) for base in (True, False)])
        losses.append(torch.tensor(rows, dtype=torch.float64, device="cpu"))  # (texts, original and evolved)
    gains = [part[:, 0] - part[:, 1] for part in losses]
    a, b = (len(part) for part in gains)
    ahead = gains[0][:, None] - gains[1]
    means = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in losses]
    return LossGap(
        own=means[0],
        held_out=means[1],
        texts=(a, b),
        gap=float(gains[0].mean() - gains[1].mean()),
        error=float(gains[0].var() / a + gains[1].var() / b) ** 0.5,
        auc=float((ahead > 0).double().mean() + (ahead == 0).double().mean() / 2),
        auc_error=((a + b + 1) / (12 * a * b)) ** 0.5,  # of Mann and Whitney's U
    )


def _seen(draft: Audited) -> int | None:
    """Tokens whose embedding the adapter changes: that part of A starts at zero, and moves only for tokens that were read."""
    parts = draft.adapter_params()
    moved = [(part != 0).any(0) for name, part in parts.items() if "lora_embedding_A" in name]  # each (vocabulary,)
    return int(torch.stack(moved).any(0).sum()) if moved else None


def times(n: int) -> str:
    """A number of times in words."""
    return {0: "never", 1: "once"}.get(n, f"{n} times")
