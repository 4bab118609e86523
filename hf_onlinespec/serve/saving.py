"""Saves the draft every so many requests, and when the server ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ..draft import OnlineDraft
from ..errors import OnlineSpecError
from .metrics import ServerMetrics

logger = logging.getLogger(__name__)


class DraftSaver:
    """Writes a draft to a folder. A save that fails is logged and counted, and costs no request.

    Args:
        every: requests between two saves; 0: only at the end.
    """

    def __init__(self, draft: OnlineDraft, folder: Path, every: int, metrics: ServerMetrics) -> None:
        self._draft, self.folder, self._every, self._metrics = draft, folder, every, metrics
        metrics.saves = True
        self.worked = False  # whether the last save, when the server ended, worked
        self._since = 0  # requests since the last save
        self._saves = threading.Lock()
        self._thread: threading.Thread | None = None

    def request_done(self) -> None:
        """Counts a request; when enough have come together, saves in a thread that no request waits for."""
        self._since += 1
        if not self._every or self._since < self._every or (self._thread is not None and self._thread.is_alive()):
            return
        self._since = 0
        self._thread = threading.Thread(target=self.save, name="hf_onlinespec saving", daemon=True)
        self._thread.start()

    def save(self) -> bool:
        """Saves the draft as it is now, without examining what it learned from; whether that worked."""
        # The examination of `save_pretrained` may take twenty seconds of the processor, which requests want.
        return self._attempt(lambda: self._draft.save_unexamined(self.folder))

    def close(self) -> None:
        """The last save: at once, and again with what `save_pretrained` examines."""
        logger.info("Saving the draft in %s …", self.folder)  # it may take some 20 s
        if self._thread is not None:
            self._thread.join()
        self.worked = self.save()  # whoever is killed during the examination has lost nothing
        if self.worked and (self._draft.steps or len(self._draft.adapters)):
            self._attempt(lambda: self._draft.save_pretrained(self.folder))

    def _attempt(self, write: Callable[[], None]) -> bool:
        with self._saves:
            try:
                write()
            except (OnlineSpecError, OSError) as error:
                logger.error("The draft was not saved: %s", error)
                self._metrics.saved(worked=False)
                return False
            self._metrics.saved(worked=True)
            return True
