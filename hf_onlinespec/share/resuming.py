"""A new draft goes on from what was saved, or from an adapter that was trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..config import OnlineSpecConfig
from .artifact import Artifact
from .audited import Audited
from .learned_from import loaded_record, privacy_record
from .loading import Loaded
from .privacy_record import TRAINED_ELSEWHERE


def go_on(draft: Audited, loaded: Loaded) -> None:
    """Goes on from what was read and checked, with a new draft of its base and settings. Raises ArtifactError."""
    if loaded.artifact is not None:
        restore(draft, loaded.artifact)
    elif loaded.adapter is not None:
        adopt(draft, loaded.adapter)
    draft.lineage = draft.lineage.going_on_from(loaded.lineage)


def restore(draft: Audited, artifact: Artifact) -> None:
    """Takes over everything that was saved, for a new draft of the same base and settings. Raises ArtifactError."""
    with draft.learning.steps_lock:
        draft.learning.resume(artifact.adapter, artifact.state, artifact.state.part("metrics"))
        draft.targets.names = list(artifact.serving.targets)
        draft.lineage.privacy = loaded_record(artifact.lineage, _scale(artifact.settings), _scale(draft.settings))


def adopt(
    draft: Audited, adapter: Mapping[str, Tensor], texts: Sequence[Tensor] | None = None, n_texts: int | None = None
) -> None:
    """Goes on from an adapter that was trained elsewhere, by PEFT's names; the learner begins anew.

    Args:
        texts: (L,) tokens each, what it was trained on, for the privacy audit; None: not known, and it cannot be public.
        n_texts: how many there were, where `texts` is a part of them: the others cannot be judged; None: no more.
    """
    with draft.learning.steps_lock:
        draft.learning.adopt(adapter, texts or (), max(0, (n_texts or 0) - len(texts or ())))
        if texts is None:
            draft.lineage.privacy = privacy_record(draft).plus(TRAINED_ELSEWHERE)


def _scale(settings: OnlineSpecConfig) -> float:
    return settings.alpha / settings.rank
