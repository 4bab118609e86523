"""What has to be kept so that learning goes on as if it had never stopped: tensors, and values that fit into JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, brief

MOST_COUNT = 2**53  # of anything that is counted: a float holds it exactly


@dataclass(frozen=True)
class State:
    """One part of the state."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, **parts: State) -> State:
        """Parts as one, each under its name."""
        tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
        return cls(tensors, {name: part.values for name, part in parts.items() if part.values})

    def part(self, name: str) -> State:
        """The inverse of `joined` for one name."""
        values = self.values.get(name, {})
        if not isinstance(values, dict):
            raise ArtifactError(f"The saved state of {name!r} is {brief(values)}: expected a JSON object.")
        return State(under(self.tensors, name), values)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A saved tensor, on the device of `like`.

        Raises:
            ArtifactError: there is none, or it has another shape or dtype than `like`.
        """
        found = self.tensors.get(name)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            seen = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ArtifactError(
                f"The saved state has for {name!r}: {seen}, expected {tuple(like.shape)} {like.dtype}. "
                "It belongs to other settings or to another base."
            )
        return found.to(like.device, copy=True)

    def value(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A saved value. Raises ArtifactError where there is none, or of another type."""
        found = self.values.get(name)
        allowed = kind if isinstance(kind, tuple) else (kind,)
        # An int is not taken for a float, nor a bool for an int.
        if not isinstance(found, kind) or (isinstance(found, bool) and bool not in allowed):
            raise ArtifactError(f"The saved state has {name}={brief(found)}: expected {kind}.")
        return found

    def count(self, name: str) -> int:
        """A saved number of something. Raises ArtifactError."""
        found: int = self.value(name, int)
        if not 0 <= found <= MOST_COUNT:
            raise ArtifactError(f"The saved state has {name}={brief(found)}: expected a number of at least 0.")
        return found

    def numbers(self, name: str, n: int | None = None) -> list[float]:
        """A saved list of n finite numbers; None: of any length. Raises ArtifactError."""
        found = self.value(name, list)
        if not are_numbers(found) or (n is not None and len(found) != n):
            raise ArtifactError(f"The saved state has {name}={brief(found)}: expected {n or 'some'} finite numbers.")
        return list(found)


def are_numbers(values: Any, most: float = 1e15) -> bool:
    """Whether this is a list of numbers, none of them larger than `most`."""
    return isinstance(values, list) and all(type(v) in (int, float) and abs(v) <= most for v in values)


def under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `name` and a dot, without it."""
    return {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no later step can change."""
    return {key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
