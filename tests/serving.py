"""A real server on localhost for tests: the embedded pair behind uvicorn, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, attach, detach
from hf_onlinespec.embedded import EmbeddedPair, load_pair
from hf_onlinespec.serve.app import Served, build_app

NAME = "embedded"
PATIENCE_S = 60.0  # for what has to come: a machine that is busy is slow, not wrong
TEMPLATE = "{% for m in messages %}# {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}-{% endif %}"


@dataclass
class Running:
    """A server that runs."""

    url: str
    server: uvicorn.Server
    pair: EmbeddedPair
    http: httpx.Client
    open: ExitStack  # clients that are closed with the server

    def client(self, key: str = "a key") -> OpenAI:
        return self.open.enter_context(
            OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)
        )

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, **kwargs)

    def complete(self, prompt: str, most: int, key: str = "a key") -> str:
        """An answer of /v1/completions."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": most}
        text: str = self.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).json()[
            "choices"
        ][0]["text"]
        return text

    def page(self) -> dict[str, Any]:
        return self.get("/onlinespec.json").json()

    def idle_page(self) -> dict[str, Any]:
        """The page once no request waits or runs: a stream has said its last word before its request is counted."""
        wait_for(lambda: not any(self.page()[name] for name in ("waiting", "running")))
        return self.page()

    def stop(self) -> None:
        self.server.should_exit = True


@contextmanager
def running(
    config: OnlineSpecConfig | None = None, with_draft: bool = True, save: Path | None = None, **kwargs: Any
) -> Iterator[Running]:
    """Serves the embedded target; it ends with the block."""
    pair = load_pair()
    pair.tokenizer.chat_template = TEMPLATE
    drafts = attach(
        pair.target, OnlineDraft(pair.draft, config) if with_draft else None, None if with_draft else config
    )
    app = build_app(Served(NAME, pair.target, pair.tokenizer, drafts, saves_to=save, **kwargs))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with ExitStack() as clients:
            http = clients.enter_context(httpx.Client(base_url=url, timeout=PATIENCE_S))
            yield Running(url, server, pair, http, clients)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        detach(pair.target)
    assert not thread.is_alive()


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def plain(pair: EmbeddedPair, prompt: str, most: int) -> str:
    """What the target says by itself."""
    tokenizer: PreTrainedTokenizerBase = pair.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt")
    output = pair.target.generate(**inputs, max_new_tokens=most, onlinespec=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
