"""The requests of all endpoints, one after the other: transformers' `GenerateManager`, with every request checked and recorded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from concurrent.futures import TimeoutError
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .._compat.generation import generative
from .._compat.models import max_positions
from .._compat.serving import BaseGenerateManager, Cancelled, GenerateManager, GenerationState
from ..commit.base import Draft
from ..errors import ConfigError, OnlineSpecError
from ..generation.setting import wanted, wanted_adapter
from ..metrics import Counts
from ..verify.checks import check_adapters
from .clients import ClientMemories
from .metrics import DONE, FAILED, SOURCES, STOPPED, ServedRequest, ServerMetrics
from .saving import DraftSaver

logger = logging.getLogger(__name__)

NEW_TOKENS = 1024  # of an answer whose length nobody states; as transformers' handlers have it
LAST_WAIT_S = 10.0  # for the request at hand when the server ends; chosen: longer than a target forward
# What `generate` raises where the request asks for something that cannot be; anything else is a fault of the server.
CALLERS_FAULTS = (OnlineSpecError, ValueError, TypeError, KeyError, NotImplementedError)


class RequestError(Exception):
    """A request that is answered with an error; its text goes to the client alone, never into a log."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Asked:
    """What of a request the handlers of transformers do not hand on."""

    endpoint: str
    client: bytes  # see clients.client_of
    seed: int | None = None
    adapter: str | None = None  # that drafts and learns, by name
    answered: bool = False  # whether it was generated: what a handler raises after that is no fault of the request


ASKED: ContextVar[Asked] = ContextVar("ASKED")  # the request at hand, set by its route


class OneModel(GenerationState):
    """transformers' state of generation, with a manager of ours; the smallest way in that it leaves."""

    def __init__(self, manager: OnlineGenerateManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OnlineGenerateManager:
        return self._manager


class OnlineGenerateManager(BaseGenerateManager):
    """Checks and records requests, and hands them to transformers' manager, whose one thread generates them in their order.

    Args:
        target: with a draft attached.
        draft: what drafts for it.
        saver: None: nothing is saved.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: Draft,
        metrics: ServerMetrics,
        memories: ClientMemories,
        saver: DraftSaver | None = None,
    ) -> None:
        self.target, self.draft, self.metrics, self.memories, self.saver = target, draft, metrics, memories, saver
        self.closed = threading.Event()
        self._inner = GenerateManager()
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
        call = self._call(inputs, gen_config, streams=True)
        try:
            return self._inner.generate_streaming(
                cast(PreTrainedModel, call), processor, inputs, gen_config, request_id, **kwargs
            )
        except Exception:  # such as a tokenizer that cannot decode token by token: it never came to wait
            self.metrics.left()
            raise

    async def generate_non_streaming(  # type: ignore[override]  # the base class says list[int], its managers a tensor
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, Tensor]:
        call = self._call(inputs, gen_config, streams=False)
        answer = asyncio.ensure_future(
            self._inner.generate_non_streaming(cast(PreTrainedModel, call), processor, inputs, gen_config, request_id)
        )
        try:
            # The thread would fail to set the result of what is cancelled.
            found = await asyncio.shield(answer)
        except asyncio.CancelledError:  # the client hung up
            call.stopped.set()
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        ASKED.get().answered = True
        return found

    def stop(self) -> None:
        """Ends the request at hand at its next token, and those that wait; no new one begins."""
        self.closed.set()
        with suppress(TimeoutError):
            self._inner.submit(bool).result(LAST_WAIT_S)  # behind all others
        self._inner.stop()

    def _call(self, inputs: dict[str, Tensor], gen_config: GenerationConfig, streams: bool) -> Call:
        if ASKED.get().adapter is not None:
            gen_config.adapter = ASKED.get().adapter  # type: ignore[attr-defined]
        check(inputs, gen_config, self.target, streams)
        check_adapter(self.draft, gen_config)
        self._numbers += 1
        self.metrics.queued()
        return Call(self, self._numbers, ASKED.get(), inputs["input_ids"].shape[-1], streams)


class Stopped(StoppingCriteria):
    """Ends a request at the next token, once one of the events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self._events = events

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        stops = any(event.is_set() for event in self._events)
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device, dtype=torch.bool)


@dataclass(frozen=True)
class _Before:
    """What the draft had counted when a request began."""

    started_s: float
    requests: int
    rounds: dict[str, int]  # by who drafted


class Call:
    """One request, in the place of the model that transformers' manager would call."""

    def __init__(
        self, manager: OnlineGenerateManager, number: int, asked: Asked, prompt_tokens: int, streams: bool
    ) -> None:
        self.stopped = threading.Event()  # the client of a request that does not stream hung up
        self._manager, self._number, self._asked = manager, number, asked
        self._prompt_tokens, self._streams = prompt_tokens, streams
        self._queued_at = time.perf_counter()

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the target, on the one thread that generates. Raises RequestError."""
        manager, draft = self._manager, self._manager.draft
        before = _Before(time.perf_counter(), draft.metrics.requests, dict(draft.metrics.decisions.rounds))
        status, output = FAILED, None
        fault: Exception | None = None
        manager.metrics.begun()
        try:
            manager.memories.use(self._asked.client)
            if self._asked.seed is not None:
                torch.manual_seed(self._asked.seed)
            if self.stopped.is_set() or manager.closed.is_set():
                raise Cancelled
            kwargs["stopping_criteria"] = StoppingCriteriaList([Stopped(self.stopped, manager.closed)])
            output = generative(manager.target).generate(**kwargs)
            status = STOPPED if self.stopped.is_set() or manager.closed.is_set() else DONE
        except Cancelled as stopped:
            status, fault = STOPPED, stopped
        except Exception as error:
            fault = self._told(error)
        # Only now: what is raised while an error is handled keeps that one, which may quote the request.
        with draft.failures.records.attempt():
            new_tokens = 0 if output is None else output.shape[-1] - self._prompt_tokens
            request = self._served(status, new_tokens, before)
            manager.metrics.ended(request)
            logger.info("%s", request.line())
            if manager.saver is not None:
                manager.saver.request_done()
        if fault is not None:
            try:
                raise fault from None
            finally:
                fault = None  # it holds this frame
        return output

    def _served(self, status: str, new_tokens: int, before: _Before) -> ServedRequest:
        """This request as it is counted, now that it has ended."""
        metrics = self._manager.draft.metrics
        # Calls that our loop does not take leave the draft's counters as they were.
        looped = metrics.requests > before.requests
        counts = metrics.last if looped else Counts(new_tokens=new_tokens)
        rounds = metrics.decisions.rounds
        return ServedRequest(
            number=self._number,
            endpoint=self._asked.endpoint,
            status=status,
            ended_at_s=time.time(),
            prompt_tokens=self._prompt_tokens,
            new_tokens=counts.new_tokens,
            waited_s=before.started_s - self._queued_at,
            wall_time_s=time.perf_counter() - before.started_s,
            update_time_s=counts.update_time_s,
            rounds=counts.rounds,
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            sources={name: max(0, rounds[name] - before.rounds[name]) for name in SOURCES if looped},
        )

    def _told(self, error: Exception) -> RequestError:
        """What the client hears of an error; the log hears where it was raised, and no word of the request."""
        status = 400 if isinstance(error, CALLERS_FAULTS) else 500
        name = type(error).__name__
        last = traceback.extract_tb(error.__traceback__)[-1]
        logger.error("%s: %s in %s, line %d", self._asked.endpoint, name, last.filename, last.lineno)
        if self._streams:
            # transformers logs this text, and puts it into the stream as it is.
            return RequestError(status, f"The request failed ({name}). Send it without stream to see why.")
        return RequestError(status, f"{name}: {error}")


def check_adapter(draft: Draft, gen_config: GenerationConfig) -> None:
    """Refuses an adapter that the draft neither has nor makes. Raises RequestError."""
    name = wanted_adapter(gen_config)
    if isinstance(name, list):
        raise RequestError(400, "adapter: a request has one prompt, and takes one name.")
    try:
        check_adapters(draft, (name,), wanted(gen_config) is not False)
    except ConfigError as error:
        raise RequestError(400, str(error)) from error


def check(inputs: dict[str, Tensor], gen_config: GenerationConfig, target: PreTrainedModel, streams: bool) -> None:
    """Refuses what could not be generated, before it waits for its turn; shortens an answer that would not fit.

    Raises:
        RequestError: the prompt is empty or too long, or a setting is none that `generate` takes.
    """
    prompt_tokens, longest = inputs["input_ids"].shape[-1], max_positions(target.config)
    if prompt_tokens == 0:
        raise RequestError(400, "The prompt has no tokens.")
    if prompt_tokens >= longest:
        raise RequestError(
            400, f"The prompt has {prompt_tokens} tokens: the model takes {longest} together with the answer."
        )
    if gen_config.max_new_tokens is None and gen_config.max_length is None:  # a configuration of the request's own
        gen_config.max_new_tokens = NEW_TOKENS
    most = gen_config.max_new_tokens
    if most is not None:
        if most < 1:
            raise RequestError(400, f"The answer may have {most} tokens (max_tokens): expected at least 1.")
        gen_config.max_new_tokens = min(most, longest - prompt_tokens)
    if streams and gen_config.num_beams not in (None, 1):
        raise RequestError(400, f"num_beams={gen_config.num_beams}: a stream takes 1. Send it without stream.")
    if wanted(gen_config) not in (None, True, False):
        raise RequestError(400, "onlinespec: expected true or false; how this server drafts is not a request's to say.")
    if not gen_config.sequence_bias:  # an empty logit_bias is none
        gen_config.sequence_bias = None
    penalty = gen_config.repetition_penalty
    if penalty is not None and not penalty > 0:
        raise RequestError(
            400, f"repetition_penalty={penalty}: expected more than 0 (frequency_penalty: more than -1)."
        )
    gen_config.return_dict_in_generate = False  # the handlers take tokens
    stop = gen_config.stop_strings
    if stop is not None and not (isinstance(stop, str) or (stop and all(isinstance(one, str) for one in stop))):
        raise RequestError(400, "stop: expected a text or a list of texts.")
    try:
        gen_config.validate()
    except ValueError as error:
        raise RequestError(400, str(error)) from error
