"""The server's routes: those of OpenAI's API by transformers' handlers, metrics, and the page `/onlinespec`."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.serving import (
    X_REQUEST_ID,
    ChatCompletionHandler,
    CompletionHandler,
    ModelManager,
    ResponseHandler,
    TimedModel,
)
from ..commit.base import Draft
from ..config.adapters import AUTO, is_name
from ..draft import OnlineDraft
from .calls import ASKED, Asked
from .checks import RequestError
from .clients import ClientMemories, client_of
from .generating import OneModel, OnlineGenerateManager
from .metrics import ServerMetrics
from .saving import DraftSaver

logger = logging.getLogger(__name__)

Handler = ChatCompletionHandler | CompletionHandler | ResponseHandler  # of one endpoint each
HANDLERS: dict[str, type[Handler]] = {
    "chat": ChatCompletionHandler,
    "completions": CompletionHandler,
    "responses": ResponseHandler,
}

PAGE = Path(__file__).with_name("page.html")
LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")
MOST_BYTES = 16 * 2**20  # of a body: it is read and cut into tokens while nothing else is answered; chosen
HANG_UP_S = 0.25  # between two looks whether a client that does not stream is still there
# Fields whose values transformers' handlers look at behind the answer alone.
FOUND_OUT_LATE = {"suffix": (str, "a text"), "parallel_tool_calls": (bool, "true or false")}
# The page loads nothing from anywhere.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
    "Cache-Control": "no-store",
}
CLOSED = (
    "This server serves one model, and what its draft has learned goes with it: /reset is closed. Stop the server, which saves the "
    "draft where --save says, and start it again."
)


@dataclass
class Served:
    """What a server serves.

    Args:
        name: of the target, as clients name it.
        target: with the draft attached, see `hf_onlinespec.attach`.
        draft: what drafts for it.
        draft_name: of the draft model, for the page; None: there is none.
        saves_to, save_every: where the draft is saved at the end, and every so many requests; None: nowhere.
        isolate: one suffix memory per API key.
        batch: requests that are decoded together; 1: one after the other.
        hosts: names under which a browser may reach the server; None: any.
    """

    name: str
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: Draft
    draft_name: str | None = None
    saves_to: Path | None = None
    save_every: int = 0
    isolate: bool = False
    batch: int = 8
    hosts: tuple[str, ...] | None = LOCAL


@dataclass
class _Pages:
    """What is answered beside generation.

    Args:
        key: of the target in `models`.
    """

    served: Served
    metrics: ServerMetrics
    memories: ClientMemories
    models: ModelManager
    key: str

    async def list_models(self, request: Request) -> Response:
        about = {
            "id": self.served.name,
            "object": "model",
            "created": int(self.metrics.started_at_s),
            "owned_by": "hf_onlinespec",
        }
        return JSONResponse({"object": "list", "data": [about]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def load_model(self, request: Request) -> Response:
        """As there, for the model that is served: `transformers chat` asks before its first request."""
        try:
            asked = (await _body(request)).get("model")
        except RequestError as error:
            return _error(error.status, error.message)
        if asked not in (self.served.name, self.key):
            return _error(400, f"This server serves {self.served.name!r} alone.")
        return StreamingResponse(self.models.load_model_streaming(self.key), media_type="text/event-stream")

    async def reset(self, request: Request) -> Response:
        return _error(403, CLOSED)

    async def prometheus(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def numbers(self, request: Request) -> Response:
        after = request.query_params.get("after", "0")
        if not re.fullmatch(r"[0-9]{1,18}", after):
            return _error(400, "after: expected the number of a request.")
        about = {
            "model": self.served.name,
            "draft": self.served.draft_name,
            "isolated": self.served.isolate,
            "clients": len(self.memories),
        }
        return JSONResponse(about | self.metrics.page(int(after)), headers={"Cache-Control": "no-store"})


def _models(served: Served) -> tuple[ModelManager, str]:
    """Transformers' manager of models with the target as the one that it has, and the name that it has there."""
    models = ModelManager(model_timeout=-1)
    key = models.process_model_name(served.name)
    tokenizer: Any = served.tokenizer  # annotated for the one of the classes that AutoTokenizer makes
    models.loaded_models[key] = TimedModel(served.target, timeout_seconds=-1, processor=tokenizer)
    models.force_model = served.name
    return models, key


def build_app(served: Served) -> Starlette:
    """The app. It saves the draft when it ends; `state.saver` has the rest of that, `state.metrics` the counts.

    FastAPI, which transformers' handlers come with, is not asked: it can report requests elsewhere (OpenTelemetry).
    """
    metrics = ServerMetrics(served.draft)
    saver = None
    if served.saves_to is not None and isinstance(served.draft, OnlineDraft):
        saver = DraftSaver(served.draft, served.saves_to, served.save_every, metrics)
    memories = ClientMemories(served.draft, served.isolate)
    manager = OnlineGenerateManager(served.target, served.draft, metrics, memories, served.batch, saver)
    models, key = _models(served)
    generation = OneModel(manager)
    pages = _Pages(served, metrics, memories, models, key)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(manager.stop)
        if saver is not None:
            await asyncio.to_thread(saver.close)

    api = {
        endpoint: _route(endpoint, kind(model_manager=models, generation_state=generation), metrics)
        for endpoint, kind in HANDLERS.items()
    }
    middleware = [Middleware(_NoTracebacks)]
    if served.hosts is not None:  # a page from elsewhere cannot reach it by a name that it makes point here
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(served.hosts), www_redirect=False))
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api["chat"], methods=["POST"]),
            Route("/v1/completions", api["completions"], methods=["POST"]),
            Route("/v1/responses", api["responses"], methods=["POST"]),
            Route("/v1/models", pages.list_models),
            Route("/health", pages.health),
            Route("/load_model", pages.load_model, methods=["POST"]),
            Route("/reset", pages.reset, methods=["POST"]),
            Route("/metrics", pages.prometheus),
            Route("/onlinespec", pages.page),
            Route("/onlinespec.json", pages.numbers),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refusal},
        lifespan=lifespan,
    )
    app.state.metrics, app.state.saver = metrics, saver
    return app


def _route(endpoint: str, handler: Handler, metrics: ServerMetrics) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        request_id = request.headers.get(X_REQUEST_ID, "")
        if not re.fullmatch(r"[\w.-]{1,128}", request_id, re.ASCII):
            request_id = str(uuid.uuid4())
        asked: Asked | None = None
        try:
            # Null is what was not given, as in OpenAI's API.
            body = {name: value for name, value in (await _body(request)).items() if value is not None}
            body.setdefault("stream", False)  # as OpenAI's API; transformers streams responses by default
            for name, (kind, words) in FOUND_OUT_LATE.items():
                if not isinstance(body.get(name), kind | None):
                    raise RequestError(400, f"{name}: expected {words}.")
            asked = Asked(endpoint, client_of(request.headers.get("authorization")), _seed(body), _adapter(body))
            ASKED.set(asked)
            response = await _unless_hung_up(request, handler.handle_request(body, request_id))
        except RequestError as error:
            metrics.refused(endpoint)
            response = _error(error.status, error.message)
        except HTTPException as error:
            metrics.refused(endpoint)
            response = _error(error.status_code, str(error.detail))
        except Exception as error:
            if asked is not None and asked.answered:
                _log(error)
                response = _error(500, f"The answer cannot be read ({type(error).__name__}: {error}).")
            else:
                # Nothing was generated: what a handler raises here, it raises at the body.
                metrics.refused(endpoint)
                response = _error(400, _why(error))
        response.headers[X_REQUEST_ID] = request_id
        return response

    return route


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page from elsewhere may send unasked is no JSON
        raise RequestError(415, "Expected JSON, with the header Content-Type: application/json.")
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise RequestError(413, f"The body has more than {MOST_BYTES // 2**20} MiB.")
    content = b"".join(parts)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is no JSON: {error}.") from error
    if b"\\ud" in content.lower():  # one half of a character alone is JSON, and nothing that could be read or sent back
        try:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                400, "The body has one half of a surrogate pair alone, which is no character."
            ) from error
    if not isinstance(body, dict):
        raise RequestError(400, f"The body is a JSON {type(body).__name__}: expected an object.")
    return body


def _seed(body: dict[str, Any]) -> int | None:
    """Takes the seed out of a request: set before its turn, it would be another request's."""
    seed = body.pop("seed", None)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise RequestError(400, "seed: expected a whole number of 64 bits.")
    return seed


def _adapter(body: dict[str, Any]) -> str | None:
    """Takes the adapter's name out of a request: transformers' handlers know no such parameter."""
    name = body.pop("adapter", None)
    if name is None or name == AUTO or is_name(name):
        adapter: str | None = name
        return adapter
    raise RequestError(
        400, "adapter: expected a name of at most 64 small letters, digits, '.', '_' and '-', or \"auto\"."
    )


async def _unless_hung_up(request: Request, answer: Awaitable[Response]) -> Response:
    """Waits for an answer, and cancels it when the client is gone; a response that streams looks after itself."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=HANG_UP_S))[0]:
            if await request.is_disconnected():
                task.cancel()
                return Response(status_code=499)  # nobody reads it
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        raise


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"The request lacks {error}."
    return f"The request cannot be read ({type(error).__name__}: {error})."


def _error(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    message = message.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be sent
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _log(error: Exception) -> None:
    """Where a fault was raised; its text may be a request's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s in %s, line %d", type(error).__name__, last.filename, last.lineno)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


class _NoTracebacks:
    """Keeps what a fault raises out of the log: its text may be a request's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            _log(error)
            if not begun:
                await _error(500, f"A fault of the server ({type(error).__name__}).")(scope, receive, send)
