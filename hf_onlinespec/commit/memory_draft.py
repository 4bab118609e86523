"""MemoryDraft: what drafts without a draft model; one is kept with each target."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._compat.models import inner_model
from ..config import OnlineSpecConfig, as_config
from ..errors import UnsupportedError
from ..govern.acceptance import RequestStats
from ..govern.governor import NOTHING_LEARNS
from ..govern.planner import NO_MODEL_DRAFTS
from ..state import State
from .base import Call, Draft, Proposer
from .combined import Combined


@final
class MemoryDraft(Draft):
    """What drafts where there is no draft model: the suffix memory alone, from call to call."""

    def __init__(self, config: OnlineSpecConfig | dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        # That is decided before the first request.
        self.metrics.decisions.drafting, self.metrics.decisions.learning = NO_MODEL_DRAFTS, NOTHING_LEARNS

    @property
    def model(self) -> None:
        return None

    @property
    def generation_config(self) -> None:
        return None

    def proposer(self, call: Call) -> Proposer:
        return Combined(self, call, [], self.guess_sources(call), [RequestStats() for _ in range(call.rows)])

    def state(self) -> State:
        with self.lock:
            return State.joined(metrics=self.metrics.state())

    def resume(self, state: State) -> None:
        with self.lock:
            self.metrics.resume(state.part("metrics"))

    def generating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def serves(self, target: PreTrainedModel, own_tokens: bool = True) -> None:
        pass

    def begin_anew_if_changed(self, model: PreTrainedModel | PeftModel | None = None) -> None:
        pass

    def _title(self) -> str:
        return f"{type(self).__name__}: no draft model, the suffix memory drafts"

    def _rows(self) -> list[tuple[str, str]]:
        return [self._memory_row()]


_memories: weakref.WeakKeyDictionary[nn.Module, MemoryDraft] = weakref.WeakKeyDictionary()


def online_memory(
    target: PreTrainedModel | PeftModel,
    config: OnlineSpecConfig | dict[str, Any] | None = None,
    anew: bool = False,
    **settings: Any,
) -> MemoryDraft:
    """What drafts for a target without a draft model: its suffix memory, made at the first call and kept with the target.

    Args:
        target: a model, also inside of a `PeftModel` or as torch.compile returns it: the memory is the same.
        anew: forget what is kept with the target, and begin with this config.

    Raises:
        ConfigError: it exists already with other settings.
    """
    if not isinstance(target, nn.Module):
        raise UnsupportedError(f"target is a {type(target).__name__}: expected a loaded transformers model.")
    config = as_config(config, **settings)
    inner = inner_model(target)
    if anew:
        _memories[inner] = MemoryDraft(config)
    elif inner not in _memories:
        _memories.setdefault(inner, MemoryDraft(config))
    memory = _memories[inner]
    memory.check_setting(config)
    return memory


def kept_memory(target: nn.Module) -> MemoryDraft | None:
    """The memory that is kept with a target, if one was made."""
    return _memories.get(target)


def keep_memory(target: PreTrainedModel, memory: MemoryDraft) -> None:
    """Keeps this memory with a target, in the place of the one that was kept with it."""
    _memories[target] = memory
