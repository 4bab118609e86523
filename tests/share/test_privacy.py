"""The privacy audit: exposure against its closed form and after planting, copies that touch nothing, what a push is refused for."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_onlinespec import ConfigError, DraftError, Feedback, OnlineDraft, OnlineSpecConfig, PrivacyError
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.embedded import load_draft
from hf_onlinespec.share import privacy as audit
from hf_onlinespec.share.audit_report import MOST_AUC, MOST_BITS, AuditReport, LossGap, Probed
from hf_onlinespec.share.canaries import Canary, Exposure, as_feedback, learn, make_canaries, plant, probe
from hf_onlinespec.share.card import write
from hf_onlinespec.share.privacy import check_privacy, loss_gap
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import flat_params, move

VOCABULARY = 32
FIXED = OnlineSpecConfig(lookahead=4, update_every=1, memory_tokens=0, rank=4, alpha=4.0)


def texts(n: int, seed: int, length: int = 12) -> list[Feedback]:
    generator = torch.Generator().manual_seed(seed)
    return [as_feedback(torch.randint(VOCABULARY, (length,), generator=generator), 8) for _ in range(n)]


def learned(**settings: Any) -> OnlineDraft:
    """A tiny draft that has learned a little."""
    draft = OnlineDraft(tiny_llama(2), replace(FIXED, **settings))
    learn(draft, texts(4, seed=0))
    return draft


def everything(draft: OnlineDraft) -> dict[str, Any]:
    """All that learning has left in a draft, and what it says."""
    state = draft.artifact().state
    logits = draft.trainable.logits(torch.arange(10)[None], 10)
    tensors = state.tensors | draft.learning.adapter_params() | {"gradient": draft.trainable.adapter.grads.clone()}
    replay = [r.tokens for r in draft.learning.replayed()]
    return {"tensors": tensors | {"logits": logits, "replay": torch.cat(replay)}, "values": state.values}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["values"] == b["values"] and a["tensors"].keys() == b["tensors"].keys()
    for name, tensor in a["tensors"].items():
        assert torch.equal(tensor, b["tensors"][name]), name


# Exposure


def all_of_a_form(prefix: Tensor, letters: Tensor, length: int) -> list[Canary]:
    return [Canary(prefix, torch.tensor(s), letters) for s in itertools.product(letters.tolist(), repeat=length)]


def test_exposure_of_every_string_is_that_of_all_ranks() -> None:
    """Ranked among all N strings of a form, each rank from 1 to N is held by one of them."""
    every = all_of_a_form(torch.tensor([3, 1, 4]), torch.tensor([5, 9, 2, 6]), 3)
    bits = sorted((e.bits for e in probe(learned(), every)), reverse=True)
    assert bits == pytest.approx([math.log2(64 / k) for k in range(1, 65)])


def test_exposure_by_hand() -> None:
    """The rank by change of log-likelihood, each string read by itself."""
    draft = learned()
    every = all_of_a_form(torch.tensor([3, 1, 4]), torch.tensor([5, 9]), 2)
    score = []
    for canary in every:
        row, change = canary.tokens[None], 0.0
        for sign, base in ((1, False), (-1, True)):
            with draft.trainable.serving(base) as model:
                law = model(row).logits.log_softmax(-1)[0]
            change += sign * sum(float(law[at - 1, row[0, at]]) for at in (3, 4))
        score.append(change)
    ranks = [1 + sum(other > own for other in score) for own in score]
    assert [e.bits for e in probe(draft, every)] == pytest.approx([math.log2(4 / rank) for rank in ranks])


def test_a_sample_estimates_the_exposure_among_all() -> None:
    draft = learned()
    canaries = make_canaries(VOCABULARY, 12, seed=1, length=3, alphabet=10)  # 1,000 strings
    exact, sampled = (probe(draft, canaries, references=n) for n in (999, 300))
    for a, b in zip(exact, sampled, strict=True):
        chance = 2**-a.bits
        assert abs(2**-b.bits - chance) < 4 * (chance * (1 - chance) / 300) ** 0.5 + 1 / 300
    assert [e.bits for e in exact] != [e.bits for e in sampled]


def test_what_was_never_learned_is_exposed_by_chance_alone() -> None:
    """A draft that learned nothing gives every string the same score; one that learned other text, ranks by chance."""
    canaries = make_canaries(VOCABULARY, 40, seed=1)
    fresh = probe(OnlineDraft(tiny_llama(2), FIXED), canaries)
    assert {e.bits for e in fresh} == {math.log2(256 / 128.5)}
    mean = statistics.mean(e.bits for e in probe(learned(), canaries))
    assert mean == pytest.approx(1 / math.log(2), abs=4 / math.log(2) / 40**0.5)


def test_planting_exposes_and_more_of_it_exposes_more() -> None:
    draft = OnlineDraft(tiny_llama(2, vocab=200), replace(FIXED, lr=1e-3))
    planted, other = make_canaries(200, 8, seed=1), make_canaries(200, 8, seed=2)
    bits = []
    for more in (1, 3, 12):  # planted once, 4 times, 16 times
        plant(draft, planted, more)
        bits.append(statistics.mean(e.bits for e in probe(draft, planted)))
    never = statistics.mean(e.bits for e in probe(draft, other))
    assert never < 1.44 + 3 * 1.44 / 8**0.5 < bits[0] < bits[1] < bits[2]


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "cross_entropy", "tv"])
def test_every_loss_can_be_planted(loss: str) -> None:
    draft = OnlineDraft(tiny_llama(2), replace(FIXED, loss=loss))
    canaries = make_canaries(VOCABULARY, 2)
    before = flat_params(draft)
    plant(draft, canaries, repeats=8)
    assert draft.steps == 8 * 2 * (1 + FIXED.replay_passes)
    assert not torch.equal(flat_params(draft), before)
    assert math.isfinite(probe(draft, canaries)[0].bits)


def test_what_greedy_decoding_writes_is_extracted() -> None:
    draft = OnlineDraft(tiny_llama(2), replace(FIXED, lr=1e-2))
    canaries = make_canaries(VOCABULARY, 2, seed=3)
    assert not any(e.extracted for e in probe(draft, canaries))
    plant(draft, canaries, repeats=30)
    for canary, exposure in zip(canaries, probe(draft, canaries), strict=True):
        tokens = canary.prefix
        for _ in canary.secret:
            tokens = torch.cat([tokens, draft(tokens[None]).logits[0, -1:].argmax(-1)])
        assert exposure.extracted and torch.equal(tokens, canary.tokens)
    wrong = replace(canaries[0], secret=canaries[0].secret.roll(1))
    assert not torch.equal(wrong.secret, canaries[0].secret) and not probe(draft, [wrong])[0].extracted


def test_canaries_are_the_same_for_the_same_seed() -> None:
    first, again, other = (torch.stack([c.tokens for c in make_canaries(500, 3, seed)]) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    canary = make_canaries(500, 1)[0]
    assert len(set(canary.alphabet.tolist())) == 10 and set(canary.secret.tolist()) <= set(canary.alphabet.tolist())


# Own text and text that was never seen


def test_memorised_text_is_told_from_unseen_text() -> None:
    draft = OnlineDraft(tiny_llama(2), replace(FIXED, lr=1e-2))
    own, apart = texts(6, seed=1), texts(6, seed=2)
    for _ in range(10):
        learn(draft, own)
    gap = loss_gap(draft, own, apart)
    assert gap.gap > 5 * gap.error > 0 and gap.auc == 1.0
    assert gap.own[1] < gap.own[0]
    gained = (gap.own[0] - gap.own[1]) - (gap.held_out[0] - gap.held_out[1])
    assert gap.gap == pytest.approx(gained)
    with draft.trainable.serving(base=True) as model:  # one loss by hand, at the written tokens alone
        law = model(own[0].tokens[None]).logits.log_softmax(-1)[0]
    by_hand = -statistics.mean(float(law[at - 1, own[0].tokens[at]]) for at in range(4, 12))
    assert loss_gap(draft, [own[0]] * 2, apart).own[0] == pytest.approx(by_hand, rel=1e-5)


def test_two_halves_of_unseen_text_are_alike() -> None:
    draft = learned()
    gap = loss_gap(draft, texts(40, seed=3), texts(40, seed=4))
    assert gap.error > 0 and abs(gap.gap) < 3 * gap.error
    assert abs(gap.auc - 0.5) < 3 * gap.auc_error and gap.auc != 0.5
    assert gap.texts == (40, 40)


def test_a_draft_that_learned_nothing_tells_nothing() -> None:
    gap = loss_gap(OnlineDraft(tiny_llama(2), FIXED), texts(3, seed=1), texts(4, seed=2))
    assert gap.gap == 0.0 and gap.auc == 0.5 and gap.own[0] == gap.own[1]


# The copy


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(2),
    "tied": lambda: tiny_llama(2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(2),
}


@pytest.mark.parametrize("learner", ["optimistic", "ensemble"])
@pytest.mark.parametrize("model", MODELS)
def test_a_twin_says_the_same_and_learns_by_itself(model: str, learner: str) -> None:
    draft = OnlineDraft(MODELS[model](), replace(FIXED, learner=learner, replay_passes=0))
    learn(draft, texts(4, seed=0))
    before, copied = everything(draft), draft.clone_for_audit()
    x = torch.arange(20)[None]
    for base in (False, True):
        with draft.trainable.serving(base) as one, copied.trainable.serving(base) as other:
            assert torch.equal(one(x).logits, other(x).logits)
    learn(copied, texts(3, seed=5))
    assert not torch.equal(flat_params(copied), flat_params(draft))
    assert_same(before, everything(draft))
    learn(draft, texts(3, seed=5))
    assert torch.equal(flat_params(copied), flat_params(draft))  # moments and all were copied


@pytest.mark.parametrize("wrong", [False, True], ids=["to the end", "into an error"])
@pytest.mark.parametrize("update_when", ["request", "idle"])
def test_an_audit_leaves_the_draft_as_it_was(wrong: bool, update_when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = learned(update_when=update_when, update_every="auto")
    before = everything(draft)
    if wrong:

        def fail(*args: Any) -> None:
            raise RuntimeError("in the middle")

        monkeypatch.setattr("hf_onlinespec.share.privacy.learn", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            audit.audit(draft, 2, held_out=texts(3, seed=9))
    else:
        report = audit.audit(draft, 2, (1, 3), held_out=texts(3, seed=9))
        assert [(p.repeats, p.afterwards) for p in report.probed] == [(0, 0), (1, 0), (3, 0), (1, 4)]
    assert_same(before, everything(draft))


def test_an_audit_under_inference_mode() -> None:
    draft, live = learned(), learned()
    with torch.inference_mode():
        report = audit.audit(draft, 2, (1,))
        plant(live, make_canaries(VOCABULARY, 1))
    assert live.steps == draft.steps + 3
    assert report == audit.audit(draft, 2, (1,))


# The report


def test_the_same_seed_gives_the_same_report() -> None:
    reports = [audit.audit(learned(update_every="auto"), 3, (1, 2), held_out=texts(3, 9), seed=s) for s in (1, 1, 2)]
    assert reports[0] == reports[1] and reports[0].text() == reports[1].text()
    assert reports[0].probed != reports[2].probed


def test_it_counts_the_tokens_that_can_be_read_off() -> None:
    draft = OnlineDraft(tiny_llama(2), FIXED)
    assert audit.audit(draft, 1, (1,)).seen == 0
    own = texts(2, seed=0)
    learn(draft, own)
    read = {int(token) for text in own for token in text.tokens[:-1]}
    assert audit.audit(draft, 1, (1,)).seen == len(read) < VOCABULARY
    blind = OnlineDraft(tiny_llama(2), replace(FIXED, target_modules=("q_proj",)))
    assert audit.audit(blind, 1, (1,)).seen is None


def report(
    gap: LossGap | None = None, bits: float | None = None, afterwards: bool = False, **record: Any
) -> AuditReport:
    """Of a draft whose present settings give everything away; with `bits`, so much is exposed as it learned."""
    from hf_onlinespec.share.privacy_record import PrivacyRecord

    rows = [(0, 0, 1.4), (1, 0, 8.0), (16, 0, 8.0), *([(1, 40, 8.0)] if afterwards else [])]
    probed = [Probed(repeats, after, [Exposure(bits, bits > 7)] * 2) for repeats, after, bits in rows]
    decisive = [] if bits is None else [Probed(5, 0, [Exposure(bits, bits > 7)] * 2)]
    return AuditReport(probed, 8.0, gap, 12, 100, PrivacyRecord(**record), as_it_learned=decisive)


def test_refusals_on_both_sides_of_the_thresholds() -> None:
    gap = LossGap((2.0, 1.0), (2.0, 1.5), (50, 50), 0.5, 0.1, MOST_AUC, 0.05)
    for calm in (report(gap, MOST_BITS), report(), report(replace(gap, auc=0.9, auc_error=0.3))):
        assert calm.refusals() == [] and "is not refused" in calm.text()
    (one,) = report(bits=MOST_BITS + 0.1, repeats=20, texts=3).refusals()
    assert "stood 20 times" in one and "among 3 texts" in one and "writes 5 times" in one
    assert "3.1 of at most 8.0 bits" in one and "0 of 2 are written out" in one
    (told,) = report(gap=replace(gap, auc=MOST_AUC + 0.02)).refusals()
    assert "0.62" in told
    both = report(replace(gap, auc=0.9), 8.0, repeats=20, texts=3, memorised=2)
    assert len(both.refusals()) == 3 and all(reason in both.text() for reason in both.refusals())


def test_rows_say_whether_they_decide() -> None:
    """Under rows of the present settings nothing claims that all is well."""
    rows = report(bits=8.0, repeats=20).text()
    assert "| 5 times, as it learned | 0 | 8.00 | 8.00 | 2 of 2 |" in rows and "A public push is refused" in rows
    passed = report().text()
    assert "| 16 times | 0 | 8.00 | 8.00 | 2 of 2 |" in passed and "as it learned" not in passed
    assert "speaks against" not in passed and "would give away secrets as in the rows above" in passed
    (reason,) = report(texts=5, memorised=2).refusals()
    assert "memorised 2 of the 5" in reason and reason in report(texts=5, memorised=2).text()


def test_the_report_says_what_was_not_done() -> None:
    bare, full = report().text(), report(LossGap((2, 1), (2, 1.5), (3, 4), 0.5, 0.1, 0.6, 0.2), afterwards=True).text()
    assert "not compared" in bare and "not measured" in bare and "12 of 100" in bare
    assert "not compared" not in full and "not measured" not in full and "| held out | 4 | 2.000 | 1.500 |" in full
    assert "| 16 times | 0 | 8.00 | 8.00 | 2 of 2 |" in full


def test_a_public_push_is_refused_for_what_was_memorised() -> None:
    """The embedded draft with the default settings writes out what the target wrote once; a draft that never learned may go."""
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(update_every=1, memory_tokens=0))
    check_privacy(draft)
    plant(draft, make_canaries(2048, 2))
    with pytest.raises(PrivacyError, match="of the 2 texts that it learned from") as error:
        check_privacy(draft)
    assert "skip_audit=True" in str(error.value) and "replay_passes" not in str(error.value)


# A draft that has learned with other experts than it has now


def test_a_public_ensemble_that_canaries_cannot_judge_is_refused_in_words(tmp_path: Path) -> None:
    """What is public is the one adapter that the ensemble serves: its experts are gone."""
    from hf_onlinespec.share.memorization import examine
    from hf_onlinespec.share.public import public_version

    base = tiny_llama(2)
    draft = OnlineDraft(base, replace(FIXED, learner="ensemble", lr=1e-6, replay_passes=0))
    learn(draft, texts(1, seed=0) * 5)
    examine(draft)
    whole = audit.audit(draft, 1, (1,))
    assert [p.repeats for p in whole.as_it_learned] == [5] and "cannot be judged" not in whole.text()
    write(public_version(draft.artifact()), tmp_path / "public", draw=False)
    public = OnlineDraft.from_pretrained(tmp_path / "public", base_model=base)
    report = audit.audit(public, 1, (1,))
    assert "cannot be judged: it learned with other experts" in report.text() and report.as_it_learned == []
    with pytest.raises(PrivacyError, match="cannot be judged: it learned with other experts"):
        check_privacy(public)


def test_what_an_ensemble_goes_on_with_is_judged_as_it_was_learned() -> None:
    """By one learner, into one adapter of the rank of all experts."""
    one = OnlineDraft(tiny_llama(2), replace(FIXED, rank=12, alpha=12.0, lr=1e-6, replay_passes=0))
    learn(one, texts(1, seed=0) * 5)
    many = OnlineDraft(tiny_llama(2), replace(FIXED, learner="ensemble", replay_passes=0))
    learn(many, texts(1, seed=1))
    many.lineage.privacy = replace(one.artifact().lineage.privacy, unexamined=0)
    assert [p.repeats for p in audit.audit(many, 1, (1,)).as_it_learned] == [6, 6]


# What is refused


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_numbers_that_are_none(n: Any) -> None:
    draft = learned()
    for call in (
        lambda: audit.audit(draft, n),
        lambda: audit.audit(draft, 2, (n,)),
        lambda: make_canaries(VOCABULARY, 1, length=n),
        lambda: make_canaries(VOCABULARY, 1, prefix=n),
        lambda: make_canaries(VOCABULARY, 1, alphabet=n),
        lambda: probe(draft, make_canaries(VOCABULARY, 1), references=n),
    ):
        with pytest.raises(ConfigError, match="expected"):
            call()


def test_what_cannot_be_audited() -> None:
    draft = learned()
    with pytest.raises(ConfigError, match="vocabulary's 32 tokens"):
        make_canaries(VOCABULARY, 1, alphabet=33)
    with pytest.raises(ConfigError, match="repeats"):
        audit.audit(draft, 1, ())
    with pytest.raises(ConfigError, match="0 canaries"):
        probe(draft, [])
    with pytest.raises(ConfigError, match="1 own and 3 held-out"):
        loss_gap(draft, texts(1, 0), texts(3, 1))
    with pytest.raises(ConfigError, match="two of each"):
        audit.audit(draft, 1, held_out=[])
    too_long = make_canaries(VOCABULARY, 1, length=250)
    for call in (plant, probe):
        with pytest.raises(ConfigError, match="258 tokens"):
            call(draft, too_long)
    with pytest.raises(ConfigError, match="vocabulary of 32"):
        plant(draft, make_canaries(5000, 1))
    for tokens, n in ((torch.arange(3), 3), (torch.arange(3), 0), (torch.arange(1), None), (torch.ones(2, 2), 1)):
        with pytest.raises(ConfigError, match="written"):
            as_feedback(tokens, n)
    nothing = Feedback(torch.arange(4), Teacher(torch.zeros(0, VOCABULARY)))
    with pytest.raises(ConfigError, match="0 of them written"):
        audit.audit(draft, 1, own=[nothing])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_named(value: float) -> None:
    draft = learned()
    move(draft, lambda part: torch.full_like(part, value))
    with pytest.raises(DraftError, match="evolved draft's log-likelihoods are not finite"):
        probe(draft, make_canaries(VOCABULARY, 1))
    with pytest.raises(DraftError, match="not finite"):
        loss_gap(draft, texts(2, 0), texts(2, 1))
