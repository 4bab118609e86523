"""The public version of an evolved draft: only what serving and reuse need.

The adapter, its options, the settings, the base by its public name and fingerprints, the figures of the run. Not: the learner's
moments and earlier states of the adapter, from which more could be read out than was audited; names of folders; the machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import ENSEMBLE, one_expert
from ..models.identity import is_own_name
from ..state import State
from .artifact import Artifact
from .lineage import Lineage

L = TypeVar("L", bound=Lineage)
WITHHELD = "not told"  # in place of a name


def public_version(artifact: Artifact) -> Artifact:
    """An artifact without what only its users need; an ensemble becomes the one adapter that it serves."""
    base = artifact.base
    if not is_public(base.name, base.revision):
        base = replace(base, name="")
    target = artifact.target
    if target is not None and not is_public(target.name, target.revision):
        target = replace(target, name="")
    machine = artifact.serving.machine
    gpu = None if machine.gpu is None else WITHHELD
    serving = replace(
        artifact.serving,
        targets=tuple(name for name in artifact.serving.targets if is_public(name)),
        machine=replace(machine, cpu=WITHHELD, cores=None, gpu=gpu, platform=WITHHELD, other={}),
    )
    settings = one_expert(artifact.settings)
    if artifact.settings.learner == ENSEMBLE:  # which leaves out layers that one expert would adapt
        settings = replace(settings, target_modules=artifact.options.target_modules)
    return replace(
        artifact,
        settings=settings,
        base=base,
        target=target,
        options=replace(
            artifact.options,
            base_name=base.name,
            revision=None,
            other={**artifact.options.other, "auto_mapping": None},
        ),
        state=State(),
        serving=serving,
        lineage=_public_lineage(artifact.lineage),
    )


def is_public(name: str | None, revision: str | None = "") -> bool:
    """Whether a name is one of the package, or one on the Hub as far as it tells itself; not whether the repository is public.

    Args:
        revision: of what was loaded from there; None: it was not.
    """
    if is_own_name(name):
        return True
    return revision is not None and name is not None and "/" in name and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _public_lineage(lineage: L) -> L:
    """Without names of folders, and without the parent: mostly the private repository that the draft was kept in before."""
    # What was said of a part was said of its own push.
    merged = tuple(replace(_public_lineage(part), data_statement=None) for part in lineage.merged)
    found = replace(lineage, parent=None, merged=merged)
    if found.warm_start is not None and not is_public(found.warm_start.target):
        found.warm_start = replace(found.warm_start, target=None)
    if found.alignment is not None and not is_public(found.alignment.target):
        found.alignment = replace(found.alignment, target=None)
    return found
