"""borrow: a second module tree over the weights of a model that somebody else holds.

The weights are shared and the modules are new. What the user attached to the modules stays with the user's: hooks are not
run by our forwards, and an object that is not a part of a model (a lock, a file, a trainer) is not copied.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .._compat.models import module_state, weight_of

M = TypeVar("M", bound=nn.Module)

# torch's own hooks of these modules compute a weight before the forward (weight_norm, spectral_norm, pruning).
WEIGHT_HOOKS = "torch.nn.utils."


def borrow(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights: same numbers in the same memory, own modules and flags, no hooks.

    A head that is tied to the embedding becomes a parameter of its own (over the same memory), so that both can carry
    an adapter.
    """
    # Quantised weights are Parameter subclasses with state of their own: shared as they are.
    tree = copy_modules(model, {id(p): _frozen(p) if is_plain(p) else p for p in model.parameters()})
    head, embedding = tree.get_output_embeddings(), tree.get_input_embeddings()
    if head is not None and embedding is not None:
        if head.weight is embedding.weight:
            head.weight = _frozen(weight_of(head))
        tree.config.tie_word_embeddings = False  # some configurations (T5) say so whatever their weights are
    return tree.eval()


def copy_modules(model: M, instead: Mapping[int, Tensor | nn.Module]) -> M:
    """A copy of a module tree that shares its parameters and all buffers but those that a forward may write to, without hooks.

    Args:
        instead: by the ids of parameters and modules, what stands in their place in the copy.
    """
    copied: M = _twin(model, dict(instead))
    return copied


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary parameter of floating-point numbers."""
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _frozen(parameter: Tensor) -> nn.Parameter:
    data = parameter.detach()
    # Weights that were made under inference_mode can take no part in autograd: these alone are copied.
    return nn.Parameter(data.clone() if data.is_inference() else data, requires_grad=False)


def _twin(value: Any, twins: dict[int, Any]) -> Any:
    """Our counterpart of anything that a module holds; `twins` maps the ids of what was met before to theirs."""
    if id(value) in twins:
        return twins[id(value)]
    kind = type(value)
    if isinstance(value, nn.Module):
        return _module(value, twins)
    if isinstance(value, PretrainedConfig | GenerationConfig):
        return copy.deepcopy(value, twins)
    if kind in (dict, OrderedDict):
        table = twins[id(value)] = kind()
        table.update((key, _twin(item, twins)) for key, item in value.items())
        return table
    if kind is list:
        items: list[Any] = []
        twins[id(value)] = items
        items.extend(_twin(item, twins) for item in value)
        return items
    if kind is set:
        return set(value)
    if kind is tuple:
        return tuple(_twin(item, twins) for item in value)
    if kind is MethodType and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _twin(value.__self__, twins))
    if kind is functools.partial:
        args = [_twin(item, twins) for item in value.args]
        keywords = {name: _twin(item, twins) for name, item in value.keywords.items()}
        call = functools.partial(_twin(value.func, twins), *args, **keywords)
        vars(call).update({name: _twin(item, twins) for name, item in vars(value).items()})
        return call
    return value  # a buffer, a function, whatever is no part of a module tree


def _module(module: nn.Module, twins: dict[int, Any]) -> nn.Module:
    own: nn.Module = module.__class__.__new__(module.__class__)
    twins[id(module)] = own
    for name, value in module_state(module).items():
        if name == "_buffers":
            vars(own)[name] = {key: _own_buffer(buffer, twins) for key, buffer in value.items()}
        elif "_hooks" in name and isinstance(value, dict):
            vars(own)[name] = type(value)((key, hook) for key, hook in value.items() if _computes_weight(hook))
        else:
            vars(own)[name] = _twin(value, twins)
    return own


def _own_buffer(buffer: Tensor | None, twins: dict[int, Any]) -> Tensor | None:
    """Frequencies of positions (n,) that long RoPE overwrites in every forward, which another thread may be in: its own ones."""
    if buffer is None or buffer.dim() != 1 or not buffer.is_floating_point():
        return buffer
    if id(buffer) not in twins:
        twins[id(buffer)] = buffer.detach().clone()
    own: Tensor = twins[id(buffer)]
    return own


def _computes_weight(hook: Any) -> bool:
    return type(hook).__module__.startswith(WEIGHT_HOOKS)
