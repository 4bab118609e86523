"""Holds the forwards of a served target, so that a test decides what arrives between two of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from hf_onlinespec.verify.ragged import RaggedVerifier
from hf_onlinespec.verify.target import Verifier
from tests.serving import PATIENCE_S


class Gate:
    """Holds the target's forwards, after the first so many, until its event is set.

    It stands before them and not in a hook: a target with a hook is tried in forwards of its own.

    Args:
        kinds: whose forwards; a target that was not seen before is tried with a `Verifier`, too.
    """

    def __init__(self, opens_after: int = 0, kinds: Sequence[Any] = (Verifier, RaggedVerifier)) -> None:
        self._opened, self._left = threading.Event(), opens_after
        self._verifies = {kind: kind.verify for kind in kinds}

    def _waiting(self, verify: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*args: Any) -> Any:
            if self._left:
                self._left -= 1
            else:
                assert self._opened.wait(PATIENCE_S)
            return verify(*args)

        return waits

    def __enter__(self) -> threading.Event:
        for kind, verify in self._verifies.items():
            kind.verify = self._waiting(verify)
        return self._opened

    def __exit__(self, *args: object) -> None:
        for kind, verify in self._verifies.items():
            kind.verify = verify
        self._opened.set()
