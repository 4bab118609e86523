"""The privacy audit: what comes out of an evolved draft, and what its settings retain of secrets that are planted in a copy.

A public push is decided by the adapter itself: by what comes out of the texts that it learned from (`memorization.py`), and, where
one prompt makes much of its stream, by canaries that are planted as often (`canaries.py`) under every setting that it learned with.
The other rows of canaries tell what its present settings would retain of a secret: they do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..adapt.feedback import Feedback
from ..errors import ConfigError, PrivacyError, require_whole
from ..runtime.progress import progress
from .audit_report import AuditReport, LossGap, Probed
from .audited import Audited
from .canaries import REFERENCES, Canary, check_text, learn, log_likelihoods, make_canaries, plant, probe
from .learned_from import learned_settings, privacy_record
from .memorization import examine
from .privacy_record import OTHER_EXPERTS, PrivacyRecord

AFTERWARDS = 40  # requests learned after the canaries, at most: whether these are forgotten
CANARIES = 8  # of a check
MOST_REPEATS = (
    16  # that canaries are planted, at most: from there on all of them come out (benchmarks/results/audit.md)
)


@torch.inference_mode(False)
def audit(
    draft: Audited,
    canaries: int = 8,
    repeats: Sequence[int] = (1, 4, 16),
    own: Sequence[Feedback] | None = None,
    held_out: Sequence[Feedback] | None = None,
    afterwards: Sequence[Feedback] | None = None,
    seed: int = 0,
) -> AuditReport:
    """What a draft gives away. It is not touched: everything happens in a copy that shares its base's weights.

    For the embedded draft about 20 s of one CPU core; most of it is learning canaries and the requests after them.

    Args:
        repeats: how often the target writes each canary; one measurement each.
        own: what the draft learned from, see `as_feedback` for plain text; None: what its replay remembers.
        held_out: text of the same kind that it never saw; None: no comparison.
        afterwards: what is learned after the canaries in one more measurement; None: the last `AFTERWARDS` of `own`.
        seed: of canaries and references.

    Raises:
        ConfigError: nothing to plant, canaries that are too long or of too large an alphabet, too few or too long texts.
        DraftError: the draft's numbers are not finite.
    """
    if not repeats:
        raise ConfigError("repeats is empty: expected whole numbers, at least 1.")
    for often in repeats:
        require_whole("repeats", often)
    vocabulary = draft.vocabulary.size
    secrets = make_canaries(vocabulary, canaries, seed, ids=draft.trainable.ids)
    if own is None:
        own = draft.learning.replayed()
    afterwards = own[-AFTERWARDS:] if afterwards is None else afterwards
    for text in (*own, *(held_out or ()), *afterwards):
        check_text(draft, text, vocabulary)
    gap = None if held_out is None else loss_gap(draft, own, held_out)
    probed = _plant_and_probe(draft, secrets, sorted(set(repeats)), afterwards, seed)
    examine(draft)
    known, decisive = _as_it_learned(draft, privacy_record(draft))
    compared = draft.targets.at_hand is not None
    return AuditReport(
        probed, math.log2(REFERENCES + 1), gap, _tokens_seen(draft), vocabulary, known, compared, decisive
    )


def _plant_and_probe(
    draft: Audited, secrets: Sequence[Canary], repeats: Sequence[int], afterwards: Sequence[Feedback], seed: int
) -> list[Probed]:
    """How exposed canaries are that were never planted, that were planted so often, and after other requests."""
    copied = draft.clone_for_audit()
    probed, planted = [Probed(0, 0, probe(copied, secrets, seed=seed))], 0
    steps = len(secrets) * (repeats[-1] + repeats[0] * bool(afterwards)) + len(afterwards)
    with progress(steps, "Planting", "text") as bar:
        for often in repeats:
            plant(copied, secrets, often - planted, bar)
            planted = often
            probed.append(Probed(often, 0, probe(copied, secrets, seed=seed)))
        if afterwards:
            copied = draft.clone_for_audit()
            plant(copied, secrets, repeats[0], bar)
            learn(copied, afterwards, bar)
            probed.append(Probed(repeats[0], len(afterwards), probe(copied, secrets, seed=seed)))
    return probed


def _as_it_learned(draft: Audited, known: PrivacyRecord) -> tuple[PrivacyRecord, list[Probed]]:
    """Canaries planted as often as the main prompt stood in the stream, under every setting that ever learned; none without one.

    Where that cannot be done, the record says so.
    """
    found: list[Probed] = []
    if not known.has_main_prompt or not draft.steps:
        return known, found
    often = min(known.repeats, MOST_REPEATS)
    secrets = make_canaries(draft.vocabulary.size, CANARIES, ids=draft.trainable.ids)
    for learned in known.settings:
        settings = learned_settings(draft, learned)
        if settings is None:
            known = known.plus(OTHER_EXPERTS)
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
    if not draft.steps:
        return
    examine(draft)
    known = privacy_record(draft)
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
            n, source = text.teacher.length, None if text.source is None else text.source.to(draft.device)
            both = (log_likelihoods(draft, text.tokens[None], n, base, source)[0] for base in (True, False))
            rows.append([-float(likely.mean()) for likely in both])
        losses.append(torch.tensor(rows, dtype=torch.float64, device="cpu"))  # (texts, base and evolved)
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


def _tokens_seen(draft: Audited) -> int | None:
    """Tokens whose embedding the adapter changes: that part of A starts at zero, and moves only for tokens that were read."""
    parts = draft.learning.adapter_params()
    moved = [(part != 0).any(0) for name, part in parts.items() if "lora_embedding_A" in name]  # each (vocabulary,)
    return int(torch.stack(moved).any(0).sum()) if moved else None
