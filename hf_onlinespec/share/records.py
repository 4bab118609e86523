"""Parts of the manifest as dataclasses: read from JSON and checked by the types of their fields, written under the same names.

Keys that this version does not know are kept, so that a draft which a later version saved can be handed on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ArtifactError, brief

MOST = 1e15  # of any number in a record: seconds, tokens, requests
LONGEST_WHERE = 500  # characters of where a record is, in an error: lineages may nest a hundred deep
SIGNED = {"signed": True}  # metadata of a number that may be below 0
J = TypeVar("J", bound="JsonObject")
R = TypeVar("R", bound="Record")


class JsonObject(ABC):
    """What is a JSON object in the manifest."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[J], found: object, where: str) -> J:
        """From JSON; `where` it was found, for the error. Raises ArtifactError."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """The inverse of `from_dict`."""


@dataclass
class Record(JsonObject):
    """A JSON object whose keys are the fields' names. A field with a default may be missing, and is then not written either.

    A field is an int, a float, a str, another JsonObject, `X | None`, or a `tuple[X, ...]` of one of these.
    """

    other: dict[str, object] = field(default_factory=dict, kw_only=True)  # values of unknown keys

    @classmethod
    def from_dict(cls: type[R], found: object, where: str) -> R:
        """Raises ArtifactError where it is no JSON object, a key is missing, or a value is of another type."""
        if not isinstance(found, Mapping):
            raise ArtifactError(f"{where} is {brief(found)}: expected a JSON object.")
        types = _types(cls)
        values: dict[str, Any] = {"other": {name: value for name, value in found.items() if name not in types}}
        for name, part in types.items():
            if name in found:
                values[name] = _value(found[name], part.kind, name, where, part.least)
            elif part.required:
                raise ArtifactError(f"{where} has no {name}: expected {_expected(part.kind)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, object]:
        """The inverse of `from_dict`."""
        found = dict(self.other)
        for name, part in _types(type(self)).items():
            value = getattr(self, name)
            if part.required or value not in (None, ()):
                found[name] = _json_value(value)
        return found


@dataclass(frozen=True)
class _Type:
    """What a field takes."""

    kind: Any  # a type, as annotated
    required: bool  # its key has to be there
    least: float  # of a number


@cache
def _types(record: type[Record]) -> dict[str, _Type]:
    """By the names of a record's fields."""
    hints = get_type_hints(record)
    return {
        part.name: _Type(hints[part.name], part.default is MISSING, -MOST if part.metadata == SIGNED else 0)
        for part in fields(record)
        if part.name != "other"
    }


def _value(found: object, kind: Any, name: str, where: str, least: float) -> object:
    """What was found, if it is of this type. Raises ArtifactError."""
    if isinstance(kind, UnionType):  # X | None
        return None if found is None else _value(found, get_args(kind)[0], name, where, least)
    if get_origin(kind) is tuple and isinstance(found, list | tuple):
        return tuple(_value(one, get_args(kind)[0], name, where, least) for one in found)
    if isinstance(kind, type) and issubclass(kind, JsonObject):
        return kind.from_dict(found, where if len(where) > LONGEST_WHERE else f"{where}: {name}")
    if kind is str and isinstance(found, str):
        return found
    # Neither is a bool taken for a number, nor a float for an int.
    if kind in (int, float) and type(found) in (int, kind) and least <= found <= MOST:  # type: ignore[operator]
        return found
    raise ArtifactError(f"{where} has {name}={brief(found)}: expected {_expected(kind)}.")


def _expected(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    if isinstance(kind, UnionType):
        return " or ".join(map(_expected, get_args(kind)))
    return "a list" if get_origin(kind) is tuple else words.get(kind, "a JSON object")


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(one) for one in value]
    return value.to_dict() if isinstance(value, JsonObject) else value
