"""Drafts that learn one adapter: two replicas in one process, each told that it is another one. Two real ones: test_processes.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from hf_onlinespec import OnlineDraft
from hf_onlinespec._compat.processes import Process
from hf_onlinespec.adapt.service import LearningService
from hf_onlinespec.errors import ConfigError, PrivacyError
from tests.conftest import tiny_llama
from tests.drafts import flat_params

REPEATABLE: dict[str, Any] = {"lookahead": 3, "update_every": 1, "memory_tokens": 0, "replay_passes": 1}


class Store:
    """One in memory that can be away."""

    def __init__(self) -> None:
        self._store = HashStore()
        self.away = False

    def _here(self) -> HashStore:
        if self.away:
            raise ConnectionError("the store's process has died")
        return self._store

    def set(self, key: str, value: bytes) -> None:
        self._here().set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._here().get(key)

    def check(self, keys: list[str]) -> bool:
        return self._here().check(keys)

    def delete_key(self, key: str) -> bool:
        return self._here().delete_key(key)


class Replica:
    """A draft that takes itself for the process of a rank whenever it does something."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, store: Store, rank: int, model: int = 2, **settings: Any
    ) -> None:
        self.draft = OnlineDraft(tiny_llama(model), **(REPEATABLE | {"average_every": 4} | settings))
        self._patch, self._process = monkeypatch, Process(rank, 2, store, itertools.count())
        self._target = tiny_llama(1)
        self._texts = torch.Generator().manual_seed(rank)

    def act(self) -> OnlineDraft:
        self._patch.setattr("hf_onlinespec.adapt.replicas.this_process", lambda: self._process)
        return self.draft

    def serve(self, requests: int = 1, **arguments: Any) -> torch.Tensor:
        draft = self.act()
        for _ in range(requests):
            prompt = torch.randint(1, 32, (1, 6), generator=self._texts)
            out = self._target.generate(prompt, assistant_model=draft, max_new_tokens=6, **arguments)
        return out

    def meet(self) -> torch.Tensor:
        assert self.act().catch_up(60)
        return flat_params(self.draft)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, store: Store) -> tuple[Replica, Replica]:
    return Replica(monkeypatch, store, 0), Replica(monkeypatch, store, 1)


def test_two_replicas_end_with_one_adapter_that_both_have_learned(both: tuple[Replica, Replica]) -> None:
    one, other = both
    for _ in range(3):
        one.serve(2)
        other.serve(2)
    one.meet()
    other.meet()
    assert torch.equal(one.meet(), other.meet())
    assert one.draft.metrics.averages > 2 and one.draft.metrics.averaging_time_s > 0
    assert "exchanges with other processes" in str(one.draft.metrics)
    assert "1 other process contributed" in one.draft.metrics.decisions.averaging


def test_after_one_average_the_adapter_is_the_mean_of_what_each_has_learned(both: tuple[Replica, Replica]) -> None:
    led = []
    for replica in both:
        replica.serve(1)  # two gradient steps: fewer than are averaged after
        led.append(flat_params(replica.draft))
    both[0].meet()
    both[1].meet()
    torch.testing.assert_close(both[0].meet(), (led[0] + led[1]) / 2)


def test_a_replica_that_has_not_begun_holds_up_nobody_and_finds_everything_when_it_does(
    both: tuple[Replica, Replica],
) -> None:
    """One serves all of its requests before the other one serves its first: were it to wait for that one, it would for ever."""
    fast, late = both
    fast.serve(8)
    learned = fast.meet()
    assert fast.draft.metrics.averages >= 3
    late.serve(1)
    late.act().catch_up(60)
    late.serve(1)
    assert late.draft.metrics.decisions.averaging.endswith("1 other process contributed")
    late.meet()
    assert torch.equal(fast.meet(), late.meet()) and not torch.equal(learned, fast.meet())


def test_one_that_learns_nothing_serves_what_the_others_have_learned(both: tuple[Replica, Replica]) -> None:
    one, reader = both
    one.serve(3)
    one.meet()
    reader.serve(1, onlinespec=False)
    reader.meet()
    text = torch.tensor([[3, 14, 15, 9, 2, 6]])
    assert torch.equal(reader.draft(text).logits, one.draft(text).logits)
    assert reader.draft.steps and not reader.draft.metrics.updates


@pytest.mark.failures
def test_without_the_store_learning_goes_on_alone_and_with_it_together_again(
    both: tuple[Replica, Replica], store: Store
) -> None:
    one, other = both
    one.serve(2)
    before = one.meet()
    store.away = True
    one.serve(4)
    assert not one.act().catch_up(60)
    assert not torch.equal(flat_params(one.draft), before)
    assert "ConnectionError" in one.draft.metrics.decisions.averaging
    store.away = False
    one.meet()
    other.serve(1)
    other.meet()
    assert torch.equal(one.meet(), other.meet())


@pytest.mark.failures
def test_what_fails_beside_a_request_costs_no_answer(
    both: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = both
    other.serve(2)
    other.meet()
    with monkeypatch.context() as patch:
        patch.setattr(LearningService, "move", _no_memory)
        one.serve(3)
        assert not one.act().catch_up(60) and "MemoryError" in one.draft.metrics.decisions.averaging
    assert one.draft.metrics.requests == 3 and not one.draft.metrics.averages
    one.meet()
    other.meet()
    assert torch.equal(one.meet(), other.meet())


def _no_memory(*arguments: Any) -> None:
    raise MemoryError


def test_another_base_or_other_settings_are_told_before_any_work(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    Replica(monkeypatch, store, 0).serve(1)
    for wrong, told in (
        ({"lr": 1e-4}, "lr is"),
        ({"model": 7}, "the base's weights is"),
        ({"seed": 5}, "begins with is"),
    ):
        replica = Replica(monkeypatch, store, 1, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=told):
            replica.serve(1)
        assert not replica.draft.metrics.requests and not replica.draft.steps
    replica = Replica(monkeypatch, store, 1, lr=1e-4, average_every=None)
    replica.serve(1)
    assert replica.draft.metrics.decisions.averaging == ""


def test_rank_0_saves_and_another_one_where_it_is_told_to(both: tuple[Replica, Replica], tmp_path: Path) -> None:
    one, other = both
    for replica in both:
        replica.serve(1)
    for name in ("adapter", "alone"):
        other.act().save_pretrained(tmp_path / name)
        other.act().merge_and_export(tmp_path / name)
        assert other.act().push_to_hub("me/nothing") == ""
        assert not (tmp_path / name).exists()
    one.act().save_pretrained(tmp_path / "adapter")
    other.act().save_pretrained(tmp_path / "alone", is_main_process=True)
    for name, replica in (("adapter", one), ("alone", other)):
        loaded = OnlineDraft.from_pretrained(tmp_path / name, base_model=tiny_llama(2))
        assert torch.equal(flat_params(loaded), flat_params(replica.draft))
    one.act().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_public_push_is_refused_for_texts_of_other_processes(both: tuple[Replica, Replica]) -> None:
    for replica in (*both, *both):
        replica.serve(1)
        replica.meet()
    with pytest.raises(PrivacyError, match="other processes have learned the same adapter"):
        both[0].act().push_to_hub("me/draft", private=False, data_statement="random tokens")


@pytest.mark.parametrize(
    "settings",
    [{"learner": "ensemble"}, {"radius": 0.05}, {"radius": 0.05, "learner": "ogd"}, {"update_when": "idle"}],
    ids=str,
)
def test_every_kind_of_learner_goes_on_from_an_average(
    monkeypatch: pytest.MonkeyPatch, store: Store, settings: dict[str, Any]
) -> None:
    one, other = (Replica(monkeypatch, store, rank, **settings) for rank in range(2))
    start = flat_params(one.draft)
    for _ in range(3):
        for replica in (one, other):
            replica.serve(2)
            replica.meet()
    one.meet()
    other.meet()
    assert torch.equal(one.meet(), other.meet())
    radius = settings.get("radius")
    if radius is not None:
        assert float((flat_params(one.draft) - start).norm()) <= radius * 1.001
    one.serve(1)
    assert not one.draft.metrics.skipped_updates and torch.isfinite(flat_params(one.draft)).all()


def test_what_was_learned_while_an_exchange_was_under_way_stays(both: tuple[Replica, Replica]) -> None:
    draft = both[0].draft
    seen = torch.linspace(-1.0, 1.0, len(flat_params(draft)))
    draft.learning.move(flat_params(draft), seen)
    assert torch.equal(flat_params(draft), seen)
    draft.learning.move(seen - 0.25, seen + 0.5)  # it was seen before its last step, which led 0.25 further
    torch.testing.assert_close(flat_params(draft), seen + 0.75)
