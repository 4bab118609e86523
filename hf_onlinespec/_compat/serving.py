"""What we use of transformers' serving code. It needs the packages of `hf_onlinespec[serve]`. Checked on transformers 5.23.0 and 5.24.0."""

from __future__ import annotations

from contextlib import suppress

from ..errors import VersionError

try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import (
        X_REQUEST_ID,
        BaseGenerateManager,
        BaseHandler,
        DirectStreamer,
        GenerateManager,
        GenerationState,
        _StreamError,
    )
    from transformers.cli.serving.utils import (
        _GenerationCancelled as Cancelled,
    )
except ImportError as error:
    raise VersionError(
        f"{error}. hf-onlinespec serve was run on transformers 5.23 and 5.24 with fastapi, uvicorn, openai and "
        'prometheus_client: pip install "hf_onlinespec[serve]".'
    ) from error

__all__ = [
    "X_REQUEST_ID",
    "BaseGenerateManager",
    "BaseHandler",
    "Cancelled",
    "ChatCompletionHandler",
    "CompletionHandler",
    "GenerateManager",
    "GenerationState",
    "ModelManager",
    "ResponseHandler",
    "TimedModel",
    "end_stream",
]


def end_stream(streamer: DirectStreamer, error: Exception) -> None:
    """Ends a stream before its time: with the text of an error, or without a word where its client is gone."""
    last = None if isinstance(error, Cancelled) else _StreamError(str(error))
    with suppress(RuntimeError):  # the server has ended, and its event loop is closed
        streamer._loop.call_soon_threadsafe(streamer._queue.put_nowait, last)
