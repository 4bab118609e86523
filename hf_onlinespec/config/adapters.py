"""Names of adapters, as `generate(adapter=...)` takes them: one for all rows, or one for each."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError, brief

# They become names of folders, also where a system does not tell capital letters from small ones.
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
# Of one draft. Chosen: one that is away keeps up to 13 MB of requests in the process, with the default replay.
MOST_ADAPTERS = 256
AUTO = "auto"  # no name: the prompt says which adapter serves it
Asked = str | list[str | None] | None  # one for all rows; or per row; None: the adapter without a name


def is_name(value: object) -> bool:
    """Whether an adapter may be called that."""
    return isinstance(value, str) and value != AUTO and NAME.fullmatch(value) is not None


def checked_adapter(value: Any) -> Asked:
    """`adapter=` as a name, or as a list of them. Raises ConfigError."""
    if isinstance(value, list | tuple):
        return [_checked(one) for one in value]
    return _checked(value)


def _checked(value: Any) -> str | None:
    if value is None or value == AUTO or is_name(value):
        found: str | None = value
        return found
    raise ConfigError(
        f"adapter={brief(value)}: expected a name of at most 64 small letters, digits, '.', '_' and '-' that begins and ends with a "
        "letter or a digit, 'auto', or a list of one of them, or None, per row."
    )


def adapters_of_rows(value: Any, rows: int, copies: int = 1) -> tuple[str | None, ...]:
    """Per row the adapter that a call asks for; (): it asks for none.

    Args:
        rows: that are generated.
        copies: of each prompt among them, see `num_return_sequences`; a list may name one adapter for each prompt.

    Raises:
        ConfigError: a name is none, or a list has another length.
    """
    asked = checked_adapter(value)
    if asked is None:
        return ()
    if isinstance(asked, str):
        return (asked,) * rows
    if len(asked) * copies == rows:
        asked = [name for name in asked for _ in range(copies)]
    if len(asked) != rows:
        raise ConfigError(
            f"adapter={brief(value)} has {len(asked)} names for a batch of {rows // copies}: expected one per prompt."
        )
    return tuple(asked) if any(asked) else ()
