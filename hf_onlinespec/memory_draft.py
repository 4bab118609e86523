"""MemoryDraft: what drafts without a draft model, and the ground that `OnlineDraft` stands on."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from .config import OnlineSpecConfig
from .errors import ConfigError
from .governor import Governor
from .memory import SuffixMemory
from .metrics import DraftMetrics

if TYPE_CHECKING:
    from .draft import OnlineDraft


class MemoryDraft:
    """What drafts where there is no draft model: the suffix memory, the governor and the counters, from call to call.

    Safe with several threads: `lock` is held for the moments in which the served weights or the counters change.
    """

    def __init__(self, config: OnlineSpecConfig | None = None) -> None:
        self.settings = config if config is not None else OnlineSpecConfig()
        if not isinstance(self.settings, OnlineSpecConfig):
            raise ConfigError(f"config={config!r}: expected an OnlineSpecConfig.")
        size = self.settings.memory_tokens
        self.memory = SuffixMemory(size) if size else None
        self.governor = Governor(self.settings.update_budget, self.settings.replay_passes, self.settings.lookahead)
        self.metrics = DraftMetrics(decisions=self.governor.decisions)
        self.lock = threading.RLock()
        self._warned: set[str] = set()

    @property
    def neural(self) -> OnlineDraft | None:
        """The draft model, if there is one."""
        return None

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The time of one call of `generate`."""
        yield

    def warn_once(self, message: str | None) -> None:
        """Warns the user, of one thing a single time; None: nothing to say."""
        with self.lock:
            if message is None or message in self._warned:
                return
            self._warned.add(message)
        warnings.warn(message, stacklevel=2)

    def check_setting(self, onlinespec: OnlineSpecConfig | bool | None) -> None:
        """Raises ConfigError where an `onlinespec=` argument is none, or asks for other settings than the draft's own."""
        if onlinespec is None or isinstance(onlinespec, bool):
            return
        if not isinstance(onlinespec, OnlineSpecConfig):
            raise ConfigError(f"onlinespec={onlinespec!r}: expected True, False or an OnlineSpecConfig.")
        own = self.settings.to_dict()
        changed = {k: v for k, v in onlinespec.to_dict().items() if v != own[k]}
        if changed:
            raise ConfigError(
                f"This draft already learns with other settings; asked for {changed}. "
                "Pass onlinespec=True to go on with its own, or OnlineDraft(model, config) as assistant_model to start anew."
            )


_memories: weakref.WeakKeyDictionary[nn.Module, MemoryDraft] = weakref.WeakKeyDictionary()


def online_memory(target: PreTrainedModel, config: OnlineSpecConfig | None = None) -> MemoryDraft:
    """What drafts for a target without a draft model: its suffix memory, made at the first call and kept with the target.

    Raises:
        ConfigError: it exists already with other settings.
    """
    if target not in _memories:
        _memories.setdefault(target, MemoryDraft(config))
    memory = _memories[target]
    memory.check_setting(config)
    return memory
