"""Adapters with names: each row its own, none moved by another, on the disk and back to the bit."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import hf_onlinespec
from hf_onlinespec import ConfigError, OnlineDraft, OnlineSpecConfig, UnsupportedError
from tests.chi_square import THOUSAND, follows
from tests.drafts import flat_params, move
from tests.heads.tiny import KINDS, tiny_head
from tests.tiny_models import tiny_llama
from tests.verify.test_batches import padded, prompts

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
FIXED = OnlineSpecConfig(lookahead=4, update_every=1, rank=2, alpha=2.0, memory_tokens=0)
NAMES = ("sql", "orders", "notes")


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


def new_draft(config: OnlineSpecConfig = FIXED, **settings: Any) -> OnlineDraft:
    return OnlineDraft(tiny_llama(2), replace(config, **settings))


def params(draft: OnlineDraft, name: str) -> Tensor:
    """A copy of a named adapter's parameters."""
    with draft.adapters.using(name) as own:
        return flat_params(own)


def inputs_of(seed: int, lengths: tuple[int, ...] = (6, 6)) -> dict[str, Tensor]:
    return padded(prompts(lengths, seed))


def test_greedy_rows_of_several_adapters_say_what_a_plain_batch_says(target) -> None:
    draft, inputs = OnlineDraft(tiny_llama(1, layers=2), FIXED), inputs_of(0, (3, 8, 5, 12))
    plain = target.generate(**inputs, **GREEDY)
    for _ in range(2):
        out = target.generate(**inputs, assistant_model=draft, adapter=["sql", None, "orders", "sql"], **GREEDY)
        assert torch.equal(plain, out)
    served = {name: draft.adapters[name].metrics for name in ("sql", "orders")}
    assert draft.metrics.last.acceptance_length > 2, "each row drafts"
    assert [served["sql"].new_tokens, served["orders"].new_tokens, draft.metrics.new_tokens] == [36, 18, 72]
    assert served["sql"].requests == 2 and served["sql"].accepted_tokens > 0 and served["orders"].tokens_per_s > 0
    assert draft.adapters["sql"].acceptance_length == served["sql"].acceptance_length > 2
    steps = {name: one.steps for name, one in draft.adapters.items()}
    assert all(steps.values()) and sum(steps.values()) + draft.steps == draft.metrics.updates
    assert "adapter orders: the last request was learned from" in draft.metrics.decisions.learning


@pytest.mark.parametrize("settings", [{}, {"learner": "ensemble", "experts": 2}], ids=["one", "ensemble"])
def test_learning_of_one_adapter_never_moves_another(target, settings) -> None:
    """To the bit, one request after the other: whatever the other adapter and the one without a name have learned meanwhile."""
    alone, among = new_draft(**settings), new_draft(**settings)
    for seed in range(3):
        inputs = inputs_of(seed, (6,))
        target.generate(**inputs, assistant_model=alone, adapter="sql", **GREEDY)
        target.generate(**inputs, assistant_model=among, adapter="sql", **GREEDY)
        for other in ("orders", None):
            before = params(among, "sql")
            target.generate(**inputs_of(seed + 9, (7,)), assistant_model=among, adapter=other, **GREEDY)
            assert torch.equal(before, params(among, "sql"))
    assert among.steps and among.adapters["orders"].steps
    assert torch.equal(params(alone, "sql"), params(among, "sql"))
    assert not torch.equal(params(among, "orders"), params(among, "sql"))


def test_in_a_batch_a_row_teaches_its_own_adapter_alone(target) -> None:
    """To the bit whatever the other row's adapter is, where every round has one token per row; and as alone, up to rounding."""
    found = []
    for other in ("orders", None, "sql-too"):
        draft = new_draft(lookahead=0)
        for seed in range(2):
            target.generate(**inputs_of(seed), assistant_model=draft, adapter=[other, "sql"], **GREEDY)
        found.append(params(draft, "sql"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = new_draft(lookahead=0)
    with alone.adapters.using("sql") as own:
        begun = flat_params(own)
    for seed in range(2):
        one = {name: rows[1:] for name, rows in inputs_of(seed).items()}
        target.generate(**one, assistant_model=alone, adapter="sql", **GREEDY)
    assert (params(alone, "sql") - found[0]).norm() < 0.02 * (found[0] - begun).norm()


@pytest.mark.parametrize(
    "settings",
    [{}, {"learner": "ensemble", "experts": 2}, {"learner": "ogd", "radius": 0.05}, {"hint_memory": 0.5}],
    ids=["optimistic", "ensemble", "radius", "hint"],
)
def test_an_adapter_that_was_on_the_disk_goes_on_as_if_it_had_never_left(target, settings) -> None:
    drafts = [new_draft(resident_adapters=n, **settings) for n in (8, 1)]
    for seed, name in enumerate(("sql", "orders", "sql", "notes", "orders", "sql")):
        for draft in drafts:
            target.generate(**inputs_of(seed, (6,)), assistant_model=draft, adapter=name, **GREEDY)
    kept, away = (draft.adapters for draft in drafts)
    assert [away[name].resident for name in NAMES] == [True, False, False]
    assert all(kept[name].resident and kept[name].steps == away[name].steps for name in NAMES)
    assert [kept[name].metrics.requests for name in NAMES] == [away[name].metrics.requests for name in NAMES]
    for name in NAMES:
        assert torch.equal(params(drafts[0], name), params(drafts[1], name)), name
        assert away[name].resident
        with kept.using(name) as one, away.using(name) as other:
            assert len(one.learning.replayed()) == len(other.learning.replayed()) > 0
    assert kept["orders"].nbytes > 2 * away["orders"].nbytes, "what is away takes little"


def test_no_adapter_leaves_while_a_call_uses_it(target) -> None:
    draft, inputs = new_draft(resident_adapters=1), inputs_of(0, (4, 5, 6))
    plain = target.generate(**inputs, **GREEDY)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter=list(NAMES), **GREEDY))
    assert all(draft.adapters[name].steps and draft.adapters[name].resident for name in NAMES)
    with draft.adapters.using("sql"):
        with draft.adapters.using("orders"):
            pass
        assert [draft.adapters[name].resident for name in NAMES] == [True, True, False]
        with draft.adapters.using("notes"):
            assert [draft.adapters[name].resident for name in NAMES] == [True, False, True]


def test_an_adapter_that_cannot_be_read_again_begins_anew(target, caplog) -> None:
    draft = new_draft(resident_adapters=1)
    for name in ("sql", "orders"):
        target.generate(**inputs_of(0, (6,)), assistant_model=draft, adapter=name, **GREEDY)
    file = draft.adapters.file("sql")
    assert file is not None and draft.adapters.file("orders") is None
    file.write_bytes(b"nothing")
    plain = target.generate(**inputs_of(0, (6,)), **GREEDY)
    out = target.generate(**inputs_of(0, (6,)), assistant_model=draft, adapter="sql", **GREEDY)
    assert torch.equal(plain, out) and "'sql' cannot be read again" in caplog.text
    assert draft.adapters["sql"].resident and 0 < draft.adapters["sql"].steps < 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_has_adapters_with_names(target, kind) -> None:
    draft, inputs = OnlineDraft(tiny_head(kind, target), replace(FIXED, resident_adapters=1)), inputs_of(3, (4, 9))
    plain = target.generate(**inputs, **GREEDY)
    for names in (["sql", "orders"], ["sql", "notes"], ["orders", None]):
        assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter=names, **GREEDY))
    assert draft.metrics.failed_drafts == draft.metrics.failed_updates == 0
    assert draft.steps and all(draft.adapters[name].steps for name in NAMES)


def test_rows_of_two_adapters_that_learn_follow_the_target_s_law() -> None:
    vocab, new = 6, 2
    flat = {"vocab": vocab, "initializer_range": 0.2}
    target, model = tiny_llama(1, layers=2, **flat), tiny_llama(2, **flat)
    draft = OnlineDraft(model, replace(FIXED, lookahead=3, lr=3e-3, replay_passes=0, recycle=False))
    rows = [[1, 4], [2, 3, 5, 1]]
    many = {name: value.repeat(4, 1) for name, value in padded(rows).items()}
    place, counts = torch.tensor([vocab, 1]), torch.zeros(2, vocab**new, dtype=torch.long)
    torch.manual_seed(21)
    for _ in range(60):
        out = target.generate(
            **many, assistant_model=draft, adapter=["a", "b"] * 4, do_sample=True, top_k=0, max_new_tokens=new
        )
        for i, row in enumerate(out[:, -new:]):
            counts[i % 2, (row * place).sum()] += 1
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=new)))
    for row, prompt in enumerate(rows):
        tokens = torch.cat([torch.tensor([prompt]).expand(len(sequences), -1), sequences], dim=-1)
        p = target(tokens).logits.double().softmax(-1)[:, len(prompt) - 1 : -1]
        assert follows(counts[row], p.gather(-1, sequences[..., None]).squeeze(-1).prod(-1), THOUSAND)
    assert draft.adapters["a"].steps > 25 and draft.adapters["b"].steps > 25 and not draft.steps
    assert draft.metrics.accepted_tokens > 25


def test_learning_when_idle_is_of_the_row_s_adapter(target) -> None:
    draft = new_draft(update_when="idle", resident_adapters=1)
    target.generate(**inputs_of(0), assistant_model=draft, adapter=["sql", "orders"], **GREEDY)
    assert draft.catch_up(30) and not draft.steps
    assert draft.adapters["sql"].steps == draft.adapters["orders"].steps == 3
    target.generate(**inputs_of(0, (6,)), assistant_model=draft, adapter="notes", **GREEDY)
    assert draft.catch_up(30)
    assert [draft.adapters[name].resident for name in NAMES] == [False, False, True]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "SQL", "", ".", "x.", "a" * 65, 3, ["sql", "/"], "a\\b", "a\n", {"a": 1}]
)
def test_what_is_no_name_is_refused_before_any_work(target, name) -> None:
    draft, forwards = new_draft(), []
    hook = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    for how in ({"assistant_model": draft}, {"custom_generate": draft.generate_fn()}):
        with pytest.raises(ConfigError, match="adapter="):
            target.generate(**inputs_of(0), adapter=name, **how, **GREEDY)
    hook.remove()
    assert forwards == [] and len(draft.adapters) == 0


def test_names_for_another_number_of_rows_are_refused_before_any_work(target) -> None:
    draft, inputs = new_draft(), inputs_of(0)
    for names in (["sql"], ["sql"] * 3, []):
        with pytest.raises(ConfigError, match="for a batch of 2: expected one per prompt"):
            target.generate(**inputs, assistant_model=draft, adapter=names, **GREEDY)
    assert len(draft.adapters) == 0 and draft.metrics.requests == 0
    sampled = GREEDY | {"do_sample": True}
    target.generate(**inputs, assistant_model=draft, adapter=["sql", "orders"], num_return_sequences=2, **sampled)
    assert [draft.adapters[name].metrics.new_tokens for name in ("sql", "orders")] == [18, 18]


def test_a_name_that_nobody_could_use_is_refused(target) -> None:
    draft, inputs = new_draft(), inputs_of(0)
    with pytest.raises(ConfigError, match=r"adapter='sql': this draft has no such adapter.* There are: none"):
        target.generate(**inputs, assistant_model=draft, adapter="sql", onlinespec=False, **GREEDY)
    with pytest.raises(ConfigError, match="MemoryDraft has no adapters"):
        target.generate(**inputs, onlinespec=True, adapter="sql", **GREEDY)
    with pytest.raises(UnsupportedError, match="no draft of ours"):
        target.generate(**inputs, adapter="sql", **GREEDY)
    target.generate(**inputs, assistant_model=draft, adapter="sql", **GREEDY)
    steps = draft.adapters["sql"].steps
    target.generate(**inputs, assistant_model=draft, adapter="sql", onlinespec=False, **GREEDY)
    assert draft.adapters["sql"].steps == steps and draft.adapters["sql"].metrics.requests == 2


def test_a_name_reaches_the_draft_on_every_way_in(target) -> None:
    draft, inputs = new_draft(), inputs_of(0)
    config = GenerationConfig(adapter="sql", pad_token_id=0, **GREEDY)
    assert GenerationConfig.from_dict(config.to_dict()).adapter == "sql"
    target.generate(**inputs, assistant_model=draft, generation_config=config)
    with hf_onlinespec.attached(target, draft):
        target.generate(**inputs, adapter=["orders", "sql"], **GREEDY)
        with pytest.raises(ConfigError, match="names for a batch of 2"):
            target.generate(**inputs, adapter=["orders"], **GREEDY)
    hf_onlinespec.disable()
    try:
        target.generate(**inputs, custom_generate=draft.generate_fn(), adapter="notes", **GREEDY)
    finally:
        hf_onlinespec.enable()
    assert [draft.adapters[name].metrics.requests for name in NAMES] == [2, 1, 1]


def test_a_changed_base_forgets_adapters_with_names(target) -> None:
    model = tiny_llama(2)
    draft = OnlineDraft(model, FIXED)
    target.generate(**inputs_of(0), assistant_model=draft, adapter="sql", **GREEDY)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="learning begins anew"):
        target.generate(**inputs_of(0), assistant_model=draft, **GREEDY)
    assert len(draft.adapters) == 0


# adapter="auto"

KINDS_OF = {"sql": range(1, 8), "orders": range(8, 16), "notes": range(16, 24)}  # tokens of the prompts of each


def of_kind(name: str, seed: int, n: int = 6) -> list[int]:
    rng = random.Random(f"{name} {seed}")
    return [rng.choice(KINDS_OF[name]) for _ in range(n)]


def teach(draft: OnlineDraft, target: PreTrainedModel, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        inputs = padded([of_kind(name, seed) for seed in range(2)])
        target.generate(**inputs, assistant_model=draft, adapter=name, **GREEDY)


def requests(draft: OnlineDraft) -> list[int]:
    return [draft.adapters[name].metrics.requests if name in draft.adapters else 0 for name in NAMES]


def test_auto_gives_each_row_the_adapter_whose_prompts_its_own_looks_like(target) -> None:
    draft = new_draft()
    inputs = padded([of_kind("sql", 7, 4), of_kind("orders", 7), [25, 26, 27, 28, 29] * 3, of_kind("sql", 8)])
    plain = target.generate(**inputs, **GREEDY)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter="auto", **GREEDY))
    assert len(draft.adapters) == 0 and draft.steps, "without names it is the one without a name"
    draft = new_draft()
    teach(draft, target)
    before = [draft.adapters[name].metrics.new_tokens for name in NAMES]
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter="auto", **GREEDY))
    new = [draft.adapters[name].metrics.new_tokens - n for name, n in zip(NAMES, before, strict=True)]
    assert new == [18, 9, 0] and draft.steps, "two rows, one, none; one looks like none of them"
    target.generate(**inputs, assistant_model=draft, adapter=["notes", "auto", "notes", None], **GREEDY)
    assert requests(draft) == [2, 3, 2]


def test_auto_reads_again_the_adapter_that_a_prompt_speaks_for(target) -> None:
    draft = new_draft(resident_adapters=1)
    teach(draft, target)
    assert [draft.adapters[name].resident for name in NAMES] == [False, False, True]
    one = padded([of_kind("sql", 9)])
    target.generate(**one, assistant_model=draft, adapter="auto", onlinespec=False, **GREEDY)
    assert requests(draft) == [2, 1, 1] and draft.adapters["sql"].resident


def test_auto_goes_by_acceptance_where_prompts_mislead(target) -> None:
    """The base is the target itself, and "sql", which the prompts speak for, is spoiled."""
    draft, chosen = OnlineDraft(tiny_llama(1, layers=2), FIXED), []
    teach(draft, target, ("sql",))
    with draft.adapters.using("sql") as own:
        move(own)
    for _ in range(12):
        before = requests(draft)[0]
        one = padded([of_kind("sql", 3)])
        target.generate(**one, assistant_model=draft, adapter="auto", onlinespec=False, **GREEDY)
        chosen.append(requests(draft)[0] - before)
    assert chosen[:2] == [1, 1] and chosen[-4:] == [0] * 4
    assert draft.metrics.last.acceptance_rate == pytest.approx(1.0)


@pytest.mark.parametrize("more", [{}, {"update_when": "round"}, {"update_when": "idle"}, {"update_every": "auto"}])
def test_auto_scores_every_adapter_on_what_is_learned_so_that_none_has_to_serve_to_be_known(target, more) -> None:
    """The base is the target itself, and "sql" and "orders", which two of three rows speak for, are spoiled."""
    draft = OnlineDraft(tiny_llama(1, layers=2), replace(FIXED, **more))
    teach(draft, target, ("sql", "orders"))
    assert draft.catch_up()
    for name in ("sql", "orders"):
        with draft.adapters.using(name) as own:
            move(own)
    inputs = padded([of_kind("sql", 3), of_kind("orders", 3, 4), of_kind("sql", 5)])
    plain = target.generate(**inputs, **GREEDY)
    before = requests(draft)
    for _ in range(2):
        assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter="auto", **GREEDY))
        assert draft.catch_up()
        assert requests(draft) == [before[0] + 1, before[1] + 1, 0], "the second time, the one without a name serves"


def test_auto_routes_the_rows_of_a_head(target) -> None:
    draft = OnlineDraft(tiny_head("EAGLE-3", target), FIXED)
    teach(draft, target, ("sql", "orders"))
    inputs = padded([of_kind("orders", 1), of_kind("sql", 0)])
    plain = target.generate(**inputs, **GREEDY)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, adapter="auto", **GREEDY))
    assert requests(draft) == [2, 2, 0] and draft.metrics.failed_drafts == 0 and not draft.steps


def test_of_several_processes_each_keeps_its_adapters_with_names_and_says_so(target, monkeypatch) -> None:
    monkeypatch.setattr("hf_onlinespec.adapt.replicas.has_others", lambda: True)
    draft = new_draft()
    with pytest.warns(UserWarning, match="average the adapter without a name alone"):
        target.generate(**inputs_of(1), assistant_model=draft, adapter="sql", **GREEDY)
    target.generate(**inputs_of(1), assistant_model=draft, adapter="orders", **GREEDY)  # said once
    assert sorted(draft.adapters) == ["orders", "sql"]
