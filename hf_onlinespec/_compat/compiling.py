"""Targets that torch.compile has made programs of: one for each number of tokens that a forward reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from .caches import CACHE
from .modules import modules_of
from .versions import imports_of_others

with imports_of_others():
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

COMPILED = "the target {name} is compiled, once for each shape of its inputs"


def is_compiled(target: nn.Module) -> bool:
    """Whether the target, or a part of it that holds modules, is compiled; a norm alone is made anew in no time."""
    return any(_is_program(module) for module in modules_of(target) if module._modules)


def _is_program(module: nn.Module) -> bool:
    """Whether it was compiled: by `module.compile()`, in the place of its `forward`, or as what holds the original."""
    own = vars(module)
    forward = own.get("forward")
    wrapped = forward is not None and "_torchdynamo_orig_callable" in vars(forward)
    return wrapped or own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]


def compiled_forward(target: PreTrainedModel, cache: Cache, config: GenerationConfig) -> Callable[..., Any] | None:
    """What runs the forwards behind the prompt: the compiled target, or what `generate` compiles for a preallocated cache.

    None: nothing is compiled.
    """
    own = cast(Any, target)  # torch annotates every attribute of a module as a tensor or a module
    if own._valid_auto_compile_criteria({CACHE: cache}, config):
        compiled: Callable[..., Any] = own.get_compiled_call(config.compile_config)
        return compiled
    return target if is_compiled(target) else None
