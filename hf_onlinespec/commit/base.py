"""Draft: what every kind of draft has from call to call, and what each of them has to say for itself."""

from __future__ import annotations

import logging
import warnings
import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..config import REPORTING, OnlineSpecConfig, ReportTo, as_config
from ..errors import ConfigError
from ..govern.governor import Governor
from ..metrics import Counts, DraftMetrics, RequestReport
from ..metrics.summary import Summary, counted, size
from ..runtime.failures import Failures
from ..runtime.forks import Lock
from ..runtime.traces import Traces
from .suffix_memory import SuffixMemory

_requests = logging.getLogger("hf_onlinespec.requests")  # a line for every request, at INFO


class Draft(ABC):
    """What drafts, from call to call: the settings, the suffix memory, the governor and the counters.

    Safe with several threads: `lock` is held for the moments in which the served weights or the counters change.
    """

    def __init__(self, config: OnlineSpecConfig | dict[str, Any] | None = None, **settings: Any) -> None:
        self.settings = as_config(config, **settings) or OnlineSpecConfig()
        size = self.settings.memory_tokens
        self.memory = SuffixMemory(size) if size else None
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

    @abstractmethod
    def generating(self) -> AbstractContextManager[None]:
        """The time of one call of `generate`."""

    @abstractmethod
    def serves(self, target: PreTrainedModel) -> None:
        """Takes note of a target that it drafts for, at every call of `generate`."""

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
        """Warns the user, of one thing a single time; None: nothing to say."""
        with self.lock:
            if message is None or message in self._warned:
                return
            self._warned.add(message)
        warnings.warn(message, stacklevel=2)

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
