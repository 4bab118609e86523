"""Several evolved drafts as one: two users' adapters, or weekday's and weekend's.

    ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ

Side by side the ranks say exactly that: the rows of every Aᵢ one below the other, the columns of every wᵢ sᵢ Bᵢ one beside the
other. (The mean of the A times the mean of the B would be something else.) What it takes, rank Σ rᵢ, the best approximation of a
lower rank brings down again. PEFT writes A as (r, d_in) and B as (d_out, r) for linear layers, Conv1D and embeddings alike: an
embedding is a linear layer from one-hot tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat.devices import doubles
from ..config import ENSEMBLE, OnlineSpecConfig
from ..draft import OnlineDraft
from ..errors import ArtifactError, ConfigError, require_whole
from ..models.identity import BaseFingerprint
from ..runtime.progress import each
from ..share.artifact import Artifact
from ..share.base_models import check_base
from ..share.fit import PARTS, PREFIX, check_layers, check_size, names_of
from ..share.heads import check_learned_for
from ..share.learned_from import merged_record
from ..share.lineage import Distilled, merged_lineages
from ..share.loading import NamedBase, draftable, locate
from ..share.resuming import adopt
from ..share.targets import Targets
from ..share.tensor_files import shapes_of

RANK_TOLERANCE = 1e-7  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Factors:
    """The change of one layer's weights, b @ a."""

    a: Tensor  # (rank, d_in)
    b: Tensor  # (d_out, rank), the scale in it


@dataclass(frozen=True)
class Distillation:
    """What an approximation of lower rank leaves out: Frobenius norms of the rest, relative to the whole change."""

    rank: int
    error: float  # of all layers together
    errors: dict[str, float]  # by layer


def read_evolved(source: str | Path, revision: str | None = None, token: str | None = None) -> Artifact:
    """An evolved draft from a folder or from the Hub, to be combined.

    Raises:
        ArtifactError: a file is damaged, or it is no evolved draft.
        DraftError, HubError: it cannot be found, or not be reached.
    """
    origin = locate(source, revision, token)
    if origin.folder is None or not origin.evolved:
        raise no_evolved_draft(source)
    artifact = Artifact.read(origin.folder)
    return replace(artifact, lineage=replace(artifact.lineage, draft=None, parent=origin.parent))


def no_evolved_draft(source: str | Path) -> ArtifactError:
    return ArtifactError(
        f"{source}: no evolved draft. Expected what save_pretrained or push_to_hub wrote; an ordinary adapter becomes one by "
        "OnlineDraft.from_pretrained and save_pretrained."
    )


def combine(
    artifacts: Sequence[Artifact],
    base_model: PreTrainedModel | str | Path | None = None,
    weights: Sequence[float] | None = None,
    config: OnlineSpecConfig | None = None,
    target: PreTrainedModel | None = None,
) -> OnlineDraft:
    """One draft from several of one base, exactly: its rank is the sum of theirs. It learns on with a new state.

    Exactly the sum of the changes, not of what they are worth: of an acceptance length of 3.1 on orders, and of 1.39 on sql, the
    mean of the two keeps 1.85 and 1.25. Sums with weights of 1 keep less, and forget more of what the base knew
    (benchmarks/studies/combining.py). It is a start to learn on from.

    Args:
        artifacts: what `read_evolved` or `OnlineDraft.artifact` gave.
        base_model: the base draft, or its name; None: the one that the first was made for.
        weights: factors of the adapters' changes; None: 1 / n each, their mean.
        config: settings to go on with, of a single learner; None: those of the first. Rank, alpha and layers are set here.
        target: that draft heads are for.

    Raises:
        ConfigError: there is nothing to combine, or a weight that is not finite.
        ArtifactError: they belong to different bases, or were trained for another target.
    """
    if not artifacts:
        raise ConfigError("artifacts is empty: expected at least one evolved draft.")
    weights = [1 / len(artifacts)] * len(artifacts) if weights is None else list(weights)
    if len(weights) != len(artifacts) or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise ConfigError(f"weights={weights}: expected {len(artifacts)} finite numbers, one for each draft.")
    first = artifacts[0]
    for other in artifacts[1:]:
        if not first.base.is_same(other.base):
            raise ArtifactError(
                f"The adapters were made for different bases, and only those of one base can be combined.\n"
                f"  one:     {first.base}\n  another: {other.base}"
            )
    layers = sorted(set().union(*(_layers(artifact.adapter) for artifact in artifacts)))
    rank = sum(artifact.options.rank for artifact in artifacts)
    draft = _new_draft(artifacts, base_model, config, rank, layers, target)
    changes = [_changes(artifact) for artifact in artifacts]
    joined: dict[str, Factors] = {}
    for layer in layers:
        parts = [(change[layer], w) for change, w in zip(changes, weights, strict=True) if layer in change]
        joined[layer] = Factors(torch.cat([p.a for p, _ in parts]), torch.cat([w * p.b for p, w in parts], dim=1))
    _adopt(draft, joined)
    lineages = [artifact.lineage for artifact in artifacts]
    without_record = [replace(lineage, privacy=None) for lineage in lineages]  # the record is one of all together
    draft.lineage.merged = merged_lineages(without_record, list(map(float, weights)))
    draft.lineage.privacy = merged_record(lineages, weights)
    return draft


def distil(
    artifact: Artifact,
    rank: int,
    base_model: PreTrainedModel | str | Path | None = None,
    config: OnlineSpecConfig | None = None,
    target: PreTrainedModel | None = None,
) -> tuple[OnlineDraft, Distillation]:
    """The best approximation of lower rank, layer by layer, and what it leaves out. It learns on with a new state.

    Of the weights, that is: of all changes of this rank the one nearest to the whole in the Frobenius norm. No prompt is looked
    at, so directions that are never used cost as much as the others.

    Args:
        rank: of the new adapter; one that is not lower changes nothing.
        base_model, config, target: as in `combine`.

    Raises:
        ConfigError: the rank is below 1.
        ArtifactError: the adapter was not made for this base.
    """
    require_whole("rank", rank)
    draft = _new_draft([artifact], base_model, config, rank, sorted(_layers(artifact.adapter)), target)
    changes = _changes(artifact)
    approximated: dict[str, Factors] = {}
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer in each(changes, "Distilling", "layer"):
        approximated[layer], lost[layer], whole[layer] = nearest(changes[layer], rank)
    _adopt(draft, approximated)
    error = _share(math.hypot(*lost.values()), math.hypot(*whole.values()))
    draft.lineage = replace(
        artifact.lineage,
        draft=draft.lineage.draft,
        distilled=Distilled(rank, error),
        privacy=merged_record([artifact.lineage], [1.0]),
    )
    return draft, Distillation(rank, error, {layer: _share(lost[layer], whole[layer]) for layer in changes})


def nearest(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest change of at most this rank, the Frobenius norm of what it leaves out, and that of the whole.

    From the thin factors, in float64: with b = Q₁R₁ and aᵀ = Q₂R₂, b a = Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the small matrix in the middle has its
    singular values. A dense (d_out, d_in) is never made. Each factor gets the root of the singular values.
    """
    q1, r1 = torch.linalg.qr(doubles(factors.b))  # (d_out, m), (m, r)
    q2, r2 = torch.linalg.qr(doubles(factors.a).T)  # (d_in, n), (n, r)
    u, values, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(rank, int((values > RANK_TOLERANCE * values[0]).sum()))
    root = values[:kept].sqrt()
    a, b = root[:, None] * (vt[:kept] @ q2.T), (q1 @ u[:, :kept]) * root
    return Factors(a.float(), b.float()), float(values[kept:].norm()), float(values.norm())


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _changes(artifact: Artifact) -> dict[str, Factors]:
    """What an adapter changes, by the name of the layer. Raises ArtifactError where that is not finite."""
    changes = {
        layer: Factors(artifact.adapter[a].cpu().float(), artifact.adapter[b].cpu().float() * artifact.options.scale)
        for layer, (a, b) in _layers(artifact.adapter).items()
    }
    for layer, factors in changes.items():
        if not bool(torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
            raise ArtifactError(
                f"The change of {layer} by an adapter is not finite: it has diverged. Take an earlier copy of the draft."
            )
    return changes


def _layers(adapter: Iterable[str]) -> dict[str, tuple[str, str]]:
    """PEFT's names of A and of B, by the name of their layer."""
    return {
        name.removeprefix(PREFIX).removesuffix(a): (name, name.removesuffix(a) + b)
        for name in adapter
        for a, b in PARTS.items()
        if name.endswith(a)
    }


def _new_draft(
    artifacts: Sequence[Artifact],
    base_model: PreTrainedModel | str | Path | None,
    config: OnlineSpecConfig | None,
    rank: int,
    layers: Sequence[str],
    target: PreTrainedModel | None,
) -> OnlineDraft:
    """A new draft of this rank for what these adapters change, that has learned nothing yet."""
    first = artifacts[0]
    settings = first.settings if config is None else config
    if settings.learner == ENSEMBLE:
        if config is not None:
            raise ConfigError("learner='ensemble': combined adapters are one expert. Use another learner to go on.")
        settings = replace(settings, learner=settings.expert_learner)
    named = NamedBase(first.base, first.options.base_name or "", None, first.early_exit)
    found = named.load(base_model, target=target)
    base = draftable(found)
    check_base(first.base, BaseFingerprint.of(base), force=False)
    sizes = []
    for artifact in artifacts:
        if target is not None and artifact.target is not None:
            check_learned_for(artifact.target, target, force=False)
        shapes = shapes_of(artifact.adapter)
        check_layers(shapes, artifact.options.target_modules, artifact.settings, base)
        sizes += [4 * math.prod(shape) for shape in shapes.values()]
    check_size(sum(sizes), base)
    draft = OnlineDraft(
        found,
        replace(
            settings,
            rank=rank,
            alpha=first.options.scale * rank,  # so that steps keep their size
            target_modules=names_of(layers, base),
        ),
    )
    draft.targets = Targets(name for artifact in artifacts for name in artifact.serving.targets)
    if target is not None:
        draft.serves(target)
    return draft


def _adopt(draft: OnlineDraft, changes: Mapping[str, Factors]) -> None:
    """Makes a new draft serve these changes, each of at most its rank.

    Ranks that they do not use keep a new adapter's values, A at random and B at zero: they change nothing, and can learn.
    """
    scale = draft.settings.alpha / draft.settings.rank
    adapter = draft.learning.adapter_params()
    for layer, (a, b) in _layers(adapter).items():
        used = len(changes[layer].a)
        adapter[a][:used] = changes[layer].a
        adapter[b][:, :used] = changes[layer].b / scale
    adopt(draft, adapter)
