"""Several clients of the server at once, with the real `openai` client: what is decoded together, what alone, and what each hears."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

import httpx

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.base import latest_draft
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.rounds import Proposal, Rows
from hf_onlinespec.verify.ragged import RaggedVerifier
from hf_onlinespec_cli import main
from tests.serve.gate import Gate
from tests.serving import NAME, Running, plain, running, wait_for

SHELL, SQL = prompts("shell"), prompts("sql")
CONFIG = OnlineSpecConfig(lookahead=3, update_every=4, replay_passes=0)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(CONFIG) as found:
        yield found


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward in which several requests may be."""
    found: list[int] = []
    verify = RaggedVerifier.verify

    def watched(self: RaggedVerifier, rows: Rows, proposal: Proposal) -> Any:
        found.append(len(rows.lengths))
        return verify(self, rows, proposal)

    monkeypatch.setattr(RaggedVerifier, "verify", watched)
    return found


@contextmanager
def beside(server: Running, asked: Sequence[dict[str, Any]]) -> Iterator[list[Future[httpx.Response]]]:
    """Requests of clients of their own: the first one has begun before the others arrive, and has no second token before all have."""
    with ThreadPoolExecutor(len(asked)) as pool, Gate(1, [RaggedVerifier]) as opened:
        found = []
        for number, body in enumerate(asked):
            body = {"model": NAME} | body
            headers = {"Authorization": f"Bearer {body.pop('key', number)}"}
            found.append(pool.submit(server.post, "/v1/completions", json=body, headers=headers))
            wait_for(lambda: sum(server.page()[name] for name in ("waiting", "running")) == len(found))
            wait_for(lambda: server.page()["running"])  # the first one has begun
        yield found
        opened.set()


def text(answer: Future[httpx.Response]) -> str:
    said: str = answer.result().json()["choices"][0]["text"]
    return said


def test_requests_join_those_that_run_and_each_gets_what_it_gets_alone(
    server: Running, pair: EmbeddedPair, sizes: list[int]
) -> None:
    kinds: list[dict[str, Any]] = [
        {"prompt": SQL[0], "max_tokens": 20},
        {"prompt": SHELL[1], "max_tokens": 6},
        {"prompt": SQL[2], "max_tokens": 12, "stop": "\n"},
        {"prompt": SHELL[3], "max_tokens": 16, "seed": 3},
    ]
    expected = [plain(pair, kind["prompt"], kind["max_tokens"]) for kind in kinds]
    expected[2] = expected[2][: expected[2].find("\n") + 1 or None]
    before = server.idle_page()["totals"]
    with beside(server, kinds) as answers:
        pass
    assert [text(answer) for answer in answers] == expected
    assert max(sizes) == 4 and sizes[0] == 1, "the first one has begun alone"
    page = server.idle_page()
    own = sorted(page["requests"], key=lambda one: one["number"])[-4:]
    tokens = [len(pair.tokenizer(said).input_ids) for said in expected]
    assert [one["new_tokens"] for one in own] == tokens and all(one["rounds"] > 0 for one in own)
    assert all(sum(one["sources"].values()) == one["rounds"] for one in own)
    assert all(0 < one["generate_s"] <= one["wall_time_s"] for one in own)
    assert page["totals"]["rounds"] - before["rounds"] == sum(one["rounds"] for one in own)
    assert page["totals"]["generate_s"] - before["generate_s"] < sum(one["wall_time_s"] for one in own)


def test_streams_and_whole_answers_of_all_endpoints_are_decoded_together(
    server: Running, pair: EmbeddedPair, sizes: list[int]
) -> None:
    client, chat = server.client(), [{"role": "user", "content": "git log\n"}]
    expected = plain(pair, "# git log\n\n-", 14)

    def streamed() -> str:
        pieces = client.chat.completions.create(model=NAME, messages=chat, max_tokens=14, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def whole() -> str | None:
        return client.chat.completions.create(model=NAME, messages=chat, max_tokens=14).choices[0].message.content

    def response() -> str:
        events = client.responses.create(model=NAME, input="git log\n", max_output_tokens=14, stream=True)
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    with ThreadPoolExecutor(3) as pool, Gate(1, [RaggedVerifier]) as opened:
        asked = [pool.submit(ask) for ask in (streamed, whole, response)]
        wait_for(lambda: sum(server.page()[name] for name in ("waiting", "running")) == 3)
        opened.set()
        assert [one.result() for one in asked] == [expected] * 3
    assert max(sizes) >= 2


def test_a_client_that_hangs_up_ends_its_row_and_no_other(server: Running, pair: EmbeddedPair) -> None:
    number = max((one["number"] for one in server.idle_page()["requests"]), default=0)
    body = {"model": NAME, "prompt": SHELL[6], "max_tokens": 300, "stream": True}
    with Gate(2, [RaggedVerifier]) as opened, ThreadPoolExecutor(1) as pool:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            other = pool.submit(server.complete, SHELL[7], 24)
            wait_for(lambda: sum(server.page()[name] for name in ("waiting", "running")) == 2)
            next(answer.iter_lines())
        wait_for(lambda: len(server.server.server_state.tasks) == 1)
        opened.set()
        assert other.result() == plain(pair, SHELL[7], 24)
    gone, served = sorted((one for one in server.idle_page()["requests"] if one["number"] > number), key=_number)
    assert (gone["status"], served["status"]) == ("stopped", "done") and gone["new_tokens"] < 300


def _number(request: dict[str, Any]) -> int:
    return int(request["number"])


def test_what_is_decoded_alone_has_its_turn_before_those_that_came_later(
    server: Running, pair: EmbeddedPair, sizes: list[int]
) -> None:
    """A search by beams, and draws that a seed is to repeat; others wait behind them, and do not overtake."""
    sampled = json.dumps({"do_sample": True, "temperature": 1.0, "max_new_tokens": 12})
    beams = json.dumps({"num_beams": 2, "max_new_tokens": 4})
    seeded = {"prompt": SHELL[2], "seed": 7, "generation_config": sampled}
    number = max((one["number"] for one in server.idle_page()["requests"]), default=0)
    with (
        pytest.warns(UserWarning, match="num_beams=2"),
        beside(
            server,
            [
                {"prompt": SQL[0], "max_tokens": 6},
                {"prompt": SQL[1], "generation_config": beams},
                seeded,
                {"prompt": SQL[3], "max_tokens": 6},
            ],
        ) as answers,
    ):
        pass
    found = [text(answer) for answer in answers]
    assert (found[0], found[3]) == (plain(pair, SQL[0], 6), plain(pair, SQL[3], 6))
    assert max(sizes) == 1
    done = [one["number"] for one in server.idle_page()["requests"] if one["number"] > number]
    assert done == sorted(done), "they have ended in the order in which they came"


def test_a_seed_gives_the_same_text_alone_and_beside_others(pair: EmbeddedPair) -> None:
    """With a draft in the same state: here one that does not move, and no memory."""
    sampled = json.dumps({"do_sample": True, "temperature": 1.0, "max_new_tokens": 12})
    seeded = {"prompt": SHELL[2], "seed": 7, "generation_config": sampled}
    off = OnlineSpecConfig(lookahead=3, memory_tokens=0, recycle=False, lr=1e-12, replay_passes=0)
    texts = []
    with running(off) as server:
        for others in (0, 2):
            more = [{"prompt": prompt, "max_tokens": 8} for prompt in SQL[:others]]
            with beside(server, [*more, seeded]) as answers:
                pass
            texts.append(text(answers[-1]))
    assert texts[0] == texts[1] != ""


def test_clients_that_are_isolated_share_forwards_and_no_memory(sizes: list[int]) -> None:
    """What one was answered, another one beside it is not drafted: by rounds, which its client could count as time."""
    config = OnlineSpecConfig(lookahead=6, recycle=False)
    with running(config, with_draft=False, isolate=True) as server:
        same = [{"prompt": SHELL[0], "max_tokens": 24, "key": key} for key in ("one", "two", "three")]
        with beside(server, same[:1]):
            pass
        with beside(server, same):
            pass
        first, *later = sorted(server.idle_page()["requests"], key=_number)
        rounds = [one["rounds"] for one in later]
        assert rounds[0] < first["rounds"] and rounds[1:] == [first["rounds"]] * 2
        assert max(sizes) == 3


def test_clients_name_adapters_of_their_own_in_one_batch(pair: EmbeddedPair, sizes: list[int]) -> None:
    with running(CONFIG) as server:
        asked = [{"prompt": SQL[0], "adapter": "sql"}, {"prompt": SHELL[1], "adapter": "shell"}, {"prompt": SQL[2]}]
        with beside(server, [one | {"max_tokens": 12} for one in asked]) as answers:
            pass
        assert [text(answer) for answer in answers] == [plain(pair, one["prompt"], 12) for one in asked]
        server.idle_page()
        drafts = latest_draft(server.pair.target)
        assert isinstance(drafts, OnlineDraft) and max(sizes) == 3
        assert {name: one.metrics.requests for name, one in drafts.adapters.items()} == {"sql": 1, "shell": 1}
        assert all(one.steps for one in drafts.adapters.values()) and drafts.metrics.requests == 3


def test_as_many_are_decoded_together_as_was_said(pair: EmbeddedPair, sizes: list[int]) -> None:
    asked = [{"prompt": prompt, "max_tokens": 6} for prompt in SQL[:3]]
    expected = [plain(pair, prompt, 6) for prompt in SQL[:3]]
    for batch, most in ((2, 2), (1, 0)):
        sizes.clear()
        with running(CONFIG, batch=batch) as server, beside(server, asked) as answers:
            pass
        assert [text(answer) for answer in answers] == expected
        assert max(sizes, default=0) == most


def test_a_batch_of_none_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model", "--batch", "0"]) == 2
    assert "--batch 0: expected a number of requests" in capsys.readouterr().err
