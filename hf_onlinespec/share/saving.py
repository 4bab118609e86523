"""A draft is saved: a copy of everything as it is at one moment, after what it learned from was examined."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from .._compat.models import model_name
from ..adapt.idle import IdleLearning
from ..metrics import DraftMetrics
from ..models.identity import BaseFingerprint
from ..state import State
from . import card
from .artifact import Artifact
from .audited import Audited
from .head_facts import HeadFacts
from .history import ServingHistory
from .learned_from import privacy_record
from .lora_options import LoraOptions
from .memorization import SAVE_S, examine

logger = logging.getLogger(__name__)


class Saved(Audited, Protocol):
    """A draft, as far as it is saved."""

    identity: BaseFingerprint  # of its base
    target_identity: BaseFingerprint | None  # that a head learns for; None: it is no head, or has served none yet
    exit_layers: int | None  # first layers of the target that draft; None: it is a model of its own, or a head
    metrics: DraftMetrics
    idle: IdleLearning

    def state(self) -> State: ...


def artifact_of(draft: Saved) -> Artifact:
    """A copy of everything that is saved, as it is now; waits for what drafts or learns in another thread at this moment."""
    with draft.learning.steps_lock, draft.learning.lock:
        name = model_name(draft.config)  # it may be a folder of this machine: PEFT has to find it
        state = draft.state()
        learned = state.part("learning")
        return Artifact(
            settings=draft.settings.of_draft(),
            base=draft.identity,
            options=LoraOptions.of(draft.trainable.adapter.adapter_config(name).to_dict()),
            adapter=state.part("adapter").tensors,
            state=State(learned.tensors, learned.values | {"metrics": state.part("metrics").values}),
            serving=ServingHistory.of(draft.metrics, draft.targets.names),
            lineage=replace(copy.deepcopy(draft.lineage), privacy=privacy_record(draft)),
            target=draft.target_identity,
            head=HeadFacts.of(draft.config),
            early_exit=draft.exit_layers,
        )


def save(draft: Saved, folder: str | Path, seconds: float = SAVE_S) -> None:
    """Writes a folder that `OnlineDraft.from_pretrained` resumes, see `OnlineDraft.save_pretrained`.

    Args:
        seconds: in which what it learned from is examined; 0: it is not.

    Raises:
        ArtifactError: the folder cannot be written; what it held is still there.
    """
    with draft.idle.call():  # no step comes in between: what is saved is what was examined
        if draft.steps and seconds:
            try:
                examine(draft, seconds)
            except Exception:  # a save that is lost would be worse
                logger.exception(
                    "What the draft learned from was not examined: a public push of what is saved will be refused."
                )
        artifact = artifact_of(draft)
    card.write(artifact, folder, draw=False)
