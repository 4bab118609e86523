"""What every kind of draft implements: `Draft` from call to call, and `Proposer` in one call of `generate`."""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .._compat.generation import stateless
from .._compat.hidden_states import Reads
from ..adapt.schedules import Schedule
from ..config import REPORTING, OnlineSpecConfig, ReportTo, as_config
from ..errors import ConfigError
from ..govern.governor import Governor
from ..metrics import Counts, DraftMetrics, RequestReport
from ..metrics.summary import Summary, counted, size
from ..models.retokenizing import Retokenizer
from ..models.source import Source
from ..models.vocabulary import Vocabulary
from ..rounds import Proposal, Rows, Verdict
from ..runtime.failures import Failures
from ..runtime.forks import Lock
from ..runtime.traces import Traces
from ..runtime.warning import warn_or_log
from ..state import State
from .gaps import Gaps
from .guessing import GuessSources
from .recycling import RecyclingTable
from .suffix_memory import SuffixMemory

_requests = logging.getLogger("hf_onlinespec.requests")  # a line for every request, at INFO


@dataclass(frozen=True)
class Call:
    """One call of `generate`, as a draft is told of it."""

    config: GenerationConfig
    processors: LogitsProcessorList  # of the target
    rows: int = 1  # sequences that are generated
    mask: Tensor | None = None  # (batch, prompt) with zeros where the prompt is padded on the left; None: no padding
    learns: bool = True  # False: this request is only drafted, nothing is remembered or learned
    vocabulary: Vocabulary | None = None  # of the target; None: the draft's own
    retokenizer: Retokenizer | None = (
        None  # what the draft reads, and which tokens it may say; None: it has the target's tokenizer
    )
    timed: bool = (
        True  # whether the loop tells times; where it does not, all of the room is drafted, by the model alone
    )
    waits: bool = False  # whether anything is decided by times: only then is an accelerator waited for
    lookahead: int | None = None  # tokens per round, as the user has fixed them; None: the governor decides
    counts: Counts = field(default_factory=Counts)  # of the request
    # Per row the name of the adapter that drafts and learns, or "auto"; None: the one without a name. (): no row has one.
    adapters: tuple[str | None, ...] = ()
    at_once: int | None = None  # rows, at most so many in a round: others begin where some have ended; None: all
    first_row: int = 0  # number of its first row, where rows of several calls are read together
    prompts: Tensor | None = None  # (batch, L) that the rows begin with, padded on the left; None: not told
    placeholders: frozenset[int] = (
        frozenset()
    )  # tokens of the target that stand for a part of a picture, a video or a sound
    gaps: Gaps | None = (
        None  # padding between the tokens of prompts; rows are shown with all of it on the left. None: none
    )
    source: Source | None = None  # what an encoder–decoder target has read for each row; None: it has no encoder

    def stateless_processors(self, row: int = 0) -> LogitsProcessorList:
        """Copies of the processors that are applied to a row of a draft too; to be made before the target's own are called."""
        return stateless(self.processors, row)

    @property
    def sample(self) -> bool:
        return bool(self.config.do_sample)

    @property
    def temperature(self) -> float:
        """That tokens are sampled at; 0: greedy."""
        return float(self.config.temperature or 1.0) if self.sample else 0.0

    @cached_property
    def end_tokens(self) -> set[int]:
        eos = self.config.eos_token_id
        return set(torch.tensor([] if eos is None else eos).view(-1).long().tolist())

    def count_failed_draft(self) -> None:
        """Something that drafts has raised; the call goes on without it."""
        self.counts.failed_drafts += 1

    def padding(self, row: int) -> int:
        """Tokens on the left of a row that are none."""
        return 0 if self.mask is None else int((self.mask[row] == 0).sum())

    def first_fed(self, row: int) -> int:
        """Tokens of a row before the first one that the target may read in this call."""
        return self.padding(row) if self.gaps is None else self.gaps.first_fed[row]

    def shown(self, rows: Rows) -> Rows:
        """Rows as a draft is shown them."""
        return rows if self.gaps is None else self.gaps.shown(rows)


class Proposer(ABC):
    """What a draft is in one call of `generate`: it owns caches, and nothing that outlives the call."""

    schedule: Schedule | None = None  # when the request is learned; None: there is nothing to train
    reads: Reads = ()  # of `Draft.reads`, what is read in this call: all or nothing

    @abstractmethod
    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        """Commits to candidates behind every row, at most `room` that follow each other, and to no more than are expected to pay.

        Whether a token is drafted, and by whom, may depend on the prefix and on q before the draw alone: every token that was drawn
        from q is submitted. That keeps the target's law. A token that was not drawn may be guessed or left out for any reason.

        Args:
            trees: whether several candidates may follow the same prefix; else a chain is asked for.
        """

    @abstractmethod
    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None:
        """Takes what it needs of the target's raw logits (batch, n + 1, vocab) behind the rows and behind each candidate.

        Called before `observe` of the same round; later, processors may have written into them.

        Args:
            features: (batch, fed, width) the hidden states of `reads`, of all that the target was fed in this round: the end of the
                rows, then the candidates; None: none are read, or the target hands out none.
        """

    @abstractmethod
    def observe(self, verdict: Verdict) -> None:
        """Takes in the outcome of a round."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets what it has read: a proposal failed, and caches may hold anything."""

    @abstractmethod
    def leave(self, rows: Rows) -> bool:
        """Rows have ended, of a request that goes on with others: as `finish`, of these alone."""

    @abstractmethod
    def finish(self) -> bool:
        """The end of the request: what was written is remembered.

        Returns:
            Whether it is long since the draft's acceptance was seen: if nothing is learned of the request, it should be scored.
        """


class Draft(ABC):
    """What drafts, from call to call: the settings, the suffix memory, the governor and the counters.

    Safe with several threads: `lock` is held for the moments in which the served weights or the counters change.

    Attributes:
        reads: what the draft reads inside of its target; (): nothing.
        adapters: names of the adapters that it has beside the one without a name; None: it has none, and makes none.
        exit_layers: of the target's own layers how many draft; None: none do.
    """

    reads: Reads = ()
    exit_layers: int | None = None
    adapters: Collection[str] | None = None

    def __init__(self, config: OnlineSpecConfig | dict[str, Any] | None = None, **settings: Any) -> None:
        self.settings = as_config(config, **settings) or OnlineSpecConfig()
        size = self.settings.memory_tokens
        self.memory = SuffixMemory(size) if size else None
        self.recycled = RecyclingTable() if self.settings.recycle else None
        self.governor = self._new_governor()
        self.metrics = DraftMetrics(decisions=self.governor.decisions)
        self.failures = Failures()
        self.lock = Lock(order=1)
        self._warned: set[str] = set()
        self._traces = Traces()
        if self.settings.traces:
            self._traces.open(self.settings)
        weakref.finalize(self, self._traces.close)

    def summary(self) -> Summary:
        """What it is and what it did, in lines with units; `metrics.summary()` and `metrics.decisions` say more."""
        metrics = self.metrics
        rows = [("settings", repr(self.settings))]
        if metrics.requests:
            served = f"{counted(metrics.requests, 'request')}, {counted(metrics.new_tokens, 'token')}"
            rows.append(("served", f"{served}: {metrics.acceptance_length:.2f} tokens per target forward"))
            learning = (
                f" ({metrics.decode_tokens_per_s:.1f} with the learning time left out)" if metrics.updates else ""
            )
            rows.append(("speed", f"{metrics.tokens_per_s:.1f} tokens/s{learning}"))
        rows += [*self._rows(), ("drafting", metrics.decisions.drafting), ("learning", metrics.decisions.learning)]
        return Summary(self._title(), tuple(rows), metrics.to_dict())

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    @abstractmethod
    def _title(self) -> str:
        """The first line of `summary`."""

    @abstractmethod
    def _rows(self) -> list[tuple[str, str]]:
        """What a summary says of this kind of draft alone."""

    def _memory_row(self) -> tuple[str, str]:
        memory = f"{counted(self.settings.memory_tokens, 'token')} at most, {size(self.metrics.memory_bytes)} now"
        return "suffix memory", memory

    def _new_governor(self) -> Governor:
        return Governor(self.settings.update_budget, self.settings.replay_passes, self.settings.lookahead)

    @property
    @abstractmethod
    def model(self) -> PeftModel | None:
        """The model that drafts; None: the suffix memory drafts alone."""

    def guess_sources(self, call: Call) -> GuessSources:
        """Where guesses come from in one call."""
        size = min(call.config.max_length + 1, self.settings.memory_tokens)
        padding = [call.padding(row) for row in range(call.rows)]
        governor, vocabulary = self.governor, call.vocabulary
        return GuessSources(
            self.memory,
            self.recycled if call.lookahead is None and call.timed else None,  # a number asks for chains of the draft's
            self.failures.memory,
            call.counts,
            self.lock,
            governor.acceptances,
            governor.guesses,
            size,
            padding,
            None if vocabulary is None else vocabulary.size,
            [] if call.source is None else [call.source.text(row) for row in range(call.rows)],
        )

    @property
    @abstractmethod
    def generation_config(self) -> GenerationConfig | None:
        """Of the model that drafts: transformers takes `num_assistant_tokens` from it. None: there is no model."""

    @abstractmethod
    def proposer(self, call: Call) -> Proposer:
        """What drafts in one call of `generate`."""

    @abstractmethod
    def state(self) -> State:
        """What it needs to go on as if it had never stopped, in a copy; no text of a request is in it."""

    @abstractmethod
    def resume(self, state: State) -> None:
        """The inverse of `state`, for a new draft of the same kind and settings. Raises ArtifactError."""

    @abstractmethod
    def generating(self) -> AbstractContextManager[None]:
        """The time of one call of `generate`."""

    @abstractmethod
    def serves(self, target: PreTrainedModel, own_tokens: bool = True) -> None:
        """Takes note of a target that it drafts for, at every call of `generate`.

        Args:
            own_tokens: whether both have one tokenizer: what the draft learns from can be read by the target, too.
        """

    @abstractmethod
    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        """Begins anew, with a warning, where the model that it was made from has other weights or layers by now."""

    def report_to(
        self,
        report_to: ReportTo,
        logging_dir: str | PathLike[str] | None = None,
        project: str = "huggingface",
        run_name: str | None = None,
    ) -> None:
        """Reports every request from now on, in place of where `OnlineSpecConfig(report_to=...)` said; arguments as there.

        Raises:
            ConfigError: a name that does not exist, or a folder that cannot be written.
            MissingExtraError: a package is missing.
        """
        folder = None if logging_dir is None else str(logging_dir)
        settings = replace(self.settings, report_to=report_to, logging_dir=folder, project=project, run_name=run_name)
        self._traces.open(settings)
        self.settings = settings

    def report(self, call: Counts) -> None:
        """Reports a call of `generate` that the metrics have taken in: to the log, and to the traces. No text of it."""
        if _requests.isEnabledFor(logging.INFO):
            _requests.info("request %d: %s", self.metrics.requests, call.line())
        if self._traces:
            with self.lock:
                report = RequestReport.of(self.metrics, call)
            self._count_reports(self._traces.flush(report))

    def _count_reports(self, failed: int) -> None:
        with self.lock:
            self.metrics.failed_reports += failed

    def warn_once(self, message: str | None) -> None:
        """Warns the user, of one thing a single time; None: nothing to say. Where warnings are errors, it is logged."""
        with self.lock:
            if message is None or message in self._warned:
                return
            self._warned.add(message)
        warn_or_log(message, stacklevel=3)

    def check_setting(self, onlinespec: OnlineSpecConfig | dict[str, Any] | bool | None) -> None:
        """Raises ConfigError where an `onlinespec=` argument is none, or asks for other settings than the draft's own."""
        if isinstance(onlinespec, dict):
            onlinespec = as_config(onlinespec)
        if onlinespec is None or isinstance(onlinespec, bool):
            return
        if not isinstance(onlinespec, OnlineSpecConfig):
            raise ConfigError(f"onlinespec={onlinespec!r}: expected True, False or an OnlineSpecConfig.")
        own, asked = vars(self.settings), vars(onlinespec)
        changed = {k: v for k, v in asked.items() if v != own[k]}
        if changed and changed.keys() <= set(REPORTING):
            raise ConfigError(
                f"This draft reports to {self.settings.traces or 'nothing'}; asked for {changed}. "
                "Pass onlinespec=True to go on, or call its report_to(...) to report elsewhere."
            )
        if changed and self.model is None:
            raise ConfigError(
                f"The memory that is kept with this target has other settings; asked for {changed}. "
                "Pass onlinespec=True to go on with it, or begin anew with online_memory(target, config, anew=True)."
            )
        if changed:
            raise ConfigError(
                f"This draft already learns with other settings; asked for {changed}. "
                "Leave the settings out to go on with its own, or pass OnlineDraft(model, config) as the draft to start anew."
            )


_latest: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Draft]] = weakref.WeakKeyDictionary()


def note_latest(target: PreTrainedModel, draft: Draft) -> None:
    """Notes, weakly, what drafts for a target now."""
    _latest[target] = weakref.ref(draft)


def latest_draft(target: nn.Module) -> Draft | None:
    """What drafted in the latest call of `generate` on a target; None: there was no such call, or the draft is gone."""
    noted = _latest.get(target)
    return None if noted is None else noted()
