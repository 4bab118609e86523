"""The requests of all endpoints: transformers' manager of generation, with every request checked, and several decoded together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import TimeoutError
from contextlib import suppress
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .._compat.serving import BaseGenerateManager, GenerateManager, GenerationState
from ..commit.base import Draft
from .calls import ASKED, ServedCall, Serving
from .checks import check, check_adapter
from .clients import ClientMemories
from .metrics import ServerMetrics
from .saving import DraftSaver
from .turns import Turns

LAST_WAIT_S = 10.0  # for the requests at hand when the server ends; chosen: longer than a target forward


class OneModel(GenerationState):
    """transformers' state of generation, with a manager of ours; the smallest way in that it leaves."""

    def __init__(self, manager: OnlineGenerateManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OnlineGenerateManager:
        return self._manager


class OnlineGenerateManager(BaseGenerateManager):
    """Checks requests, and generates them in the one thread of transformers' manager, see `Turns`.

    Args:
        target: with a draft attached.
        draft: what drafts for it.
        batch: requests that are decoded together.
        saver: None: nothing is saved.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: Draft,
        metrics: ServerMetrics,
        memories: ClientMemories,
        batch: int,
        saver: DraftSaver | None = None,
    ) -> None:
        self._inner = GenerateManager()
        self._serving = Serving(target, draft, metrics, memories, saver, threading.Event())
        self._turns = Turns(self._serving, batch, self._inner.submit)
        self._numbers = 0

    def generate_streaming(  # type: ignore[override]  # transformers 5.24 has arguments that 5.23 has not
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
        **kwargs: Any,
    ) -> Any:
        arrival = _Arrival(self._turns, self._serving, self._checked(inputs, gen_config, streams=True))
        try:
            return self._inner.generate_streaming(
                cast(PreTrainedModel, arrival), processor, inputs, gen_config, request_id, **kwargs
            )
        except Exception:  # such as a tokenizer that cannot decode token by token: it never came to wait
            self._serving.metrics.left()
            raise

    async def generate_non_streaming(  # type: ignore[override]  # the base class says list[int], its managers a tensor
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, Tensor]:
        arrival = _Arrival(self._turns, self._serving, self._checked(inputs, gen_config, streams=False))
        call = arrival.call(inputs | {"generation_config": gen_config, "tokenizer": processor})
        answer = asyncio.wrap_future(call.tokens)
        self._inner.submit(self._turns.arrived, call)
        try:
            # The thread would fail to set the result of what is cancelled.
            tokens = await asyncio.shield(answer)
        except asyncio.CancelledError:  # the client hung up
            call.stopped.set()
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        call.asked.answered = True
        prompt = inputs["input_ids"].shape[-1]
        new = tokens[0, prompt:]
        return processor.decode(new, skip_special_tokens=True), prompt, new

    def stop(self) -> None:
        """Ends the requests at hand at their next token, and those that wait; no new one begins."""
        self._serving.closed.set()
        with suppress(TimeoutError):
            self._inner.submit(self._turns.finish).result(LAST_WAIT_S)
        self._inner.stop()

    def _checked(self, inputs: dict[str, Tensor], gen_config: GenerationConfig, streams: bool) -> int:
        """The number of a request that may wait for its turn. Raises RequestError."""
        if ASKED.get().adapter is not None:
            gen_config.adapter = ASKED.get().adapter  # type: ignore[attr-defined]
        check(inputs, gen_config, self._serving.target, streams)
        check_adapter(self._serving.draft, gen_config)
        self._numbers += 1
        self._serving.metrics.queued()
        return self._numbers


class _Arrival:
    """A request that is about to wait; in the place of the model that transformers' manager would call for a stream."""

    def __init__(self, turns: Turns, serving: Serving, number: int) -> None:
        self._turns, self._serving, self._number, self._asked = turns, serving, number, ASKED.get()

    def call(self, arguments: dict[str, Any]) -> ServedCall:
        return ServedCall(self._serving, self._number, self._asked, arguments)

    def generate(self, **arguments: Any) -> None:
        """Called in the thread that generates: the request waits for its turn there, and its streamer hears of it."""
        self._turns.arrived(self.call(arguments))
