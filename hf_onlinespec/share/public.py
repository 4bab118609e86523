"""The public version of an evolved draft: what serving and reuse need, and no more.

The adapter, its options, the settings, the base by its public name and fingerprints, the figures of the run. Not: the learner's
moments and earlier states of the adapter, from which more could be read out than was audited; names of folders; the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import ENSEMBLE, one_expert
from ..models.identity import EMBEDDED, EMBEDDED_TARGET
from ..state import State
from .artifact import Artifact

NOT_TOLD = "not told"
KEPT_OF_MACHINE = ("threads", "python", "hf_onlinespec", "torch", "transformers", "peft")
NOT_PUBLIC = {"cpu": NOT_TOLD, "cores": None, "platform": NOT_TOLD}


def public_version(artifact: Artifact) -> Artifact:
    """An artifact without what only its users need; an ensemble becomes the one adapter that it serves."""
    base = artifact.base
    if not is_public(base.name, base.revision):
        base = replace(base, name="")
    machine = artifact.run["machine"]
    gpu = None if machine["gpu"] is None else NOT_TOLD
    run = artifact.run | {
        "targets": [name for name in artifact.run["targets"] if is_public(name)],
        "machine": {name: machine[name] for name in KEPT_OF_MACHINE} | NOT_PUBLIC | {"gpu": gpu},
    }
    settings = one_expert(artifact.settings)
    if artifact.settings.learner == ENSEMBLE:  # which leaves out layers that one expert would adapt
        settings = replace(settings, target_modules=tuple(artifact.adapter_config["target_modules"]))
    return replace(
        artifact,
        settings=settings,
        base=base,
        adapter_config=artifact.adapter_config
        | {"base_model_name_or_path": base.name, "revision": None, "auto_mapping": None},
        state=State(),
        run=run,
        lineage=_public_lineage(artifact.lineage),
    )


def is_public(name: str | None, revision: str | None = "") -> bool:
    """Whether a name is one on the Hub, as far as it tells itself; not whether the repository is public.

    Args:
        revision: of what was loaded from there; None: it was not.
    """
    if name in (EMBEDDED, EMBEDDED_TARGET):
        return True
    return revision is not None and name is not None and "/" in name and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _public_lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(lineage)
    found.pop("parent", None)  # mostly the private repository that it was kept in before
    for name in ("warm_start", "alignment"):
        if name in found and not is_public(found[name]["target"]):
            found[name] = dict(found[name]) | {"target": None}
    if "merged" in found:
        parts = [_public_lineage(part) for part in found["merged"]]
        # What was said of a part was said of its own push.
        found["merged"] = [{key: value for key, value in part.items() if key != "data_statement"} for part in parts]
    return found
