"""What makes a model compute otherwise than its classes were written: hooks, and functions put in the place of theirs."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .versions import imports_of_others

with imports_of_others():
    from accelerate.hooks import SequentialHook  # type: ignore[import-untyped]
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOK = "_hf_hook"  # where accelerate keeps its hook of a module; what was `forward` before is in `_old_forward` then
# A hook that one of these registers watches, or places weights and inputs.
WATCHING = ("hf_onlinespec", "transformers", "accelerate", "torch")
WITH_CLASSES = (*WATCHING, "peft", "bitsandbytes")  # a function that one of these defines is a class's own
IMPORTED = {*WITH_CLASSES, *sys.stdlib_module_names}  # from where transformers' modules import functions
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")  # of all modules
EMPTY = frozenset(vars(nn.Module()))  # what every module has
MOST_DEPTH, MOST_VALUES = 6, 2048  # of what alterations refer to; a look at so many values takes about 2 ms. Chosen


@dataclass(frozen=True)
class Alterations:
    """What was altered. It holds nothing of a model: weak references, code and numbers alone."""

    # The code of each, or its type: a hook that is registered anew for each request stays the same.
    kinds: tuple[Any, ...]
    # What each of them refers to, such as a vector that is added, or a switch.
    values: tuple[Any, ...]


def alterations(model: PreTrainedModel, modules: Sequence[nn.Module], elsewhere: Sequence[nn.Module]) -> Alterations:
    """What makes this model compute otherwise than transformers' classes.

    Args:
        modules: all modules of it.
        elsewhere: those of them whose classes are not transformers': their values count too.
    """
    found, values = list(_altered(model, modules)), _Values()
    return Alterations(
        tuple(_kind(part) for part, _ in found),
        (*(values.of(whole, MOST_DEPTH) for _, whole in found), *(values.of_module(m, MOST_DEPTH) for m in elsewhere)),
    )


# A function, or an object with a `__call__`; and what it is called through, such as a partial or a bound method.
Altered = tuple[Any, Any]


def _altered(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[Altered]:
    for name in GLOBAL_HOOKS:
        for hook in vars(torch_module)[name].values():
            yield from _foreign(hook, WATCHING)
    for module in modules:
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            yield from _of_module(module)
    for method in (model.prepare_inputs_for_generation, model._update_model_kwargs_for_generation):
        yield from _foreign(method, WITH_CLASSES)
    text = model.config.get_text_config(decoder=True)
    for interfaces in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        function = interfaces.get(vars(text).get("_attn_implementation_internal"))
        if function is not None:
            yield from _foreign(function, WITH_CLASSES)
    classes = dict.fromkeys(type(module) for module in modules)
    for cls in classes:
        for written in (cls.forward, cls.__call__):
            yield from _foreign(written, (*WITH_CLASSES, _root(cls)))
    for name in dict.fromkeys(cls.__module__ for cls in classes):
        if name.startswith("transformers."):
            space = vars(sys.modules[name])
            for key, function in space.items():
                # What torch.compile made is called __compiled_fn_1.
                if type(function) is FunctionType and function.__globals__ is not space and not key.startswith("__"):
                    yield from _foreign(function, IMPORTED)


def _of_module(module: nn.Module) -> Iterator[Altered]:
    own = vars(module)
    for hook in (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values()):
        yield from _foreign(hook, WATCHING)
    placed, forward = own.get(HOOK), own.get("forward")
    if placed is not None:  # what accelerate put in the place of `forward` calls the one that was there
        forward = own.get("_old_forward", forward)
        for part in placed.hooks if isinstance(placed, SequentialHook) else (placed,):
            if not type(part).__module__.startswith("accelerate."):
                yield part, part
    if forward is not None:
        *_, function = _parts(forward, wrapped=False)
        if function is not type(module).forward:
            yield function, forward


def is_foreign(callee: Any) -> bool:
    """Whether somebody else than transformers, torch and their like wrote a part of what a call runs."""
    return any(True for _ in _foreign(callee, WITH_CLASSES))


def _foreign(callee: Any, known: Collection[str]) -> Iterator[Altered]:
    """Of what a call runs, the functions and objects that other packages than the known ones define."""
    for part in _parts(callee):
        if _root(part) not in known or isinstance(part, torch.jit.ScriptFunction):
            yield part, callee


def _parts(callee: Any, wrapped: bool = True) -> Iterator[Any]:
    """The functions that a call runs, as far as its wrappers tell, the innermost one last; of an object with a `__call__`, the object.

    Args:
        wrapped: also what a decorator says it has wrapped: decorators of torch call it (`torch.no_grad`), others may not.
    """
    if inspect.isfunction(callee):
        compiled = vars(callee).get("_torchdynamo_orig_callable")
        inner = vars(callee).get("__wrapped__") if wrapped and compiled is None else compiled
        if compiled is None:
            yield callee
        if inner is not None:
            yield from _parts(inner, wrapped)
    elif isinstance(callee, functools.partial):
        for value in (*callee.args, *callee.keywords.values()) if wrapped else ():
            if callable(value):
                yield from _parts(value)
        yield from _parts(callee.func, wrapped)
    elif inspect.ismethod(callee) or isinstance(callee, staticmethod | classmethod):
        yield from _parts(callee.__func__, wrapped)
    else:
        yield callee


def _root(defined: Any) -> str:
    """The package where a function, a class, or an object's class is defined; functools.wraps does not hide it."""
    if inspect.isfunction(defined):
        name = defined.__globals__.get("__name__")
    else:
        name = defined.__module__ if isinstance(defined, type) else type(defined).__module__
    return str(name).partition(".")[0]


def _kind(part: Any) -> CodeType | weakref.ref[type]:
    return part.__code__ if inspect.isfunction(part) else weakref.ref(type(part))


class _Same:
    """An object that is told from a later one in its place without being held."""

    def __init__(self, value: Any) -> None:
        self._value, self._hash = weakref.ref(value), id(value)

    def __eq__(self, other: object) -> bool:
        value = self._value()
        return value is not None and isinstance(other, _Same) and other._value() is value

    def __hash__(self) -> int:
        return self._hash


class _Values:
    """What functions and objects refer to, in values that can be compared and hold nothing."""

    def __init__(self) -> None:
        self._left = MOST_VALUES

    def of(self, value: Any, depth: int) -> Any:
        """Of anything; what is nested deeper is not looked at."""
        self._left -= 1
        if isinstance(value, str | bytes):
            return hash(value)  # it may be a prompt, which is not to be kept
        if value is None:
            return None
        if isinstance(value, int):  # as a plain number: a class of its own may have no hash
            return int(value)
        if isinstance(value, float | complex):
            return complex(value)
        if isinstance(value, Tensor):
            return _Same(value), None if value.is_inference() else value._version
        if depth <= 0 or self._left <= 0:
            return None
        if isinstance(value, dict):
            return tuple((self.of(key, depth - 1), self.of(item, depth - 1)) for key, item in self._some(value.items()))
        if isinstance(value, list | tuple | set | frozenset):
            return tuple(self.of(item, depth - 1) for item in self._some(value))
        if isinstance(value, functools.partial):
            return self.of((value.func, value.args, value.keywords), depth)
        if inspect.ismethod(value):
            return self.of((value.__func__, value.__self__), depth)
        if inspect.isfunction(value):
            return self._of_function(value, depth)
        if isinstance(value, nn.Module):
            return self.of_module(value, depth)
        if isinstance(value, ModuleType) or _root(value) in WATCHING:
            return None
        if isinstance(value, type):
            return self._of_space(vars(value), depth)
        try:
            own = vars(value)
        except TypeError:  # a number of another library, a lock, whatever has no attributes
            return None
        return self._of_space(vars(type(value)), depth), self.of(own, depth)

    def of_module(self, module: nn.Module, depth: int) -> Any:
        """Of what a module has beside the modules in it: attributes and tensors. Transformers' own have nothing that counts."""
        if _root(module) == "transformers":
            return None
        own = vars(module)
        tensors = [*own["_buffers"].values(), *own["_parameters"].values()]
        return (
            tuple((name, self.of(own[name], depth - 1)) for name in self._some(own) if name not in EMPTY),
            tuple(self.of(tensor, depth - 1) for tensor in self._some(tensors)),
        )

    def _of_function(self, function: FunctionType, depth: int) -> Any:
        if _root(function) in WITH_CLASSES:
            return None
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # empty as yet
                cells.append(None)
        named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
        return function.__code__, self.of((cells, function.__defaults__, function.__kwdefaults__, named), depth)

    def _of_space(self, space: Any, depth: int) -> Any:
        """Of a class: its numbers and texts."""
        plain = {name: value for name, value in space.items() if isinstance(value, bool | int | float | str | Tensor)}
        return self.of({name: value for name, value in plain.items() if not name.startswith("__")}, depth)

    def _some(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in list(values):
            if self._left <= 0:
                return
            yield value
