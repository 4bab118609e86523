"""Where requests and gradient steps are reported: TensorBoard, Trackio, a file of JSON lines, or an object of the user's.

Nothing that a trace does reaches a call of `generate`: what it raises is counted and logged, and the trace is left out for a number
of requests that doubles, see failures.py.
"""

from __future__ import annotations

import json
import os
import socket
from abc import abstractmethod
from collections import deque
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import OnlineSpecConfig
from ..errors import ConfigError
from ..metrics import RequestReport, Trace, UpdateReport
from .failures import Backoff
from .forks import Lock, renew_in_child

JSONL = "onlinespec.jsonl"
MOST_WAITING = 4096  # gradient steps that wait for a report; chosen: more than any request takes


class Traces:
    """What one draft reports to. Without traces it does nothing."""

    def __init__(self) -> None:
        self._traces: list[tuple[Trace, Backoff]] = []
        self._updates: deque[UpdateReport] = deque(maxlen=MOST_WAITING)
        # Taken before all other locks: a trace of the user's may save the draft.
        self._lock = Lock(order=-1)

    def open(self, settings: OnlineSpecConfig) -> None:
        """Reports where these settings say, and no longer where earlier ones said. Raises ConfigError where a folder cannot be written."""
        writes = {"tensorboard", "jsonl"} & {one for one in settings.traces if isinstance(one, str)}
        folder = _folder(settings) if writes else Path()
        made = [_made(one, settings, folder) for one in settings.traces]
        with self._lock:
            self._close()
            self._traces = [(trace, Backoff(f"Reporting to {name}", "answers do not need it")) for name, trace in made]

    def __bool__(self) -> bool:
        return bool(self._traces)

    def update(self, report: UpdateReport) -> None:
        """Notes a gradient step. It is handed on with the next request: the time of a trace is none of learning's."""
        if self._traces:
            self._updates.append(report)

    def flush(self, request: RequestReport | None = None) -> int:
        """Hands on the gradient steps that wait, then a request. Returns how many traces failed."""
        failed = 0
        with self._lock:
            updates = []
            while self._updates:
                updates.append(self._updates.popleft())
            for trace, backoff in self._traces:
                if not (backoff.begin() if request is not None else not backoff.paused):
                    continue
                before = backoff.failures
                with backoff.attempt():
                    for update in updates:
                        trace.on_update(update)
                    if request is not None:
                        trace.on_request(request)
                    backoff.worked()
                failed += backoff.failures - before
        return failed

    def close(self) -> None:
        """Writes what is left."""
        with self._lock:
            self._close()
            self._traces = []

    def _close(self) -> None:
        for trace, backoff in self._traces:
            if isinstance(trace, Writer):
                with backoff.attempt():
                    trace.close()


class Writer(Trace):
    """A trace of ours: it begins with the first report, in a forked child anew."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left; a report after that begins anew."""

    @abstractmethod
    def renew(self) -> None:
        """In a forked child, which has none of the parent's threads."""


class JsonLines(Writer):
    """One JSON object a line, appended to `onlinespec.jsonl`: {"event": "request" | "update", ...}.

    A line is written at once, so that several processes may append to one file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JSONL

    def on_request(self, report: RequestReport) -> None:
        self._write({"event": "request"} | asdict(report))

    def on_update(self, report: UpdateReport) -> None:
        self._write({"event": "update"} | asdict(report))

    def _write(self, values: dict[str, Any]) -> None:
        values["time"] = datetime.now().astimezone().isoformat(timespec="milliseconds")
        with self._path.open("ab", buffering=0) as file:
            file.write((json.dumps(values, ensure_ascii=False) + "\n").encode())

    def close(self) -> None: ...

    def renew(self) -> None: ...


class TensorBoard(Writer):
    """Scalars by request and by gradient step; the governor's decisions as text, whenever they change."""

    def __init__(self, folder: Path, settings: OnlineSpecConfig) -> None:
        self._folder, self._settings = folder, settings
        self._writer: Any = None
        self._said: dict[str, str] = {}
        renew_in_child(self)

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder))
            self._writer.add_text("settings", f"```\n{self._settings.to_json()}\n```")
        return self._writer

    def on_request(self, report: RequestReport) -> None:
        writer = self._open()
        for name, value in scalars(report).items():
            writer.add_scalar(name, value, report.request)
        for name, text in texts(report).items():
            if self._said.get(name) != text:
                self._said[name] = text
                writer.add_text(name, text, report.request)
        writer.flush()

    def on_update(self, report: UpdateReport) -> None:
        writer = self._open()
        for name, value in update_scalars(report).items():
            writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self.renew()

    def renew(self) -> None:
        self._writer, self._said = None, {}


class Trackio(Writer):
    """The same for Trackio, in its local database; nothing is sent anywhere unless Trackio's own environment variables say so."""

    def __init__(self, settings: OnlineSpecConfig) -> None:
        self._settings = settings
        self._run: Any = None
        renew_in_child(self)

    def _open(self) -> Any:
        if self._run is None:
            import trackio

            config = self._settings.to_dict()
            name = self._settings.run_name
            self._run = trackio.init(self._settings.project, name=name, config=config, resume="allow")
        return self._run

    def on_request(self, report: RequestReport) -> None:
        self._open().log(scalars(report) | texts(report), step=report.request)

    def on_update(self, report: UpdateReport) -> None:
        self._open().log(update_scalars(report), step=report.step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self.renew()

    def renew(self) -> None:
        self._run = None


def scalars(report: RequestReport) -> dict[str, float]:
    """The numbers of a request by the names that dashboards show."""
    found: dict[str, float] = {
        "request/acceptance_length": report.acceptance_length,
        "request/acceptance_rate": report.acceptance_rate,
        "request/tokens_per_s": report.tokens_per_s,
        "request/decode_tokens_per_s": report.decode_tokens_per_s,
        "request/update_share": report.update_share,
        "request/wall_time_s": report.wall_time_s,
        "request/new_tokens": report.new_tokens,
        "request/updates": report.updates,
        "request/verified_per_kept": report.verified_per_kept,
    }
    if report.loss is not None:
        found["request/loss"] = report.loss
    rounds = max(report.rounds, 1)
    found |= {f"rounds_share/{source}": n / rounds for source, n in report.sources.items()}
    found |= {f"kept/{source}": n for source, n in report.kept.items()}
    if len(report.expert_weights) > 1:
        *experts, base = report.expert_weights
        found |= {f"expert_weights/{i}": weight for i, weight in enumerate(experts)}
        found["expert_weights/base"] = base
    return found


def texts(report: RequestReport) -> dict[str, str]:
    """What was decided, in words."""
    return {"decisions/drafting": report.drafting, "decisions/learning": report.learning}


def update_scalars(report: UpdateReport) -> dict[str, float]:
    return {f"update/loss_{report.kind}": report.loss, "update/time_s": report.time_s}


def _made(wanted: str | Trace, settings: OnlineSpecConfig, folder: Path) -> tuple[str, Trace]:
    """The name of a trace in messages, and the trace."""
    if isinstance(wanted, Trace):
        return type(wanted).__name__, wanted
    if wanted == "trackio":
        return wanted, Trackio(settings)
    return wanted, TensorBoard(folder, settings) if wanted == "tensorboard" else JsonLines(folder)


def _folder(settings: OnlineSpecConfig) -> Path:
    """The folder to write into; made now, so that a name that cannot be one is refused before any work."""
    named = settings.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
    # As torch's SummaryWriter and transformers' Trainer name it.
    default = Path("runs", f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}")
    folder = Path(named).expanduser() if named else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it may not be written")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"logging_dir={str(folder)!r} cannot be used ({error}). Name a folder that can be written."
        ) from error
    return folder
