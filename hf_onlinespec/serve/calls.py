"""One request from its arrival to its end: how it is generated, what its client hears, and what is counted of it."""

from __future__ import annotations

import copy
import logging
import threading
import time
import traceback
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .._compat.generation import generative
from .._compat.serving import Cancelled, end_stream
from ..commit.base import Draft
from ..errors import OnlineSpecError
from ..generation.setting import unset, wanted
from ..metrics import Counts
from ..verify.custom_generate import Prepare, PreparedCall
from ..verify.running_calls import check_joins
from .checks import RequestError
from .clients import ClientMemories
from .metrics import DONE, FAILED, STOPPED, ServedRequest, ServerMetrics
from .saving import DraftSaver

logger = logging.getLogger(__name__)

# What `generate` raises where the request asks for something that cannot be; anything else is a fault of the server.
CALLERS_FAULTS = (OnlineSpecError, ValueError, TypeError, KeyError, NotImplementedError)


@dataclass
class Asked:
    """What of a request the handlers of transformers do not hand on."""

    endpoint: str
    client: bytes  # see clients.client_of
    seed: int | None = None
    adapter: str | None = None  # that drafts and learns, by name
    answered: bool = False  # whether it was generated: what a handler raises after that is no fault of the request


ASKED: ContextVar[Asked] = ContextVar("ASKED")  # the request at hand, set by its route


@dataclass(frozen=True)
class Serving:
    """What all requests of a server have in common.

    Args:
        target: with a draft attached.
        draft: what drafts for it.
        saver: None: nothing is saved.
        closed: set when the server ends.
    """

    target: PreTrainedModel
    draft: Draft
    metrics: ServerMetrics
    memories: ClientMemories
    saver: DraftSaver | None
    closed: threading.Event


class Stopped(StoppingCriteria):
    """Ends a request at the next token, once one of the events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self._events = events

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        stops = any(event.is_set() for event in self._events)
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device, dtype=torch.bool)


class ServedCall:
    """One request.

    Args:
        arguments: of `generate`.

    Attributes:
        stopped: set when the client of a request that does not stream has hung up.
        tokens: (1, L) with the prompt, once they are known.
    """

    def __init__(self, serving: Serving, number: int, asked: Asked, arguments: dict[str, Any]) -> None:
        self.asked, self.stopped, self.tokens = asked, threading.Event(), Future[Tensor]()
        self._serving, self._number = serving, number
        criteria = StoppingCriteriaList([Stopped(self.stopped, serving.closed)])
        self._arguments = arguments | {"stopping_criteria": criteria}
        self._prompt_tokens = arguments["input_ids"].shape[-1]
        self._queued_at = time.perf_counter()
        self._began_at = 0.0

    @property
    def streamer(self) -> Any:
        """Shown the tokens of an answer that is streamed; None: it is not."""
        return self._arguments.get("streamer")

    @property
    def is_stopped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.stopped.is_set() or self._serving.closed.is_set()

    @cached_property
    def joining(self) -> PreparedCall | None:
        """What is decoded beside other requests; None: it is decoded alone."""
        arguments, target = dict(self._arguments), self._serving.target
        config: GenerationConfig = copy.deepcopy(arguments["generation_config"])
        if wanted(config) != wanted(target.generation_config):  # it says itself how it drafts, or that nothing does
            return None
        unset(config)
        config.adapter = None  # type: ignore[attr-defined]
        arguments.pop("streamer", None)
        prepare = Prepare(arguments.pop("tokenizer"))
        stop = config.stop_strings
        config.stop_strings = None  # its criterion is made where the tokenizer is
        try:
            generative(target).generate(
                **arguments | {"generation_config": config, "custom_generate": prepare, "stop_strings": stop}
            )
            assert prepare.call is not None
            check_joins(prepare.call, self._serving.draft)
        except Exception:  # decoded alone, it says why it cannot be
            return None
        if self.asked.seed is not None and prepare.call.config.do_sample:
            return None  # its draws are to be its own
        return prepare.call

    def begin(self) -> None:
        """Its turn has come."""
        self._began_at = time.perf_counter()
        self._serving.metrics.begun()

    def run_alone(self) -> None:
        """Its turn has come, and nobody else's: from beginning to end, by `generate` of the target."""
        serving, metrics = self._serving, self._serving.draft.metrics
        before, output = metrics.requests, None
        error: Exception | None = None
        self.begin()
        try:
            if self.is_stopped:
                raise Cancelled
            serving.memories.use(self.asked.client)
            if self.asked.seed is not None:
                torch.manual_seed(self.asked.seed)
            output = generative(serving.target).generate(**self._arguments)
        except Exception as raised:
            error = raised
        counts = Counts()
        if metrics.requests > before:  # calls that our loop does not take leave the draft's counters as they were
            counts = metrics.last
        elif output is not None:
            counts.new_tokens = output.shape[-1] - self._prompt_tokens
        self.end(output, error, counts, time.perf_counter() - self._began_at)

    def end(self, output: Tensor | None, error: Exception | None, counts: Counts, generate_s: float) -> None:
        """It is over: its client hears so, and it is counted.

        Args:
            output: (1, L) with the prompt.
            error: why there is none, or no more of it; None: it is whole.
            generate_s: its share of the time that was spent on generating.
        """
        status = STOPPED if self.is_stopped else DONE
        if error is not None:
            status = STOPPED if isinstance(error, Cancelled) else FAILED
            error = error if isinstance(error, Cancelled) else self._told(error)
        serving = self._serving
        with serving.draft.failures.records.attempt():
            request = self._served(status, counts, generate_s)
            serving.metrics.ended(request)
            logger.info("%s", request.line())
            if serving.saver is not None:
                serving.saver.request_done()
        if error is not None:
            if self.streamer is not None:
                end_stream(self.streamer, error)
            self.tokens.set_exception(error)
        elif output is not None:
            self.tokens.set_result(output)

    def _served(self, status: str, counts: Counts, generate_s: float) -> ServedRequest:
        return ServedRequest(
            number=self._number,
            endpoint=self.asked.endpoint,
            status=status,
            ended_at_s=time.time(),
            prompt_tokens=self._prompt_tokens,
            new_tokens=counts.new_tokens,
            waited_s=self._began_at - self._queued_at,
            wall_time_s=time.perf_counter() - self._began_at,
            generate_s=generate_s,
            update_time_s=counts.update_time_s,
            rounds=counts.rounds,
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            sources=counts.sources,
        )

    def _told(self, error: Exception) -> RequestError:
        """What the client hears of an error; the log hears where it was raised, and no word of the request."""
        status = 400 if isinstance(error, CALLERS_FAULTS) else 500
        name = type(error).__name__
        last = traceback.extract_tb(error.__traceback__)[-1]
        logger.error("%s: %s in %s, line %d", self.asked.endpoint, name, last.filename, last.lineno)
        if self.streamer is not None:
            # It is put into the stream as it is.
            return RequestError(status, f"The request failed ({name}). Send it without stream to see why.")
        return RequestError(status, f"{name}: {error}")
