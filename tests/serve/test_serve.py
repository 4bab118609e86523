"""The server with the real `openai` client: answers, many clients, clients that go, bad requests, privacy, saving, ending."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.commit.base import latest_draft
from hf_onlinespec.commit.memory_draft import MemoryDraft
from hf_onlinespec.embedded import FOLDER, EmbeddedPair, prompts
from hf_onlinespec.serve import app
from hf_onlinespec.serve.clients import MOST_CLIENTS, ClientMemories
from hf_onlinespec.serve.metrics import ServerMetrics
from hf_onlinespec.share.folder import is_artifact
from hf_onlinespec_cli import main
from tests.serve.gate import Gate
from tests.serving import NAME, Running, plain, running, wait_for

SHELL, SQL = prompts("shell"), prompts("sql")
QUESTION = "git log\n\n> Show a history of commits.\n"
ASKED = f"# {QUESTION}\n-"  # the same under the chat template
TEXT = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}]}
SECRET = "xylophone-4711"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def as_body(**kwargs: Any) -> str:
    return json.dumps(TEXT | kwargs)


def test_every_endpoint_answers_what_the_target_says_by_itself(server: Running, pair: EmbeddedPair) -> None:
    client, expected = server.client(), plain(pair, ASKED, 12)
    chat = client.chat.completions.create(**TEXT, max_tokens=12)
    assert chat.choices[0].message.content == expected
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(pair.tokenizer(ASKED).input_ids), 12)
    assert chat.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**TEXT, max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].usage.completion_tokens == 12

    response = client.responses.create(model=NAME, input=QUESTION, max_output_tokens=12)
    assert response.output_text == expected
    events = client.responses.create(model=NAME, input=QUESTION, max_output_tokens=12, stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected

    expected = plain(pair, SQL[0], 12)
    assert server.complete(SQL[0], 12) == expected
    pieces = client.completions.create(model=NAME, prompt=SQL[0], max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    assert server.idle_page()["requests"][-1]["rounds"] > 0
    assert [model.id for model in client.models.list()] == [NAME]
    assert server.get("/health").json() == {"status": "ok"}


def test_eight_clients_at_once_get_what_each_gets_alone(server: Running, pair: EmbeddedPair) -> None:
    asked = [SHELL[1], SQL[1], *SHELL[2:5], *SQL[2:5]]
    expected = [plain(pair, prompt, 10) for prompt in asked]

    def ask(number: int) -> str:
        client = server.client(f"key {number}")
        if number % 2:
            pieces = client.completions.create(model=NAME, prompt=asked[number], max_tokens=10, stream=True)
            return "".join(piece.choices[0].text for piece in pieces)
        return client.completions.create(model=NAME, prompt=asked[number], max_tokens=10).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == expected
    page = server.idle_page()
    assert (page["waiting"], page["running"], page["totals"]["failed"]) == (0, 0, 0)


def test_a_client_that_hangs_up_in_a_stream_ends_its_request_and_no_other(server: Running, pair: EmbeddedPair) -> None:
    before = server.idle_page()["totals"]["requests"]
    body = {"model": NAME, "prompt": SHELL[6], "max_tokens": 300, "stream": True}
    with Gate(opens_after=2) as opened:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        wait_for(lambda: not server.server.server_state.tasks)
        opened.set()
        assert server.complete(SHELL[7], 8) == plain(pair, SHELL[7], 8)
    gone, served = server.idle_page()["requests"][before:]
    assert (gone["status"], served["status"]) == ("stopped", "done")
    assert gone["new_tokens"] < 300


def test_a_client_that_hangs_up_without_a_stream_ends_its_request_and_no_other(
    server: Running, pair: EmbeddedPair
) -> None:
    before = server.idle_page()["totals"]["requests"]
    body = json.dumps({"model": NAME, "prompt": SHELL[8], "max_tokens": 300}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with Gate() as opened:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head % len(body) + body)
            wait_for(lambda: server.page()["running"] == 1)
        wait_for(lambda: not server.server.server_state.tasks)
        opened.set()
        assert server.complete(SHELL[9], 8) == plain(pair, SHELL[9], 8)
    gone, served = server.idle_page()["requests"][before:]
    assert (gone["status"], served["status"]) == ("stopped", "done")
    assert gone["new_tokens"] < 300


LONG = [{"role": "user", "content": "word " * 600}]
REFUSED: dict[str, tuple[str | bytes, int]] = {
    "no JSON": ('{"model": ', 400),
    "nothing": ("", 400),
    "a list": ("[]", 400),
    "nested too deep": ("[" * 100_000, 400),
    "too large": (" " * (app.MOST_BYTES + 1), 413),
    "bytes that are no text": (b'{"model": "\xff"}', 400),
    "no messages": (json.dumps({"model": NAME}), 400),
    "messages as a text": (as_body(messages=SECRET), 400),
    "half a surrogate pair": ('{"model": "embedded", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "an unknown field": (as_body(anything=1), 422),
    "another model": (as_body(model="another"), 400),
    "a prompt that is too long": (as_body(messages=LONG), 400),
    "max_tokens of 0": (as_body(max_tokens=0), 400),
    "max_tokens below 0": (as_body(max_tokens=-5), 400),
    "max_completion_tokens of 0, streaming": (as_body(max_completion_tokens=0, stream=True), 400),
    "max_tokens that is no number": (as_body(max_tokens="many"), 400),
    "max_tokens without end": (as_body(max_tokens=float("inf")), 400),
    "a temperature that is no number": (as_body(temperature=SECRET), 400),
    "stop that is no text": (as_body(stop=[1]), 400),
    "a penalty that cannot be": (as_body(frequency_penalty=-1), 400),
    "a bias for no token": (as_body(logit_bias={SECRET: 1}), 400),
    "a seed of too many bits": (as_body(seed=2**64), 400),
    "a configuration that is no JSON": (as_body(generation_config="{"), 400),
    "beams in a stream": (as_body(generation_config='{"num_beams": 2}', stream=True), 400),
    "settings of a draft": (as_body(generation_config='{"onlinespec": {"memory_tokens": 0}}'), 400),
}


def test_bad_requests_are_refused_in_words_and_the_next_one_is_served(server: Running, pair: EmbeddedPair) -> None:
    headers = {"Content-Type": "application/json"}
    answers = {
        kind: server.post("/v1/chat/completions", content=body, headers=headers) for kind, (body, _) in REFUSED.items()
    }
    assert {kind: answer.status_code for kind, answer in answers.items()} == {
        kind: status for kind, (_, status) in REFUSED.items()
    }
    errors = [answer.json()["error"] for answer in answers.values()]
    assert not [error for error in errors if error["type"] != "invalid_request_error" or len(error["message"]) < 9]
    assert server.post("/v1/chat/completions", json=TEXT | {"max_tokens": 6}).json()["choices"][0]["message"][
        "content"
    ] == plain(pair, ASKED, 6)
    assert (server.page()["waiting"], server.page()["running"]) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_is_not_begun_for_what_the_request_shows_to_be_wrong(server: Running, stream: bool) -> None:
    """Half of a character could be neither read nor sent back, and a repetition penalty of 0 divides by it."""
    headers, body = (
        {"Content-Type": "application/json"},
        {"model": NAME, "prompt": "a", "max_tokens": 2, "stream": stream},
    )
    for more in ({"suffix": "\ud83d"}, {"stop": "\udc00"}, {"prompt": "\ud83d"}, {"frequency_penalty": -1}):
        refused = server.post("/v1/completions", content=json.dumps(body | more), headers=headers)
        assert refused.status_code == 400, (more, refused.text)
    whole = server.post("/v1/completions", content=json.dumps(body | {"suffix": "\U0001f600"}), headers=headers)
    assert whole.status_code == 200 and "error" not in whole.text


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_null_or_empty_was_not_given(server: Running, stream: bool) -> None:
    for path, body in (
        ("/v1/chat/completions", TEXT | {"max_tokens": 2, "logit_bias": {}, "stop": None, "tools": None}),
        ("/v1/responses", {"model": NAME, "input": "a", "max_output_tokens": 2, "parallel_tool_calls": None}),
    ):
        answer = server.post(path, json=body | {"stream": stream})
        assert answer.status_code == 200 and '"error": ' not in answer.text, answer.text
    refused = server.post(
        "/v1/responses", json={"model": NAME, "input": "a", "parallel_tool_calls": "x", "stream": stream}
    )
    assert refused.status_code == 400 and "parallel_tool_calls: expected true or false" in refused.text


def test_an_answer_is_cut_where_the_model_ends_and_a_prompt_that_is_none_is_refused(server: Running) -> None:
    prompt = "word " * 250  # of 512 positions the answer gets what is left
    answer = server.client().completions.create(model=NAME, prompt=prompt, max_tokens=5000)
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"
    for body, message in (({"prompt": ""}, "no tokens"), ({"prompt": "a", "suffix": 1}, "suffix")):
        refused = server.post("/v1/completions", json={"model": NAME} | body)
        assert refused.status_code == 400 and message in refused.json()["error"]["message"]


def test_a_request_that_our_loop_does_not_take_runs_plain(server: Running) -> None:
    before = server.idle_page()["totals"]
    body = {"generation_config": json.dumps({"num_beams": 2, "max_new_tokens": 4})}
    with pytest.warns(UserWarning, match="num_beams=2"):
        answer = server.client().chat.completions.create(**TEXT, extra_body=body)
    assert answer.usage.completion_tokens == 4
    after = server.idle_page()["totals"]
    assert (after["outside"], after["new_tokens"]) == (before["outside"] + 1, before["new_tokens"] + 4)


def test_a_request_can_switch_drafting_off(server: Running, pair: EmbeddedPair) -> None:
    body = {"generation_config": json.dumps({"onlinespec": False})}
    answer = server.client().chat.completions.create(**TEXT, max_tokens=8, extra_body=body)
    assert answer.choices[0].message.content == plain(pair, ASKED, 8)
    assert server.idle_page()["requests"][-1]["rounds"] == 0


def test_a_request_names_the_adapter_that_drafts_and_learns(pair: EmbeddedPair) -> None:
    def ask(server: Running, prompt: str, **more: Any) -> httpx.Response:
        return server.post("/v1/completions", json={"model": NAME, "prompt": prompt, "max_tokens": 8} | more)

    with running(OnlineSpecConfig(lookahead=3, update_every=4, replay_passes=0)) as server:
        for name in ("sql", "sql", "auto", None):
            answer = ask(server, SQL[0], adapter=name)
            assert answer.json()["choices"][0]["text"] == plain(pair, SQL[0], 8)
        chat = server.client().chat.completions.create(
            **TEXT, max_tokens=8, extra_body={"adapter": "shell"}, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == plain(pair, ASKED, 8)
        server.idle_page()
        drafts = latest_draft(server.pair.target)
        assert isinstance(drafts, OnlineDraft)
        assert sorted(drafts.adapters) == ["shell", "sql"] and all(one.steps for one in drafts.adapters.values())
        assert drafts.adapters["sql"].metrics.requests >= 2 and drafts.adapters["shell"].metrics.requests == 1
        of_config = json.dumps({"adapter": ["sql"]})
        for name, more in (("../x", {}), (3, {}), (["sql"], {}), (None, {"generation_config": of_config})):
            refused = ask(server, SQL[0], adapter=name, **more)
            assert refused.status_code == 400 and "adapter: " in refused.json()["error"]["message"], refused.text
        off = json.dumps({"onlinespec": False, "max_new_tokens": 4})
        refused = ask(server, SQL[0], adapter="unheard", generation_config=off)
        assert refused.status_code == 400 and "no such adapter" in refused.json()["error"]["message"]
        assert sorted(drafts.adapters) == ["shell", "sql"]


def test_an_answer_that_cannot_be_parsed_is_a_fault_of_the_server(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(server.pair.tokenizer, "response_template", {}, raising=False)
    monkeypatch.setattr(server.pair.tokenizer, "parse_response", broken)
    answer = server.post("/v1/chat/completions", json=TEXT | {"max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "ValueError" in caplog.text and SECRET not in caplog.text


def test_what_is_no_json_or_comes_under_a_foreign_name_is_refused(server: Running) -> None:
    """A page of another site can send a form, and can make its own name point at this machine."""
    assert server.post("/v1/chat/completions", data={"model": NAME}).status_code == 415
    assert httpx.get(f"{server.url}/onlinespec.json", headers={"Host": "elsewhere.example"}).status_code == 400


def test_the_model_can_be_neither_reset_nor_replaced(server: Running) -> None:
    assert server.post("/reset").status_code == 403
    assert server.post("/load_model", json={"model": "another"}).status_code == 400
    assert '"cached": true' in server.post("/load_model", json={"model": NAME}).text
    assert server.client().chat.completions.create(**TEXT, max_tokens=2).usage.completion_tokens == 2


def test_texts_of_requests_stay_out_of_logs_page_and_metrics(
    server: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not hand its records on
    said = [{"role": "user", "content": SECRET}]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {SECRET}", "X-Request-ID": f"{SECRET} x"}
    wrong = [{"temperature": SECRET}, {"stop": [1, SECRET]}, {"frequency_penalty": -1, "stream": True, "stop": SECRET}]
    bodies = [TEXT | {"messages": said, "max_tokens": 4} | more for more in ({}, {"stream": True}, *wrong)]
    bodies += [{"model": SECRET, "messages": said}, {"messages": SECRET}, {SECRET: 1}]
    try:
        for body in bodies:
            server.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
            server.post(f"/v1/responses?{SECRET}", content=json.dumps({"input": SECRET} | body), headers=headers)
            server.post("/v1/completions", content=json.dumps({"prompt": SECRET} | body), headers=headers)
        server.post("/v1/completions", content=f'{{"prompt": "{SECRET}', headers=headers)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    told = [record for record in caplog.records if record.name.startswith(("hf_onlinespec", "uvicorn", "transformers"))]
    assert any("chat done" in record.getMessage() for record in told)  # it does listen
    logged = "\n".join(f"{record.getMessage()} {record.exc_text} {record.exc_info}" for record in told)
    server.idle_page()
    shown = [server.get(path).text for path in ("/metrics", "/onlinespec", "/onlinespec.json")]
    assert not [text for text in (logged, *capfd.readouterr(), *shown) if SECRET in text]


@pytest.mark.failures
def test_what_fails_beside_a_request_that_fails_quotes_neither(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(SECRET)

    with running() as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.pair.target, "generate", fails)
            patch.setattr(ServerMetrics, "ended", fails)
            body = {"model": NAME, "prompt": "x", "max_tokens": 2, "stream": True}
            assert "RuntimeError" in server.post("/v1/completions", json=body).text
        server.complete(SQL[6], 5)
        shown = [server.get(path).text for path in ("/metrics", "/onlinespec.json")]
    assert "A counter, a name or a checkpoint failed (RuntimeError in calls.py:" in caplog.text
    assert not [text for text in (caplog.text, *shown) if SECRET in text]


def test_metrics_count_what_the_page_shows(server: Running) -> None:
    server.complete(SQL[6], 5)
    totals = server.idle_page()["totals"]
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
    }
    assert found["onlinespec_tokens_total", "new"] == totals["new_tokens"] > 0
    assert found["onlinespec_tokens_total", "accepted"] == totals["accepted_tokens"]
    assert found["onlinespec_rounds_total", "memory"] == totals["sources"]["memory"]
    assert found["onlinespec_generate_seconds_total",] == pytest.approx(totals["generate_s"])
    assert found["onlinespec_requests_waiting",] == 0
    done = sum(
        value
        for (name, *labels), value in found.items()
        if name == "onlinespec_requests_total" and "refused" not in labels
    )
    assert done == totals["requests"]
    last = server.idle_page()["requests"][-1]
    assert (last["endpoint"], last["new_tokens"]) == ("completions", 5)
    assert server.get(f"/onlinespec.json?after={last['number']}").json()["requests"] == []


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    answer = server.get("/onlinespec")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.findall(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(", answer.text)


@pytest.mark.parametrize("isolate", [False, True])
def test_isolated_clients_draft_from_what_they_wrote_themselves(isolate: bool) -> None:
    with running(OnlineSpecConfig(lookahead=6), with_draft=False, isolate=isolate) as server:
        for key in ("one", "one", "two"):
            server.complete(SHELL[0], 24, key)
        first, again, other = (request["rounds"] for request in server.idle_page()["requests"])
        assert again < first
        assert other == (first if isolate else again)
        assert server.page()["clients"] == (2 if isolate else 0)


def test_isolated_clients_recycle_what_was_said_to_themselves() -> None:
    draft = MemoryDraft(OnlineSpecConfig(memory_tokens=0))
    memories = ClientMemories(draft, isolate=True)
    memories.use(b"first")
    first = draft.recycled
    assert first is not None
    first.update([3], [list(range(8))], 32)
    memories.use(b"second")
    assert draft.recycled is not None and not draft.recycled.successors(3)
    memories.use(b"first")
    assert draft.recycled is first


def test_a_client_more_than_fit_takes_the_place_of_the_one_that_was_silent_for_longest() -> None:
    draft = MemoryDraft(OnlineSpecConfig(memory_tokens=8))
    memories = ClientMemories(draft, isolate=True)
    memories.use(b"first")
    first = draft.memory
    for n in range(MOST_CLIENTS - 1):
        memories.use(bytes([n]))
    memories.use(b"first")
    assert draft.memory is first
    memories.use(b"one more")
    assert len(memories) == MOST_CLIENTS
    memories.use(b"first")
    assert draft.memory is first
    memories.use(bytes([0]))
    memories.use(bytes([1]))
    assert draft.memory is not first and len(memories) == MOST_CLIENTS


def test_the_draft_is_saved_between_requests_and_at_the_end(tmp_path: Path) -> None:
    config = OnlineSpecConfig(lookahead=3, update_every=4, replay_passes=0, audit_tokens=64)
    with running(config, save=tmp_path / "draft", save_every=2) as server:
        for prompt in SQL[:2]:
            server.complete(prompt, 8)
        wait_for(lambda: is_artifact(tmp_path / "draft"))
        wait_for(lambda: server.page()["saves"]["done"] == 1)
        between = OnlineDraft.from_pretrained(tmp_path / "draft").metrics.requests
        server.complete(SQL[2], 8)
    saved = OnlineDraft.from_pretrained(tmp_path / "draft")
    assert (between, saved.metrics.requests) == (2, 3)
    assert saved.metrics.updates > 0


def test_a_save_that_fails_costs_no_request(tmp_path: Path, pair: EmbeddedPair) -> None:
    (tmp_path / "draft").write_text("a file, no folder")
    with running(save=tmp_path / "draft", save_every=1) as server:
        server.complete(SQL[0], 4)
        wait_for(lambda: server.page()["saves"]["failed"] == 1)
        assert server.complete(SQL[1], 4) == plain(pair, SQL[1], 4)
    assert (tmp_path / "draft").read_text() == "a file, no folder"


def test_requests_that_run_and_that_wait_are_ended_with_the_server() -> None:
    with running(batch=2) as server:
        with Gate() as opened, ThreadPoolExecutor(3) as pool:
            body = {"model": NAME, "prompt": SHELL[0], "max_tokens": 300, "stream": True}
            asked = [pool.submit(server.post, "/v1/completions", json=body) for _ in range(3)]
            wait_for(lambda: sum(server.page()[name] for name in ("waiting", "running")) == 3)
            metrics = server.server.config.app.state.metrics
            server.stop()
            wait_for(lambda: not server.server.server_state.tasks)
            opened.set()
            for one in asked:
                with pytest.raises(httpx.HTTPError):
                    one.result()
            wait_for(lambda: metrics.totals.stopped == 3)
            assert metrics.totals.new_tokens < 300


@pytest.mark.usefixtures("process_settings")
def test_the_address_can_be_reached_when_it_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client that reads it may be faster than uvicorn's start."""

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        out = capsys.readouterr().out
        address = sockets[0].getsockname()
        assert f"http://{address[0]}:{address[1]}/v1" in out
        socket.create_connection(address).close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert main(["serve", str(FOLDER / "target"), "--port", "0"]) == 0


def test_a_terminated_server_saves_its_draft(tmp_path: Path) -> None:
    """One that was saved there before goes on."""
    folder = tmp_path / "draft"
    with running(save=folder) as server:
        server.complete(SQL[0], 4)
    command = [sys.executable, "-m", "hf_onlinespec_cli", "serve", str(FOLDER / "target"), "--port", "0"]
    command += ["--draft", str(FOLDER / "draft"), "--save", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = [next(process.stdout), next(process.stdout)]
            assert said[0] == f"The draft saved in {folder} goes on: 1 requests so far.\n"
            url = said[1].split()[3].removesuffix("/v1")
            body = {"model": str(FOLDER / "target"), "prompt": SQL[0], "max_tokens": 6}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 6
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and out == f"The draft is saved in {folder}.\n"
    assert "completions done" in err and "Traceback" not in err
    assert f"Loading {FOLDER / 'target'} …\n" in err and f"Saving the draft in {folder} …\n" in err
    assert OnlineDraft.from_pretrained(folder).metrics.requests == 2
