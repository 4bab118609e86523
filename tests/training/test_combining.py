"""Combining: side by side is the weighted sum to rounding, a lower rank is the nearest there is, and either learns on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.errors import ArtifactError, ConfigError
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.lineage import Distilled, Lineage, MergedLineage, WarmStart, merged_lineages
from hf_onlinespec.share.targets import Targets
from hf_onlinespec.training.combining import Factors, combine, distil, nearest, read_evolved
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params, move

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [4, 4, 8, 11, 3, 0]])
MODELS = {
    "untied": lambda: tiny_llama(2),
    "tied": lambda: tiny_llama(2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(2),
}
SMALL = {"rank": 2, "alpha": 2.0, "lookahead": 3, "update_every": 1, "memory_tokens": 0}


def evolved(model: PreTrainedModel, seed: int, **settings: object) -> OnlineDraft:
    """A draft whose adapter has moved away from its start."""
    draft = OnlineDraft(model, OnlineSpecConfig(**(SMALL | settings)))
    generator = torch.Generator().manual_seed(seed)
    move(draft, lambda part: part + 0.3 * torch.randn(part.shape, generator=generator))
    return draft


def changes(draft: OnlineDraft) -> dict[str, torch.Tensor]:
    """What a draft adds to the weights of each layer, dense (d_out, d_in)."""
    found, parts = {}, draft.artifact().adapter
    for name, a in parts.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            b = parts[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
            found[layer] = draft.settings.alpha / draft.settings.rank * b @ a
    return found


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_combined_change_is_the_weighted_sum(make) -> None:
    """Different ranks and scales: the sum of what each adds, on every layer; and never the base model's own weights."""
    base = make()
    before = base(TOKENS).logits
    one, other = evolved(make(), 3), evolved(make(), 4, rank=3, alpha=12.0)
    whole = combine([one.artifact(), other.artifact()], base, [0.25, 1.5])
    assert whole.settings.rank == 5 and whole.model.peft_config["default"].r == 5
    found, parts = changes(whole), (changes(one), changes(other))
    assert found.keys() == parts[0].keys() and "lm_head" in found
    for name, change in found.items():
        torch.testing.assert_close(change, 0.25 * parts[0][name] + 1.5 * parts[1][name], atol=1e-5, rtol=1e-5)
    assert torch.equal(base(TOKENS).logits, before)
    assert not torch.allclose(whole(TOKENS).logits, before, atol=1e-2)  # it serves at once


def test_one_draft_at_weight_one_is_itself() -> None:
    one = evolved(tiny_llama(2), 3, alpha=6.0)
    again = combine([one.artifact()], tiny_llama(2), [1.0])
    torch.testing.assert_close(again(TOKENS).logits, one(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert (again.settings.rank, again.settings.alpha) == (2, 6.0)


def test_the_mean_is_the_default() -> None:
    one, other = evolved(tiny_llama(2), 3), evolved(tiny_llama(2), 4)
    whole = combine([one.artifact(), other.artifact()], tiny_llama(2))
    for name, change in changes(whole).items():
        mean = (changes(one)[name] + changes(other)[name]) / 2
        torch.testing.assert_close(change, mean, atol=1e-5, rtol=1e-5)


def test_layers_that_only_one_adapts() -> None:
    """The other adds nothing there; and the rank that it does not use can still learn."""
    one = evolved(tiny_llama(2), 3, target_modules=("lm_head", "up_proj"))
    other = evolved(tiny_llama(2), 4, target_modules=("lm_head", "embed_tokens"))
    whole = combine([one.artifact(), other.artifact()], tiny_llama(2), [1.0, 1.0])
    found = changes(whole)
    assert sorted(found) == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj"], changes(one)["model.layers.0.mlp.up_proj"])
    torch.testing.assert_close(found["lm_head"], changes(one)["lm_head"] + changes(other)["lm_head"])
    a = whole.learning.adapter_params()["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert bool((a.norm(dim=-1) > 0).all())  # no row of A is dead: B's gradient reaches through it


def test_an_ensemble_gives_the_mixture_that_serves() -> None:
    """Folded as in its file, as one expert that its expert_learner goes on with."""
    many = evolved(tiny_llama(2), 3, learner="ensemble", experts=2, expert_learner="heavy_ball")
    learned, served = many.learning.adapter_params(), many.artifact().adapter
    assert not all(torch.equal(served[name], part) for name, part in learned.items()), "their weights are in the file"
    whole = combine([many.artifact()], tiny_llama(2), [1.0])
    assert (whole.settings.learner, whole.settings.rank) == ("heavy_ball", 4)
    torch.testing.assert_close(whole(TOKENS).logits, many(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_it_learns_on_and_is_saved_with_its_parents(tmp_path) -> None:
    one, other = evolved(tiny_llama(2), 3), evolved(tiny_llama(2), 4)
    for name, draft, target in (("weekday", one, "big"), ("weekend", other, "bigger")):
        draft.targets = Targets([target])
        draft.save_pretrained(tmp_path / name)
    whole = combine([read_evolved(tmp_path / "weekday"), read_evolved(tmp_path / "weekend")], tiny_llama(2), [0.5, 2])
    assert whole.targets.names == ["big", "bigger"]
    assert whole.lineage.to_dict()["merged"] == [
        {"parent": {"source": "weekday", "revision": None}, "weight": 0.5},
        {"parent": {"source": "weekend", "revision": None}, "weight": 2.0},
    ]
    assert whole.lineage.draft not in (one.lineage.draft, other.lineage.draft)
    whole.save_pretrained(tmp_path / "both")
    assert Artifact.read(tmp_path / "both").lineage == whole.lineage
    again = OnlineDraft.from_pretrained(tmp_path / "both", tiny_llama(2))
    assert torch.equal(flat_params(again), flat_params(whole))
    tiny_llama(1, layers=2).generate(TOKENS[:1], assistant_model=again, do_sample=False, max_new_tokens=12)
    assert again.metrics.updates > 0 and not torch.equal(flat_params(again), flat_params(whole))


def test_the_nearest_of_lower_rank() -> None:
    """From thin factors as from the dense change: the same singular values, the same error."""
    generator = torch.Generator().manual_seed(5)
    factors = Factors(torch.randn(6, 40, generator=generator), torch.randn(30, 6, generator=generator))
    dense = (factors.b @ factors.a).double()
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    near, lost, whole = nearest(factors, 4)
    assert near.a.shape == (4, 40) and near.b.shape == (30, 4)
    best = u[:, :4] * values[:4] @ vt[:4]
    torch.testing.assert_close((near.b @ near.a).double(), best, atol=1e-4, rtol=1e-4)
    assert lost == pytest.approx(float((dense - best).norm()), rel=1e-5)
    assert whole == pytest.approx(float(dense.norm()), rel=1e-5)
    torch.testing.assert_close(near.a.norm(dim=-1), near.b.norm(dim=0))  # neither factor is small beside the other


def test_the_nearest_of_a_wide_factor_and_of_nothing() -> None:
    """More rank than the layer has dimensions, and a layer that nobody changed."""
    factors = Factors(torch.randn(9, 4), torch.randn(5, 9))
    near, lost, _ = nearest(factors, 20)
    torch.testing.assert_close(near.b @ near.a, factors.b @ factors.a, atol=1e-4, rtol=1e-4)
    assert len(near.a) == 4 and lost == 0.0
    near, lost, whole = nearest(Factors(torch.randn(3, 4), torch.zeros(5, 3)), 2)
    assert near.a.shape == (0, 4) and (lost, whole) == (0.0, 0.0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_distilled_to_the_rank_that_is_there_says_the_same(make) -> None:
    one = evolved(make(), 3, rank=6, alpha=3.0)
    for rank in (6, 8):
        same, report = distil(one.artifact(), rank, make())
        assert (same.settings.rank, same.settings.alpha) == (rank, rank / 2)
        assert report.rank == rank and report.error < 1e-6
        torch.testing.assert_close(same(TOKENS).logits, one(TOKENS).logits, atol=1e-3, rtol=1e-3)
    a, b = (same.learning.adapter_params()[f"base_model.model.lm_head.lora_{x}.weight"] for x in "AB")
    assert bool((a.norm(dim=-1) > 0).all()) and bool((b[:, 6:] == 0).all())  # what is not used can learn


def test_the_report_says_what_was_left_out() -> None:
    """Relative to the whole, by layer and together; less of it at a higher rank."""
    one, other = evolved(tiny_llama(2), 3), evolved(tiny_llama(2), 4)
    whole = combine([one.artifact(), other.artifact()], tiny_llama(2))
    errors = []
    for rank in (1, 2, 3):
        near, report = distil(whole.artifact(), rank, tiny_llama(2))
        all_of_it, rest = changes(whole), changes(near)
        by_layer = {n: float((c - rest[n]).norm() / c.norm()) for n, c in all_of_it.items()}
        assert report.errors == pytest.approx(by_layer, abs=1e-4)
        lost = sum(float((c - rest[n]).square().sum()) for n, c in all_of_it.items())
        total = sum(float(c.square().sum()) for c in all_of_it.values())
        assert report.error == pytest.approx((lost / total) ** 0.5, abs=1e-4)
        assert near.lineage.distilled == Distilled(rank, report.error)
        assert near.lineage.merged == whole.lineage.merged
        errors.append(report.error)
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_adapters_of_different_bases_are_refused() -> None:
    one, other = evolved(tiny_llama(2), 3), evolved(tiny_llama(5), 4)
    with pytest.raises(ArtifactError, match=r"different bases") as error:
        combine([one.artifact(), other.artifact()], tiny_llama(2))
    assert one.identity.weights in str(error.value) and other.identity.weights in str(error.value)
    with pytest.raises(ArtifactError, match="another base"):
        combine([one.artifact()], tiny_llama(5))
    with pytest.raises(ArtifactError, match="another base"):
        distil(one.artifact(), 1, tiny_llama(5))


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, float("inf")], [], [1.0, "2"]])
def test_weights_that_cannot_work_are_refused(weights) -> None:
    artifacts = [evolved(tiny_llama(2), seed).artifact() for seed in (3, 4)]
    with pytest.raises(ConfigError, match="expected 2 finite numbers"):
        combine(artifacts, tiny_llama(2), weights)


def test_other_bad_input_is_refused(tmp_path) -> None:
    artifact = evolved(tiny_llama(2), 3).artifact()
    with pytest.raises(ConfigError, match="at least one"):
        combine([], tiny_llama(2))
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="rank="):
            distil(artifact, rank, tiny_llama(2))
    with pytest.raises(ConfigError, match="ensemble"):
        combine([artifact], tiny_llama(2), config=OnlineSpecConfig(learner="ensemble"))
    broken = replace(artifact, adapter={k: v.clone().fill_(float("nan")) for k, v in artifact.adapter.items()})
    with pytest.raises(ArtifactError, match="not finite"):
        distil(broken, 1, tiny_llama(2))
    tiny_llama(2).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="no evolved draft"):
        read_evolved(tmp_path)


def test_settings_to_go_on_with() -> None:
    artifact = evolved(tiny_llama(2), 3).artifact()
    whole = combine([artifact, artifact], tiny_llama(2), config=OnlineSpecConfig(learner="ogd", lr=0.5, lookahead=7))
    assert (whole.settings.learner, whole.settings.lr, whole.settings.lookahead) == ("ogd", 0.5, 7)
    assert (whole.settings.rank, whole.settings.alpha) == (4, 4.0)


def parts(lineage: Lineage) -> int:
    """How many lineages of what was merged are told."""
    return sum(1 + parts(part) for part in lineage.merged)


def test_merges_of_merges_are_saved_however_many(tmp_path) -> None:
    """The most distant lineages are left out, and the card says how many."""
    one = evolved(tiny_llama(2), 3).artifact()
    lineage = Lineage(warm_start=WarmStart(None, texts=7, prompts=0, tokens=9))
    for _ in range(48):  # a chain
        lineage = Lineage(merged=(MergedLineage(**vars(lineage), weight=0.5), MergedLineage(weight=0.5)))
    for _ in range(9):  # each with itself
        whole = combine([replace(one, lineage=lineage)] * 2, tiny_llama(2))
        lineage = whole.lineage
    whole.save_pretrained(tmp_path)
    again = OnlineDraft.from_pretrained(tmp_path, tiny_llama(2))
    assert again.lineage.merged == whole.lineage.merged and parts(again.lineage) <= 200
    assert [part.weight for part in again.lineage.merged] == [0.5, 0.5]
    assert "drafts, directly or not, which are left out here" in (tmp_path / "README.md").read_text()


def test_what_a_long_lineage_leaves_out_is_counted() -> None:
    lineage = Lineage()
    for _ in range(120):
        lineage = Lineage(merged=merged_lineages([lineage, Lineage()], [0.5, 0.5]))
    told, counted, part = parts(lineage), 0, lineage
    while part.merged:
        part = part.merged[0]
        counted += part.merged_left_out or 0
    assert told < 120 and told + counted == 240
    assert merged_lineages([Lineage()], [1.0]) == (MergedLineage(weight=1.0),)


def test_the_lineage_that_was_merged_is_left_as_it_is() -> None:
    """Shortening works on copies, however deep."""
    lineage = Lineage()
    for _ in range(30):
        lineage = Lineage(merged=(MergedLineage(**vars(lineage), weight=1.0),))
    before = lineage.to_dict()
    assert parts(Lineage(merged=merged_lineages([lineage], [1.0]))) < 30 == parts(lineage)
    assert lineage.to_dict() == before
